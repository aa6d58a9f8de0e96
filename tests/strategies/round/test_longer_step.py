"""Longer steps: what clients' losses have to say before a round goes beyond the mean."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto.report import PathSums, Step
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.choice import is_more_than_chance
from fedbasin.strategies.round.longer_step import best_step, lengthen
from fedbasin.strategies.round.path_ends import path_ends
from fedbasin.strategies.tensors.state import continued
from tests.strategies.round.test_round import result_of

SEARCH = RECIPES["auto"].step
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
NODES = [1, 2, 3, 4]


def path(*losses, examples=100.0, correct=True):
    zeros = (0.0,) * len(losses)
    sums = tuple(loss * examples for loss in losses)
    return PathSums(POINTS[: len(losses)], (), sums, (), zeros if correct else (), examples, 1)


def state(value):
    return {"0.weight": torch.full((2,), value), "0.running_var": torch.full((2,), 1.0 + value), "n": torch.tensor(3)}


def drive(answers, before=None):
    """Return the end of a search whose stages get these answers, and what each of them asked."""
    steps = lengthen(state(1.0), result_of(state(2.0), NODES), before or {}, SEARCH)
    asked = []
    try:
        plan = next(steps)
        while True:
            stage = plan.make()
            asked.append((stage.request.stage, stage.request.refit.path, bool(plan.carries)))
            paths = tuple(answers[len(asked) - 1])
            plan = steps.send(replace(result_of(state(2.0), NODES), paths=paths))
    except StopIteration as end:
        return (*end.value, asked)


def test_without_an_earlier_move_one_line_from_the_global_model_is_asked_for():
    model, step, asked = drive([[path(3.0, 2.0, 1.0, 0.5, 0.7)] * 4])
    assert [(stage, spec.mix, spec.extrapolate) for stage, spec, _ in asked] == [("beyond", 0.0, 2.0)]
    assert step == Step(0.0, 1.5, 0.5, 1.0, 400.0)
    assert model["0.weight"].tolist() == [2.5, 2.5]
    # What is measured or counted is the mean's.
    assert model["0.running_var"].tolist() == [3.0, 3.0]
    assert int(model["n"]) == 3


def test_a_shorter_step_is_never_taken():
    model, step, _ = drive([[path(0.1, 0.2, 1.0, 2.0, 3.0)] * 4])
    assert (step.momentum, step.length) == (0.0, 1.0)
    assert torch.equal(model["0.weight"], state(2.0)["0.weight"])


def test_the_last_rounds_move_is_added_and_what_follows_goes_beyond_it():
    first, along, beyond = path(3, 2, 1.0, 1.1, 1.2), path(1.0, 0.9, 0.6, 0.7, 0.8), path(3, 1, 0.6, 0.3, 0.5)
    model, step, asked = drive([[first] * 4, [along] * 4, [beyond] * 4], before=state(-1.0))
    assert [(spec.mix, spec.extrapolate) for _, spec, _ in asked] == [(0.0, 2.0), (1.0, 0.0), (0.5, 2.0)]
    # Clients have the second line's models when they evaluate the third.
    assert [carries for *_, carries in asked] == [True, True, False]
    assert step == Step(0.5, 1.5, 0.3, 1.0, 400.0)
    assert model["0.weight"].tolist() == [1 + 1.5 * (2 + 0.5 * 2 - 1)] * 2


def test_where_the_move_does_not_help_the_first_line_decides():
    first, along = path(3, 2, 1.0, 0.4, 0.2), path(1.0, 1.1, 1.2, 1.3, 1.4)
    _, step, asked = drive([[first] * 4, [along] * 4], before=state(-1.0))
    assert (len(asked), step.momentum, step.length, step.loss) == (2, 0.0, 2.0, 0.2)


def test_without_examples_that_nobody_trains_on_there_is_no_step():
    model, step, asked = drive([[path(0.0, 0.0, 0.0, 0.0, 0.0, examples=0.0)] * 4], before=state(-1.0))
    assert (step, len(asked)) == (Step(), 1)
    assert torch.equal(model["0.weight"], state(2.0)["0.weight"])


def test_where_nobody_judges_the_second_line_the_step_is_the_whole_one():
    first, along = path(3, 2, 1.0, 0.9, 0.8), path(1.0, 0.9, 0.6, 0.7, 0.8)
    silent = path(0.0, 0.0, 0.0, 0.0, 0.0, examples=0.0)
    model, step, _ = drive([[first] * 4, [along] * 4, [silent] * 4], before=state(-1.0))
    assert (step.momentum, step.length) == (0.5, 1.0)
    assert model["0.weight"].tolist() == [2 + 0.5 * 2] * 2


def test_what_one_client_claims_moves_nothing():
    honest, liar = path(1.0, 1.1, 1.2, 1.3, 1.4), path(1e9, 1.0, 1.0, 0.0, 0.0, examples=1e6)
    assert best_step([honest, honest, honest, liar], 0) == 0


curves = st.lists(st.floats(0.01, 10.0), min_size=5, max_size=5)


@given(st.lists(st.tuples(curves, st.integers(0, 50)), min_size=1, max_size=8), st.integers(0, 4))
def test_a_step_lowers_the_loss_of_all_and_is_no_worse_for_half(clients, shortest):
    paths = [path(*losses, examples=float(count)) for losses, count in clients]
    chosen = best_step(paths, shortest)
    judges = [p for p in paths if p.examples]
    if not judges:
        assert chosen == shortest
        return
    assert chosen >= shortest
    if chosen > shortest:
        gains = [p.loss_after[shortest] - p.loss_after[chosen] for p in judges]
        assert sum(gains) > 1 - 1e-6
        assert 2 * sum(gain >= 0 for gain in gains) >= len(judges)


@given(st.floats(0.0, 10.0), st.floats(0.0, 10.0), st.floats(1.0, 1e4), st.booleans())
def test_a_loss_that_is_not_lower_is_no_gain_and_more_examples_make_one(loss, reference, examples, in_nats):
    better = is_more_than_chance(loss, reference, examples, in_nats=in_nats)
    assert not better or loss < reference
    assert is_more_than_chance(loss, reference, 2 * examples, in_nats=in_nats) >= better


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 10.0), st.floats(1e-3, 10.0))
def test_the_unit_of_a_squared_error_decides_nothing(unit, loss, reference):
    one = is_more_than_chance(loss, reference, 100.0, in_nats=False)
    ratio = abs(loss / reference - 1)
    # Equal up to rounding at the threshold itself.
    assert is_more_than_chance(unit * loss, unit * reference, 100.0, in_nats=False) == one or ratio < 0.03


def test_a_path_of_the_chosen_length_ends_in_the_model():
    model, step, asked = drive([[path(3, 2, 1.0, 0.4, 0.2)] * 4])
    spec = replace(asked[0][1], extrapolate=step.length)
    assert torch.equal(path_ends(spec, state(1.0), state(2.0), state(2.0))[1]["0.weight"], model["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_going_on_keeps_the_number_format_and_masks(dtype):
    mask = torch.tensor([0.0, float("-inf")], dtype=dtype)
    moved = continued({"w": mask + 1}, {"w": mask}, {"w": mask - 1})
    assert moved["w"].dtype == dtype
    assert moved["w"].tolist() == [2.0, float("-inf")]
