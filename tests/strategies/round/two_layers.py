"""A model of two layers and a counter, its symmetry, and updates of it."""

import torch

from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.symmetry.symmetry import parse

SYMMETRY = parse("hidden  S(6)  first.weight[0] first.bias[0] second.weight[1]")
BLOCKS = [("first.weight", "first.bias"), ("second.weight",)]


def state(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "first.weight": torch.randn(6, 4, generator=draw),
        "first.bias": torch.randn(6, generator=draw),
        "second.weight": torch.randn(3, 6, generator=draw),
        "count": torch.tensor(seed),
    }


def plain_update(seed):
    return Update(state(seed), 5.0)


def gram_update(seed):
    draw = torch.Generator().manual_seed(seed)
    rows = {b: torch.randn(30, n, generator=draw).double() for b, n in zip(BLOCKS, (5, 6), strict=True)}
    return Update(state(seed), 10.0 + seed, {b: Gram(x.T @ x) for b, x in rows.items()})


def perturb(base, seed, step=0.05):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: t + step * torch.randn(t.shape, generator=draw) if t.is_floating_point() else t
        for name, t in base.items()
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name])
