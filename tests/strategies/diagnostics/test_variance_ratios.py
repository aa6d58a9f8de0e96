import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.diagnostics.variance_ratios import PreactivationMoments, variance_ratio, variance_ratios

quickly = settings(max_examples=25, deadline=None)

seeds = st.integers(0, 2**16)


def rows(seed, count=200, channels=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, generator=generator, dtype=torch.float64)


@quickly
@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_moments_of_parts_add_up_to_the_moments_of_all(seed, first, second):
    a, b = rows(seed, first), rows(seed + 1, second)
    summed, whole = (
        PreactivationMoments.of(a) + PreactivationMoments.of(b),
        PreactivationMoments.of(torch.cat([a, b])),
    )
    assert summed.rows == whole.rows
    torch.testing.assert_close(summed.total, whole.total)
    torch.testing.assert_close(summed.squares, whole.squares)
    both = PreactivationMoments.of(b) + PreactivationMoments.of(a) + PreactivationMoments.zero(4)
    torch.testing.assert_close(summed.variance, both.variance)


@quickly
@given(seeds)
def test_moments_give_the_mean_and_the_variance(seed):
    values = 3 * rows(seed) + 5
    moments = PreactivationMoments.of(values)
    torch.testing.assert_close(moments.mean, values.mean(0))
    torch.testing.assert_close(moments.variance, values.var(0, correction=0))


def test_a_constant_channel_does_not_vary():
    assert PreactivationMoments.of(torch.full((1000, 2), 0.1)).variance.tolist() == [0, 0]


@quickly
@given(seeds)
def test_a_model_keeps_its_own_variance(seed):
    moments = PreactivationMoments.of(rows(seed))
    ratio = variance_ratio(moments, [moments, moments])
    assert ratio.layer == pytest.approx(1)
    torch.testing.assert_close(ratio.channels, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.3, 1.0])
def test_the_mean_of_two_channels_keeps_half_of_one_plus_their_correlation(correlation):
    white, _ = torch.linalg.qr(torch.cat([torch.ones(500, 1).double(), rows(1, 500, 2)], 1))
    first = white[:, 1:2]
    second = correlation * first + (1 - correlation**2) ** 0.5 * white[:, 2:3]
    ratio = variance_ratio(
        PreactivationMoments.of((first + second) / 2), [PreactivationMoments.of(first), PreactivationMoments.of(second)]
    )
    assert ratio.layer == pytest.approx((1 + correlation) / 2)


def test_the_target_is_the_mean_of_deviations_and_not_of_variances():
    ends = [PreactivationMoments.of(rows(1, 300, 1)), PreactivationMoments.of(3 * rows(1, 300, 1))]
    assert variance_ratio(PreactivationMoments.of(2 * rows(1, 300, 1)), ends).layer == pytest.approx(1)
    weighted = variance_ratio(PreactivationMoments.of(1.5 * rows(1, 300, 1)), ends, weights=[3, 1])
    assert weighted.layer == pytest.approx(1)


def test_a_layer_counts_its_channels_by_how_much_they_vary():
    client = rows(1) * torch.tensor([1.0, 1.0, 10.0, 0.0])
    fused = client * torch.tensor([0.5, 0.5, 1.0, 0.0])
    ratio = variance_ratio(PreactivationMoments.of(fused), [PreactivationMoments.of(client)])
    torch.testing.assert_close(ratio.channels, torch.tensor([0.25, 0.25, 1, 1]).double())
    variance = rows(1).var(0, correction=0)
    scale = torch.tensor([1.0, 1.0, 100.0, 0.0]).double() * variance
    expected = (0.25 * scale[:2].sum() + scale[2]) / scale.sum()
    assert ratio.layer == pytest.approx(float(expected))


def test_a_channel_that_only_the_fused_model_has_is_infinite():
    dead, alive = PreactivationMoments.of(torch.zeros(5, 1)), PreactivationMoments.of(rows(1, 5, 1))
    assert variance_ratio(alive, [dead]).layer == float("inf")
    assert variance_ratio(dead, [dead]).layer == 1


def test_layers_are_compared_by_name():
    a, b = PreactivationMoments.of(rows(1)), PreactivationMoments.of(rows(2))
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
    moments = [PreactivationMoments.of(rows(1, 5, channels)) for channels in clients]
    with pytest.raises(ValueError, match=message):
        variance_ratio(PreactivationMoments.of(rows(1, 5, fused)), moments, weights)


def test_moments_of_other_layers_are_not_added():
    with pytest.raises(ValueError, match="same layer"):
        PreactivationMoments.zero(2) + PreactivationMoments.zero(3)


def test_no_rows_have_no_mean():
    with pytest.raises(ValueError, match="no rows"):
        _ = PreactivationMoments.zero(2).variance
