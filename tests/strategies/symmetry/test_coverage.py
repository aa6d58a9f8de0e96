import re

import pytest
import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.coverage import coverage, kind_of, touched_entries
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.groups.group_notation import parse_group
from fedbasin.strategies.symmetry.symmetry import parse
from tests.strategies.symmetry.families import ConvNet, mlp
from tests.strategies.symmetry.test_discovery_of_attention import IMAGES, Images


def test_all_but_the_labels_of_a_perceptron_is_covered() -> None:
    model = mlp()
    report = coverage(discover(model, torch.zeros(3, 6)).symmetry, model.state_dict())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert report.fraction == pytest.approx(1 - 3 / total)
    assert report.by_kind == {"S": report.fraction}
    assert report.uncovered == ("4.bias",)


def test_counters_are_no_parameters() -> None:
    model = ConvNet()
    report = coverage(discover(model, torch.zeros(2, 2, 6, 6)).symmetry, model.state_dict())
    assert report.uncovered == ("fc2.bias",)


def test_each_kind_of_group_has_its_fraction() -> None:
    model = Images()
    discovery = discover(model, IMAGES)
    state = model.state_dict()
    report = coverage(discovery.symmetry, state)
    total = sum(tensor.numel() for tensor in state.values())
    heads = sum(
        tensor.numel() for name, tensor in state.items() if "self_attn" in name and not name.endswith("out_proj.bias")
    )
    assert report.by_kind["O*O wr S"] == pytest.approx(heads / total)
    assert set(report.by_kind) == {"S", "O*O wr S"}
    assert report.fraction < 1 < sum(report.by_kind.values())


class RunningSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


def test_what_does_not_move_is_named_with_its_operation_and_line() -> None:
    model = nn.Sequential(nn.Linear(4, 5), RunningSum(), nn.Linear(5, 2))
    discovery = discover(model, torch.zeros(2, 4))
    assert discovery.coverage.fraction == 0
    (stop,) = discovery.stops
    assert (stop.part, stop.operation) == ("0", "cumsum")
    assert re.fullmatch(r"test_coverage\.py:\d+", stop.source)
    assert discovery.coverage.uncovered == tuple(model.state_dict())


def test_parts_of_two_axes_are_counted_once() -> None:
    symmetry = parse("a  S(2)  w[0,0:2]\nb  S(3)  w[1,0:3]\nc  S(2)  v[0,0:1/4]\n")
    state = {"w": torch.zeros(4, 6), "v": torch.zeros(8)}
    axes = [axis for space in symmetry.spaces for axis in space.axes]
    assert touched_entries(axes, state) == {"w": 2 * 6 + 4 * 3 - 2 * 3, "v": 2}


@pytest.mark.parametrize(
    ("group", "kind"),
    [
        ("S(8)", "S"),
        ("O(8)^4", "O"),
        ("(R(4,2)*O(4))xS(2) wr S(2)", "(R*O)xS wr S"),
        ("R(2,1)+O(2) wr S(3)", "R+O wr S"),
    ],
)
def test_a_kind_is_a_group_without_its_numbers(group: str, kind: str) -> None:
    assert kind_of(parse_group(group)) == kind
