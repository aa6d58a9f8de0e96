"""Example inputs may be given as a model takes them: in order, or by name."""

from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn

from fedbasin import check, discover, parse
from fedbasin.strategies.symmetry.example_inputs import positional_inputs
from fedbasin.strategies.symmetry.symmetry import SymmetryError

X, Y = torch.randn(2, 4), torch.randn(2, 4)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, first, second=None, third=None, *, scale=1.0):
        for other in (second, third):
            first = first if other is None else first + other
        return self.body(first) * scale


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((X,), (X,)),
        ((X, Y), (X, Y)),
        (((X, Y),), (X, Y)),
        (([X, Y],), (X, Y)),
        (({"first": X},), (X,)),
        (({"second": Y, "first": X},), (X, Y)),
        (({"first": X, "third": Y},), (X, None, Y)),
        ((UserDict(first=X),), (X,)),
    ],
)
def test_come_in_the_order_of_the_arguments(given, expected):
    found = positional_inputs(Sum(), *given)
    assert len(found) == len(expected)
    assert all(a is b for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "example", [X, (X,), (X, Y), {"first": X}, {"first": X, "second": Y}, {"first": X, "third": Y}]
)
def test_of_every_kind_prove_and_trace(example):
    model = Sum()
    assert [str(space.group) for space in discover(model, example).symmetry.spaces] == ["S(6)"]
    symmetry = parse("body.0 S(6) body.0.weight[0] body.0.bias[0] body.2.weight[1]")
    assert check(model, symmetry, example).passed


@pytest.mark.parametrize(
    ("example", "named"),
    [
        (np.zeros((2, 4)), "input number 0 of the example is a ndarray"),
        ((X, "text"), "input number 1 of the example is a str"),
        ({"first": [1, 2]}, "input 'first' of the example is a list"),
        ({"first": X, "labels": Y}, "'labels', which are not among the arguments of Sum: first, second, third"),
        ({"first": X, "scale": Y}, "'scale'"),
        ((), "does not run"),
        ((X, Y, Y, Y), "does not run"),
    ],
)
def test_that_do_not_fit_are_named(example, named):
    for act in (lambda: discover(Sum(), example).symmetry, lambda: check(Sum(), discover(Sum(), X).symmetry, example)):
        with pytest.raises(SymmetryError, match=named):
            act()
