"""Blocks joined and split, and updates that move as a whole."""

import pytest
import torch

from fedbasin.strategies.fusion.precisions import Gram, Scalar
from fedbasin.strategies.fusion.update import Update, join, split
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.symmetry.transform import random

STATE = {
    "vector": torch.arange(3.0),
    "matrix": torch.arange(12.0).reshape(3, 4),
    "kernel": torch.arange(24.0).reshape(3, 2, 2, 2),
    "bias": torch.arange(3.0) + 100,
    "half": torch.arange(6.0).reshape(3, 2).bfloat16(),
}


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        (("vector",), (3,)),
        (("matrix",), (3, 4)),
        (("kernel",), (3, 8)),
        (("matrix", "bias"), (3, 5)),
        (("kernel", "bias"), (3, 9)),
        (("half",), (3, 2)),
    ],
)
def test_splitting_undoes_joining(block, shape):
    joined = join(block, STATE)
    assert joined.shape == shape
    back = split(block, joined.double(), STATE)
    assert list(back) == list(block)
    for name, tensor in back.items():
        assert tensor.dtype == STATE[name].dtype
        assert torch.equal(tensor, STATE[name])
        assert tensor.is_contiguous()


def test_the_bias_is_the_last_column():
    assert torch.equal(join(("matrix", "bias"), STATE)[:, -1], STATE["bias"])


def test_what_a_layer_computes_on_its_grams_rows_stays_when_both_are_moved():
    symmetry = parse("hidden  S(4)  first.weight[0] first.bias[0] second.weight[1]")
    draw = torch.Generator().manual_seed(0)
    g = random(symmetry, draw)
    assert not g.is_identity
    rows = torch.randn(9, 8, generator=draw, dtype=torch.float64)  # two entries for each unit
    state = {
        "first.weight": torch.randn(4, 3, generator=draw, dtype=torch.float64),
        "first.bias": torch.randn(4, generator=draw, dtype=torch.float64),
        "second.weight": torch.randn(2, 8, generator=draw, dtype=torch.float64),
    }
    precisions = {("second.weight",): Gram(rows.T @ rows), ("first.bias",): Scalar(3.0)}
    update = Update(state, 5.0, precisions)
    moved = update.apply(g)
    for one in (update, moved):
        weight, gram = one.parameters["second.weight"], one.precisions["second.weight",].matrix
        energy = (weight @ gram @ weight.T).trace()
        torch.testing.assert_close(energy, (rows @ state["second.weight"].T).square().sum())
    assert moved.examples == 5.0
    assert moved.precisions["first.bias",] == Scalar(3.0)
    assert not torch.equal(moved.precisions["second.weight",].matrix, rows.T @ rows)


def test_layers_that_read_the_same_space_keep_their_gram_in_common():
    symmetry = parse("hidden  S(4)  first.weight[0] q.weight[1] k.weight[1]")
    draw = torch.Generator().manual_seed(0)
    g, rows = random(symmetry, draw), torch.randn(9, 4, generator=draw, dtype=torch.float64)
    gram = Gram(rows.T @ rows)
    state = {
        n: torch.randn(4, 4, generator=draw, dtype=torch.float64) for n in ("first.weight", "q.weight", "k.weight")
    }
    precisions = {("q.weight",): gram, ("k.weight",): gram}
    moved = Update(state, 1.0, precisions).apply(g)
    assert not g.is_identity
    assert moved.precisions["q.weight",] is moved.precisions["k.weight",]
    alone = Update(state, 1.0, {("k.weight",): gram}).apply(g).precisions["k.weight",]
    assert torch.equal(moved.precisions["k.weight",].matrix, alone.matrix)
