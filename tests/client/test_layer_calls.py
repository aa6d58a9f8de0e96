"""Calls as they happen: rows and columns that belong together, through every way of calling a layer."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbasin.strategies.capture import layer_calls
from fedbasin.strategies.capture.layer_calls import LayerCall, LayerCalls
from fedbasin.strategies.fusion.layers import gram_layers
from fedbasin.strategies.statistics.gram import grams
from tests.strategies.symmetry.tiny_transformers import MODELS

W = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=W)


def seen(model, *inputs):
    found: list[LayerCall] = []
    with torch.no_grad(), LayerCalls(model, gram_layers(model), found.append):
        model(*inputs)
    return found


def rows_and_columns(product, values=None, mask=None):
    values = product.output if values is None else values
    return (torch.cat(list(product.rows(mask)), 1), torch.cat(list(product.columns(values, mask)), 1))


LAYERS = {
    "linear": (nn.Linear(4, 3), normal(5, 4)),
    "linear of tokens": (nn.Linear(4, 3, bias=False), normal(2, 5, 4)),
    "linear of one vector": (nn.Linear(4, 3), normal(4)),
    "convolution": (nn.Conv2d(2, 3, 3, padding=1), normal(4, 2, 5, 6)),
    "strided and dilated": (nn.Conv2d(2, 3, (3, 2), (2, 1), dilation=(1, 2)), normal(4, 2, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), normal(3, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), normal(3, 4, 5, 5)),
    "of one image": (nn.Conv2d(2, 3, 2), normal(2, 4, 4)),
}


@pytest.mark.parametrize("parts", ["whole", "in parts"])
@pytest.mark.parametrize(("layer", "x"), LAYERS.values(), ids=LAYERS)
def test_columns_are_the_weights_times_the_rows_in_the_same_order(monkeypatch, layer, x, parts):
    if parts == "in parts":
        monkeypatch.setattr(layer_calls, "ROW_ELEMENTS", 1)
    (product,) = seen(layer.to(W), x)
    rows, columns = rows_and_columns(product)
    weight = layer.weight.detach().flatten(1).unflatten(0, (product.layer.groups, -1))
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias.detach().view(*weight.shape[:2], 1)], 2)
    torch.testing.assert_close(columns, rows @ weight.mT)
    assert rows.shape[-1] == product.layer.inputs


def test_columns_take_any_values_in_the_place_of_the_output():
    layer, x = nn.Conv2d(2, 3, 3, dtype=W), normal(4, 2, 5, 5)
    (product,) = seen(layer, x)
    _, columns = rows_and_columns(product, 2 * product.output + 1)
    _, plain = rows_and_columns(product)
    torch.testing.assert_close(columns, 2 * plain + 1)


def test_a_mask_leaves_the_same_rows_out_of_both():
    layer, x = nn.Linear(4, 3, dtype=W), normal(3, 5, 4)
    mask = torch.arange(5) < torch.tensor([5, 1, 3]).unsqueeze(1)
    (product,) = seen(layer, x)
    rows, columns = rows_and_columns(product, mask=mask)
    torch.testing.assert_close(rows[0, :, :-1], x[mask])
    torch.testing.assert_close(columns[0], layer(x[mask]).detach())


CALLS = {
    "positions": lambda x, w, b: F.linear(x, w, b),
    "keywords": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "some of each": lambda x, w, b: F.linear(x, bias=b, weight=w),
    "keywords in another order": lambda x, w, b: F.linear(bias=b, weight=w, input=x),
}
CONVOLVED = {
    "positions": lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 1),
    "keywords": lambda x, w, b: F.conv2d(padding=1, stride=2, input=x, weight=w, bias=b),
    "pairs": lambda x, w, b: torch.conv2d(x, w, b, (2, 2), padding=[1, 1], dilation=(1,)),
    "words": lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1)), w, b, (2,), "valid"),
}


class Calling(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_linear_map_is_seen_however_it_is_called(call):
    (product,) = seen(Calling(nn.Linear(4, 3, dtype=W), call), x := normal(5, 4))
    assert product.inputs is x


@pytest.mark.parametrize("call", CONVOLVED.values(), ids=CONVOLVED)
def test_a_convolution_is_seen_however_it_is_called(call):
    model = Calling(nn.Conv2d(2, 3, 3, dtype=W), call)
    (product,) = seen(model, normal(2, 2, 5, 5))
    rows, columns = rows_and_columns(product)
    weight = torch.cat([model.layer.weight.flatten(1), model.layer.bias[:, None]], 1).detach()
    torch.testing.assert_close(columns[0], rows[0] @ weight.T)


def test_what_attention_multiplies_is_seen_inside():
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=W)
    x = normal(3, 5, 8)
    joint, out = seen(attention, x, x, x)
    assert joint.layer.block == ("in_proj_weight", "in_proj_bias")
    assert out.layer.block == ("out_proj.weight", "out_proj.bias")
    assert (joint.inputs.shape, joint.output.shape) == ((3, 5, 8), (3, 5, 24))
    torch.testing.assert_close(out.output, attention(x, x, x)[0].detach())


def test_attention_to_something_else_shows_its_output_projection_alone():
    """Queries and keys then read different tensors, so the joint projection is no single product."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=W)
    blocks = [p.layer.block[0] for p in seen(attention, normal(3, 5, 8), *[normal(3, 4, 8)] * 2)]
    assert blocks == ["out_proj.weight"]


def test_a_copy_is_safe_from_steps_in_place():
    layer, x = nn.Linear(4, 3, dtype=W), normal(5, 4)
    (product,) = seen(layer, x)
    copy = product.copy()
    x.zero_()
    product.output.zero_()
    assert copy.inputs.any()
    assert copy.output.any()


def hooked_grams(model, inputs):
    """Grams by forward hooks on every linear layer."""
    found = {}

    def hook(name):
        def see(layer, args, output):
            rows = args[0].reshape(-1, layer.in_features).double()
            if layer.bias is not None:
                rows = F.pad(rows, (0, 1), value=1.0)
            found[name] = found.get(name, 0) + rows.T @ rows

        return see

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_a_transformers_grams_are_those_of_forward_hooks(name):
    tiny = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the library says of its own future
        model = tiny.model().double()
        inputs = tuple(tiny.inputs.values())
        expected = hooked_grams(model, inputs)
    found = grams(model, [(inputs[0], torch.zeros(len(inputs[0])))])
    linear = [block for block in found if block[0].removesuffix(".weight") in expected]
    assert len(linear) > 10
    for block in linear:
        torch.testing.assert_close(found[block], expected[block[0].removesuffix(".weight")])
