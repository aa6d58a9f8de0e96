"""Discovery has at least what was written by hand for each published family: the oracles."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbasin.strategies.symmetry.check import DOUBLE_TOLERANCE, check
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry
from fedbasin.strategies.symmetry.transform import Transform, random
from tests.strategies.symmetry.by_hand.families import FAMILIES
from tests.strategies.symmetry.tiny_transformers import MODELS, discovered, hf, symmetry_of

# One member of each kind of family; all others have `slow`.
SAMPLE = ("llama", "gpt2", "bert", "t5", "mixtral")
every_model = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow) for n in MODELS]
)


def factors(space: Space) -> Counter[str]:
    """The groups of a space's roles, in any order; the direct sum of two roles is as large as both."""
    return Counter(re.findall(r"[A-Z]+\([\d,]+\)|xS|wr", str(space.group).replace("*S(1)", "")))


def axes(space: Space) -> set[tuple[str, int]]:
    return {(axis.tensor, axis.dim) for axis in space.axes}


@every_model
def test_what_was_written_by_hand_is_discovered(name: str) -> None:
    model, inputs = MODELS[name].model(), tuple(MODELS[name].inputs.values())
    by_hand, symmetry = symmetry_of(model), discovered(name)
    assert check(model, by_hand, *inputs, trials=1).passed
    assert check(model, symmetry, *inputs, trials=1).passed
    for space in by_hand.spaces:
        (same,) = (found for found in symmetry.spaces if axes(space) <= axes(found))
        assert factors(space) <= factors(same), (str(space.group), str(same.group))
    assert set(by_hand.shifts) <= set(symmetry.shifts)


def test_every_family_is_an_oracle() -> None:
    types = {MODELS[name].make().config.model_type for name in MODELS}  # type: ignore[union-attr]
    assert types == set(FAMILIES)


def change(model: nn.Module, inputs: tuple[Tensor, ...], state: Mapping[str, Tensor]) -> float:
    """How far another state takes the outputs, in double."""
    with torch.no_grad():
        before, after = (
            functional_call(model, dict(tensors), inputs, tie_weights=False) for tensors in (model.state_dict(), state)
        )
    pairs = zip(before, after, strict=True) if isinstance(before, tuple) else [(before, after)]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def displacing(symmetry: Symmetry) -> Transform:
    """A random transform that leaves no space's units all in their places."""
    drawn = (random(symmetry, torch.Generator().manual_seed(seed)) for seed in range(1000))
    return next(g for g in drawn if all(moves(element) for element in g.elements.values()))


def moves(element: Element) -> bool:
    home = torch.arange(len(element.order))
    return len(home) == 1 or not torch.equal(element.order, home)


@every_model
def test_only_what_says_nothing_may_be_left_behind(name: str) -> None:
    model, symmetry = MODELS[name].model(), discovered(name)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in MODELS[name].inputs.values())
    state = model.double().state_dict()
    transform = displacing(symmetry)
    assert change(model, inputs, transform.act(state)) < DOUBLE_TOLERANCE
    silent, gauges = set(), set()
    for space in symmetry.spaces:
        for axis in space.axes:
            others = tuple(m for m in space.axes if m != axis)
            alone = Symmetry((replace(space, axes=others),))
            moved = Transform(alone, {space.name: transform.elements[space.name]}).act(state)
            if change(model, inputs, moved) < 1e-6:
                silent.add(axis.tensor)
            if not axis.scored:
                gauges.add(axis.tensor)
    # Called without ties, T5 reads its stacks' names of the shared table.
    assert silent - {"shared.weight"} == gauges


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("gpt2", {"transformer.wte.weight", "lm_head.weight"}),
        ("bert", {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}),
        ("t5", {"shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"}),
    ],
)
def test_all_names_of_a_tied_table_move_alike(name: str, tables: set[str]) -> None:
    state = MODELS[name].model().state_dict()
    assert len({state[table].data_ptr() for table in tables}) == 1
    moved = random(discovered(name), torch.Generator().manual_seed(0)).act(state)
    first, *others = (moved[table] for table in tables)
    assert not torch.equal(first, state[next(iter(tables))])
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("model", "config"), [(hf.BertModel, hf.BertConfig), (hf.LlamaModel, hf.LlamaConfig)])
def test_a_model_without_a_head_hands_its_stream_out(model: type, config: type) -> None:
    sizes = {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 3}
    bare = model(config(**sizes, vocab_size=31, max_position_embeddings=16)).eval()
    spaces = discover(bare, torch.tensor([[3, 9, 21, 7], [5, 8, 30, 11]])).symmetry.spaces
    assert not any("embed" in axis.tensor for space in spaces for axis in space.axes)
    assert len(spaces) >= 2
