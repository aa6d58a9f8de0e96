import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedbasin.strategies.symmetry.groups.centred import Centred
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.groups.group_notation import parse_group
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Permutation, Wreath

GROUPS: list[Group] = [
    Permutation(1),
    Permutation(6),
    Orthogonal(1),
    Orthogonal(4),
    Orthogonal(2, count=3),
    Centred(2),
    Centred(5),
    Wreath((Permutation(2),), 3),
    Wreath((Orthogonal(3),), 2),
    Wreath((Orthogonal(2), Orthogonal(3)), 3),
    Wreath((Permutation(3), Orthogonal(2)), 2),
]
PERMUTATIONS = [Permutation(4), Wreath((Permutation(2),), 3), Wreath((Permutation(3),), 2)]

every_group = pytest.mark.parametrize("group", GROUPS, ids=str)
seeds = given(seed=st.integers(0, 2**32 - 1))
few = settings(max_examples=8, deadline=None)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def width(group: Group, role: int) -> int:
    return group.count * group.sizes[role]


def matrix(group: Group, element: Element, role: int) -> Tensor:
    return element.act(torch.eye(width(group, role), dtype=torch.float64), 0, role)


def matrices(group: Group, element: Element) -> list[Tensor]:
    return [matrix(group, element, role) for role in range(len(group.sizes))]


def rows(group: Group, role: int, generator: torch.Generator, features: int = 5) -> Tensor:
    return torch.randn(width(group, role), features, generator=generator, dtype=torch.float64)


def scores_of(group: Group, anchor: list[Tensor], client: list[Tensor]) -> tuple[Tensor, ...]:
    roles = range(len(group.sizes))
    return tuple(group.score(anchor[role], client[role], role) for role in roles)


def random_scores(group: Group, generator: torch.Generator) -> tuple[Tensor, ...]:
    roles = range(len(group.sizes))
    anchor, client = ([rows(group, role, generator) for role in roles] for _ in range(2))
    return scores_of(group, anchor, client)


def all_permutations(group: Group) -> list[Element]:
    if group.is_permutation:
        orders = itertools.permutations(range(group.count))
        return [Element(torch.tensor(order), (None,), (1,)) for order in orders]
    size = group.sizes[0]
    eye = torch.eye(size, dtype=torch.float64)
    inner = [eye[list(order)] for order in itertools.permutations(range(size))]
    return [
        Element(torch.tensor(order), (torch.stack(blocks),), group.sizes)
        for order in itertools.permutations(range(group.count))
        for blocks in itertools.product(inner, repeat=group.count)
    ]


@every_group
def test_the_identity_changes_nothing(group: Group) -> None:
    identity = group.identity()
    assert identity.is_identity
    assert identity.displacement() == 0
    for dense in matrices(group, identity):
        torch.testing.assert_close(dense, torch.eye(len(dense), dtype=torch.float64))


@every_group
@few
@seeds
def test_an_inverse_undoes_from_both_sides(group: Group, seed: int) -> None:
    element = group.random(drawn(seed))
    for product in (element.inverse().after(element), element.after(element.inverse())):
        for dense in matrices(group, product):
            torch.testing.assert_close(dense, torch.eye(len(dense), dtype=torch.float64))


@every_group
@few
@seeds
def test_products_are_associative(group: Group, seed: int) -> None:
    generator = drawn(seed)
    f, g, h = (group.random(generator) for _ in range(3))
    left, right = f.after(g).after(h), f.after(g.after(h))
    for one, other in zip(matrices(group, left), matrices(group, right), strict=True):
        torch.testing.assert_close(one, other)


@every_group
@few
@seeds
def test_the_action_is_a_homomorphism(group: Group, seed: int) -> None:
    generator = drawn(seed)
    first, then = group.random(generator), group.random(generator)
    for one, other in ((first, then), (group.identity(), then), (first, group.identity())):
        product = other.after(one)
        for role, axis, owned in itertools.product(range(len(group.sizes)), (0, 1, 2), (1, 3)):
            shape = [2, 3, 4]
            shape[axis] = owned * width(group, role)
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
            torch.testing.assert_close(
                product.act(tensor, axis, role), other.act(one.act(tensor, axis, role), axis, role)
            )


@every_group
@few
@seeds
def test_elements_are_orthogonal_and_act_like_their_matrices(group: Group, seed: int) -> None:
    generator = drawn(seed)
    element = group.random(generator)
    for role, dense in enumerate(matrices(group, element)):
        torch.testing.assert_close(dense @ dense.mT, torch.eye(len(dense), dtype=torch.float64))
        tensor = torch.randn(3, len(dense), generator=generator, dtype=torch.float64)
        torch.testing.assert_close(element.act(tensor, 1, role), tensor @ dense.mT)


@every_group
@few
@seeds
def test_units_that_own_several_entries_keep_them_together(group: Group, seed: int) -> None:
    generator = drawn(seed)
    element = group.random(generator)
    for role, dense in enumerate(matrices(group, element)):
        features = torch.randn(len(dense), 4, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(element.act(features.reshape(-1), 0, role), (dense @ features).reshape(-1))


@every_group
@few
@seeds
def test_the_value_of_an_element_is_its_agreement_with_the_anchor(group: Group, seed: int) -> None:
    generator = drawn(seed)
    roles = range(len(group.sizes))
    anchor, client = ([rows(group, role, generator) for role in roles] for _ in range(2))
    scores = scores_of(group, anchor, client)
    for element in (group.random(generator), group.identity()):
        agreement = sum(float((anchor[role] * element.act(client[role], 0, role)).sum()) for role in roles)
        assert group.value(scores, element) == pytest.approx(agreement)


@every_group
@few
@seeds
def test_no_element_beats_the_maximiser(group: Group, seed: int) -> None:
    generator = drawn(seed)
    scores = random_scores(group, generator)
    best = group.value(scores, group.maximiser(scores, prior=0.0))
    rivals = [group.identity(), *(group.random(generator) for _ in range(20))]
    assert all(best >= group.value(scores, rival) - 1e-9 for rival in rivals)


@pytest.mark.parametrize("group", PERMUTATIONS, ids=str)
@few
@seeds
def test_the_maximiser_of_a_finite_group_is_the_best_of_all_elements(group: Group, seed: int) -> None:
    scores = random_scores(group, drawn(seed))
    best = max(group.value(scores, element) for element in all_permutations(group))
    assert group.value(scores, group.maximiser(scores, prior=0.0)) == pytest.approx(best)


@every_group
@few
@seeds
def test_the_maximiser_undoes_a_planted_element(group: Group, seed: int) -> None:
    generator = drawn(seed)
    planted = group.random(generator)
    roles = range(len(group.sizes))
    anchor = [rows(group, role, generator, features=40) for role in roles]
    client = [planted.act(anchor[role], 0, role) for role in roles]
    found = group.maximiser(scores_of(group, anchor, client), prior=1e-9)
    for one, other in zip(matrices(group, found), matrices(group, planted.inverse()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@every_group
def test_a_score_of_zeros_gives_the_identity(group: Group) -> None:
    roles = range(len(group.sizes))
    zeros = [torch.zeros(width(group, role), 2, dtype=torch.float64) for role in roles]
    found = group.maximiser(scores_of(group, zeros, zeros), prior=1e-6)
    assert found.displacement() < 1e-12


@every_group
@few
@seeds
def test_dead_and_duplicate_units_of_equal_models_stay_in_place(group: Group, seed: int) -> None:
    generator = drawn(seed)
    units = [rows(group, role, generator) for role in range(len(group.sizes))]
    for role, matrix_of_units in enumerate(units):
        half = width(group, role) // 2
        matrix_of_units[:half] = matrix_of_units[-1:].expand(half, -1).clone()
        matrix_of_units[0] = 0
    found = group.maximiser(scores_of(group, units, units), prior=1e-6)
    assert found.displacement() < 1e-6


@every_group
@few
@seeds
def test_moved_is_a_share(group: Group, seed: int) -> None:
    element = group.random(drawn(seed))
    assert 0 <= element.displacement() <= 1
    assert element.is_identity == (element.displacement() == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", PERMUTATIONS, ids=str)
def test_permutations_are_exact_in_every_precision(group: Group, dtype: torch.dtype) -> None:
    element = group.random(drawn(1))
    tensor = torch.randn(width(group, 0), 3, generator=drawn(2)).to(dtype)
    moved = element.act(tensor, 0)
    assert moved.dtype == dtype
    assert torch.equal(element.inverse().act(moved, 0), tensor)


def test_a_rotation_of_halves_is_rounded_once() -> None:
    element = Orthogonal(16).random(drawn(3))
    tensor = torch.randn(16, 5, generator=drawn(4)).half()
    exact = element.act(tensor.float(), 0)
    assert torch.equal(element.act(tensor, 0), exact.half())


def test_drawn_rotations_include_reflections() -> None:
    generator = drawn(5)
    signs = {round(float(torch.linalg.det(Orthogonal(3).inner_random(1, generator)[0]))) for _ in range(50)}
    assert signs == {-1, 1}


PROPERTIES = {
    "S(6)": (True, True, False),
    "O(6)": (False, False, False),
    "O(2)^3": (False, False, False),
    "C(6)": (False, False, False),
    "O(2)*O(3) wr S(3)": (False, True, False),
    "P(1) wr S(6)": (False, True, True),
    "GL(4) wr S(1)": (False, True, True),
    "(R(4,2)*O(2))xS(2) wr S(3)": (False, True, False),
    "((S(1)*O(1) wr S(3))*S(1))xS(2) wr S(2)": (False, True, False),
}


@pytest.mark.parametrize("text", PROPERTIES)
def test_a_group_says_what_its_elements_do(text: str) -> None:
    group = parse_group(text)
    assert str(group) == text
    assert (group.is_permutation, group.permutes_blocks, group.stretches) == PROPERTIES[text]


@pytest.mark.parametrize("text", PROPERTIES)
def test_the_subgroup_in_place_permutes_no_blocks(text: str) -> None:
    group = parse_group(text).in_place
    assert not group.permutes_blocks
    assert group.in_place == group
    assert group.sizes == parse_group(text).sizes
    element = group.random(drawn(0))
    assert element.is_in_place
    if not group.stretches:
        assert group.maximiser(random_scores(group, drawn(1)), prior=1e-6).is_in_place
