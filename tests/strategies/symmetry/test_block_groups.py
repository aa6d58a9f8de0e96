import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedbasin.strategies.symmetry.groups.block_groups import DirectSum, PairSigns, Rotary
from fedbasin.strategies.symmetry.groups.general_linear import Conformal, General, Positive
from fedbasin.strategies.symmetry.groups.group_notation import parse_group
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.groups.shared_heads import SharedHeads
from fedbasin.strategies.symmetry.symmetry_error import SymmetryError
from tests.strategies.symmetry.by_hand.draft import gated, signed
from tests.strategies.symmetry.test_groups import drawn, matrices, random_scores, rows, scores_of, width

HEAD = (Rotary(4, 2), Orthogonal(3))
GROUPS: dict[str, Group] = {
    "O(1) wr S(5)": signed(5),
    "O(1)*S(1) wr S(5)": signed(5, scales=True),
    "S(1)*O(1) wr S(5)": gated(5),
    "R(6,3)*O(3) wr S(3)": Wreath((Rotary(6, 3), Orthogonal(3)), 3),
    "R(6,1) wr S(2)": Wreath((Rotary(6, 1),), 2),
    "Z(6,3)*O(2) wr S(3)": Wreath((PairSigns(6, 3), Orthogonal(2)), 3),
    "R(4,2)+O(3) wr S(2)": Wreath((DirectSum((Rotary(4, 2), Orthogonal(3))),), 2),
    "(R(4,2)*O(3))xS(2) wr S(3)": Wreath((SharedHeads(HEAD, 2),), 3),
    "(R(4,2)*O(3))xS(3) wr S(1)": Wreath((SharedHeads(HEAD, 3),), 1),
    "(Z(4,2)*O(2))xS(2) wr S(2)": Wreath((SharedHeads((PairSigns(4, 2), Orthogonal(2)), 2),), 2),
    "(S(1)*O(1) wr S(3))*S(1) wr S(3)": Wreath((gated(3), Permutation(1)), 3),
    "(S(3) wr S(2))*O(2) wr S(2)": Wreath((Wreath((Permutation(3),), 2), Orthogonal(2)), 2),
    "P(1) wr S(6)": Wreath((Positive(1),), 6),
    "P(1)*S(1) wr S(4)": Wreath((Positive(1), Permutation(1)), 4),
    "P(3)*O(2) wr S(2)": Wreath((Positive(3), Orthogonal(2)), 2),
    "S(1)*CO(1) wr S(5)": Wreath((Permutation(1), Conformal(1)), 5),
    "CO(3)*CO(2) wr S(3)": Wreath((Conformal(3), Conformal(2)), 3),
    "GL(3) wr S(1)": Wreath((General(3),), 1),
    "GL(2) wr S(2)": Wreath((General(2),), 2),
}
FINITE = [
    signed(3),
    signed(3, scales=True),
    gated(3),
    Wreath((PairSigns(4, 2),), 2),
    Wreath((SharedHeads((Orthogonal(1), Orthogonal(1)), 2),), 2),
    Wreath((gated(2), Permutation(1)), 2),
]

every_group = pytest.mark.parametrize("group", GROUPS.values(), ids=str)
seeds = given(seed=st.integers(0, 2**32 - 1))
few = settings(max_examples=4, deadline=None)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("text", GROUPS)
def test_a_group_is_written_and_read_back(text: str) -> None:
    assert str(GROUPS[text]) == text
    assert parse_group(text) == GROUPS[text]


@every_group
@few
@seeds
def test_a_dual_role_has_the_inverse_transposes_and_elements_compose(group: Group, seed: int) -> None:
    generator = drawn(seed)
    f, g, h = (group.random(generator) for _ in range(3))
    assert group.identity().is_identity
    for role in range(len(group.sizes)):
        one, two, product = (matrices(group, e)[role] for e in (f, g, g.after(f)))
        torch.testing.assert_close(matrices(group, f)[f.dual(role)] @ one.mT, eye(len(one)))
        torch.testing.assert_close(product, two @ one)
        torch.testing.assert_close(matrices(group, f.inverse())[role] @ one, eye(len(one)))
        left, right = h.after(g).after(f), h.after(g.after(f))
        torch.testing.assert_close(matrices(group, left)[role], matrices(group, right)[role])
    assert 0 < f.displacement() <= 1 or f.is_identity


@every_group
@few
@seeds
def test_products_and_inverses_stay_in_the_group(group: Group, seed: int) -> None:
    # An element of the group is its own best match; one that left it would be matched worse.
    generator = drawn(seed)
    element = group.random(generator).after(group.random(generator).inverse())
    roles = range(len(group.sizes))
    scores = scores_of(group, matrices(group, element), [eye(width(group, role)) for role in roles])
    best = group.value(scores, group.maximiser(scores, prior=0.0))
    norms = sum(float(m.square().sum()) + len(m) for m in matrices(group, element))
    assert best == pytest.approx(norms / 2)


@every_group
@few
@seeds
@example(seed=830940051)  # an ascent of GL(3) from the best start ends in a maximum that is not the largest
def test_no_element_beats_the_maximiser(group: Group, seed: int) -> None:
    generator = drawn(seed)
    scores = random_scores(group, generator)
    best = group.value(scores, group.maximiser(scores, prior=0.0))
    rivals = [group.identity(), *(group.random(generator) for _ in range(30))]
    assert all(best >= group.value(scores, rival) - 1e-9 for rival in rivals)


@every_group
@few
@seeds
def test_the_value_falls_with_the_distance_to_the_anchor(group: Group, seed: int) -> None:
    generator = drawn(seed)
    roles = range(len(group.sizes))
    anchor, client = ([rows(group, role, generator) for role in roles] for _ in range(2))
    scores = scores_of(group, anchor, client)
    norms = sum(float(m.square().sum()) for m in (*anchor, *client))
    for element in (group.random(generator), group.identity()):
        moved = [element.act(client[role], 0, role) for role in roles]
        apart = sum(float((a - b).square().sum()) for a, b in zip(anchor, moved, strict=True))
        assert group.value(scores, element) == pytest.approx((norms - apart) / 2)


@every_group
@few
@seeds
def test_a_planted_element_is_undone(group: Group, seed: int) -> None:
    generator = drawn(seed)
    planted = group.random(generator)
    roles = range(len(group.sizes))
    anchor = [rows(group, role, generator, features=40) for role in roles]
    client = [planted.act(anchor[role], 0, role) for role in roles]
    found = group.maximiser(scores_of(group, anchor, client), prior=1e-9)
    for one, other in zip(matrices(group, found), matrices(group, planted), strict=True):
        torch.testing.assert_close(one @ other, eye(len(one)), atol=1e-6, rtol=0)


@every_group
def test_a_score_of_zeros_gives_the_identity(group: Group) -> None:
    roles = range(len(group.sizes))
    zeros = [torch.zeros(width(group, role), 2, dtype=torch.float64) for role in roles]
    assert group.maximiser(scores_of(group, zeros, zeros), prior=1e-6).displacement() < 1e-12


def small_elements(group: Wreath, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
    """All elements of a small group: so many draws that none is missed."""
    found = {}
    for _ in range(4000):
        element = tuple(matrices(group, group.random(generator)))
        found[tuple(tuple(role.flatten().tolist()) for role in element)] = element
    return list(found.values())


@pytest.mark.parametrize(("group", "order"), list(zip(FINITE, [48, 48, 48, 32, 128, 128], strict=True)), ids=str)
def test_the_maximiser_of_a_finite_group_is_the_best_of_all_elements(group: Wreath, order: int) -> None:
    elements = small_elements(group, drawn(0))
    assert len(elements) == order
    for seed in range(5):
        generator = drawn(seed)
        roles = range(len(group.sizes))
        anchor, client = ([rows(group, role, generator) for role in roles] for _ in range(2))
        scores = scores_of(group, anchor, client)
        best = max(sum(float((anchor[role] * (e[role] @ client[role])).sum()) for role in roles) for e in elements)
        assert group.value(scores, group.maximiser(scores, prior=0.0)) == pytest.approx(best)


def positions(size: int, stride: int, place: float) -> Tensor:
    """What rotary codes do at a place: pairs turn by their own frequency."""
    first = torch.arange(size).reshape(-1, 2, stride)[:, 0].flatten()
    second = first + stride
    angles = place * 100.0 ** (-torch.arange(size // 2, dtype=torch.float64) / size)
    turn = torch.zeros(size, size, dtype=torch.float64)
    turn[first, first] = turn[second, second] = angles.cos()
    turn[second, first], turn[first, second] = angles.sin(), -angles.sin()
    return turn


@pytest.mark.parametrize(("size", "stride"), [(8, 4), (8, 1), (8, 2), (2, 1)])
def test_rotary_elements_commute_with_every_position(size: int, stride: int) -> None:
    (element,) = Rotary(size, stride).inner_random(1, drawn(1))
    for place in (1.0, 7.0, 30.0):
        turn = positions(size, stride, place)
        torch.testing.assert_close(element @ turn, turn @ element)
    assert float(torch.linalg.det(element)) == pytest.approx(1)


def test_the_other_layout_does_not_commute() -> None:
    (element,) = Rotary(8, 1).inner_random(1, drawn(1))
    turn = positions(8, 4, 3.0)
    assert not torch.allclose(element @ turn, turn @ element, atol=0.1)


@few
@seeds
def test_the_closed_form_of_a_pair_is_the_best_angle(seed: int) -> None:
    score = torch.randn(2, 2, generator=drawn(seed), dtype=torch.float64)
    angles = torch.linspace(0, 6.2832, 20001, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    values = cos * (score[0, 0] + score[1, 1]) + sin * (score[1, 0] - score[0, 1])
    found = Rotary(2, 1).inner_values(score)
    assert float(found) == pytest.approx(float(values.max()), abs=1e-6)
    best = Rotary(2, 1).inner_maximisers(score)
    torch.testing.assert_close((best * score).sum(), found)


def test_signs_of_pairs_are_two_for_each_pair() -> None:
    drawn_signs = PairSigns(4, 2).inner_random(400, drawn(0))
    diagonals = {tuple(m.diagonal().tolist()) for m in drawn_signs}
    assert diagonals == {(a, b, a, b) for a in (-1.0, 1.0) for b in (-1.0, 1.0)}


@pytest.mark.parametrize("heads", [4, 5, 6])
def test_many_heads_on_one_key_are_put_back(heads: int) -> None:
    group = Wreath((SharedHeads((Rotary(4, 2), Orthogonal(2)), heads),), 2)
    roles = range(4)
    for seed in range(4):
        generator = drawn(seed)
        planted = group.random(generator)
        anchor = [rows(group, role, generator, features=12) for role in roles]
        noise = [0.05 * rows(group, role, generator, features=12) for role in roles]
        client = [planted.act(a + n, 0, role) for role, a, n in zip(roles, anchor, noise, strict=True)]
        found = group.maximiser(scores_of(group, anchor, client), prior=1e-9)
        for one, other in zip(matrices(group, found), matrices(group, planted), strict=True):
            assert float((one @ other - eye(len(one))).abs().max()) < 0.2


@few
@seeds
def test_climbing_never_ends_below_the_identity(seed: int) -> None:
    group = Wreath((SharedHeads((Rotary(2, 1), Orthogonal(2)), 5),), 1)
    scores = random_scores(group, drawn(seed))
    best = group.value(scores, group.maximiser(scores, prior=0.0))
    still = scores_at_home(group, scores)
    assert best >= still - 1e-9


def scores_at_home(group: Wreath, scores: tuple[Tensor, ...]) -> float:
    """The value when heads stay and only their common element is chosen."""
    key, value, query, output = (score[0, 0] for score in scores)
    joined = [
        alone + sum(many[2 * h : 2 * h + 2, 2 * h : 2 * h + 2] for h in range(5))
        for alone, many in ((key, query), (value, output))
    ]
    rotary = Rotary(2, 1).inner_values(joined[0])
    return float(rotary + torch.linalg.svdvals(joined[1]).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_signed_permutations_are_exact_in_every_precision(dtype: torch.dtype) -> None:
    element = signed(6).random(drawn(2))
    tensor = torch.randn(3, 12, 2, generator=drawn(3)).to(dtype)
    moved = element.act(tensor, 1)
    assert moved.dtype == dtype
    assert torch.equal(element.inverse().act(moved, 1), tensor)
    assert bool((matrices(signed(6), element)[0] < 0).any())


def test_signs_of_units_that_own_several_entries_are_common_to_them() -> None:
    element = signed(3).random(drawn(4))
    (dense,) = matrices(signed(3), element)
    features = torch.randn(3, 4, generator=drawn(5), dtype=torch.float64)
    torch.testing.assert_close(element.act(features.reshape(-1), 0), (dense @ features).reshape(-1))


@pytest.mark.parametrize(("size", "stride"), [(6, 2), (5, 1), (4, 4), (4, 0), (0, 1)])
def test_pairs_that_do_not_fill_the_head_are_refused(size: int, stride: int) -> None:
    for kind in (Rotary, PairSigns):
        with pytest.raises(ValueError, match="pairs"):
            kind(size, stride)


@pytest.mark.parametrize(
    "text",
    [
        *("R(8,4)", "Z(8,4)", "R(8,3) wr S(2)", "R(8) wr S(2)", "S(8,4)", "O(4)+O(4)"),
        *("O(4) wr ", " wr S(4)", "O(4)+ wr S(2)", "(O(4)*O(4) wr S(2)", "(O(4)) wr S(2)"),
        *("(O(4))xO(2) wr S(2)", "O(4)xS(2) wr S(2)", "O(4) wr S(2) wr S(2)", "O(4) wr S(2)*S(1)"),
        *("S(2)^1", "O(4)  wr S(2)", "O(0) wr S(2)", "(O(4) wr S(2)", "", "*", "O(4)^2*O(2) wr S(2)"),
    ],
)
def test_what_is_no_group_is_refused(text: str) -> None:
    with pytest.raises(SymmetryError):
        parse_group(text)
