"""Discovery has at least what was written by hand for plain pre-norm transformers of any names."""

import pytest
import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.symmetry import Symmetry
from tests.strategies.symmetry.by_hand.prenorm_transformer import Names, preln_transformer
from tests.strategies.symmetry.families import Block, Transformer
from tests.strategies.symmetry.test_discovery_of_families import axes, factors

IMAGES = torch.zeros(2, 8, 8)


def assert_at_least(symmetry: Symmetry, by_hand: Symmetry) -> None:
    for space in by_hand.spaces:
        (same,) = (found for found in symmetry.spaces if axes(space) <= axes(found))
        assert factors(space) <= factors(same), (str(space.group), str(same.group))
    assert set(by_hand.shifts) <= set(symmetry.shifts)


@pytest.mark.parametrize("bias", [True, False])
def test_what_was_written_by_hand_is_discovered(bias: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(width=16, heads=4, bias=bias)
    by_hand = preln_transformer(model.state_dict(), 4)
    assert check(model, by_hand, IMAGES).passed
    assert_at_least(discover(model, IMAGES).symmetry, by_hand)


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
    model, tokens = Language(), torch.arange(10).reshape(2, 5)
    by_hand = preln_transformer(model.state_dict(), 2, LANGUAGE)
    assert check(model, by_hand, tokens).passed
    assert_at_least(discover(model, tokens).symmetry, by_hand)
