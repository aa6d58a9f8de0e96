"""The laws of the running sum, for every statistic, against dense least squares."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge, fuse
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Scalar, SingularSumError
from fedbasin.strategies.fusion.update import Update, join
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.symmetry.transform import random

W = torch.float64
SHAPES = {
    "conv.weight": (3, 2, 2, 2),
    "conv.bias": (3,),
    "norm.weight": (3,),
    "fc.weight": (4, 12),  # reads 3 channels of 4 pixels
    "fc.bias": (4,),
    "head.weight": (2, 4),
}
LAYERS = [("conv.weight", "conv.bias"), ("fc.weight", "fc.bias"), ("head.weight",)]
ROWS = 40
PERMUTATIONS = parse(
    """
    channels  S(3)  conv.weight[0] conv.bias[0] norm.weight[0] fc.weight[1]
    hidden    S(4)  fc.weight[0] fc.bias[0] head.weight[1]
    """
)
# Not a symmetry of this network, but the algebra of the sum does not ask.
ROTATIONS = parse("hidden  O(4)  fc.weight[0] fc.bias[0] head.weight[1]")

KINDS = ("none", "fisher", "gram")
RIDGES = (Ridge(1e-3), Ridge(0.3), Ridge(0.3, "anchor"))
every_kind = pytest.mark.parametrize("kind", KINDS)
every_ridge = pytest.mark.parametrize("ridge", RIDGES, ids=str)
quickly = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def state(draw, dtype=W):
    floats = {n: torch.randn(s, dtype=W, generator=draw) for n, s in SHAPES.items()}
    return {n: t.to(dtype) for n, t in floats.items()} | {"norm.count": torch.randint(9, (2,), generator=draw)}


def rows(draw, block):
    inputs = join(block, {n: torch.zeros(s) for n, s in SHAPES.items()}).shape[1]
    data = torch.randn(ROWS, inputs, dtype=W, generator=draw)
    if len(block) > 1:
        data[:, -1] = 1
    return data


def update(draw, kind="none", dtype=W):
    precisions = {}
    if kind == "fisher":
        for name, shape in SHAPES.items():
            precisions[name,] = Diagonal(torch.rand(shape, dtype=W, generator=draw) + 0.01)
    if kind == "gram":
        for block in LAYERS:
            data = rows(draw, block)
            precisions[block] = Gram(data.T @ data)
    examples = float(torch.randint(1, 500, (), generator=draw))
    return Update(state(draw, dtype), examples, precisions)


def updates(seed, kind, clients=4, dtype=W):
    draw = torch.Generator().manual_seed(seed)
    return state(draw, dtype), [update(draw, kind, dtype) for _ in range(clients)]


def accumulator(anchor, contributions, dtype=W):
    sums = Accumulator.zero(anchor, dtype)
    for one in contributions:
        sums.add(one)
    return sums


def assert_equal(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


@every_kind
@quickly
@given(seed=seeds)
def test_the_sum_is_a_commutative_monoid(kind, seed):
    anchor, (a, b, c, d) = updates(seed, kind)
    whole = accumulator(anchor, [a, b, c, d]).finalize(anchor, Ridge())

    backwards = accumulator(anchor, [d, c, b, a])
    assert_equal(backwards.finalize(anchor, Ridge()), whole)

    tree, right, empty = (accumulator(anchor, [b]), accumulator(anchor, [c, a]), Accumulator.zero(anchor))
    right.merge(accumulator(anchor, [d]))
    tree.merge(empty)
    tree.merge(right)
    empty.merge(tree)
    for sums in (tree, empty):
        assert sums.clients == 4
        assert_equal(sums.finalize(anchor, Ridge()), whole)


@every_kind
@quickly
@given(seed=seeds)
def test_merging_leaves_the_other_sum_as_it_was(kind, seed):
    anchor, (a, b, c, d) = updates(seed, kind)
    sums, other = accumulator(anchor, [a]), accumulator(anchor, [b])
    before = other.finalize(anchor, Ridge())
    sums.merge(other)
    sums.add(c)
    empty = Accumulator.zero(anchor)
    empty.merge(other)
    empty.add(d)
    assert_equal(other.finalize(anchor, Ridge()), before, tolerance=0)


@every_kind
@quickly
@given(seed=seeds)
def test_a_sum_split_by_tensors_gives_the_same(kind, seed):
    anchor, contributions = updates(seed, kind)
    whole = fuse(anchor, contributions, Ridge())
    first = {"conv.weight", "conv.bias", "norm.weight", "norm.count"}
    parts = [first, anchor.keys() - first]
    fused = {}
    for part in parts:
        pieces = [
            Update(
                {n: u.parameters[n] for n in part},
                u.examples,
                {b: p for b, p in u.precisions.items() if set(b) <= part},
            )
            for u in contributions
        ]
        fused |= fuse({n: anchor[n] for n in part}, pieces, Ridge())
    assert_equal({n: fused[n] for n in whole}, whole)


@every_kind
@every_ridge
@quickly
@given(seed=seeds, clients=st.integers(1, 4))
def test_equal_updates_give_that_update(kind, ridge, seed, clients):
    anchor, (one,) = updates(seed, kind, clients=1)
    if ridge.target == "anchor":
        anchor = dict(one.parameters)
    fused = fuse(anchor, [one] * clients, ridge)
    assert_equal(fused, one.parameters)


@every_kind
def test_no_clients_give_the_anchor(kind):
    anchor, _ = updates(0, kind)
    assert fuse(anchor, [], Ridge()) == anchor


def dense_gram(block, data, states, examples, ridge, anchor):
    """Least squares over all clients' rows, and over the ridge's own as one client more."""
    target = anchor
    if ridge.target == "mean":
        weights = np.array(examples) / sum(examples)
        target = {n: sum(w * s[n] for w, s in zip(weights, states, strict=True)) for n in SHAPES}
    stacked = torch.cat(data)
    strength = ridge.strength * float((stacked.T @ stacked).diagonal().mean())
    own = strength**0.5 * torch.eye(stacked.shape[1], dtype=W)
    inputs = torch.cat([stacked, own])
    outputs = [x @ join(block, s).T for x, s in zip(data, states, strict=True)]
    outputs.append(own @ join(block, target).T)
    solution, *_ = np.linalg.lstsq(inputs.numpy(), torch.cat(outputs).numpy(), rcond=None)
    return torch.from_numpy(solution.T)


@every_ridge
@quickly
@given(seed=seeds)
def test_regmean_is_least_squares_over_all_rows(ridge, seed):
    draw = torch.Generator().manual_seed(seed)
    anchor, states = state(draw), [state(draw) for _ in range(3)]
    data = [{block: rows(draw, block) for block in LAYERS} for _ in states]
    examples = [3.0, 50.0, 7.0]
    contributions = [
        Update(s, n, {b: Gram(x.T @ x) for b, x in own.items()})
        for s, n, own in zip(states, examples, data, strict=True)
    ]
    fused = fuse(anchor, contributions, ridge)
    for block in LAYERS:
        expected = dense_gram(block, [own[block] for own in data], states, examples, ridge, anchor)
        torch.testing.assert_close(join(block, fused), expected, rtol=1e-8, atol=1e-8)


@every_ridge
@quickly
@given(seed=seeds)
def test_fisher_is_a_mean_entry_by_entry(ridge, seed):
    anchor, contributions = updates(seed, "fisher")
    fused = fuse(anchor, contributions, ridge)
    examples = np.array([u.examples for u in contributions])
    for name in SHAPES:
        values = np.stack([u.parameters[name].numpy() for u in contributions])
        weights = np.stack([u.precisions[name,].values.numpy() for u in contributions])
        target = anchor[name].numpy()
        if ridge.target == "mean":
            target = np.average(values, 0, examples)
        prior = ridge.strength * weights.sum(0).mean()
        expected = ((weights * values).sum(0) + prior * target) / (weights.sum(0) + prior)
        np.testing.assert_allclose(fused[name].numpy(), expected, rtol=1e-9, atol=1e-9)


@quickly
@given(seed=seeds)
def test_fedavg_is_the_mean_weighted_by_examples(seed):
    anchor, contributions = updates(seed, "none")
    fused = fuse(anchor, contributions)
    examples = [u.examples for u in contributions]
    for name in SHAPES:
        values = [u.parameters[name].numpy() for u in contributions]
        expected = np.average(values, 0, examples)
        np.testing.assert_allclose(fused[name].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "symmetry", "tolerance"),
    [
        ("none", PERMUTATIONS, 1e-9),
        ("fisher", PERMUTATIONS, 1e-9),
        ("gram", PERMUTATIONS, 1e-9),
        # The elements of a rotation are orthogonal to single precision.
        ("none", ROTATIONS, 1e-5),
        ("gram", ROTATIONS, 1e-5),
    ],
)
@every_ridge
@quickly
@given(seed=seeds)
def test_fusing_moved_updates_moves_the_fused(kind, symmetry, tolerance, ridge, seed):
    anchor, contributions = updates(seed, kind)
    g = random(symmetry, torch.Generator().manual_seed(seed))
    moved = fuse(g.act(anchor), [u.apply(g) for u in contributions], ridge)
    assert_equal(moved, g.act(fuse(anchor, contributions, ridge)), tolerance)


def test_a_gram_that_stays_behind_is_noticed():
    anchor, contributions = updates(0, "gram")
    g = random(PERMUTATIONS, torch.Generator().manual_seed(1))
    left = [replace(u, parameters=g.act(u.parameters)) for u in contributions]
    with pytest.raises(AssertionError):
        assert_equal(fuse(g.act(anchor), left, Ridge()), g.act(fuse(anchor, contributions, Ridge())))


def test_a_diagonal_under_rotation_is_refused_with_the_remedy():
    _, (one, *_) = updates(0, "fisher")
    g = random(ROTATIONS, torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"fc\.weight.*cannot follow a rotation.*align on the client"):
        one.apply(g)


def test_inputs_that_nobody_saw_take_the_mean():
    anchor, (one, other) = updates(3, "gram", clients=2)
    block = ("fc.weight", "fc.bias")
    for u in (one, other):
        u.precisions[block].matrix[2, :] = u.precisions[block].matrix[:, 2] = 0
    fused = fuse(anchor, [one, other], Ridge(1e-6))
    mean = fuse(anchor, [Update(one.parameters, one.examples), Update(other.parameters, other.examples)])
    torch.testing.assert_close(fused["fc.weight"][:, 2], mean["fc.weight"][:, 2])
    assert not torch.allclose(fused["fc.weight"][:, 1], mean["fc.weight"][:, 1])


@pytest.mark.parametrize("target", ["mean", "anchor"])
@pytest.mark.parametrize("zero", [partial(Scalar, 0.0), lambda: Diagonal(torch.zeros(2, 4))])
def test_a_block_that_nobody_knows_takes_the_target(target, zero):
    anchor, contributions = updates(4, "none")
    silent = [replace(u, precisions={("head.weight",): zero()}) for u in contributions]
    fused = fuse(anchor, silent, Ridge(0.1, target))
    expected = anchor if target == "anchor" else fuse(anchor, contributions)
    torch.testing.assert_close(fused["head.weight"], expected["head.weight"])


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_singular_sum_without_a_ridge_is_an_error(kind):
    anchor, (one, *_) = updates(5, kind)
    for precision in one.precisions.values():
        if isinstance(precision, Diagonal):
            precision.values[0] = 0
        else:
            precision.matrix[0, :] = precision.matrix[:, 0] = 0
    with pytest.raises(SingularSumError):
        fuse(anchor, [one])
    fuse(anchor, [one], Ridge())


def test_the_fast_sum_is_close_to_the_reproducible_one():
    anchor, contributions = updates(6, "none", clients=50, dtype=torch.float32)
    exact = accumulator(anchor, contributions).finalize(anchor)
    fast = accumulator(anchor, contributions, torch.float32).finalize(anchor)
    assert_equal(fast, exact, tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_to_single_the_sum_does_not_depend_on_the_order_of_arrival(kind):
    anchor, contributions = updates(7, kind, clients=12, dtype=torch.float32)
    first = fuse(anchor, contributions, Ridge())
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        order = torch.randperm(len(contributions), generator=draw)
        assert_equal(fuse(anchor, [contributions[i] for i in order], Ridge()), first, tolerance=0)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, W])
def test_the_fused_model_has_the_anchors_dtypes_shapes_and_counters(kind, dtype):
    anchor, contributions = updates(8, kind, dtype=dtype)
    fused = fuse(anchor, contributions, Ridge())
    assert list(fused) == list(anchor)
    for name, tensor in fused.items():
        assert (tensor.dtype, tensor.shape) == (anchor[name].dtype, anchor[name].shape)
        assert tensor.isfinite().all()
    exact = fuse(
        {n: t.to(W) if n in SHAPES else t for n, t in anchor.items()},
        [replace(u, parameters={n: u.parameters[n].to(W) for n in SHAPES}) for u in contributions],
        Ridge(),
    )
    # Rounded once, at the end.
    assert_equal({n: exact[n].to(fused[n].dtype) for n in SHAPES}, {n: fused[n] for n in SHAPES}, 0)


def test_a_long_tensor_is_summed_to_its_end():
    anchor = {"w": torch.zeros(300_001)}
    ramp = torch.arange(300_001.0)
    fused = fuse(anchor, [Update({"w": ramp}, 1.0), Update({"w": -ramp}, 3.0)])
    assert torch.equal(fused["w"], -ramp / 2)


def test_folding_keeps_nothing_of_the_update():
    anchor, (one, _) = updates(9, "gram", clients=2)
    sums = accumulator(anchor, [one])
    before = sums.finalize(anchor, Ridge())
    for tensor in (*one.parameters.values(), *(p.matrix for p in one.precisions.values())):
        tensor.zero_()
    assert_equal(sums.finalize(anchor, Ridge()), before, tolerance=0)


SIZES = {"q": 3, "k": 2, "v": 5}
BLOCKS = [(f"{name}.weight", f"{name}.bias") for name in SIZES]
GROUPS = [[0, 1, 2]], [[0], [1], [2]], [[0, 2], [1]]


class TestBlocksWithAGramInCommon:
    """As queries, keys and values, here of sizes of their own."""

    def state(self, draw):
        return {
            name: torch.randn(shape, dtype=W, generator=draw)
            for each, size in SIZES.items()
            for name, shape in ((f"{each}.weight", (size, 4)), (f"{each}.bias", (size,)))
        }

    def updates(self, seed, groupings):
        """Clients whose inputs are the same however they group their blocks."""
        draw = torch.Generator().manual_seed(seed)
        for groups in groupings:
            x = torch.randn(7, 5, dtype=W, generator=draw)
            parts = [(Gram(x.T @ x), group) for group in groups]
            known = {BLOCKS[i]: gram for gram, group in parts for i in group}
            examples = float(torch.randint(1, 9, (), generator=draw))
            yield Update(self.state(draw), examples, {b: known[b] for b in BLOCKS})

    def fused(self, seed, groupings, ridge):
        anchor = self.state(torch.Generator().manual_seed(seed + 1))
        sums = accumulator(anchor, self.updates(seed, groupings))
        return sums, sums.finalize(anchor, ridge)

    @every_ridge
    @quickly
    @given(seed=seeds, groupings=st.lists(st.sampled_from(GROUPS), min_size=1, max_size=4))
    def test_are_fused_as_each_of_them_alone(self, ridge, seed, groupings):
        _, expected = self.fused(seed, [GROUPS[1]] * len(groupings), ridge)
        _, found = self.fused(seed, groupings, ridge)
        assert_equal(found, expected)

    def test_are_fused_as_each_of_them_alone_without_a_ridge(self):
        _, expected = self.fused(0, [GROUPS[1]] * 2, None)
        _, found = self.fused(0, [GROUPS[0]] * 2, None)
        assert_equal(found, expected)

    def test_have_one_sum_and_one_factorisation(self, monkeypatch):
        made = []
        factorise = torch.linalg.cholesky_ex
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: made.append(matrix) or factorise(matrix))
        sums, _ = self.fused(0, [GROUPS[0]] * 3, Ridge())
        assert len({id(precision) for precision in sums.precisions.values()}) == 1
        assert len(made) == 1

    def test_are_split_where_a_client_has_them_apart(self):
        sums, _ = self.fused(0, [GROUPS[0], GROUPS[2], GROUPS[0]], Ridge())
        q, k, v = (sums.precisions[block] for block in BLOCKS)
        assert q is v
        assert q is not k

    def test_keep_it_in_common_when_sums_are_merged(self):
        anchor = self.state(torch.Generator().manual_seed(1))
        one, two = self.updates(0, [GROUPS[0]] * 2)
        sums = accumulator(anchor, [one])
        sums.merge(accumulator(anchor, [two]))
        assert len({id(precision) for precision in sums.precisions.values()}) == 1
        assert_equal(sums.finalize(anchor, Ridge()), fuse(anchor, [one, two], Ridge()))

    def test_that_nobody_knows_anything_of_are_the_mean(self):
        anchor = self.state(torch.Generator().manual_seed(1))
        nothing = Gram(torch.zeros(5, 5, dtype=W))
        one, two = (
            replace(update, precisions=dict.fromkeys(BLOCKS, nothing)) for update in self.updates(0, [GROUPS[0]] * 2)
        )
        plain = [replace(update, precisions={}) for update in (one, two)]
        assert_equal(fuse(anchor, [one, two], Ridge()), fuse(anchor, plain))
