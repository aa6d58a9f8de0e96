import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import nll_loss

from fedbasin.strategies.diagnostics.ensemble import Ensemble

quickly = settings(max_examples=25, deadline=None)

seeds = st.integers(0, 2**16)
weights = st.floats(0.1, 100)
TARGETS = torch.tensor([0, 2, 1, 1, 0])


def probabilities(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, generator=generator, dtype=torch.float64).softmax(-1).to(dtype)


@quickly
@given(seeds, weights, weights)
def test_ensembles_are_a_commutative_monoid(seed, v, w):
    a, b, c = (Ensemble.of(probabilities(seed + i), x) for i, x in enumerate((v, w, 1.0)))
    torch.testing.assert_close((a + b).total, (b + a).total)
    torch.testing.assert_close(((a + b) + c).probabilities, (a + (b + c)).probabilities)
    torch.testing.assert_close((a + Ensemble.zero(5, 3)).probabilities, a.probabilities)


@quickly
@given(seeds, weights, weights)
def test_an_ensemble_is_the_weighted_mean_of_probabilities(seed, v, w):
    a, b = probabilities(seed), probabilities(seed + 1)
    both = Ensemble.of(a, v) + Ensemble.of(b, w)
    mean = (v * a + w * b) / (v + w)
    torch.testing.assert_close(both.probabilities, mean)
    assert both.loss(TARGETS) == pytest.approx(float(nll_loss(mean.log(), TARGETS)))
    assert both.accuracy(TARGETS) == float((mean.argmax(1) == TARGETS).double().mean())


@quickly
@given(seeds, weights)
def test_an_ensemble_is_never_worse_than_its_models_on_average(seed, w):
    a, b = Ensemble.of(probabilities(seed)), Ensemble.of(probabilities(seed + 1), w)
    mean = (a.loss(TARGETS) + w * b.loss(TARGETS)) / (1 + w)
    assert (a + b).loss(TARGETS) <= mean + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_of_every_precision_are_accepted(dtype):
    assert Ensemble.of(probabilities(1, dtype)).loss(TARGETS) > 0


def test_an_impossible_class_costs_much_and_not_everything():
    sure = torch.tensor([[1.0, 0.0]])
    assert 700 < Ensemble.of(sure).loss(torch.tensor([1])) < 720


@pytest.mark.parametrize("rows", [torch.ones(2, 3), torch.tensor([[1.5, -0.5]]), torch.full((1, 2), torch.nan)])
def test_logits_are_no_probabilities(rows):
    with pytest.raises(ValueError, match="softmax"):
        Ensemble.of(rows)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf")])
def test_a_weight_is_positive(weight):
    with pytest.raises(ValueError, match="positive number"):
        Ensemble.of(probabilities(1), weight)


def test_models_on_other_examples_are_not_added():
    with pytest.raises(ValueError, match="same examples"):
        Ensemble.of(probabilities(1)) + Ensemble.zero(4, 3)


def test_an_ensemble_of_nothing_says_nothing():
    with pytest.raises(ValueError, match="no models"):
        Ensemble.zero(5, 3).accuracy(TARGETS)
