import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.diagnostics.barrier import (
    Barriers,
    Path,
    accuracy_barrier,
    along,
    area,
    barriers,
    grid,
    linear_barrier,
    mean_barrier,
    midpoint_gap,
)
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.symmetry.transform import random
from fedbasin.strategies.tensors.state import interpolate
from tests.strategies.diagnostics.models import SITES, examples, learnt, mlp, on

quickly = settings(max_examples=25, deadline=None)

THIRDS = (0.0, 0.5, 1.0)
losses = st.floats(-1e3, 1e3)


@st.composite
def curves(draw):
    inner = sorted(draw(st.sets(st.integers(1, 999), max_size=8)))
    points = (0.0, *(thousandths / 1000 for thousandths in inner), 1.0)
    return points, tuple(draw(losses) for _ in points)


@st.composite
def paths(draw):
    examples = draw(st.integers(0, 1000))
    counts = st.integers(0, examples).map(float)
    loss, correct = (tuple(draw(s) for _ in THIRDS) for s in (losses, counts))
    return Path(THIRDS, loss, correct, float(examples))


def close(a, b):
    return a == pytest.approx(b, abs=1e-9, rel=1e-9)


def test_the_barrier_is_the_largest_rise_above_the_chord():
    points = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert linear_barrier(points, (1.0, 1.0, 4.0, 4.0, 3.0)) == 2.0
    assert midpoint_gap(points, (1.0, 1.0, 4.0, 4.0, 3.0)) == 2.0
    assert area(points, (1.0, 1.0, 4.0, 4.0, 3.0)) == pytest.approx((-0.5 + 2 + 1.5) / 4)


def test_unequal_ends_are_judged_by_the_chord_and_not_by_their_mean():
    # The rise above the mean of the ends would be 1.5 at t = 1, where there is no barrier at all.
    assert linear_barrier(THIRDS, (0.0, 1.5, 3.0)) == 0.0


@quickly
@given(curves())
def test_the_barrier_is_never_negative(curve):
    assert linear_barrier(*curve) >= 0
    assert accuracy_barrier(*curve) >= 0


@quickly
@given(curves(), losses, losses)
def test_adding_a_line_changes_nothing(curve, a, b):
    points, values = curve
    lifted = [v + a + b * t for t, v in zip(points, values, strict=True)]
    assert close(linear_barrier(points, lifted), linear_barrier(points, values))
    assert close(area(points, lifted), area(points, values))


@quickly
@given(curves())
def test_walking_backwards_changes_nothing(curve):
    points, values = curve
    back = [1 - t for t in reversed(points)]
    assert close(linear_barrier(back, values[::-1]), linear_barrier(points, values))


@quickly
@given(curves())
def test_accuracies_fall_as_losses_rise(curve):
    points, values = curve
    assert accuracy_barrier(points, [-v for v in values]) == linear_barrier(points, values)


@quickly
@given(losses, losses)
def test_a_line_has_no_barrier_no_gap_and_no_area(a, b):
    points = tuple(i / 10 for i in range(11))
    line = [a + b * t for t in points]
    assert close(linear_barrier(points, line), 0)
    assert close(midpoint_gap(points, line), 0)
    assert close(area(points, line), 0)


def test_a_valley_has_a_negative_gap_and_no_barrier():
    assert linear_barrier(THIRDS, (1.0, 0.0, 1.0)) == 0.0
    assert midpoint_gap(THIRDS, (1.0, 0.0, 1.0)) == -1.0
    assert area(THIRDS, (1.0, 0.0, 1.0)) == -0.5


@quickly
@given(paths(), paths(), paths())
def test_paths_are_a_commutative_monoid(a, b, c):
    assert a + b == b + a
    assert a + Path.zero(THIRDS) == a
    left, right = (a + b) + c, a + (b + c)
    assert left.loss == pytest.approx(right.loss, abs=1e-9)
    assert (left.correct, left.examples) == (right.correct, right.examples)


def test_the_mean_of_a_sum_is_weighted_by_examples():
    small = Path(THIRDS, (3.0, 3.0, 3.0), (1.0, 0.0, 1.0), 1.0)
    large = Path(THIRDS, (1.0, 2.0, 1.0), (2.0, 3.0, 0.0), 3.0)
    both = small + large
    assert both.mean_loss == (1.0, 1.25, 1.0)
    assert both.accuracy == (0.75, 0.75, 0.25)


@pytest.mark.parametrize(
    ("points", "curve", "message"),
    [
        ((0.0,), (1.0,), "start at t = 0"),
        ((0.1, 1.0), (1.0, 1.0), "start at t = 0"),
        ((0.0, 0.9), (1.0, 1.0), "end at t = 1"),
        ((0.0, 0.6, 0.4, 1.0), (1.0,) * 4, "do not increase"),
        (THIRDS, (1.0, 1.0), "2 values for 3 points"),
        (THIRDS, (1.0, math.nan, 1.0), "nan at t = 0.5"),
        (THIRDS, (1.0, 1.0, math.inf), "inf at t = 1.0"),
    ],
)
def test_a_curve_that_cannot_be_read_is_refused(points, curve, message):
    with pytest.raises(ValueError, match=message):
        linear_barrier(points, curve)


def test_a_missing_middle_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="odd number"):
        midpoint_gap((0.0, 1 / 3, 2 / 3, 1.0), (1.0,) * 4)


@pytest.mark.parametrize("points", [3, 5, 11, 101])
def test_an_odd_number_of_equal_steps_has_a_middle(points):
    grid = [i / (points - 1) for i in range(points)]
    assert midpoint_gap(grid, [4 * t * (1 - t) for t in grid]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("correct", "examples", "message"),
    [
        ((1.0, 3.0, 1.0), 2.0, "counts, not fractions"),
        ((1.0, -1.0, 1.0), 2.0, "counts, not fractions"),
        ((0.0, 0.0, 0.0), -1.0, "count the examples"),
        ((0.0, 0.0, 0.0), math.nan, "count the examples"),
    ],
)
def test_counts_that_no_data_can_give_are_refused(correct, examples, message):
    with pytest.raises(ValueError, match=message):
        Path(THIRDS, (1.0,) * 3, correct, examples)


def test_paths_with_other_points_are_not_added():
    with pytest.raises(ValueError, match="same number of points"):
        Path.zero(THIRDS) + Path.zero((0.0, 1.0))


def test_a_path_over_no_data_has_no_mean():
    with pytest.raises(ValueError, match="no examples"):
        _ = Path.zero(THIRDS).mean_loss


def test_the_barrier_of_git_re_basin_is_the_rise_above_the_mean_of_the_ends():
    assert mean_barrier(THIRDS, (1.0, 4.0, 2.0)) == 2.5
    # A straight loss between unequal ends has no linear barrier, and half their difference here.
    assert mean_barrier(THIRDS, (0.0, 1.5, 3.0)) == 1.5


@quickly
@given(curves())
def test_the_rise_above_the_mean_is_at_least_half_the_difference_of_the_ends(curve):
    points, values = curve
    assert mean_barrier(points, values) >= abs(values[0] - values[-1]) / 2 - 1e-9


@quickly
@given(curves(), losses)
def test_both_barriers_agree_where_the_ends_are_equal(curve, end):
    points, values = curve
    level = (end, *values[1:-1], end)
    assert close(mean_barrier(points, level), linear_barrier(points, level))


def test_all_barriers_of_a_path_are_per_example():
    path = Path(THIRDS, (2.0, 8.0, 4.0), (2.0, 1.0, 2.0), 2.0)
    assert barriers(path) == Barriers(
        linear=2.5, above_mean=2.5, midpoint=2.5, area=1.25, accuracy=0.5, midpoint_accuracy=-0.5
    )


def test_a_path_without_a_middle_says_so():
    found = barriers(Path.zero((0.0, 0.25, 1.0)) + Path((0.0, 0.25, 1.0), (1.0,) * 3, (1.0,) * 3, 1.0))
    assert found.midpoint is None
    assert found.midpoint_accuracy is None


@pytest.mark.parametrize("points", [0, 1])
def test_a_path_has_at_least_two_points(points):
    with pytest.raises(ValueError, match="at least the two ends"):
        grid(points)


def test_barriers_equal_a_direct_computation_on_the_same_two_models():
    inputs, targets = examples(1)
    a, b = learnt(1), learnt(2)
    direct = []
    for i in range(11):
        t, model = i / 10, mlp()
        model.load_state_dict({name: (1 - t) * a[name] + t * b[name] for name in a})
        with torch.no_grad():
            direct.append(float(cross_entropy(model(inputs), targets)))
    chord = [(1 - i / 10) * direct[0] + i / 10 * direct[-1] for i in range(11)]
    rises = [value - line for value, line in zip(direct, chord, strict=True)]
    found = barriers(along(partial(interpolate, a, b), on(inputs, targets), 11))
    assert found.linear == pytest.approx(max(rises), abs=1e-6)
    assert found.linear > 0.1  # or the example shows nothing
    assert found.above_mean == pytest.approx(max(direct) - (direct[0] + direct[-1]) / 2, abs=1e-6)
    assert found.midpoint == pytest.approx(rises[5], abs=1e-6)
    assert found.area == pytest.approx(sum(rises) / 10, abs=1e-6)


def test_paths_of_clients_add_up_to_the_path_of_their_pooled_data():
    a, b = learnt(1), learnt(2)
    mine, yours = examples(1, 20), examples(2, 50)
    pooled = tuple(torch.cat(parts) for parts in zip(mine, yours, strict=True))
    walk = partial(interpolate, a, b)
    whole, left, right = (along(walk, on(*data), 5) for data in (pooled, mine, yours))
    assert (left + right).loss == pytest.approx(whole.loss, rel=1e-12)
    assert (left + right).correct == whole.correct


def test_a_planted_permutation_has_no_barrier_once_it_is_undone():
    symmetry, anchor = parse(SITES), learnt(1)
    planted = random(symmetry, torch.Generator().manual_seed(0)).act(anchor)
    evaluate = on(*examples(1))
    before = along(partial(interpolate, anchor, planted), evaluate, 11)
    aligned = match_weights(symmetry, anchor, planted).state
    after = along(partial(interpolate, anchor, aligned), evaluate, 11)
    assert barriers(before).linear > 0.1
    assert barriers(after).linear == pytest.approx(0, abs=1e-12)


def test_data_that_changes_along_a_path_is_refused():
    sizes = iter((3.0, 4.0))
    with pytest.raises(ValueError, match="on the same data"):
        along(lambda t: {}, lambda state: (0.0, 0.0, next(sizes)), 2)
