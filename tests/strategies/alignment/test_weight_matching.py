from collections.abc import Mapping
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedbasin.strategies.alignment.identity_bound import identity_bounds
from fedbasin.strategies.alignment.weight_matching import Alignment, match_weights
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.symmetry import Symmetry, parse
from fedbasin.strategies.symmetry.transform import Transform, random
from fedbasin.strategies.tensors.state import distance
from tests.strategies.symmetry.by_hand.prenorm_transformer import preln_transformer
from tests.strategies.symmetry.families import FAMILIES, Transformer

few = settings(max_examples=6, deadline=None)
seeds = st.integers(0, 2**32 - 1)
State = dict[str, Tensor]
FAMILY = pytest.mark.parametrize("name", FAMILIES)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def symmetry_of(name: str) -> tuple[Symmetry, nn.Module]:
    make, example = FAMILIES[name]
    torch.manual_seed(0)
    model = make()
    if isinstance(model, Transformer):
        return preln_transformer(model.state_dict(), heads=4), model
    return discover(model, example).symmetry, model


def family(name: str, seed: int = 0) -> tuple[Symmetry, State]:
    """A family's symmetry and a state of generic values."""
    symmetry, model = symmetry_of(name)
    return symmetry, near(model.state_dict(), 0.3, seed)


def near(state: Mapping[str, Tensor], size: float, seed: int) -> State:
    generator = drawn(seed)
    noise: dict[int, Tensor] = {}  # tied tensors stay tied
    moved = {
        name: tensor + size * noise.setdefault(tensor.data_ptr(), torch.randn(tensor.shape, generator=generator))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }
    # No model has a variance below zero.
    return {n: t.abs() if n.endswith("running_var") else t for n, t in moved.items()}


def planted(symmetry: Symmetry, space: int, seed: int) -> Transform:
    chosen = symmetry.spaces[space]
    return Transform(symmetry, {chosen.name: chosen.group.random(drawn(seed))})


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def agreement(symmetry: Symmetry, anchor: State, client: Mapping[str, Tensor]) -> float:
    names = {axis.tensor for space in symmetry.spaces for axis in space.scored}
    return sum(float((anchor[name].double() * client[name].double()).sum()) for name in names)


def only_permutes(symmetry: Symmetry) -> Symmetry:
    spaces = [space for space in symmetry.spaces if space.group.is_permutation]
    return Symmetry(tuple(spaces))


@FAMILY
def test_a_transform_planted_at_a_space_is_undone(name: str) -> None:
    symmetry, anchor = family(name)
    for i, space in enumerate(symmetry.spaces):
        if not space.quadratic:
            client = planted(symmetry, i, seed=i).act(anchor)
            found = match_weights(symmetry, anchor, client)
            if any(not other.group.is_permutation for other in symmetry.spaces):
                assert distance(anchor, found.state) < 1e-4 * distance(anchor, {**client}) + 1e-3
            else:
                assert equal(found.state, anchor)


def test_permutations_planted_everywhere_are_undone_to_the_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 9))
    symmetry, anchor = discover(model, torch.zeros(2, 32)).symmetry, model.state_dict()
    for seed in range(5):
        client = random(symmetry, drawn(seed)).act(anchor)
        found = match_weights(symmetry, anchor, client)
        assert equal(found.state, anchor)
        assert found.report.distance_before > 0
        assert found.report.distance_after == 0


def test_rotations_planted_everywhere_are_undone_to_the_prior() -> None:
    torch.manual_seed(0)
    anchor = Transformer(bias=True).double().state_dict()
    symmetry = preln_transformer(anchor, heads=4, residual=False)
    for seed in range(3):
        client = random(symmetry, drawn(seed)).act(anchor)
        found = match_weights(symmetry, anchor, client)
        assert found.report.distance_after < 1e-5 * found.report.distance_before
        exact = match_weights(symmetry, anchor, client, prior=0.0)
        assert exact.report.distance_after < 1e-9 * exact.report.distance_before


def aligned(name: str, seed: int) -> tuple[Symmetry, State, State, Alignment]:
    symmetry, anchor = family(name)
    _, client = family(name, seed)
    return symmetry, anchor, client, match_weights(symmetry, anchor, client)


@FAMILY
@few
@given(seed=seeds)
def test_the_objective_never_falls_and_the_distance_never_rises(name: str, seed: int) -> None:
    symmetry, anchor, client, found = aligned(name, seed)
    before, after = (agreement(symmetry, anchor, state) for state in (client, found.state))
    assert after >= before - 1e-5 * abs(before)
    report = found.report
    assert report.distance_after <= report.distance_before * (1 + 1e-6)
    assert all(space.gain >= 0 and 0 <= space.moved <= 1 for space in report.spaces)
    assert [space.space for space in report.spaces] == [space.name for space in symmetry.spaces]
    assert distance(found.transform.act(client), found.state) < 1e-3


@FAMILY
@few
@given(seed=seeds)
def test_aligning_twice_changes_nothing(name: str, seed: int) -> None:
    symmetry, anchor, _, found = aligned(name, seed)
    again = match_weights(symmetry, anchor, found.state)
    assert again.transform.is_identity
    assert equal(again.state, found.state)


@FAMILY
@few
@given(seed=seeds)
def test_a_client_near_the_anchor_stays_with_and_without_a_bound(name: str, seed: int) -> None:
    symmetry, anchor = family(name)
    symmetry = only_permutes(symmetry)
    client = near(anchor, 1e-3, seed)
    searched = match_weights(symmetry, anchor, client)
    bounds = identity_bounds(symmetry, anchor)
    proven = match_weights(symmetry, anchor, client, bounds)
    for found in (searched, proven):
        assert found.transform.is_identity
        assert equal(found.state, client)
        assert found.report.sweeps == bool(symmetry.spaces)
    assert not any(space.certified for space in searched.report.spaces)
    assert {space.space for space in proven.report.spaces if space.certified} == set(bounds)


def test_a_client_turned_by_a_hair_is_turned_back() -> None:
    torch.manual_seed(0)
    anchor = Transformer().state_dict()
    symmetry = preln_transformer(anchor, heads=4)
    found = match_weights(symmetry, anchor, near(anchor, 1e-2, seed=1))
    turned = [space for space in found.report.spaces if space.space.startswith("heads")]
    assert all(0 < space.moved < 0.1 for space in turned)
    assert found.report.distance_after < found.report.distance_before


@FAMILY
def test_equal_models_with_dead_and_duplicate_units_are_left_alone(name: str) -> None:
    symmetry, anchor = family(name)
    for space in symmetry.spaces:
        for axis in space.axes:
            units = anchor[axis.tensor] = anchor[axis.tensor].clone()
            half = units.shape[axis.dim] // 2
            units.narrow(axis.dim, 0, half).zero_()
    found = match_weights(symmetry, anchor, dict(anchor))
    assert found.transform.is_identity


def test_ties_among_units_of_great_length_go_to_the_identity() -> None:
    symmetry = parse("a S(6) w[0]")
    anchor = {"w": torch.cat([1e6 * torch.ones(3, 50), torch.randn(3, 50)])}
    assert match_weights(symmetry, anchor, dict(anchor)).transform.is_identity


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_clients_of_another_precision_are_aligned_and_keep_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 9))
    symmetry, anchor = discover(model, torch.zeros(2, 32)).symmetry, model.state_dict()
    there = {name: tensor.to(dtype) for name, tensor in anchor.items()}
    client = random(symmetry, drawn(3)).act(there)
    for reference in (anchor, there):
        found = match_weights(symmetry, reference, client, identity_bounds(symmetry, reference))
        assert equal(found.state, there)
        assert all(tensor.dtype == dtype for tensor in found.state.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_in_half_precision_are_turned_back_to_its_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    anchor = Transformer().state_dict()
    symmetry = preln_transformer(anchor, heads=4, residual=False)
    turned = random(symmetry, drawn(1)).act(anchor)
    client = {name: tensor.to(dtype) for name, tensor in turned.items()}
    report = match_weights(symmetry, anchor, client).report
    assert report.distance_after < 1e-2 * report.distance_before


def test_a_quadratic_space_is_improved_until_it_stops() -> None:
    symmetry, anchor = family("linear_residual")
    client = random(symmetry, drawn(5)).act(near(anchor, 0.05, 2))
    found = match_weights(symmetry, anchor, client)
    assert found.report.spaces[0].gain > 0
    assert found.report.distance_after < found.report.distance_before


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_a_step_at_a_quadratic_space_is_taken_only_if_it_helps(seed: int) -> None:
    symmetry, generator = parse("loop S(5) w[0] w[1]"), drawn(seed)
    anchor, client = ({"w": torch.randn(5, 5, generator=generator)} for _ in range(2))
    found = match_weights(symmetry, anchor, client)
    assert found.report.distance_after <= found.report.distance_before
    assert match_weights(symmetry, anchor, found.state).transform.is_identity


def test_running_statistics_do_not_decide_but_follow() -> None:
    symmetry, anchor = family("convnet")
    client = random(symmetry, drawn(1)).act(anchor)
    client["bn1.running_var"] = client["bn1.running_var"] * 1000
    found = match_weights(symmetry, anchor, client)
    assert equal({**found.state, "bn1.running_var": anchor["bn1.running_var"]}, anchor)
    torch.testing.assert_close(found.state["bn1.running_var"], anchor["bn1.running_var"] * 1000)
    assert found.report.distance_after == 0


def test_neither_side_is_changed_in_place() -> None:
    symmetry, anchor = family("transformer")
    _, client = family("transformer", 1)
    copies = [{n: t.clone() for n, t in state.items()} for state in (anchor, client)]
    match_weights(symmetry, anchor, client)
    assert equal(anchor, copies[0])
    assert equal(client, copies[1])


def test_sweeps_are_bounded() -> None:
    symmetry, anchor = family("resnet")
    _, client = family("resnet", 1)
    assert match_weights(symmetry, anchor, client, max_sweeps=1).report.sweeps == 1
    nothing = match_weights(symmetry, anchor, client, max_sweeps=0)
    assert nothing.transform.is_identity


def test_a_moved_space_whose_neighbours_settle_is_not_called_certified() -> None:
    symmetry, anchor = family("mlp")
    client = random(symmetry, drawn(4)).act(anchor)
    report = match_weights(symmetry, anchor, client, identity_bounds(symmetry, anchor)).report
    assert all(not (space.certified and space.moved) for space in report.spaces)
