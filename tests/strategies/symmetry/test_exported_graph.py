import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.discover.exported_graph import follow_exported
from fedbasin.strategies.symmetry.discover.module_graph import follow_modules
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from tests.strategies.symmetry.families import FAMILIES
from tests.strategies.symmetry.test_attention_layers import IMAGES, Images
from tests.strategies.symmetry.test_module_graph import NASTY, Net

# Group normalisation has no rule, nor have per-channel slopes and softmax over channels of their own.
SAME = [
    *("convnet", "depthwise", "twice", "tied", "branches", "resnet", "resnext", "mobilenet"),
    *("linear_residual", "layer_norm"),
]


def trace_exported(model: nn.Module, example: Tensor) -> Symmetry:
    return follow_exported(model, example).symmetry()


@pytest.mark.parametrize("name", SAME)
def test_an_exported_model_has_the_spaces_that_were_traced(name: str) -> None:
    make, example = FAMILIES[name]
    torch.manual_seed(0)
    model = make()

    def moved(symmetry: object) -> set[frozenset[str]]:
        return {frozenset(line.split()[1:]) for line in str(symmetry).splitlines()}

    assert moved(trace_exported(model, example)) == moved(follow_modules(model, example).symmetry())


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_found_leaves_the_function_as_it_was(name: str) -> None:
    make, example = FAMILIES[name]
    torch.manual_seed(0)
    model = make()
    symmetry = trace_exported(model, example)
    assert check(model, symmetry, example).passed


@pytest.mark.parametrize("name", NASTY)
def test_nothing_is_guessed(name: str) -> None:
    _, forward, layers = NASTY[name]
    torch.manual_seed(0)
    model, example = Net(forward, **copy.deepcopy(layers)), torch.randn(4, 5)
    try:
        symmetry = trace_exported(model, example)
    except SymmetryError:
        return
    report = check(model, symmetry, example)
    assert report.passed, f"{symmetry}{report}"


class Deciding(nn.Module):
    """Loops over a length and asks for types, which torch.fx cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(5, 6)
        self.again = nn.Linear(6, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([F.relu(self.into(row)) for row in x.unbind()]) if len(x) < 1 else self.into(x)
        return self.out(F.gelu(self.again(F.relu(x))) if int(x.dim()) == 2 else x)


def test_a_model_that_decides_by_shapes_is_followed_as_exported() -> None:
    model, example = Deciding(), torch.randn(4, 5)
    with pytest.raises(SymmetryError, match=r"cannot be traced by torch\.fx"):
        follow_modules(model, example)
    symmetry = trace_exported(model, example)
    assert [str(space.group) for space in symmetry.spaces] == ["S(6)", "S(7)"]
    assert check(model, symmetry, example).passed


def test_of_attention_the_stream_and_the_units_are_found() -> None:
    torch.manual_seed(0)
    model = Images()
    groups = [str(space.group) for space in trace_exported(model, IMAGES).spaces]
    assert sorted(groups) == ["S(12)", "S(12)", "S(8)"]
    assert check(model, trace_exported(model, IMAGES), IMAGES).passed


class ByData(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_a_model_that_decides_by_data_is_refused_by_name() -> None:
    with pytest.raises(SymmetryError, match="ByData cannot be exported"):
        trace_exported(ByData(), torch.randn(4, 5))
