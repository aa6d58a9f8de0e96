import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.diagnostics.variance_ratios import Moments, variance_ratio, variance_ratios

quickly = settings(max_examples=25, deadline=None)

seeds = st.integers(0, 2**16)


def rows(seed, count=200, channels=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, generator=generator, dtype=torch.float64)


@quickly
@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_moments_of_parts_add_up_to_the_moments_of_all(seed, first, second):
    a, b = rows(seed, first), rows(seed + 1, second)
    summed, whole = Moments.of(a) + Moments.of(b), Moments.of(torch.cat([a, b]))
    assert summed.rows == whole.rows
    torch.testing.assert_close(summed.total, whole.total)
    torch.testing.assert_close(summed.squares, whole.squares)
    both = Moments.of(b) + Moments.of(a) + Moments.zero(4)
    torch.testing.assert_close(summed.variance, both.variance)


@quickly
@given(seeds)
def test_moments_give_the_mean_and_the_variance(seed):
    values = 3 * rows(seed) + 5
    moments = Moments.of(values)
    torch.testing.assert_close(moments.mean, values.mean(0))
    torch.testing.assert_close(moments.variance, values.var(0, correction=0))


def test_a_constant_channel_does_not_vary():
    assert Moments.of(torch.full((1000, 2), 0.1)).variance.tolist() == [0, 0]


@quickly
@given(seeds)
def test_a_model_keeps_its_own_variance(seed):
    moments = Moments.of(rows(seed))
    ratio = variance_ratio(moments, [moments, moments])
    assert ratio.layer == pytest.approx(1)
    torch.testing.assert_close(ratio.channels, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.3, 1.0])
def test_the_mean_of_two_channels_keeps_half_of_one_plus_their_correlation(correlation):
    white, _ = torch.linalg.qr(torch.cat([torch.ones(500, 1).double(), rows(1, 500, 2)], 1))
    first = white[:, 1:2]
    second = correlation * first + (1 - correlation**2) ** 0.5 * white[:, 2:3]
    ratio = variance_ratio(
        Moments.of((first + second) / 2), [Moments.of(first), Moments.of(second)]
    )
    assert ratio.layer == pytest.approx((1 + correlation) / 2)


def test_the_target_is_the_mean_of_deviations_and_not_of_variances():
    ends = [Moments.of(rows(1, 300, 1)), Moments.of(3 * rows(1, 300, 1))]
    assert variance_ratio(Moments.of(2 * rows(1, 300, 1)), ends).layer == pytest.approx(1)
    weighted = variance_ratio(Moments.of(1.5 * rows(1, 300, 1)), ends, weights=[3, 1])
    assert weighted.layer == pytest.approx(1)


def test_a_layer_counts_its_channels_by_how_much_they_vary():
    client = rows(1) * torch.tensor([1.0, 1.0, 10.0, 0.0])
    fused = client * torch.tensor([0.5, 0.5, 1.0, 0.0])
    ratio = variance_ratio(Moments.of(fused), [Moments.of(client)])
    torch.testing.assert_close(ratio.channels, torch.tensor([0.25, 0.25, 1, 1]).double())
    variance = rows(1).var(0, correction=0)
    scale = torch.tensor([1.0, 1.0, 100.0, 0.0]).double() * variance
    expected = (0.25 * scale[:2].sum() + scale[2]) / scale.sum()
    assert ratio.layer == pytest.approx(float(expected))


def test_a_channel_that_only_the_fused_model_has_is_infinite():
    dead, alive = Moments.of(torch.zeros(5, 1)), Moments.of(rows(1, 5, 1))
    assert variance_ratio(alive, [dead]).layer == float("inf")
    assert variance_ratio(dead, [dead]).layer == 1


def test_layers_are_compared_by_name():
    a, b = Moments.of(rows(1)), Moments.of(rows(2))
    found = variance_ratios({"x": a, "y": b}, [{"x": a, "y": b}, {"x": a, "y": b}])
    assert {name: ratio.layer for name, ratio in found.items()} == pytest.approx({"x": 1, "y": 1})


@pytest.mark.parametrize(
    ("fused", "clients", "weights", "message"),
    [
        (4, [4], [1, 1], "give each a weight"),
        (4, [], None, "give each a weight"),
        (4, [4], [0], "not all of them zero"),
        (3, [4], None, "compare the same layer"),
    ],
)
def test_what_cannot_be_compared_is_refused(fused, clients, weights, message):
    moments = [Moments.of(rows(1, 5, channels)) for channels in clients]
    with pytest.raises(ValueError, match=message):
        variance_ratio(Moments.of(rows(1, 5, fused)), moments, weights)


def test_moments_of_other_layers_are_not_added():
    with pytest.raises(ValueError, match="same layer"):
        Moments.zero(2) + Moments.zero(3)


def test_no_rows_have_no_mean():
    with pytest.raises(ValueError, match="no rows"):
        _ = Moments.zero(2).variance
