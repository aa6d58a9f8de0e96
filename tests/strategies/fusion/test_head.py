import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from fedbasin.strategies.fusion.head import MARGIN, CrossValidated, least_error
from fedbasin.strategies.fusion.precision import Diagonal, Gram

BLOCK = ("head.weight", "head.bias")
CLASSES = 3


def examples(rows, noise, seed=0, inputs=8):
    """Labels that a linear teacher gives, some of them wrong."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=draw, dtype=torch.float64)
    labels = (x @ torch.randn(inputs, CLASSES, generator=draw, dtype=torch.float64)).argmax(1)
    wrong = torch.rand(rows, generator=draw) < noise
    labels = labels.where(~wrong, torch.randint(CLASSES, (rows,), generator=draw))
    ones = torch.ones(rows, 1, dtype=torch.float64)
    return torch.cat([x, ones], 1), (one_hot(labels, CLASSES) * 2.0 - 1).double() * MARGIN


def by_rows(x, y, strength):
    """The criterion from the rows themselves and their hat matrix."""
    gram = x.T @ x
    rho = strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype)
    hat = x @ torch.linalg.solve(gram + rho, x.T)
    return (y - hat @ y).square().sum() / (len(x) - hat.trace()) ** 2


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(4, 60), noise=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 2**16))
def test_sums_choose_what_the_rows_would(rows, noise, seed):
    x, y = examples(rows, noise, seed)
    chosen = least_error(x.T @ x, y.T @ x)
    best = min(by_rows(x, y, 10 ** (half / 2)) for half in range(-8, 5))
    torch.testing.assert_close(by_rows(x, y, chosen), best)


def test_wrong_labels_call_for_a_stronger_ridge():
    clean, noisy = (
        least_error(x.T @ x, y.T @ x) for x, y in (examples(40, noise) for noise in (0.0, 0.9))
    )
    assert clean < noisy


@pytest.mark.parametrize("seed", range(3))
def test_the_chosen_strength_is_near_the_best_on_fresh_examples(seed):
    def wrong(strength):
        x, y = examples(60, 0.5, seed, inputs=40)
        rho = strength * (x.T @ x).diagonal().mean() * torch.eye(41, dtype=x.dtype)
        head = torch.linalg.solve(x.T @ x + rho, x.T @ y)
        return x, y, head

    x, y, _ = wrong(1.0)
    chosen = least_error(x.T @ x, y.T @ x)
    truth = torch.linalg.lstsq(*examples(20_000, 0.0, seed, inputs=40)).solution
    error = {s: (wrong(s)[2] - truth).square().sum() for s in (1e-4, chosen)}
    assert error[chosen] < error[1e-4] / 2


def test_a_head_without_a_bias_or_a_gram_matrix_says_not_enough():
    x, y = examples(40, 0.5)
    rule = CrossValidated(otherwise=0.25)
    assert rule.ridge(BLOCK[:1], (Gram(x.T @ x), y.T @ x)).strength == 0.25
    assert rule.ridge(BLOCK, (Diagonal(torch.ones(3, 9)), y.T @ x)).strength == 0.25
    assert rule.ridge(BLOCK, (Gram(x.T @ x), y.T @ x)).strength != 0.25


def test_a_head_that_no_example_reaches_is_left_to_the_other_strength():
    nothing = torch.zeros(9, 9, dtype=torch.float64)
    assert CrossValidated(0.25).ridge(BLOCK, (Gram(nothing), nothing[:3])).strength == 0.25
