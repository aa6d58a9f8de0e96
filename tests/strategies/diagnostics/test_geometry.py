import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.alignment.coordinate_ascent import agreement
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.diagnostics.geometry import cosine, fixed_points, rotation_angles, skew
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.groups.groups import Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.symmetry.transform import random
from tests.strategies.diagnostics.models import SITES, learnt

quickly = settings(max_examples=25, deadline=None)

ROTATED = "inner  O(4)^2  q.weight[0] k.weight[0]"
HEADS = "heads  O(3)*O(2) wr S(4)  q[0] k[0] v[0]@1 o[1]@1"
seeds = st.integers(0, 2**16)


def attention(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q.weight": (8, 6), "k.weight": (8, 6)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def heads(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (12, 9), "k": (12, 9), "v": (8, 9), "o": (9, 8)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def turned(angle):
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def test_the_cosine_is_that_of_the_updates_and_not_of_the_models():
    anchor = {"w": torch.tensor([10.0, 10.0]), "steps": torch.tensor(1)}
    north = {"w": torch.tensor([10.0, 11.0]), "steps": torch.tensor(2)}
    east = {"w": torch.tensor([13.0, 10.0]), "steps": torch.tensor(3)}
    assert cosine(anchor, north, north) == pytest.approx(1)
    assert cosine(anchor, north, east) == 0
    assert cosine(anchor, anchor, east) == 0
    west = {"w": torch.tensor([4.0, 10.0])}
    assert cosine(anchor, west, east) == pytest.approx(-1)


def skew_ratio(space, anchor, client):
    return skew(agreement(space, space.group, anchor, client))


@pytest.mark.parametrize(("spaces", "state"), [(SITES, learnt(1)), (ROTATED, attention(1)), (HEADS, heads(1))])
def test_a_planted_transform_leaves_no_distance_and_no_skew(spaces, state):
    symmetry = parse(spaces)
    planted = random(symmetry, torch.Generator().manual_seed(5)).act(state)
    alignment = match_weights(symmetry, state, planted)
    report, space = alignment.report, symmetry.spaces[0]
    assert report.distance_before > 0.1
    assert report.distance_after < 1e-4 * report.distance_before
    skew_before, skew_after = (skew_ratio(space, state, s) for s in (planted, alignment.state))
    assert skew_before > 0.1
    assert skew_after < 1e-5
    (reported,) = report.spaces
    if reported.skew_before is None:
        assert max(space.group.sizes) == 1
    else:
        assert reported.skew_before == pytest.approx(skew_before, rel=1e-5)
        assert reported.skew_after == pytest.approx(skew_after, abs=1e-5)


def test_a_space_reports_what_its_element_did():
    symmetry, anchor = parse(SITES), learnt(1)
    order = torch.arange(16)
    order[:4] = torch.tensor([1, 2, 3, 0])
    planted = {**anchor, "0.weight": anchor["0.weight"][order], "0.bias": anchor["0.bias"][order]}
    planted["2.weight"] = anchor["2.weight"][:, order]
    (space,) = match_weights(symmetry, anchor, planted).report.spaces
    assert (space.space, space.fixed_points, space.largest_angle) == ("hidden", 0.75, None)


def test_identical_models_have_nothing_to_report():
    state = attention(1)
    report = match_weights(parse(ROTATED), state, state).report
    (space,) = report.spaces
    assert (report.distance_before, space.fixed_points, space.largest_angle) == (0.0, 1.0, None)
    assert space.skew_before == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("angle", [0.0, 0.3, 2.0, math.pi])
def test_a_plane_turns_by_its_angle(angle):
    blocks = torch.stack([turned(angle), turned(-angle)])
    (found,) = rotation_angles(Element(torch.arange(2), (blocks,), (2,))) or [torch.zeros(2, 2)]
    torch.testing.assert_close(found.double(), torch.full((2, 2), angle).double(), rtol=0, atol=1e-7)


def test_a_reflection_is_half_a_turn_and_directions_that_stay_have_none():
    blocks = torch.diag(torch.tensor([1.0, -1.0, 1.0]))[None]
    (found,) = rotation_angles(Element(torch.arange(1), (blocks,), (3,)))
    assert found[0].tolist() == pytest.approx([0, 0, math.pi])


@quickly
@given(seeds)
def test_angles_give_back_the_distance_from_the_identity(seed):
    element = Orthogonal(5, 2).random(torch.Generator().manual_seed(seed))
    (angles,) = rotation_angles(element)
    chord = (2 - 2 * angles.cos()).sum(-1)
    direct = torch.linalg.matrix_norm(element.blocks[0] - torch.eye(5)).square()
    torch.testing.assert_close(chord, direct, rtol=0, atol=1e-9)


@quickly
@given(seeds)
def test_fixed_points_of_a_permutation_are_counted(seed):
    element = Permutation(7).random(torch.Generator().manual_seed(seed))
    expected = sum(int(i == j) for i, j in enumerate(element.order.tolist())) / 7
    assert fixed_points(element) == pytest.approx(expected)
    assert rotation_angles(element) == []


def test_units_inside_exchanged_blocks_are_counted_one_by_one():
    swap = torch.eye(3, dtype=torch.float64)[[1, 0, 2]]
    blocks = torch.stack([swap, torch.eye(3), torch.eye(3), torch.eye(3)])
    order = torch.tensor([0, 1, 3, 2])
    # One of three units in the first block, all of the second, none of those that changed places.
    assert fixed_points(Element(order, (blocks,), (3,))) == pytest.approx((1 / 3 + 1) / 4)


def test_rotated_blocks_are_counted_by_where_they_are():
    group = Wreath((Orthogonal(3), Orthogonal(2)), 4)
    element = group.random(torch.Generator().manual_seed(0))
    home = sum(int(i == j) for i, j in enumerate(element.order.tolist())) / 4
    assert fixed_points(element) == pytest.approx(home)
    assert [angles.shape for angles in rotation_angles(element)] == [(4, 3), (4, 2)]


def test_the_skew_ratio_of_a_head_equals_a_direct_computation():
    space = parse("inner  O(4)  q.weight[0,0:4] k.weight[0,0:4]").spaces[0]
    a, b = attention(1), attention(2)
    score = sum(a[name][:4] @ b[name][:4].T for name in a)
    expected = float((score - score.T).norm() / score.norm())
    assert skew_ratio(space, a, b) == pytest.approx(expected, rel=1e-12)


def test_the_skew_ratio_of_exchanged_heads_is_that_of_the_whole_matrix():
    space = parse(HEADS).spaces[0]
    a, b = heads(1), heads(2)
    qk = a["q"] @ b["q"].T + a["k"] @ b["k"].T
    vo = a["v"] @ b["v"].T + a["o"].T @ b["o"]
    odd = math.hypot(float((qk - qk.T).norm()), float((vo - vo.T).norm()))
    size = math.hypot(float(qk.norm()), float(vo.norm()))
    assert skew_ratio(space, a, b) == pytest.approx(odd / size, rel=1e-12)


def test_a_model_of_zeros_has_no_skew():
    space = parse(ROTATED).spaces[0]
    zero = {name: torch.zeros_like(tensor) for name, tensor in attention(1).items()}
    assert skew_ratio(space, attention(1), zero) == 0
