from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.check import CheckReport, check, prove
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError, parse
from tests.strategies.symmetry.by_hand.prenorm_transformer import preln_transformer
from tests.strategies.symmetry.families import FAMILIES, ResNet, Transformer, mlp

IMAGES = torch.zeros(2, 8, 8)
ATTENTION = "blocks.0.attention"


def checked(name: str) -> tuple[nn.Module, Symmetry, Tensor]:
    make, example = FAMILIES[name]
    torch.manual_seed(0)
    model = make()
    return model, discover(model, example).symmetry, example


def without(symmetry: Symmetry, space: int, axis: int) -> Symmetry:
    """The symmetry with one axis left behind."""
    old = symmetry.spaces[space]
    kept = old.axes[:axis] + old.axes[axis + 1 :]
    return Symmetry((*symmetry.spaces[:space], replace(old, axes=kept), *symmetry.spaces[space + 1 :]))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("resnext", "mobilenet", "transformer") else ())
        for name in FAMILIES
    ],
)
def test_every_axis_that_is_left_behind_is_noticed(name: str) -> None:
    model, symmetry, example = checked(name)
    # Any vector may be added to a key bias, so it may also stay behind; to a value bias, if the output makes up for it.
    silent = {(shift.bias, shift.part) for shift in symmetry.shifts if shift.output is None}
    for i, space in enumerate(symmetry.spaces):
        for j, axis in enumerate(space.axes):
            if (axis.tensor, axis.part) in silent:
                continue
            if not axis.scored or sum(other.role == axis.role for other in space.scored) > 1:
                report = check(model, without(symmetry, i, j), example, trials=1)
                assert not report.passed, f"{axis} of {space.name} was left behind unnoticed"
                assert report.guilty == (space.name,)


def test_in_a_transformer_only_the_key_bias_may_be_left_behind() -> None:
    model = Transformer(width=8, heads=2)
    symmetry = preln_transformer(model.state_dict(), heads=2)
    silent = set()
    for i, space in enumerate(symmetry.spaces):
        for j, axis in enumerate(space.axes):
            if check(model, without(symmetry, i, j), IMAGES, trials=1).passed:
                silent.add(axis.tensor)
    assert silent == {f"blocks.{block}.attention.key.bias" for block in (0, 1)}


@pytest.mark.parametrize(
    "line",
    [
        # Channels that cross from head to head.
        f"cross S(32) {ATTENTION}.query.weight[0] {ATTENTION}.query.bias[0] "
        f"{ATTENTION}.key.weight[0] {ATTENTION}.key.bias[0]",
        f"cross S(32) {ATTENTION}.value.weight[0] {ATTENTION}.value.bias[0] {ATTENTION}.output.weight[1]",
        # A rotation of all heads at once.
        f"cross O(32) {ATTENTION}.value.weight[0] {ATTENTION}.value.bias[0] {ATTENTION}.output.weight[1]",
        # Queries turned, keys not.
        f"cross O(8)^4 {ATTENTION}.query.weight[0] {ATTENTION}.query.bias[0]",
        # Heads exchanged in queries and keys, not in values.
        f"cross O(8) wr S(4) {ATTENTION}.query.weight[0] {ATTENTION}.query.bias[0] "
        f"{ATTENTION}.key.weight[0] {ATTENTION}.key.bias[0]",
        # A rotation inside the activation.
        "cross O(64) blocks.0.mlp.up.weight[0] blocks.0.mlp.up.bias[0] blocks.0.mlp.down.weight[1]",
        # The classes.
        "cross S(10) head.weight[0] head.bias[0]",
    ],
)
def test_what_only_looks_like_a_symmetry_of_a_transformer_fails(line: str) -> None:
    model = Transformer()
    good = preln_transformer(model.state_dict(), heads=4, residual=False)
    spaces = [space for space in good.spaces if space.name == "mlp.1"]
    report = check(model, Symmetry((*spaces, *parse(line).spaces)), IMAGES)
    assert not report.passed
    assert report.guilty == ("cross",)


def test_a_symmetry_is_proven_or_refused_by_its_guilty_spaces() -> None:
    model, symmetry, example = checked("mlp")
    assert prove(model, symmetry, example) is symmetry
    with pytest.raises(SymmetryError, match=r"off by .* under: 2; leave these out"):
        prove(model, without(symmetry, 1, 0), example)


def test_heads_turned_one_by_one_in_place_pass() -> None:
    line = (
        f"turn O(8)^4 {ATTENTION}.query.weight[0] {ATTENTION}.query.bias[0] "
        f"{ATTENTION}.key.weight[0] {ATTENTION}.key.bias[0]"
    )
    assert check(Transformer(), parse(line), IMAGES).passed


def test_a_permutation_of_the_classes_fails() -> None:
    report = check(mlp(), parse("classes S(3) 4.weight[0] 4.bias[0]"), torch.zeros(3, 6))
    assert not report.passed
    assert all(trial.double_error > 1e-3 for trial in report.trials)


def test_residual_members_left_untied_fail() -> None:
    model = ResNet()
    whole = str(discover(model, torch.zeros(2, 2, 6, 6)).symmetry)
    untied = whole.replace(" block1.conv2.weight[0]", "")
    report = check(model, parse(untied), torch.zeros(2, 2, 6, 6))
    assert report.guilty == ("stem",)


def test_channels_that_leave_their_normalisation_group_fail() -> None:
    model, symmetry, example = checked("group_norm")
    mixing = str(symmetry).replace("S(2) wr S(3)", "S(6)")
    assert check(model, symmetry, example).passed
    assert check(model, parse(mixing), example, trials=5).guilty == ("0",)


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model, symmetry, example = checked("resnet")
    model.train()
    model.get_submodule("block1.bn1").eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    check(model, symmetry, example)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_same_seed_gives_the_same_report() -> None:
    model, symmetry, example = checked("mlp")
    assert check(model, symmetry, example) == check(model, symmetry, example)
    other = check(model, symmetry, example, seed=7)
    assert isinstance(other, CheckReport)
    assert other.passed


class Noisy(nn.Module):
    """Draws noise, and divides by zero if told to."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.net = mlp()
        self.divisor = divisor

    def forward(self, x: Tensor) -> dict[str, list[Tensor] | None]:
        logits = self.net(x) + torch.randn(3, dtype=x.dtype)
        return {"logits": [logits / self.divisor], "classes": [logits.argmax(1)], "loss": None}


HIDDEN = parse("hidden S(8) net.0.weight[0] net.0.bias[0] net.2.weight[1]")


def test_nested_outputs_are_compared_and_noise_is_the_same_every_time() -> None:
    assert check(Noisy(1.0), HIDDEN, torch.zeros(3, 6)).passed


def test_an_output_that_is_no_number_fails() -> None:
    assert not check(Noisy(0.0), HIDDEN, torch.zeros(3, 6)).passed


def test_a_model_without_floating_outputs_is_refused() -> None:
    class Classes(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(SymmetryError, match="no floating tensor"):
        check(Classes(*mlp()), parse("h S(8) 0.weight[0]"), torch.zeros(3, 6))


def test_a_symmetry_of_another_model_is_refused() -> None:
    with pytest.raises(SymmetryError, match="no such tensor"):
        check(mlp(), parse("h S(8) conv.weight[0]"), torch.zeros(3, 6))
