import pytest
import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.discover.module_graph import follow_modules
from fedbasin.strategies.symmetry.symmetry import SymmetryError
from tests.strategies.symmetry.families import FAMILIES, mlp
from tests.strategies.symmetry.test_attention_layers import IMAGES, Images
from tests.strategies.symmetry.test_exported_graph import ByData, Deciding
from tests.strategies.symmetry.test_module_graph import NASTY, Net


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_fx_covers_has_the_symmetry_of_fx(name: str) -> None:
    make, example = FAMILIES[name]
    torch.manual_seed(0)
    model = make()
    assert discover(model, example).symmetry == follow_modules(model, example).symmetry()


def test_a_model_that_fx_cannot_trace_is_exported() -> None:
    model, example = Deciding(), torch.randn(4, 5)
    symmetry = discover(model, example).symmetry
    assert [str(space.group) for space in symmetry.spaces] == ["S(6)", "S(7)"]
    assert check(model, symmetry, example).passed


def test_the_larger_coverage_wins() -> None:
    _, forward, layers = NASTY["named argument"]
    model, example = Net(forward, **layers), torch.randn(4, 5)
    assert not follow_modules(model, example).symmetry().spaces
    discovery = discover(model, example)
    assert [space.name for space in discovery.symmetry.spaces] == ["a"]
    assert not discovery.stops
    assert check(model, discovery.symmetry, example).passed


def test_attention_heads_are_kept_where_both_follow_the_parameters() -> None:
    torch.manual_seed(0)
    discovery = discover(Images(), IMAGES)
    assert sum(" wr " in str(space.group) for space in discovery.symmetry.spaces) == 2
    assert not discovery.stops


@pytest.mark.parametrize("name", NASTY)
def test_a_function_is_kept_whichever_trace_wins(name: str) -> None:
    _, forward, layers = NASTY[name]
    torch.manual_seed(0)
    model, example = Net(forward, **layers), torch.randn(4, 5)
    symmetry = discover(model, example).symmetry
    report = check(model, symmetry, example)
    assert report.passed, f"{symmetry}{report}"


def test_units_that_depend_on_the_length_of_the_batch_stay() -> None:
    _, forward, layers = NASTY["some units"]
    assert not discover(Net(forward, **layers), torch.randn(4, 5)).symmetry.spaces


REASONS = {
    "summed up": "Tensor.cumsum fixes the units of 'a'",
    "positions": "operator.add fixes the units of 'a'",
    "padded": "torch.nn.functional.pad fixes the units of 'a'",
    "gated linear": "GLU 'gate' fixes the units of 'a'",
    "two groupings": "GroupNorm 'two' fixes the units of 'a'",
    "read by a recurrence": "LSTM 'cell' fixes its own parameters",
    "transposed weight": "the direct use of 'a.weight' fixes the units of 'a'",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_operation_that_fixes_units_is_named(name: str) -> None:
    _, forward, layers = NASTY[name]
    assert REASONS[name] in map(str, discover(Net(forward, **layers), torch.randn(4, 5)).stops)


@pytest.mark.parametrize("name", ["mlp", "resnet", "tied", "mobilenet"])
def test_inputs_and_labels_are_no_reason(name: str) -> None:
    make, example = FAMILIES[name]
    assert discover(make(), example).stops == ()


def test_a_model_that_neither_can_trace_is_refused_with_a_remedy() -> None:
    with pytest.raises(SymmetryError, match=r"torch\.fx.*torch\.export.*`parse`"):
        discover(ByData(), torch.randn(4, 5))


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"no forward for {x.shape}")


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(SymmetryError, match="Failing cannot be traced"):
        discover(Failing(), torch.zeros(2, 3))


def test_a_hook_on_the_whole_model_is_refused() -> None:
    model = mlp()
    model.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(SymmetryError, match="hooks"):
        discover(model, torch.zeros(3, 6))
