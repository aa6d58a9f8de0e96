from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.groups.groups import Orthogonal, Permutation
from fedbasin.strategies.symmetry.symmetry import Symmetry, parse
from fedbasin.strategies.symmetry.transform import Transform, identity, random
from fedbasin.strategies.tensors.state import State, distance, tied
from tests.strategies.symmetry.by_hand.prenorm_transformer import preln_transformer
from tests.strategies.symmetry.families import FAMILIES, Transformer


def family(name: str) -> tuple[nn.Module, Symmetry, Tensor]:
    make, example = FAMILIES[name]
    torch.manual_seed(0)
    model = make().double().eval()
    inputs = torch.randn(example.shape).double() if example.is_floating_point() else example
    symmetry = (
        preln_transformer(model.state_dict(), heads=4)
        if isinstance(model, Transformer)
        else discover(model, inputs).symmetry
    )
    return model, symmetry, inputs


def drawn(symmetry: Symmetry, seed: int = 0) -> Transform:
    return random(symmetry, torch.Generator().manual_seed(seed))


def gram(layer: nn.Module, inputs: Tensor, *, ones: bool) -> Tensor:
    """Sum of `x x^T` over all that a layer reads; a convolution reads patches."""
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = patches.transpose(1, 2).flatten(0, 1)
    else:
        rows = inputs.flatten(0, -2)
    if ones:
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    return rows.mT @ rows


@contextmanager
def recording(model: nn.Module, grams: dict[str, Tensor], *, ones: bool) -> Iterator[None]:
    def hook(name: str):
        def note(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            grams[name] = grams.get(name, 0) + gram(layer, inputs[0], ones=ones)

        return note

    handles = [
        layer.register_forward_hook(hook(name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]
    yield
    for handle in handles:
        handle.remove()


def grams_of(model: nn.Module, state: State, inputs: Tensor, *, ones: bool) -> dict[str, Tensor]:
    grams: dict[str, Tensor] = {}
    with recording(model, grams, ones=ones), torch.no_grad():
        functional_call(model, dict(state), (inputs,), tie_weights=False)
    return grams


@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_grams_move_with_the_layers_that_read_them(name: str, ones: bool) -> None:
    model, symmetry, inputs = family(name)
    transform, state = drawn(symmetry), model.state_dict()
    before = grams_of(model, state, inputs, ones=ones)
    after = grams_of(model, transform.act(state), inputs, ones=ones)
    assert before
    for layer, own in before.items():
        weight = f"{layer}.weight"
        moved = transform.act_on_inputs(weight, own, state[weight].shape[1])
        torch.testing.assert_close(moved, after[layer])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_inverse_undoes_a_transform(name: str) -> None:
    model, symmetry, _ = family(name)
    transform, state = drawn(symmetry), model.state_dict()
    moved = transform.act(state)
    assert distance(state, moved) > 0
    assert distance(state, transform.inverse().act(moved)) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_a_product_acts_like_its_factors_in_turn(name: str) -> None:
    model, symmetry, _ = family(name)
    first, then, state = drawn(symmetry), drawn(symmetry, 1), model.state_dict()
    product = then.after(first)
    assert distance(product.act(state), then.act(first.act(state))) < 1e-12


def test_spaces_without_an_element_stay_as_they_are() -> None:
    model, symmetry, _ = family("mlp")
    state, space = model.state_dict(), symmetry.spaces[1]
    whole = drawn(symmetry)
    partial = Transform(symmetry, {space.name: whole.elements[space.name]})
    moved = partial.act(state)
    assert moved["0.weight"] is state["0.weight"]
    assert not torch.equal(moved["4.weight"], state["4.weight"])
    other = Transform(symmetry, {"0": whole.elements["0"]})
    assert distance(other.after(partial).act(state), whole.act(state)) == 0
    assert distance(partial.after(other).act(state), whole.act(state)) == 0


def test_the_identity_changes_nothing() -> None:
    model, symmetry, _ = family("transformer")
    state = model.state_dict()
    assert identity(symmetry).is_identity
    assert distance(identity(symmetry).act(state), state) == 0
    assert not drawn(symmetry).is_identity


def test_a_state_with_some_of_the_tensors_moves_those() -> None:
    model, symmetry, _ = family("mlp")
    transform, state = drawn(symmetry), model.state_dict()
    part = {"0.bias": state["0.bias"]}
    assert torch.equal(transform.act(part)["0.bias"], transform.act(state)["0.bias"])


def test_only_rotations_mix_entries() -> None:
    _, symmetry, _ = family("transformer")
    transform = drawn(symmetry)
    assert transform.mixes("blocks.0.attention.output.weight")
    assert not transform.mixes("blocks.0.mlp.up.weight")
    assert not identity(symmetry).mixes("blocks.0.attention.output.weight")


MONOMIAL = ["S(4)", "S(2) wr S(2)", "O(1) wr S(4)", "Z(2,1) wr S(2)", "S(1)*O(1) wr S(4)"]


@pytest.mark.parametrize("group", MONOMIAL)
def test_squared_gradients_follow_orders_and_signs(group: str) -> None:
    roles = "a[0] b[1]@1" if "*" in group else "a[0] b[1]"
    transform = drawn(parse(f"s {group} {roles}"), seed=3)
    gradients = {"a": torch.randn(4, 3), "b": torch.randn(2, 4)}
    assert not any(transform.mixes(name) for name in gradients)
    squares = {name: gradient.square() for name, gradient in gradients.items()}
    moved = transform.act_on_squares(squares)
    for name, gradient in transform.act(gradients).items():
        assert torch.equal(moved[name], gradient.square())


def test_tied_tensors_stay_one_and_others_stay_apart() -> None:
    model, symmetry, _ = family("tied")
    state = model.state_dict()
    names = tied(state)
    moved = drawn(symmetry).act(state)
    (one, other), *_ = [(name, first) for name, first in names.items() if name != first]
    assert moved[one] is moved[other]
    assert not torch.equal(moved[one], state[one])
    untied = {name: tensor.clone() for name, tensor in state.items()}
    apart = drawn(symmetry).act(untied)
    assert apart[one] is not apart[other]
    assert torch.equal(apart[one], moved[one])
    torn = parse("a S(3) x[0]\nb S(3) y[0]")
    shared = torch.arange(3.0)
    elements = {"a": Permutation(3).identity(), "b": Permutation(3).random(torch.Generator())}
    found = Transform(torn, elements).act({"x": shared, "y": shared})
    assert torch.equal(found["x"], shared)
    assert torch.equal(found["y"], elements["b"].act(shared, 0))


def test_what_is_stored_input_first_moves_its_inputs_too() -> None:
    symmetry = parse("a S(4) up[1] down[0]")
    transform = drawn(symmetry)
    features = torch.randn(9, 4, dtype=torch.float64)
    moved = transform.act({"up": features, "down": torch.zeros(4, 2)})["up"]
    gram = transform.act_on_inputs("down", features.mT @ features, inputs=4, dim=0)
    torch.testing.assert_close(gram, moved.mT @ moved)


def test_parts_of_a_fused_tensor_move_alone() -> None:
    symmetry = parse("q O(2)^2 in.weight[0,0:4]\nv S(4) in.weight[0,8:12] out.weight[1,4:8]")
    generator = torch.Generator().manual_seed(0)
    state = {"in.weight": torch.randn(12, 3), "out.weight": torch.randn(2, 8)}
    moved = random(symmetry, generator).act(state)
    assert torch.equal(moved["in.weight"][4:8], state["in.weight"][4:8])
    assert not torch.equal(moved["in.weight"][:4], state["in.weight"][:4])
    assert torch.equal(moved["out.weight"][:, :4], state["out.weight"][:, :4])
    rows = state["in.weight"][8:].tolist()
    assert sorted(rows) == sorted(moved["in.weight"][8:].tolist())


def test_the_gram_of_a_part_moves_alone() -> None:
    symmetry = parse("v O(4) out.weight[1,4:8]")
    transform = Transform(symmetry, {"v": Orthogonal(4).random(torch.Generator().manual_seed(0))})
    features = torch.randn(20, 9, dtype=torch.float64)
    turned = torch.cat([features[:, :4], transform.elements["v"].act(features[:, 4:8], 1), features[:, 8:]], 1)
    moved = transform.act_on_inputs("out.weight", features.mT @ features, inputs=8)
    torch.testing.assert_close(moved, turned.mT @ turned)
