"""Discovery has at least what was written by hand for each published family: the oracles."""

import re
from collections import Counter

import pytest

from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.symmetry import Space
from tests.strategies.symmetry.tiny_transformers import MODELS, symmetry_of

# One member of each family; all others have `slow`.
SAMPLE = ("llama", "gpt2", "bert", "t5", "mixtral")


def factors(space: Space) -> Counter[str]:
    """The groups of a space's roles, in any order; the direct sum of two roles is as large as both."""
    return Counter(re.findall(r"[A-Z]+\([\d,]+\)|xS|wr", str(space.group).replace("*S(1)", "")))


def axes(space: Space) -> set[tuple[str, int]]:
    return {(axis.tensor, axis.dim) for axis in space.axes}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow) for n in MODELS])
def test_what_was_written_by_hand_is_discovered(name: str) -> None:
    model, inputs = MODELS[name].model(), tuple(MODELS[name].inputs.values())
    by_hand = symmetry_of(model)
    discovery = discover(model, *inputs)
    assert check(model, discovery.symmetry, *inputs, trials=1).passed
    for space in by_hand.spaces:
        (same,) = (found for found in discovery.symmetry.spaces if axes(space) <= axes(found))
        assert factors(space) <= factors(same), (str(space.group), str(same.group))
    assert set(by_hand.shifts) <= set(discovery.symmetry.shifts)
