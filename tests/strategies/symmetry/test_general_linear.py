from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.groups.block_groups import agreement
from fedbasin.strategies.symmetry.groups.general_linear import Conformal, General, IllConditionedError, contragredient
from fedbasin.strategies.symmetry.groups.groups import Wreath
from fedbasin.strategies.symmetry.groups.scale import best_scale
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry, SymmetryError, parse
from fedbasin.strategies.symmetry.transform import random
from tests.strategies.symmetry.by_hand.prenorm_transformer import preln_transformer
from tests.strategies.symmetry.families import Transformer
from tests.strategies.symmetry.test_groups import drawn
from tests.strategies.symmetry.test_transform import gram

positive = st.floats(0, 5)
either = st.floats(-5, 5)


def double(*numbers: float) -> list[Tensor]:
    return [torch.tensor(number, dtype=torch.float64) for number in numbers]


def gain(a: Tensor, p: float, q: float, r: float, s: float) -> Tensor:
    return a * q - a**2 * p / 2 + s / a - r / a**2 / 2


@given(p=positive, q=either, r=positive, s=either)
@settings(max_examples=200, deadline=None)
def test_no_scale_within_bounds_is_better_than_the_best(p: float, q: float, r: float, s: float) -> None:
    found = best_scale(*double(p, q, r, s))
    grid = torch.logspace(-4, 4, 20001, base=2, dtype=torch.float64)
    assert 1 / 16 <= float(found) <= 16
    best = float(gain(grid, p, q, r, s).max())
    assert float(gain(found, p, q, r, s)) >= best - 1e-9 * max(1, abs(best))


def test_a_unit_that_says_nothing_keeps_its_scale() -> None:
    assert float(best_scale(*double(0, 0, 0, 0))) == 1


def relu_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.LeakyReLU(), nn.Linear(6, 3))


RELU = parse(
    "a  P(1) wr S(7)  0.weight[0] 0.bias[0] 2.weight[1]@1\nb  P(1) wr S(6)  2.weight[0] 2.bias[0] 4.weight[1]@1\n"
)


# Queries against keys and values against outputs: the second of each pair is on the dual role.
DUAL_ROLES = [("query.", 0), ("key.", 1), ("value.", 2), ("output.", 3)]


def attention() -> tuple[nn.Module, Symmetry]:
    torch.manual_seed(0)
    model = Transformer(width=16)
    symmetry = preln_transformer(model.state_dict(), heads=4)
    spaces = tuple(stretched(space) if space.name.startswith("heads") else space for space in symmetry.spaces)
    return model, replace(symmetry, spaces=spaces)


def stretched(space: Space) -> Space:
    """The heads of a block with a scale on queries against keys and on values against outputs."""
    axes = tuple(replace(axis, role=role) for axis in space.axes for part, role in DUAL_ROLES if part in axis.tensor)
    return replace(space, group=Wreath((Conformal(4), Conformal(4)), 4), axes=axes)


def rectified() -> tuple[nn.Module, Symmetry]:
    return relu_net(), RELU


def planted_pair(make: tuple[nn.Module, Symmetry], seed: int) -> tuple[Symmetry, dict[str, Tensor], dict[str, Tensor]]:
    model, symmetry = make
    anchor = model.double().state_dict()
    return symmetry, anchor, random(symmetry, drawn(seed)).act(anchor)


MODELS = {"relu": (rectified, torch.zeros(3, 5)), "attention": (attention, torch.zeros(2, 8, 8))}
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_scales_keep_the_function(name: str) -> None:
    make, inputs = MODELS[name]
    report = check(*make(), inputs)
    assert report.passed, report


@every_model
def test_what_divides_left_on_the_other_side_is_noticed(name: str) -> None:
    make, inputs = MODELS[name]
    model, symmetry = make()
    wrong = parse(str(symmetry).replace("0.bias[0] ", "0.bias[0]@1 ").replace("query.bias[0]", "query.bias[0]@1"))
    report = check(model, wrong, inputs)
    assert not report.passed


def test_scales_around_a_bent_activation_are_noticed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    assert check(model, RELU, torch.zeros(3, 5)).guilty == ("a",)


@every_model
@pytest.mark.parametrize("seed", range(3))
def test_planted_scales_are_undone(name: str, seed: int) -> None:
    symmetry, anchor, client = planted_pair(MODELS[name][0](), seed)
    found = match_weights(symmetry, anchor, client)
    # A gain below 1e-7 is no progress to the search, and gains are squares of what is left.
    assert found.report.distance_after < 1e-3 * found.report.distance_before
    again = match_weights(symmetry, anchor, found.state)
    assert all(space.moved < 1e-3 for space in again.report.spaces)


@every_model
def test_aligning_with_scales_brings_closer_than_without(name: str) -> None:
    make, _ = MODELS[name]
    symmetry, anchor, client = planted_pair(make(), 1)
    noisy = {n: t + 0.1 * torch.randn(t.shape, generator=drawn(2)) for n, t in client.items()}
    found = match_weights(symmetry, anchor, noisy).report
    assert found.distance_after < 0.7 * found.distance_before


@every_model
def test_equal_models_keep_their_scales(name: str) -> None:
    model, symmetry = MODELS[name][0]()
    state = model.double().state_dict()
    assert match_weights(symmetry, state, dict(state)).transform.is_identity


def squared_gradients(model: nn.Module, state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    loss = torch.func.functional_call(model, leaves, (x,)).square().sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {name: g.square() for name, g in zip(leaves, found, strict=True)}


def test_squared_gradients_follow_scales() -> None:
    model, symmetry = rectified()
    state, x = model.double().state_dict(), torch.randn(4, 5, dtype=torch.float64)
    transform = random(symmetry, drawn(3))
    assert not any(transform.mixes(name) for name in state)
    moved = transform.act_on_squares(squared_gradients(model, state, x))
    for name, expected in squared_gradients(model, transform.act(state), x).items():
        torch.testing.assert_close(moved[name], expected)


def test_second_moments_of_inputs_follow_scales() -> None:
    model, symmetry = rectified()
    state, x = model.double().state_dict(), torch.randn(4, 5, dtype=torch.float64)
    transform = random(symmetry, drawn(4))

    def read_by_the_last(tensors: dict[str, Tensor]) -> Tensor:
        model.load_state_dict(tensors)
        return gram(model[4], model[:4](x), ones=True).detach()

    before, after = read_by_the_last(state), read_by_the_last(transform.act(dict(state)))
    assert not torch.allclose(before, after)
    model.load_state_dict(transform.inverse().act(model.state_dict()))
    torch.testing.assert_close(transform.act_on_inputs("4.weight", before, inputs=6), after)


def stretched_scores(seed: int, size: int, silent: bool = False) -> tuple[Tensor, Tensor]:
    """What two roles with 6 features say; a silent one is the fresh factor of an adapter, zero."""
    generator = drawn(seed)
    anchors, clients = (
        [torch.randn(size, 6, generator=generator, dtype=torch.float64) for _ in range(2)] for _ in range(2)
    )
    if silent:
        anchors[1], clients[1] = torch.zeros(size, 6), torch.zeros(size, 6)
    pairs = zip(anchors, clients, strict=True)
    primal, dual = (torch.cat([a.double() @ c.double().mT, c.double() @ c.double().mT], 1) for a, c in pairs)
    return primal, dual


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_general_group_never_does_worse_than_rotations(seed: int, silent: bool) -> None:
    scores = stretched_scores(seed, 4, silent)
    general, conformal = General(4).values(scores), Conformal(4).values(scores)
    assert general >= conformal - 1e-9
    left, _, right = torch.linalg.svd(scores[0][:, :4] + scores[1][:, :4])
    rotated = agreement(left @ right, scores[0]) + agreement(left @ right, scores[1])
    assert conformal >= rotated - 1e-9
    assert torch.linalg.cond(General(4).maximisers(scores)[0]) < 1e3


def test_a_map_that_cannot_be_undone_is_refused_by_name() -> None:
    with pytest.raises(IllConditionedError, match=r"2 dimensions.*O\(2\)"):
        contragredient(torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-7]], dtype=torch.float64))


def test_what_cannot_stretch_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        Wreath((Wreath((Conformal(1),), 2),), 3)
    with pytest.raises(SymmetryError, match="one role"):
        parse("h R(4,2)+CO(2) wr S(2) q[0]")
