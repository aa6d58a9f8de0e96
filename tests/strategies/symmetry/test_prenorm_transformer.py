from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.groups.groups import Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.models.prenorm_transformer import Names, preln_transformer
from fedbasin.strategies.symmetry.symmetry import SymmetryError, parse
from tests.strategies.symmetry.families import Block, Transformer

IMAGES = torch.zeros(2, 8, 8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_the_function_is_left_as_it_was(bias: bool, residual: bool, heads: int) -> None:
    torch.manual_seed(0)
    model = Transformer(width=16, heads=heads, bias=bias)
    symmetry = preln_transformer(model.state_dict(), heads, residual=residual)
    report = check(model, symmetry, IMAGES)
    assert report.passed, report


def test_the_residual_stream_comes_first_then_block_by_block() -> None:
    spaces = preln_transformer(Transformer().state_dict(), heads=4).spaces
    names = ["residual", "heads.0", "mlp.0", "heads.1", "mlp.1"]
    head = Wreath((Orthogonal(8), Orthogonal(8)), 4)
    assert [space.name for space in spaces] == names
    assert [space.group for space in spaces] == [*(Permutation(32), head, Permutation(64), head, Permutation(64))]


def test_the_residual_stream_can_be_left_as_it_is() -> None:
    state = Transformer().state_dict()
    whole = preln_transformer(state, heads=4)
    assert preln_transformer(state, heads=4, residual=False).spaces == whole.spaces[1:]


def test_the_notation_holds_all_of_it() -> None:
    symmetry = preln_transformer(Transformer().state_dict(), heads=4)
    assert parse(str(symmetry)) == symmetry


def test_a_key_bias_moves_but_says_nothing() -> None:
    symmetry = preln_transformer(Transformer().state_dict(), heads=4)
    silent = [m.tensor for space in symmetry.spaces for m in space.axes if not m.scored]
    assert silent == [f"blocks.{block}.attention.key.bias" for block in (0, 1)]


class Language(nn.Module):
    """Tokens, other names, and a head that is the token table."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.places = nn.Embedding(5, 8)
        self.layers = nn.ModuleDict({f"layer{i}": Block(8, 2, bias=True) for i in range(2)})
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        for layer in self.layers.values():
            x = layer(x)
        return self.head(self.norm(x))


LANGUAGE = Names(
    embedding=None,
    tables=("tokens.weight", "places.weight"),
    attention_norm="layers.layer{block}.attention_norm",
    query="layers.layer{block}.attention.query",
    key="layers.layer{block}.attention.key",
    value="layers.layer{block}.attention.value",
    output="layers.layer{block}.attention.output",
    mlp_norm="layers.layer{block}.mlp_norm",
    up="layers.layer{block}.mlp.up",
    down="layers.layer{block}.mlp.down",
    final_norm="norm",
)


def test_any_naming_fits() -> None:
    torch.manual_seed(0)
    model = Language()
    symmetry = preln_transformer(model.state_dict(), 2, LANGUAGE)
    assert len(symmetry.spaces) == 5
    assert check(model, symmetry, torch.arange(10).reshape(2, 5)).passed


def test_a_single_block_needs_no_number() -> None:
    names = Names(query="blocks.0.attention.query")
    spaces = preln_transformer(Transformer().state_dict(), 4, names).spaces
    assert [space.name for space in spaces] == ["residual", "heads.0", "mlp.0"]


def test_a_model_without_a_head_has_one_axis_less() -> None:
    state = Transformer().state_dict()
    (whole, *_), (bare, *_) = (preln_transformer(state, 4, names).spaces for names in (Names(), Names(head=None)))
    assert [m.tensor for m in whole.axes if m not in bare.axes] == ["head.weight"]


def changed(**tensors: Tensor | None) -> Mapping[str, Tensor]:
    state = dict(Transformer().state_dict())
    for name, tensor in tensors.items():
        full = name.replace("__", ".")
        if tensor is None:
            del state[full]
        else:
            state[full] = tensor
    return state


@pytest.mark.parametrize(
    "name",
    [
        "positions",
        "embedding__weight",
        "final_norm__weight",
        "head__weight",
        "blocks__0__attention__query__weight",
        "blocks__0__attention__key__weight",
        "blocks__1__attention__output__weight",
        "blocks__1__mlp_norm__weight",
        "blocks__1__mlp__down__weight",
    ],
)
def test_a_missing_tensor_is_named(name: str) -> None:
    with pytest.raises(SymmetryError, match=repr(name.replace("__", "."))):
        preln_transformer(changed(**{name: None}), heads=4)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("positions", (8, 16)),
        ("blocks__1__attention__query__weight", (32, 16)),
        # Fewer keys than queries: another group.
        ("blocks__0__attention__key__weight", (16, 32)),
        ("blocks__0__attention__output__weight", (32, 64)),
        ("blocks__0__mlp__down__bias", (64,)),
        # A gated MLP writes two features for each that is read.
        ("blocks__0__mlp__up__weight", (128, 32)),
        ("blocks__0__attention__value__weight", (96,)),
    ],
)
def test_a_shape_that_does_not_fit_is_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(SymmetryError, match=r"blocks\.|positions"):
        preln_transformer(changed(**{name: torch.zeros(shape)}), heads=4)


@pytest.mark.parametrize("heads", [0, 5, 64])
def test_heads_that_do_not_divide_the_width_are_refused(heads: int) -> None:
    with pytest.raises(SymmetryError, match="number of heads"):
        preln_transformer(Transformer().state_dict(), heads)
