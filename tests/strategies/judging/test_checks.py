"""What no client of the real federation can be made to send, and what an honest one must never be refused for."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.fusion.accumulator import Ridge, fuse
from fedbasin.strategies.fusion.kronecker_precision import MOST_PRODUCTS, Kronecker
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Scalar
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.checks import check_alike, check_examples, check_fit, check_update
from fedbasin.strategies.judging.outcomes import Outcome, Refusal

ANCHOR = {
    "w": torch.zeros(3, 4),
    "b": torch.zeros(3),
    "conv": torch.zeros(3, 2, 2, 2),
    "scale": torch.tensor(1.0),
    "count": torch.tensor(0),
}
ONES = {name: torch.ones_like(tensor) for name, tensor in ANCHOR.items()}
quickly = settings(max_examples=20, deadline=None)


def outcome_of(precisions, blocks=None, parameters=ONES, anchor=ANCHOR):
    try:
        check_update(Update(parameters, 1.0, precisions), anchor, blocks)
    except Refusal as refusal:
        return refusal.outcome
    return Outcome.accepted


def gram(size):
    return Gram(torch.eye(size))


def kronecker(inputs, outputs):
    return Kronecker(torch.eye(inputs)[None], torch.eye(outputs)[None])


@pytest.mark.parametrize(
    ("precisions", "outcome"),
    [
        ({("w",): gram(4)}, "accepted"),
        ({("w", "b"): gram(5)}, "accepted"),
        ({("conv",): gram(8)}, "accepted"),
        ({("conv", "b"): gram(9)}, "accepted"),
        ({("conv",): Diagonal(torch.ones(3, 2, 2, 2))}, "accepted"),
        ({("scale",): Diagonal(torch.tensor(1.0))}, "accepted"),
        ({("w",): Scalar(2.0)}, "accepted"),
        ({("w",): Gram(torch.zeros(4, 4))}, "accepted"),
        ({("w",): kronecker(4, 3)}, "accepted"),
        ({("conv", "b"): kronecker(9, 3)}, "accepted"),
        ({("w",): kronecker(3, 4)}, "wrong_shape"),
        ({("w",): kronecker(4, 3) + kronecker(4, 3)}, "wrong_shape"),
        ({("b",): kronecker(1, 3)}, "unexpected_statistic"),
        ({("w",): kronecker(4, 3).scaled(-1.0)}, "not_positive"),
        ({("w",): kronecker(4, 3).scaled(float("nan"))}, "non_finite"),
        ({("w",): gram(5)}, "wrong_shape"),
        ({("w",): Gram(torch.ones(16))}, "wrong_shape"),
        ({("w",): Gram(torch.ones(2, 8))}, "wrong_shape"),
        ({("conv",): Diagonal(torch.ones(3, 8))}, "wrong_shape"),
        ({("b",): gram(3)}, "unexpected_statistic"),
        ({("scale",): gram(1)}, "unexpected_statistic"),
        ({(): gram(4)}, "unexpected_statistic"),
        ({("count",): Diagonal(torch.tensor(1.0))}, "unexpected_statistic"),
        ({("b", "w"): gram(5)}, "unexpected_statistic"),
        ({("b", "b"): gram(5)}, "unexpected_statistic"),
        ({("w", "scale"): gram(5)}, "unexpected_statistic"),
        ({("w", "b", "b"): gram(5)}, "unexpected_statistic"),
        ({("w", "b"): Diagonal(torch.ones(3, 5))}, "unexpected_statistic"),
        ({("w",): gram(4), ("w", "b"): gram(5)}, "unexpected_statistic"),
        ({("nowhere",): gram(4)}, "unexpected_statistic"),
    ],
)
def test_a_statistic_must_speak_of_tensors_that_can_be_joined(precisions, outcome):
    assert outcome_of(precisions) is Outcome[outcome]


def test_known_blocks_are_owed_exactly():
    blocks = [("w", "b"), ("conv",)]
    assert outcome_of({("w", "b"): gram(5), ("conv",): gram(8)}, blocks) is Outcome.accepted
    assert outcome_of({("w", "b"): gram(5)}, blocks) is Outcome.missing_statistic
    assert outcome_of({}, blocks) is Outcome.missing_statistic
    three = {("w", "b"): gram(5), ("conv",): gram(8), ("scale",): Diagonal(torch.tensor(1.0))}
    assert outcome_of(three, blocks) is Outcome.unexpected_statistic
    assert outcome_of({}, ()) is Outcome.accepted


def test_counters_may_stay_at_home():
    floats = {name: tensor for name, tensor in ONES.items() if name != "count"}
    assert outcome_of({}, parameters=floats) is Outcome.accepted
    assert outcome_of({}, parameters={"w": ONES["w"]}) is Outcome.missing_tensor


def test_a_long_list_of_names_is_cut():
    with pytest.raises(Refusal, match="b, conv, scale and 1 more") as refused:
        check_update(Update({}, 1.0), ANCHOR)
    assert refused.value.outcome is Outcome.missing_tensor


def test_large_numbers_whose_sum_overflows_are_finite():
    large = {**ONES, "w": torch.full((3, 4), 3e38)}
    assert outcome_of({}, parameters=large) is Outcome.accepted
    assert torch.isfinite(fuse(ANCHOR, [Update(large, 2.0**53)] * 2)["w"]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_every_precision_is_looked_at(dtype, bad):
    anchor = {"w": torch.zeros(1000).to(dtype)}
    spoiled = anchor["w"].clone()
    spoiled[777] = bad
    check_update(Update(anchor, 1.0), anchor)
    with pytest.raises(Refusal, match="w") as refused:
        check_update(Update({"w": spoiled}, 1.0), anchor)
    assert refused.value.outcome is Outcome.non_finite


@pytest.mark.parametrize("examples", [1e-9, 1, 2**53])
def test_a_weight_above_zero_is_one(examples):
    check_examples(examples)


@quickly
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 300), inputs=st.integers(1, 80), spread=st.floats(0, 4))
def test_no_gram_of_real_rows_is_refused_after_rounding_to_single(seed, rows, inputs, spread):
    draw = torch.Generator().manual_seed(seed)
    # Inputs of very different size, and fewer rows than inputs: as ill-conditioned as data gets.
    scale = 10 ** (spread * torch.rand(inputs, dtype=torch.float64, generator=draw))
    data = torch.randn(rows, inputs, dtype=torch.float64, generator=draw) * scale
    sent = (data.T @ data).float().double()
    anchor = {"w": torch.zeros(2, inputs)}
    update = Update({"w": torch.ones(2, inputs)}, 1.0, {("w",): Gram(sent)})
    check_update(update, anchor)
    assert fuse(anchor, [update], Ridge(1e-3))["w"].isfinite().all()


@quickly
@given(seed=st.integers(0, 2**32 - 1), inputs=st.integers(2, 60), depth=st.floats(-9, 1))
def test_a_gram_that_passes_never_makes_the_regularised_sum_singular(seed, inputs, depth):
    draw = torch.Generator().manual_seed(seed)
    data = torch.randn(5, inputs, dtype=torch.float64, generator=draw)
    data[:, 0] *= 1000
    matrix = data.T @ data
    direction = torch.randn(inputs, dtype=torch.float64, generator=draw)
    direction /= direction.norm()
    matrix -= 10**depth * matrix.diagonal().mean() * torch.outer(direction, direction)
    anchor = {"w": torch.zeros(2, inputs)}
    update = Update({"w": torch.ones(2, inputs)}, 1.0, {("w",): Gram(matrix)})
    fate = outcome_of(update.precisions, parameters=update.parameters, anchor=anchor)
    if fate is not Outcome.accepted:
        assert fate is Outcome.not_positive
        return
    assert fuse(anchor, [update], Ridge(1e-3))["w"].isfinite().all()


SQUARE = {name: torch.zeros(3, 4) for name in "qkv"}


class TestWhatLayersHaveInCommon:
    def sums(self, *groups):
        grams = [(gram(4), group) for group in groups]
        return {(name,): (one, torch.zeros(3, 4)) for one, group in grams for name in group}

    def update(self, *groups):
        grams = {block: one for block, (one, _) in self.sums(*groups).items()}
        return Update(SQUARE, 1.0, grams)

    @pytest.mark.parametrize("groups", [("qkv",), ("q", "k", "v"), ("qk", "v"), ("qv", "k")])
    def test_may_be_another_for_every_client_since_sums_of_both_are_right(self, groups):
        check_alike(self.update(*groups), {})
        check_alike(self.update(*groups), self.sums("q", "kv"))

    def test_is_looked_at_for_each_ones_shape(self):
        shared = gram(4)
        update = Update({"w": ONES["w"]}, 1.0, {("w",): shared, ("w2",): shared})
        anchor = {"w": torch.zeros(3, 4), "w2": torch.zeros(3, 5)}
        with pytest.raises(Refusal) as refused:
            check_update(replace(update, parameters=anchor), anchor)
        assert refused.value.outcome is Outcome.wrong_shape

    def test_is_looked_at_once_for_what_it_promises(self):
        bad = Gram(-torch.eye(4))
        update = Update(SQUARE, 1.0, {("q",): bad, ("k",): bad})
        with pytest.raises(Refusal) as refused:
            check_update(update, SQUARE)
        assert refused.value.outcome is Outcome.not_positive


def test_a_fit_without_its_moment_is_refused():
    with pytest.raises(Refusal) as refused:
        check_fit(Update({}, 1.0, {("w",): gram(4)}), ANCHOR, [("w",)], {})
    assert refused.value.outcome is Outcome.missing_statistic


def test_clients_beyond_the_kronecker_factors_that_a_round_keeps_are_refused():
    def kept(products):
        factors = Kronecker(torch.eye(4).expand(products, 4, 4), torch.eye(3).expand(products, 3, 3))
        return {("w",): (factors, torch.zeros(3, 4))}

    update = Update(ONES, 1.0, {("w",): kronecker(4, 3)})
    check_alike(update, kept(MOST_PRODUCTS - 1))
    with pytest.raises(Refusal, match=f"{MOST_PRODUCTS} clients' Kronecker factors") as refused:
        check_alike(update, kept(MOST_PRODUCTS))
    assert refused.value.outcome is Outcome.too_many
