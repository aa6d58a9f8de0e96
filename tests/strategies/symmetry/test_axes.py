"""Axes whose units are not one run of an axis: interleaved heads, stacked experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedbasin.strategies.symmetry.groups.block_groups import DirectSum, Inner, PairSigns, Rotary
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.groups.shared_heads import SharedHeads
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError, parse
from fedbasin.strategies.symmetry.transform import Transform, random

sizes = st.integers(1, 9)
names = st.text("abz09._-", min_size=1, max_size=12)
pairs = st.tuples(sizes, sizes)
atoms = st.one_of(
    st.builds(Permutation, sizes),
    st.builds(Orthogonal, sizes),
    pairs.map(lambda p: Rotary(2 * p[0] * p[1], p[1])),
    pairs.map(lambda p: PairSigns(2 * p[0] * p[1], p[1])),
)
sums = st.lists(atoms, min_size=2, max_size=3).map(lambda found: DirectSum(tuple(found)))


def products(inner: st.SearchStrategy[Inner]) -> st.SearchStrategy[tuple[Inner, ...]]:
    return st.lists(inner, min_size=1, max_size=2).map(tuple)


shared = st.builds(SharedHeads, products(atoms | sums), sizes)
nested = st.builds(Wreath, products(atoms | shared), sizes)
inners = atoms | sums | shared | nested
groups: st.SearchStrategy[Group] = st.builds(Wreath, products(inners), sizes)
parts = st.tuples(st.integers(0, 99), st.integers(1, 99)).map(lambda p: (p[0], sum(p)))
periods = st.tuples(parts, st.none() | st.integers(1, 300))
axes = st.builds(
    lambda name, axis, part, role, scored, outer: Axis(
        name, axis, part and part[0], role, scored, part and part[1], outer
    ),
    names,
    st.integers(0, 3),
    st.none() | periods,
    st.integers(0, 2),
    st.booleans(),
    st.none() | st.integers(0, 3),
)
spaces = st.builds(Space, names, groups, st.lists(axes, min_size=1, max_size=4).map(tuple))


@settings(max_examples=60, deadline=None)
@given(spaces)
def test_what_is_written_is_read_back(space: Space) -> None:
    symmetry = Symmetry((space,))
    assert parse(str(symmetry)) == symmetry


def test_a_period_without_a_part_cannot_be_written_down() -> None:
    with pytest.raises(SymmetryError, match="cannot be written down"):
        Symmetry((Space("a", Permutation(2), (Axis("w", 0, period=4),)),))


def drawn(symmetry: Symmetry) -> Transform:
    return random(symmetry, torch.Generator().manual_seed(3))


def values(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(24, 5), (5, 24), (2, 24, 3)])
def test_interleaved_heads_move_like_heads_side_by_side(shape: tuple[int, ...]) -> None:
    dim, tensor = shape.index(24), values(*shape)
    runs = tensor.unflatten(dim, (4, 6))
    apart = runs.narrow(dim + 1, 2, 2).flatten(dim, dim + 1)
    together = parse(f"h O(2) wr S(4) w[{dim},2:4/6]")
    transform = drawn(together)
    element = transform.elements["h"]
    (axis,) = together.spaces[0].axes
    moved = transform.act({"w": tensor})["w"]
    expected = runs.clone()
    expected.narrow(dim + 1, 2, 2).copy_(element.act(apart, dim).unflatten(dim, (4, 2)))
    torch.testing.assert_close(moved, expected.flatten(dim, dim + 1))
    torch.testing.assert_close(axis.rows(tensor, 8), Axis("w", dim).rows(apart, 8), rtol=0, atol=0)
    assert axis.view(tensor).data_ptr() == tensor.data_ptr() + 2 * 8 * tensor.stride(dim)


@pytest.mark.parametrize(
    ("text", "shape", "order"),
    [
        ("w[0.1]", (3, 4, 5), (0, 1, 2)),
        ("w[0.2]", (3, 5, 4), (0, 2, 1)),
        ("w[2.0]", (4, 5, 3), (2, 0, 1)),
        ("w[1.0]", (4, 3, 5), (1, 0, 2)),
    ],
)
def test_stacked_experts_move_like_experts_side_by_side(
    text: str, shape: tuple[int, ...], order: tuple[int, ...]
) -> None:
    symmetry = parse(f"m S(4) wr S(3) {text}")
    transform, tensor = drawn(symmetry), values(*shape)
    flat = tensor.permute(order).reshape(12, 5)
    moved = transform.act({"w": tensor})["w"]
    torch.testing.assert_close(moved.permute(order).reshape(12, 5), transform.elements["m"].act(flat, 0))
    (axis,) = symmetry.spaces[0].axes
    assert torch.equal(axis.rows(tensor, 12), flat)


def test_a_part_of_every_run_of_every_slice_moves_alone() -> None:
    symmetry = parse("m S(4) wr S(3) w[0.1,0:2/5]")
    tensor = values(3, 10, 2)
    moved = drawn(symmetry).act({"w": tensor})["w"]
    runs, before = moved.unflatten(1, (2, 5)), tensor.unflatten(1, (2, 5))
    assert torch.equal(runs[:, :, 2:], before[:, :, 2:])
    assert not torch.equal(runs[:, :, :2], before[:, :, :2])
    (axis,) = symmetry.spaces[0].axes
    assert torch.equal(axis.rows(tensor, 12), before[:, :, :2].reshape(12, 2))


def test_the_gram_of_interleaved_inputs_moves_with_them() -> None:
    symmetry = parse("v O(2) wr S(2) out.weight[1,2:4/4]")
    transform = drawn(symmetry)
    features = values(20, 8)
    turned = transform.act({"out.weight": features})["out.weight"]
    moved = transform.act_on_inputs("out.weight", features.mT @ features, inputs=8)
    torch.testing.assert_close(moved, turned.mT @ turned)


STATE = {"w": torch.zeros(24, 6), "e": torch.zeros(3, 8, 5), "r": torch.zeros(3, 5)}


@pytest.mark.parametrize(
    "text",
    [
        "h O(2) wr S(4) w[0,0:2/6]\ng O(4) wr S(4) w[0,2:6/6]",
        "m S(4) wr S(3) e[0.1,0:4] e[0.1,4:8]",
        "m S(4)*S(1) wr S(3) e[0.1,0:4] r[0]@1",
        "d S(5) e[2] r[1]\nm S(8) wr S(3) e[0.1]",
    ],
)
def test_what_fits_passes(text: str) -> None:
    parse(text).check(STATE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h O(2) wr S(4) w[0,0:2/7]", "runs of 7"),
        ("h O(2) wr S(4) w[0,5:7/6]", "not a multiple"),
        ("h O(2) wr S(4) w[0,0:3/6]", "not a multiple"),
        ("h O(2) wr S(4) w[0,0:2/6]\ng S(24) w[0]", "'h' already moves"),
        ("h O(2) wr S(4) w[0,0:2/6]\ng O(2) wr S(4) w[0,1:3/6]", "'h' already moves"),
        ("m S(4) wr S(3) e[3.1]", "no outer axis 3"),
        ("m S(4) wr S(3) e[1.1]", "no outer axis 1"),
        ("m S(4) wr S(5) e[0.1]", "not a multiple"),
        ("m S(8) wr S(3) e[0.1]\nx S(3) e[0]", "'m' already moves"),
        ("x S(3) e[0]\nm S(8) wr S(3) e[0.1]", "'x' already moves"),
        ("m S(4) wr S(3) e[0.1,0:4]\nx S(4) wr S(3) e[0.1,4:8]", "'m' already moves"),
        ("m S(8)*S(1) wr S(3) e[0.1] e[0]@1", "'m' already moves"),
    ],
)
def test_what_does_not_fit_is_named(text: str, message: str) -> None:
    with pytest.raises(SymmetryError, match=message):
        parse(text).check(STATE)
