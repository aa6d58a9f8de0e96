"""Agreement with another implementation, and where it is another rule: fusion-bench 0.2.33, written out.

RegMean is the same: its statistics are means over rows and ours are sums, so with weights in proportion to the rows
both give one answer. Its Fisher information is not: it takes `(sum_x sum_y sqrt(p_y) d log p_y)^2`, the square of a
gradient that was summed over classes and over the batch, in the place of `sum_x sum_y p_y (d log p_y)^2`.
"""

import pytest
import torch
from torch import nn

from fedbasin.strategies.fusion.accumulator import fuse
from fedbasin.strategies.fusion.precisions import Diagonal, Gram
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.statistics.fisher import diagonal_fisher
from fedbasin.strategies.statistics.gram import grams

W = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=W)


def linear(seed):
    torch.manual_seed(seed)
    return nn.Linear(5, 3, bias=False).to(W)


def data(rows, seed):
    return [(normal(rows, 5, seed=seed), torch.zeros(rows, dtype=torch.long))]


def their_regmean(weights, means, ratio):
    """Off-diagonals times a ratio, then `torch.inverse` of the sum."""
    kept = [mean * (ratio + (1 - ratio) * torch.eye(len(mean), dtype=W)) for mean in means]
    moment = sum(mean @ weight.T for mean, weight in zip(kept, weights, strict=True))
    return (torch.inverse(sum(kept)) @ moment).T


def their_fisher(model, x):
    """One backward pass for a batch, squared afterwards."""
    logits = model(x)
    expected = (logits.softmax(-1).detach().sqrt() * logits.log_softmax(-1)).sum()
    return torch.autograd.grad(expected, model.weight)[0] ** 2


def their_merge(weights, fishers, floor=1e-6):
    """Each client's Fisher information over its norm, which for one client is no change."""
    norms = torch.stack([fisher.norm() for fisher in fishers])
    shares = 1 / (norms + floor)
    shares = shares / shares.sum()
    terms = [(s * (f + floor), w) for s, f, w in zip(shares, fishers, weights, strict=True)]
    return sum(f * w for f, w in terms) / sum(f for f, _ in terms)


@pytest.mark.parametrize("shrink", [1.0, 0.9, 0.1])
def test_regmean_is_theirs_where_every_client_has_as_many_rows(shrink):
    models, sets = [linear(1), linear(2)], [data(20, 1), data(20, 2)]
    ours = [Gram(grams(m, d, shrink)["weight",]) for m, d in zip(models, sets, strict=True)]
    updates = [Update(m.state_dict(), 20.0, {("weight",): g}) for m, g in zip(models, ours, strict=True)]
    means = [x.T @ x / len(x) for ((x, _),) in sets]
    theirs = their_regmean([m.weight.detach() for m in models], means, shrink)
    found = fuse(models[0].state_dict(), updates)["weight"]
    torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-9)


def test_regmean_of_unequal_clients_counts_rows_where_theirs_counts_clients():
    models, sets = [linear(1), linear(2)], [data(400, 1), data(20, 2)]
    ours = [Gram(grams(m, d)["weight",]) for m, d in zip(models, sets, strict=True)]
    updates = [Update(m.state_dict(), 1.0, {("weight",): g}) for m, g in zip(models, ours, strict=True)]
    found = fuse(models[0].state_dict(), updates)["weight"]
    weights = [m.weight.detach() for m in models]
    (x, _), (y, _) = (batches[0] for batches in sets)
    sums = their_regmean(weights, [x.T @ x, y.T @ y], 1.0)
    torch.testing.assert_close(found, sums, rtol=1e-9, atol=1e-9)
    means = their_regmean(weights, [x.T @ x / 400, y.T @ y / 20], 1.0)
    nearer = (found - weights[0]).norm() / (means - weights[0]).norm()
    assert float(nearer) < 0.3


def test_fusing_by_diagonals_is_theirs_for_the_same_diagonals():
    weights = [linear(seed).weight.detach() for seed in (1, 2)]
    fishers = [normal(3, 5, seed=seed) ** 2 for seed in (3, 4)]
    updates = [
        Update({"weight": w}, 1.0, {("weight",): Diagonal((f + 1e-6) / (f.norm() + 1e-6))})
        for w, f in zip(weights, fishers, strict=True)
    ]
    found = fuse({"weight": weights[0]}, updates)["weight"]
    torch.testing.assert_close(found, their_merge(weights, fishers), rtol=1e-12, atol=1e-12)


def test_their_fisher_information_is_that_of_a_summed_gradient_and_ours_of_each():
    model, ((x, y),) = linear(1), data(64, 1)
    ours = diagonal_fisher(model, [(x, y)])["weight"]
    p = model(x).softmax(-1).detach()
    torch.testing.assert_close(ours, (p * (1 - p)).T @ x**2, rtol=1e-10, atol=1e-12)
    # Summed over classes before squaring: sum_y sqrt(p_y) (e_y - p) = sqrt(p) - p sum_y sqrt(p_y).
    summed = p.sqrt() - p * p.sqrt().sum(1, keepdim=True)
    theirs = their_fisher(model, x)
    torch.testing.assert_close(theirs, (summed.T @ x) ** 2, rtol=1e-10, atol=1e-12)
    agreement = torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]
    assert abs(float(agreement)) < 0.9


def test_their_fisher_information_changes_with_the_batch_and_ours_does_not():
    model, ((x, y),) = linear(1), data(64, 1)
    whole, parts = their_fisher(model, x), sum(their_fisher(model, part) for part in x.split(1))
    assert float((whole - parts).norm()) > 0.5 * float(parts.norm())
    ours = [diagonal_fisher(model, list(zip(x.split(n), y.split(n), strict=True))) for n in (1, 64)]
    torch.testing.assert_close(ours[0], ours[1], rtol=1e-10, atol=1e-12)


def test_where_the_model_is_undecided_their_fisher_information_vanishes():
    """With equal probabilities the gradients of all classes cancel: the model that knows least says nothing."""
    model, ((x, y),) = linear(1), data(64, 1)
    nn.init.zeros_(model.weight)
    assert float(their_fisher(model, x).max()) < 1e-20
    assert float(diagonal_fisher(model, [(x, y)])["weight"].min()) > 1
