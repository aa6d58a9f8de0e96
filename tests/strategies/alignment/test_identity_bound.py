import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedbasin.strategies.alignment import identity_bound
from fedbasin.strategies.alignment.coordinate_ascent import agreement
from fedbasin.strategies.alignment.identity_bound import IdentityBounds, drifts_of, identity_bounds
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry, parse
from fedbasin.strategies.symmetry.transform import random

SYMMETRY = parse("hidden S(7) in.weight[0] in.bias[0] (mean[0]) out.weight[1]")
(HIDDEN,) = SYMMETRY.spaces
State = dict[str, Tensor]
seeds = st.integers(0, 2**32 - 1)
many = settings(max_examples=150, deadline=None)


def drawn(generator: torch.Generator, dtype: torch.dtype) -> State:
    shapes = {"in.weight": (7, 3), "in.bias": (7,), "mean": (7,), "out.weight": (2, 14)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def scaled(state: State, factor: float) -> State:
    return {name: tensor * factor for name, tensor in state.items()}


def added(a: State, b: State) -> State:
    return {name: tensor + b[name] for name, tensor in a.items()}


def best_order(anchor: State, client: State) -> list[int]:
    """Straight from the definition: every unit against every unit, in double."""

    def units(state: State) -> Tensor:
        out = state["out.weight"].double().reshape(2, 7, 2).movedim(1, 0).reshape(7, -1)
        parts = [state["in.weight"].double(), state["in.bias"].double()[:, None], out]
        return torch.cat(parts, 1)

    cost = (units(anchor)[:, None] - units(client)[None]).square().sum(-1)
    return linear_sum_assignment(cost.numpy())[1].tolist()


def is_certified(space: Space, anchor: State, client: State, bounds: IdentityBounds) -> bool:
    return identity_bound.is_certified(space, drifts_of(space, anchor, client), bounds)


def keeps_order(space: Space, anchor: State, client: State, bounds: IdentityBounds) -> bool:
    return identity_bound.keeps_order(space, drifts_of(space, anchor, client), bounds)


def certified(anchor: State, client: State) -> bool:
    return is_certified(HIDDEN, anchor, client, identity_bounds(SYMMETRY, anchor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@many
@given(seed=seeds, noise=st.floats(0.01, 1.0), size=st.sampled_from([1e-3, 1.0, 100.0]))
def test_whenever_it_holds_the_assignment_is_the_identity(
    dtype: torch.dtype, seed: int, noise: float, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    anchor = scaled(drawn(generator, dtype), size)
    client = added(anchor, scaled(drawn(generator, dtype), size * noise))
    if certified(anchor, client):
        assert best_order(anchor, client) == list(range(7))


@many
@given(seed=seeds, gap=st.floats(0, 1e-2), noise=st.floats(0, 1e-2), offset=st.floats(0, 1e4))
def test_it_stays_sound_for_near_duplicates_far_from_the_origin(
    seed: int, gap: float, noise: float, offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    anchor = drawn(generator, torch.float32)
    for tensor, axis in (("in.weight", 0), ("in.bias", 0)):
        first = anchor[tensor].narrow(axis, 0, 1) + offset
        anchor[tensor] = first.expand_as(anchor[tensor]) + gap * anchor[tensor]
    anchor["out.weight"] = anchor["out.weight"][:, :1].expand(2, 14).clone()
    client = added(anchor, scaled(drawn(generator, torch.float32), noise * gap))
    if certified(anchor, client):
        assert best_order(anchor, client) == list(range(7))


@many
@given(seed=seeds)
def test_no_change_below_the_radius_escapes_it(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    anchor, change = (drawn(generator, torch.float32) for _ in range(2))
    bound = float(identity_bounds(SYMMETRY, anchor)["hidden"].min())
    length = float(torch.cat([change[n].flatten() for n in change if n != "mean"]).norm())
    assert certified(anchor, added(anchor, scaled(change, 0.99 * bound / length)))


@many
@given(seed=seeds, step=st.floats(0.4, 0.6))
def test_it_ends_where_two_units_that_walk_towards_each_other_meet(seed: int, step: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    units = torch.randn(7, 3, generator=generator)
    nearest = torch.cdist(units, units).fill_diagonal_(torch.inf).argmin()
    i, j = int(nearest) // 7, int(nearest) % 7
    moved = units.clone()
    moved[i] += step * (units[j] - units[i])
    moved[j] += step * (units[i] - units[j])
    symmetry = parse("walk S(7) w[0]")
    bounds = identity_bounds(symmetry, {"w": units})
    holds = is_certified(symmetry.spaces[0], {"w": units}, {"w": moved}, bounds)
    assert holds == (step < 0.5) or abs(step - 0.5) < 1e-3


def test_equal_models_of_distinct_units_are_certified() -> None:
    anchor = drawn(torch.Generator().manual_seed(0), torch.float32)
    assert certified(anchor, dict(anchor))


def test_duplicate_units_are_never_certified() -> None:
    anchor = drawn(torch.Generator().manual_seed(0), torch.float32)
    for tensor, width in (("in.weight", 1), ("in.bias", 1)):
        anchor[tensor][1:2] = anchor[tensor][:width]
    anchor["out.weight"][:, 2:4] = anchor["out.weight"][:, :2]
    assert not certified(anchor, dict(anchor))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_certified(value: float) -> None:
    anchor = drawn(torch.Generator().manual_seed(0), torch.float32)
    broken = {**anchor, "in.bias": torch.full((7,), value)}
    assert not certified(anchor, broken)
    assert not certified(broken, anchor)


def test_running_statistics_do_not_count() -> None:
    anchor = drawn(torch.Generator().manual_seed(0), torch.float32)
    assert certified(anchor, {**anchor, "mean": 1e6 * anchor["mean"]})


def test_units_and_blocks_that_change_places_have_bounds() -> None:
    symmetry = parse("plain S(4) a[0]\nturned O(4) b[0]\ngroups S(2) wr S(2) c[0]\ntwice S(4) d[0] d[1]")
    state = {name: torch.randn(4, 4) for name in "abcd"}
    bounds = identity_bounds(symmetry, state)
    assert {name: bound.shape for name, bound in bounds.items()} == {"plain": (4,), "groups": (2,)}
    assert not is_certified(symmetry.spaces[1], state, state, bounds)


def test_a_wide_space_is_compared_in_pieces_with_the_same_bounds() -> None:
    units = torch.randn(1500, 3, generator=torch.Generator().manual_seed(0))
    symmetry: Symmetry = parse("wide S(1500) w[0]")
    apart = torch.cdist(units.double(), units.double()).fill_diagonal_(torch.inf)
    found = identity_bounds(symmetry, {"w": units})["wide"].double()
    # Rounding in single precision is given away, never claimed.
    exact = apart.amin(1) / 2
    assert bool((found <= exact * (1 + 1e-6)).all())
    torch.testing.assert_close(found, exact, rtol=3e-2, atol=1e-7)


def test_a_single_unit_has_nowhere_to_go() -> None:
    symmetry = parse("one S(1) w[0]")
    state = {"w": torch.randn(1, 3)}
    assert is_certified(symmetry.spaces[0], state, {"w": state["w"] + 9}, identity_bounds(symmetry, state))


HEADS = parse("heads O(3)*O(2) wr S(4) q[0]@0 k[0]@0 v[0]@1 o[1]@1")
SIGNED = parse("units O(1) wr S(6) up[0] down[1]")
GROUPED = parse("groups (O(2)*O(2))xS(2) wr S(2) many[0]@2 v[0,0:4]@0 v[0,4:8]@1 few[1]@3")
SHAPES = {
    "many": (8, 9),
    "few": (9, 8),
    "q": (12, 9),
    "k": (12, 9),
    "v": (8, 9),
    "o": (9, 8),
    "up": (6, 9),
    "down": (9, 6),
}


def blocks(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


@pytest.mark.parametrize("symmetry", [HEADS, SIGNED, GROUPED], ids=["heads", "signed", "grouped"])
@many
@given(seed=seeds, noise=st.floats(0.01, 1.0))
def test_whenever_the_order_of_blocks_is_proven_the_best_element_exchanges_none(
    symmetry: Symmetry, seed: int, noise: float
) -> None:
    (space,), anchor = symmetry.spaces, blocks(seed)
    client = added(anchor, scaled(blocks(seed + 1), noise))
    if keeps_order(space, anchor, client, identity_bounds(symmetry, anchor)):
        scores = agreement(space, space.group, anchor, client)
        assert space.group.maximiser(scores, 0.0).order.tolist() == list(range(space.group.count))


@pytest.mark.parametrize("symmetry", [HEADS, SIGNED, GROUPED], ids=["heads", "signed", "grouped"])
def test_a_client_near_the_anchor_keeps_its_order_and_turns_as_without_the_proof(symmetry: Symmetry) -> None:
    anchor = blocks(0)
    client = added(anchor, scaled(blocks(1), 0.05))
    bounds = identity_bounds(symmetry, anchor)
    assert keeps_order(symmetry.spaces[0], anchor, client, bounds)
    proven = match_weights(symmetry, anchor, client, bounds)
    searched = match_weights(symmetry, anchor, client)
    torch.testing.assert_close(proven.state, searched.state, rtol=1e-5, atol=1e-5)
    assert not is_certified(symmetry.spaces[0], anchor, client, bounds)


def test_exchanged_heads_are_not_called_in_place() -> None:
    (space,), anchor = HEADS.spaces, blocks(0)
    client = random(HEADS, torch.Generator().manual_seed(0)).act(anchor)
    assert not keeps_order(space, anchor, client, identity_bounds(HEADS, anchor))


def test_blocks_that_stretch_have_no_bound() -> None:
    symmetry = parse("units P(1) wr S(6) up[0]@0 down[1]@1")
    assert not identity_bounds(symmetry, blocks(0))
