"""Planted elements are found again in every architecture: orders and signs exactly, rotations to the prior."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry
from fedbasin.strategies.symmetry.transform import Transform, random
from fedbasin.strategies.tensors.state import distance
from tests.strategies.symmetry.test_transform import grams_of
from tests.strategies.symmetry.tiny_transformers import MODELS, discovered

# One member of each kind of family; all others have `slow`.
SAMPLE = ("gpt2", "qwen3", "mixtral", "t5_gated", "deberta_v2")
every_model = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow) for n in MODELS]
)
State = dict[str, Tensor]


def anchored(name: str) -> tuple[Symmetry, State]:
    return discovered(name), MODELS[name].model().double().state_dict()


def near(state: Mapping[str, Tensor], size: float, generator: torch.Generator) -> State:
    noise: dict[int, Tensor] = {}  # tied tensors stay tied
    return {
        name: tensor
        + size
        * noise.setdefault(tensor.data_ptr(), torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        for name, tensor in state.items()
    }


def scored(symmetry: Symmetry, state: State) -> State:
    silent = {m.tensor for space in symmetry.spaces for m in space.axes if not m.scored}
    return {name: tensor for name, tensor in state.items() if name not in silent}


def is_exact(space: Space, product: Element) -> bool:
    """Whether orders are undone to the last unit, and signs of single units with them."""
    signs = [b for b, size in zip(product.blocks, space.group.sizes, strict=True) if size == 1]
    in_place = torch.equal(product.order, torch.arange(space.group.count))
    return in_place and all(b is None or bool((b == 1).all()) for b in signs)


@every_model
def test_elements_planted_at_all_spaces_at_once_are_undone(name: str) -> None:
    symmetry, anchor = anchored(name)
    planted = random(symmetry, torch.Generator().manual_seed(1))
    found = match_weights(symmetry, anchor, planted.act(anchor))
    products = found.transform.after(planted).elements
    assert all(is_exact(space, products[space.name]) for space in symmetry.spaces)
    assert found.report.distance_after < 1e-5 * found.report.distance_before
    assert all(torch.allclose(anchor[n], found.state[n], atol=1e-4) for n in scored(symmetry, anchor))


@every_model
def test_a_client_near_the_anchor_is_found_behind_a_planted_element(name: str) -> None:
    symmetry, anchor = anchored(name)
    generator = torch.Generator().manual_seed(2)
    close = near(anchor, 0.05, generator)
    planted = random(symmetry, generator)
    found = match_weights(symmetry, anchor, planted.act(close))
    products = found.transform.after(planted).elements
    assert all(is_exact(space, products[space.name]) for space in symmetry.spaces)
    assert found.report.distance_after <= distance(scored(symmetry, anchor), close)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mixtral", "t5_gated", "deberta_v2"])
def test_aligning_twice_changes_nothing(name: str) -> None:
    symmetry, anchor = anchored(name)
    generator = torch.Generator().manual_seed(3)
    client = random(symmetry, generator).act(near(anchor, 0.3, generator))
    once = match_weights(symmetry, anchor, client)
    again = match_weights(symmetry, anchor, once.state)
    assert again.report.distance_after == pytest.approx(once.report.distance_after, rel=1e-6)
    assert all(space.moved < 1e-3 for space in again.report.spaces)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mixtral", "t5"])
def test_equal_models_stay_as_they_are(name: str) -> None:
    symmetry, anchor = anchored(name)
    assert match_weights(symmetry, anchor, dict(anchor)).transform.is_identity


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "t5", "mixtral"])
def test_an_inverse_undoes_and_a_product_acts_in_turn(name: str) -> None:
    symmetry, anchor = anchored(name)
    generator = torch.Generator().manual_seed(4)
    first, then = random(symmetry, generator), random(symmetry, generator)
    moved: State = first.act(anchor)
    assert distance(first.inverse().act(moved), anchor) < 1e-12
    product: Transform = then.after(first)
    assert distance(product.act(anchor), then.act(moved)) < 1e-12


@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "qwen3", "gpt_neox", "mixtral", "deberta_v2"])
def test_grams_move_with_the_layers_that_read_them(name: str, ones: bool) -> None:
    model = MODELS[name].model().double()
    symmetry, state = discovered(name), model.state_dict()
    (tokens,) = MODELS[name].inputs.values()
    transform = random(symmetry, torch.Generator().manual_seed(5))
    before = grams_of(model, state, tokens, ones=ones)
    after = grams_of(model, transform.act(state), tokens, ones=ones)
    assert len(before) > 7
    for layer, own in before.items():
        weight = f"{layer}.weight"
        moved = transform.act_on_inputs(weight, own, state[weight].shape[1])
        torch.testing.assert_close(moved, after[layer])
