"""The laws of the robust rules, over models and over statistics, and each rule against its definition."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.fusion import spool
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.accumulator import fuse as mean
from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Sketched
from fedbasin.strategies.fusion.rules.robust.client_distances import TooFewClientsError
from fedbasin.strategies.fusion.rules.robust.robust_accumulator import RobustAccumulator
from fedbasin.strategies.fusion.rules.robust.robust_rules import COUNTED, ROBUST_RULES, robust_rule
from fedbasin.strategies.fusion.spool import Spool, SpoolError, SpoolFiles
from fedbasin.strategies.fusion.update import Update

W = torch.float64
SHAPES = {
    "fc.weight": (4, 3),
    "fc.bias": (4,),
    "norm.running_mean": (4,),
    "norm.running_var": (4,),
    "head.weight": (2, 4),
    "scale": (),
    "empty": (0, 3),
}
BLOCKS = [("fc.weight", "fc.bias"), ("head.weight",)]
KINDS = ("none", "fisher", "gram", "sketch", "kronecker")
CLIENTS = 11

every_rule = pytest.mark.parametrize("name", ROBUST_RULES)
every_kind = pytest.mark.parametrize("kind", KINDS)
quickly = settings(max_examples=5, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def rule_of(name, hostile=2):
    return robust_rule(name, hostile if name in COUNTED else 0)


def normal(draw, *shape):
    return torch.randn(shape, dtype=W, generator=draw)


def state(draw, dtype=W):
    tensors = {name: normal(draw, *shape) for name, shape in SHAPES.items()}
    tensors["norm.running_var"] = tensors["norm.running_var"].square() + 0.1
    counters = {
        "norm.count": torch.randint(9, (), generator=draw),
        "mask": torch.randint(2, (5,), generator=draw).bool(),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | counters


def gram(draw, inputs, rows=9):
    data = normal(draw, rows, inputs)
    return data.mT @ data


def precisions(draw, kind):
    if kind == "fisher":
        return {
            (name,): Diagonal(torch.rand(shape, dtype=W, generator=draw) + 0.01)
            for name, shape in SHAPES.items()
            if name.startswith(("fc", "head"))
        }
    if kind == "gram":
        return {block: Gram(gram(draw, 4)) for block in BLOCKS}
    if kind == "sketch":
        return {BLOCKS[1]: Sketched(normal(draw, 2, 4), torch.rand(4, dtype=W, generator=draw) + 0.01)}
    if kind == "kronecker":
        sizes = zip(BLOCKS, (4, 2), strict=True)
        return {b: Kronecker(gram(draw, 4)[None], gram(draw, out)[None]) for b, out in sizes}
    return {}


def update(draw, kind="none", dtype=W):
    examples = float(torch.randint(50, 500, (), generator=draw))
    return Update(state(draw, dtype), examples, precisions(draw, kind))


def updates(seed, kind="none", clients=CLIENTS, dtype=W):
    draw = torch.Generator().manual_seed(seed)
    return state(draw, dtype), [update(draw, kind, dtype) for _ in range(clients)]


def fuse(name, anchor, contributions, hostile=2, ridge=None):
    accumulator = RobustAccumulator(anchor, rule_of(name, hostile), SpoolFiles().open())
    for contribution in contributions:
        accumulator.add(contribution)
    return accumulator.finalize(anchor, ridge or Ridge(1e-3))


def assert_equal(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def distance(a, b):
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in SHAPES if a[n].numel())


@every_rule
@every_kind
@quickly
@given(seed=seeds)
def test_equal_updates_give_that_update_integers_and_booleans_too(name, kind, seed):
    anchor, contributions = updates(seed, kind)
    common = contributions[0].parameters
    equal = [replace(contribution, parameters=common) for contribution in contributions]
    fused = fuse(name, anchor, equal)
    # Directions without statistics stay at the ridge's target, which is the same model.
    assert_equal({n: fused[n] for n in common}, dict(common), 1e-6)


@every_rule
@every_kind
@quickly
@given(seed=seeds, order=st.permutations(range(CLIENTS)))
def test_the_order_of_the_clients_does_not_matter(name, kind, seed, order):
    anchor, contributions = updates(seed, kind)
    expected = fuse(name, anchor, contributions)
    assert_equal(fuse(name, anchor, [contributions[index] for index in order]), expected, 1e-6)


# Exponents of what hostile clients send: beyond the square root of the largest double, squares overflow.
@every_rule
@every_kind
def test_the_share_of_a_client_far_away_is_told_and_the_smallest(name, kind):
    anchor, contributions = updates(0, kind)
    far = contributions[4]
    contributions[4] = replace(far, parameters={n: t * 1000 if t.dtype == W else t for n, t in far.parameters.items()})
    accumulator = RobustAccumulator(anchor, rule_of(name), SpoolFiles().open())
    for contribution in contributions:
        accumulator.add(contribution)
    assert accumulator.notes == ()
    accumulator.finalize(anchor, Ridge())
    shares = [share_in(note, name) for note in accumulator.notes]
    assert len(shares) == CLIENTS
    assert shares[4] == min(shares) < 1


def share_in(note, name):
    if not note:
        return 1.0
    if note == f"left out by {name}":
        return 0.0
    return float(re.fullmatch(rf"{name} has taken (\d+)% of it", note)[1]) / 100


@every_rule
@every_kind
@quickly
@given(
    seed=seeds,
    model=st.sampled_from((0, 3, 30, 140, 200)),
    statistic=st.sampled_from((-30, 0, 6, 60, 160)),
    examples=st.sampled_from((1e-300, 1.0, 2.0**53)),
    collude=st.booleans(),
)
def test_a_minority_moves_the_result_by_a_bounded_distance(name, kind, seed, model, statistic, examples, collude):
    anchor, contributions = updates(seed, kind)
    honest = contributions[2:]
    sent = [contributions[0], contributions[0 if collude else 1]]
    hostile = [
        Update(
            {n: t * 10.0**model if t.is_floating_point() else t for n, t in u.parameters.items()},
            examples,
            {block: precision.scaled(10.0**statistic) for block, precision in u.precisions.items()},
        )
        for u in sent
    ]
    fused = fuse(name, anchor, [*hostile, *honest])
    assert all(bool(t.isfinite().all()) for t in fused.values())
    assert bool((fused["norm.running_var"] >= 0).all())
    # The honest clients' entries are below 5; a solution may leave their hull by the condition of its layers.
    assert distance(fused, anchor) < (20 if kind == "none" else 2e4)


@quickly
@given(seed=seeds)
def test_a_mean_is_not_bounded_so_that_the_test_above_can_fail(seed):
    anchor, contributions = updates(seed)
    far = {n: t * 1e30 if t.is_floating_point() else t for n, t in contributions[0].parameters.items()}
    assert distance(mean(anchor, [replace(contributions[0], parameters=far), *contributions[1:]]), anchor) > 1e20


@quickly
@given(seed=seeds, clients=st.integers(5, 12))
def test_median_and_trimmed_mean_are_numpys(seed, clients):
    anchor, contributions = updates(seed, clients=clients)
    for name in SHAPES:
        stack = np.sort(np.stack([u.parameters[name].numpy() for u in contributions]), axis=0)
        np.testing.assert_allclose(fuse("median", anchor, contributions)[name], np.median(stack, axis=0))
        trimmed = fuse("trimmed-mean", anchor, contributions)[name]
        np.testing.assert_allclose(trimmed, stack[2:-2].mean(axis=0))


def flat(state):
    return torch.cat([state[name].double().reshape(-1) for name in SHAPES])


def weights_of(contributions):
    weights = torch.tensor([u.examples for u in contributions], dtype=W)
    return weights.clamp(max=weights.median())


@quickly
@given(seed=seeds)
def test_no_point_is_nearer_to_all_clients_than_the_geometric_median(seed):
    anchor, contributions = updates(seed)
    weights = weights_of(contributions)
    point = flat(fuse("geometric-median", anchor, contributions))
    differences = point - torch.stack([flat(u.parameters) for u in contributions])
    # The pulls of the clients cancel, where the sum of distances is least.
    pulls = weights[:, None] * differences / differences.norm(dim=1, keepdim=True)
    assert float(pulls.sum(0).norm()) < 1e-5 * float(weights.sum())


@quickly
@given(seed=seeds)
def test_clipping_shortens_updates_to_the_median_norm(seed):
    anchor, contributions = updates(seed)
    weights = weights_of(contributions)
    rows = torch.stack([flat(u.parameters) - flat(anchor) for u in contributions])
    norms = rows.norm(dim=1)
    clipped = rows * (norms.median() / norms).clamp(max=1)[:, None]
    expected = flat(anchor) + weights @ clipped / weights.sum()
    torch.testing.assert_close(flat(fuse("norm-clipping", anchor, contributions)), expected)


@quickly
@given(seed=seeds)
def test_centred_clipping_follows_its_recursion(seed):
    anchor, contributions = updates(seed)
    weights = weights_of(contributions)
    rows = torch.stack([flat(u.parameters) for u in contributions])
    centre = flat(anchor)
    for _ in range(10):
        norms = (rows - centre).norm(dim=1)
        clipped = (rows - centre) * (norms.median() / norms).clamp(max=1)[:, None]
        centre = centre + weights @ clipped / weights.sum()
    torch.testing.assert_close(flat(fuse("centred-clipping", anchor, contributions)), centre)


@pytest.mark.parametrize("name", ["krum", "multi-krum", "geometric-median", "norm-clipping", "median"])
@pytest.mark.parametrize("kind", ["fisher", "gram", "kronecker"])
@quickly
@given(seed=seeds, exponents=st.lists(st.integers(-40, 40), min_size=CLIENTS, max_size=CLIENTS))
def test_a_client_gains_nothing_by_the_scale_of_its_statistics(name, kind, seed, exponents):
    anchor, contributions = updates(seed, kind)
    scaled = [
        replace(u, precisions={b: p.scaled(2.0**e) for b, p in u.precisions.items()})
        for u, e in zip(contributions, exponents, strict=True)
    ]
    assert_equal(fuse(name, anchor, scaled), fuse(name, anchor, contributions), 1e-6)


@quickly
@given(seed=seeds)
def test_with_one_gram_matrix_in_all_clients_a_layer_is_a_mean_of_some_of_their_weights(seed):
    anchor, contributions = updates(seed, "gram")
    first = contributions[0]
    alike = [replace(u, precisions=first.precisions, examples=first.examples) for u in contributions]
    fused = fuse("multi-krum", anchor, alike)
    rows = torch.stack([u.parameters["head.weight"] for u in alike])
    assert bool((fused["head.weight"] >= rows.min(0).values - 1e-6).all())
    assert bool((fused["head.weight"] <= rows.max(0).values + 1e-6).all())


@every_rule
def test_layers_with_one_gram_matrix_are_combined_with_one_set_of_coefficients(name):
    anchor, contributions = updates(0)
    names = ("q.weight", "k.weight")
    draw = torch.Generator().manual_seed(1)

    def with_pair(u):
        shared = Gram(gram(draw, 4))
        more = {n: normal(draw, 2, 4) for n in names}
        return replace(u, parameters={**u.parameters, **more}, precisions={(n,): shared for n in names})

    anchor = {**anchor, **{n: normal(draw, 2, 4) for n in names}}
    accumulator = RobustAccumulator(anchor, rule_of(name), SpoolFiles().open())
    for contribution in map(with_pair, contributions):
        accumulator.add(contribution)
    total = accumulator.total()
    assert total.blocks["q.weight",][0] is total.blocks["k.weight",][0]


@every_rule
def test_too_few_clients_are_an_error_that_names_the_rule_and_the_remedy(name):
    least = rule_of(name).least
    anchor, contributions = updates(0, clients=least)
    assert distance(fuse(name, anchor, contributions), anchor) < 20
    with pytest.raises(TooFewClientsError, match=rf"'{name}' needs at least {least} .* has {least - 1}; ask more"):
        fuse(name, anchor, contributions[1:])


@pytest.mark.parametrize(
    ("name", "least"), [("trimmed-mean", 5), ("krum", 7), ("multi-krum", 7), ("bulyan", 11), ("median", 3)]
)
def test_a_rule_needs_the_clients_that_its_paper_asks_for(name, least):
    assert rule_of(name).least == least


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_the_models_in_its_dtype(name, dtype):
    anchor, contributions = updates(0, dtype=dtype)
    fused = fuse(name, anchor, contributions)
    assert {n: t.dtype for n, t in fused.items()} == {n: t.dtype for n, t in anchor.items()}


@every_rule
def test_memory_is_that_of_pieces_and_pieces_change_nothing(name, monkeypatch):
    anchor, contributions = updates(0, "gram")
    expected = fuse(name, anchor, contributions)
    monkeypatch.setattr(spool, "_PIECE", 3 * CLIENTS)
    assert_equal(fuse(name, anchor, contributions), expected)


class FullDisk(io.BytesIO):
    """A file on a disk that has room for some bytes."""

    room = 10**9

    def write(self, data):
        if self.tell() + len(memoryview(data).cast("B")) > self.room:
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_an_error_that_names_the_remedy_and_leaves_the_updates_before():
    anchor, contributions = updates(0)
    file = FullDisk()
    accumulator = RobustAccumulator(anchor, rule_of("median"), Spool(file))
    for contribution in contributions[:5]:
        accumulator.add(contribution)
    file.room = file.tell() + 20
    with pytest.raises(SpoolError, match=r"No space left on device\); free space where .*fedbasin\.folder"):
        accumulator.add(contributions[5])
    file.room = 10**9
    assert accumulator.clients == 5
    assert_equal(accumulator.finalize(anchor), fuse("median", anchor, contributions[:5]))


def test_the_file_is_closed_with_its_accumulator():
    anchor, contributions = updates(0)
    file = io.BytesIO()
    accumulator = RobustAccumulator(anchor, rule_of("median"), Spool(file))
    accumulator.add(contributions[0])
    del accumulator
    assert file.closed
