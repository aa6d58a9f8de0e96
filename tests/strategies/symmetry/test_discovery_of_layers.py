import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.discover.follow import follow
from fedbasin.strategies.symmetry.discover.proof import proving
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError, parse
from tests.strategies.symmetry.families import FAMILIES, ConvNet, ResNet, mlp

EXPECTED = {
    "mlp": """
        0  S(8)  0.weight[0] 0.bias[0] 2.weight[1]
        2  S(7)  2.weight[0] 2.bias[0] 3.weight[0] 4.weight[1]
    """,
    "convnet": """
        conv1  S(5)  conv1.weight[0] conv1.bias[0] bn1.weight[0] bn1.bias[0] (bn1.running_mean[0]) \
(bn1.running_var[0]) conv2.weight[1]
        conv2  S(6)  conv2.weight[0] bn2.weight[0] bn2.bias[0] (bn2.running_mean[0]) \
(bn2.running_var[0]) fc1.weight[1]
        fc1  S(9)  fc1.weight[0] fc1.bias[0] fc2.weight[1]
    """,
    "group_norm": """
        0  S(2) wr S(3)  0.weight[0] 0.bias[0] 1.weight[0] 1.bias[0] 4.weight[1]
        4  S(4)  4.weight[0] 4.bias[0] 5.weight[0] 5.bias[0] 8.weight[1]
    """,
    "depthwise": """
        conv  S(4)  conv.weight[0] conv.bias[0] depthwise.weight[0] depthwise.bias[0] \
squeeze.weight[1] excite.weight[0] excite.bias[0] wider.weight[0] wider.bias[0] norm.weight[0] \
norm.bias[0] inner.weight[1]
        squeeze  S(3)  squeeze.weight[0] squeeze.bias[0] excite.weight[1]
        inner  S(5)  inner.weight[0] inner.bias[0] head.weight[1]
    """,
    "twice": """
        first  S(6)  first.weight[0] first.bias[0] again.weight[1] again.weight[0] again.bias[0] \
head.weight[1]
    """,
    "tied": """
        embedding  S(6)  embedding.weight[1] head.weight[1] norm.weight[0] norm.bias[0] \
hidden.weight[1] back.weight[0] back.bias[0]
        hidden  S(7)  hidden.weight[0] hidden.bias[0] back.weight[1]
    """,
    "branches": """
        left  S(6)  left.weight[0] left.bias[0] right.weight[0] right.bias[0] product.weight[1]
        mixed  S(7)  mixed.weight[0] mixed.bias[0] scale[0] head.weight[1]
    """,
}


def trace(model: nn.Module, example: Tensor) -> Symmetry:
    return discover(model, example).symmetry


def built(name: str) -> tuple[nn.Module, Tensor]:
    make, example = FAMILIES[name]
    torch.manual_seed(0)
    return make(), example


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_found_leaves_the_function_as_it_was(name: str) -> None:
    model, example = built(name)
    symmetry = trace(model, example)
    symmetry.check(model.state_dict())
    assert symmetry.spaces
    report = check(model, symmetry, example)
    assert report.passed, report


@pytest.mark.parametrize("name", EXPECTED)
def test_every_space_is_found_with_all_its_members(name: str) -> None:
    model, example = built(name)
    found = [{(axis.tensor, axis.dim) for axis in space.axes} for space in trace(model, example).spaces]
    for space in parse(EXPECTED[name]).spaces:
        assert any({(axis.tensor, axis.dim) for axis in space.axes} <= axes for axes in found), space.name


def test_a_skip_joins_a_stage_and_a_downsampling_convolution_ends_it() -> None:
    stem, inside, again, stage = trace(ResNet(), torch.zeros(2, 2, 6, 6)).spaces
    tensors = {axis.tensor for axis in stem.axes}
    assert {"stem.weight", "block1.conv2.weight", "block1.bn2.running_var"} <= tensors
    assert {"block2.conv1.weight", "block2.skip.0.weight"} <= tensors
    assert [space.name for space in (inside, again)] == ["block1.conv1", "block2.conv1"]
    assert {"block2.conv2.weight", "block2.skip.1.bias", "head.weight"} <= {axis.tensor for axis in stage.axes}


@pytest.mark.parametrize(("name", "units"), [("resnext", 3), ("mobilenet", 6)])
def test_groups_of_a_convolution_move_as_wholes(name: str, units: int) -> None:
    model, example = built(name)
    groups = {space.name: space.group for space in trace(model, example).spaces}
    assert {groups[f"block{number}.narrow"].count for number in (1, 2)} == {units}


def test_a_single_linear_around_a_skip_is_quadratic() -> None:
    model, example = built("linear_residual")
    (space,) = trace(model, example).spaces
    assert space.quadratic


def test_running_statistics_move_but_do_not_count() -> None:
    spaces = trace(ConvNet(), torch.zeros(2, 2, 6, 6)).spaces
    silent = {m.tensor for space in spaces for m in space.axes if not m.scored}
    assert silent == {f"bn{i}.running_{moment}" for i in (1, 2) for moment in ("mean", "var")}


class Net(nn.Module):
    """Layers by name around a forward pass given as a function."""

    def __init__(self, forward: Callable[["Net", Tensor], object], **layers: nn.Module) -> None:
        super().__init__()
        self.a = nn.Linear(5, 6)
        self.b = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.randn(6))
        self.temperature = nn.Parameter(torch.randn(1))
        self.register_buffer("seen", torch.zeros(4, 6))
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.steps = forward

    def forward(self, x: Tensor) -> object:
        return self.steps(self, x)


def leaky_buffer(net: Net, x: Tensor) -> Tensor:
    base = x.new_zeros(4, 6)
    alias = base[:]
    alias += net.a(x)
    return net.out(base)


def training_only(net: Net, x: Tensor) -> object:
    hidden = net.a(x)
    return (net.out(hidden), net.b(hidden)[:, 0]) if net.training else net.out(hidden)


def crossed(x: Tensor) -> Tensor:
    wide = x[:, :, None].expand(4, 6, 6)
    return wide * wide.transpose(1, 2)


def squared(width: int) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(width, width)


# A forward pass, and the spaces that it leaves free: none where an operation meets the features that
# is not the same for every order of the units.
FREE = ["a"]
NASTY: dict[str, tuple[list[str], Callable[[Net, Tensor], object], dict[str, nn.Module]]] = {
    "plain": (FREE, lambda n, x: n.out(n.a(x)), {}),
    "temperature": (FREE, lambda n, x: n.out(torch.relu(n.a(x)) / n.temperature), {}),
    "parameter": (FREE, lambda n, x: n.out(n.a(x) * n.scale), {}),
    "used directly": ([], lambda n, x: F.linear(n.a(x), n.out.weight), {}),
    "read and used directly": (FREE, lambda n, x: n.out(n.a(x)) + n.out.weight.sum(), {}),
    "transposed weight": ([], lambda n, x: n.a(x) @ n.a.weight, {}),
    "input added": ([], lambda n, x: n.out(n.b(x[:, [0, 1, 2, 3, 4, 0]]) + x.repeat(1, 2)[:, :6]), {}),
    "concatenation": ([], lambda n, x: n.out(torch.cat([n.a(x)[:, :3], n.a(x)[:, 3:]], 1)), {}),
    "chunks": ([], lambda n, x: n.out(torch.cat(n.a(x).chunk(2, 1), 1)), {}),
    "one unit": (["b"], lambda n, x: n.out(n.b(x[:, :1] * 1.0 + n.seen * 0)) + n.a(x)[:, :3], {}),
    "flipped": ([], lambda n, x: n.out(n.a(x).flip(1)), {}),
    "rolled": ([], lambda n, x: n.out(n.a(x).roll(1, 1)), {}),
    "indexed": ([], lambda n, x: n.out(n.a(x)[:, [1, 0, 2, 3, 4, 5]]), {}),
    "sorted": ([], lambda n, x: n.out(n.a(x).sort(1)[0]), {}),
    "summed up": ([], lambda n, x: n.out(n.a(x).cumsum(1)), {}),
    "positions": ([], lambda n, x: n.out(n.a(x) + torch.arange(6.0)), {}),
    "largest of units": (FREE, lambda n, x: n.out(n.a(x)) + n.b(n.a(x)).max(1)[1][:, None], {}),
    "outer product": (["b"], lambda n, x: n.b(n.a(x)[:, :, None] * n.a(x)[:, None, :]).sum(-1), {}),
    "padded": ([], lambda n, x: n.b(F.pad(n.a(x), (0, 0))), {}),
    "split heads": ([], lambda n, x: n.out(n.a(x).view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)), {}),
    "reinterpreted": (FREE, lambda n, x: n.out(n.a(x).view(torch.int16).view(x.dtype)), {}),
    "there and back": (FREE, lambda n, x: n.out(n.a(x).view(2, 2, 6, 1).flatten(0, 1).squeeze(-1)), {}),
    "batch first": (FREE, lambda n, x: n.out(n.a(x).t().transpose(0, 1)), {}),
    "mean of units": (["a", "b"], lambda n, x: n.out(n.a(x)) + n.b(n.a(x)).mean(1, keepdim=True), {}),
    "standardised": (FREE, lambda n, x: n.out(n.a(x) - n.a(x).mean(0)), {}),
    "scaled sum": (FREE, lambda n, x: n.out(torch.add(n.a(x), n.b(n.a(x)), alpha=2)), {}),
    "from the left": (FREE, lambda n, x: n.out(1 - torch.sigmoid(input=n.a(x))), {}),
    "in place": (FREE, lambda n, x: n.out(n.a(x).relu_().add_(1).mul_(n.b(n.a(x)))), {}),
    "batch and units alike": ([], lambda n, x: n.out((n.a(x)[:, None] + n.a(x)[:1].t()).sum(2)), {}),
    "written elsewhere": ([], leaky_buffer, {}),
    "buffer written": ([], lambda n, x: n.out(n.seen.add_(n.a(x)) * 1.0), {}),
    "argument out": ([], lambda n, x: n.out(torch.add(n.a(x), 1, out=x.new_zeros(4, 6))), {}),
    "normalised": (FREE, lambda n, x: n.out(F.normalize(n.a(x), dim=1)), {}),
    "softmax": (FREE, lambda n, x: n.out(n.a(x).softmax(1)), {}),
    "local response": ([], lambda n, x: n.out(n.norm(n.a(x)[:, :, None])[:, :, 0]), {"norm": nn.LocalResponseNorm(3)}),
    "gated linear": ([], lambda n, x: n.gate(n.a(x)), {"gate": nn.GLU()}),
    "recurrent": (["a"], lambda n, x: n.cell(n.out(n.a(x)))[0], {"cell": nn.LSTM(3, 4)}),
    "read by a recurrence": ([], lambda n, x: n.cell(n.a(x))[0], {"cell": nn.LSTM(6, 4)}),
    "grouped": (FREE, lambda n, x: n.out(n.conv(n.a(x)[:, :, None])[:, :, 0]), {"conv": nn.Conv1d(6, 6, 1, groups=3)}),
    "transposed convolution": (
        [],
        lambda n, x: n.out(n.conv(n.a(x)[:, :, None])[:, :, 0]),
        {"conv": nn.ConvTranspose1d(6, 6, 1)},
    ),
    "two groupings": (
        [],
        lambda n, x: n.out(n.two(n.three(n.a(x)))),
        {"two": nn.GroupNorm(2, 6), "three": nn.GroupNorm(3, 6)},
    ),
    "grouping meets none": (
        ["a"],
        lambda n, x: n.out(n.two(n.a(x)) + n.b(x[:, :1] * n.seen)),
        {"two": nn.GroupNorm(2, 6)},
    ),
    "other axis normalised": (["a"], lambda n, x: n.out(n.norm(n.a(x).t()).t()), {"norm": nn.LayerNorm(4)}),
    "other axis mixed": ([], lambda n, x: n.out(n.mix(n.a(x).t()).t()), {"mix": squared(4)}),
    "weight norm": ([], lambda n, x: n.out(n.wn(n.a(x))), {"wn": parametrizations.weight_norm(squared(6))}),
    "maximum with places": (
        [],
        lambda n, x: n.out(n.pool(n.a(x)[:, :, None])[0][:, :, 0]),
        {"pool": nn.MaxPool1d(1, return_indices=True)},
    ),
    "pooled units": ([], lambda n, x: n.out(n.pool(n.a(x))), {"pool": nn.MaxPool1d(3, 1, 1)}),
    "renormalised table": (
        [],
        lambda n, x: n.out(n.table(torch.arange(4))) + x[:, :3],
        {"table": nn.Embedding(4, 6, max_norm=1.0)},
    ),
    "channels of a channel": (FREE, lambda n, x: n.out(n.act(n.a(x)[:, None])[:, 0]), {"act": nn.PReLU(1)}),
    "training only": (FREE, training_only, {}),
    "units on two axes": ([], lambda n, x: n.out(crossed(n.a(x)).amax(2)), {}),
    "shape asked": (["a", "b"], lambda n, x: n.out(n.a(x).view(n.a(x).shape[0], n.b(n.a(x)).size(1))), {}),
    "resized": (FREE, lambda n, x: n.out(F.interpolate(n.a(x)[:, :, None], scale_factor=2.0).mean(2)), {}),
    "resized units": ([], lambda n, x: n.out(F.interpolate(n.a(x)[:, None], size=6)[:, 0]), {}),
    "some units": ([], lambda n, x: n.out(n.a(x)[:, : x.size(0) + 2]), {}),
    "asked axis": (FREE, lambda n, x: n.out(n.a(x)) + n.b(n.a(x)).sum(x.dim() - 1, keepdim=True), {}),
    "named argument": ([], lambda n, x: n.out(torch.flatten(input=n.a(x)[:, :, None], start_dim=1)), {}),
    "input activated": (FREE, lambda n, x: n.out(n.a(n.act(x))), {"act": nn.PReLU()}),
    "groups of outputs of a channel": (
        [],
        lambda n, x: n.mean(n.norm(n.conv(n.a(x)[:, :, None]))),
        {"conv": nn.Conv1d(6, 12, 1, groups=6), "norm": nn.GroupNorm(3, 12), "mean": nn.Flatten()},
    ),
    "grouped later": (FREE, lambda n, x: n.out(n.a(x) + n.two(n.b(x[:, :1] * n.seen))), {"two": nn.GroupNorm(2, 6)}),
}


ORDERED = ("input added", "flipped", "rolled", "indexed", "summed up", "positions", "buffer written", "local response")


@pytest.mark.parametrize("name", NASTY)
def test_nothing_is_guessed(name: str) -> None:
    _, forward, layers = NASTY[name]
    torch.manual_seed(0)
    model = Net(forward, **copy.deepcopy(layers))
    example = torch.randn(4, 5)
    symmetry = trace(model, example)
    assert not (name in ORDERED and symmetry.spaces)
    report = check(model, symmetry, example)
    assert report.passed, report


def test_a_branch_of_training_alone_is_followed_too() -> None:
    (space,) = trace(Net(training_only), torch.randn(4, 5)).spaces
    assert [str(axis) for axis in space.axes] == [*("a.weight[0]", "a.bias[0]", "out.weight[1]", "b.weight[1]")]


PIECES = st.lists(
    st.sampled_from(["conv", "depthwise", "norm", "group", "layer", "relu", "pool", "skip", "gate"]), max_size=7
)


class Stack(nn.Module):
    """Any sequence of pieces on images, flattened or averaged at the end."""

    def __init__(self, pieces: list[str], *, flat: bool) -> None:
        super().__init__()
        self.pieces, self.flat = pieces, flat
        self.stem = nn.Conv2d(2, 6, 1)
        self.layers = nn.ModuleList(self.layer(piece) for piece in pieces)
        self.head = nn.Linear(6 * 16 if flat else 6, 3)

    @staticmethod
    def layer(piece: str) -> nn.Module:
        layers: dict[str, Callable[[], nn.Module]] = {
            "conv": lambda: nn.Conv2d(6, 6, 3, padding=1),
            "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            "norm": lambda: nn.BatchNorm2d(6),
            "group": lambda: nn.GroupNorm(2, 6),
            "layer": lambda: nn.LayerNorm((6, 4, 4)),
            "relu": lambda: nn.LeakyReLU(),
            "pool": lambda: nn.AvgPool2d(3, 1, 1),
            "skip": lambda: nn.Conv2d(6, 6, 1),
            "gate": lambda: nn.Conv2d(6, 6, 1),
        }
        return layers[piece]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for piece, layer in zip(self.pieces, self.layers, strict=True):
            y = layer(x)
            if piece == "gate":
                y = y.sigmoid() * x
            x = x + y if piece == "skip" else y
        return self.head(x.flatten(1) if self.flat else x.mean((-1, -2)))


@settings(max_examples=20, deadline=None)
@given(PIECES, st.booleans(), st.integers(0, 1000))
def test_any_stack_of_known_pieces_has_spaces_that_leave_it_as_it_was(pieces: list[str], flat: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model, example = Stack(pieces, flat=flat), torch.zeros(2, 2, 4, 4)
    symmetry = trace(model, example)
    assert symmetry.spaces
    assert check(model, symmetry, example, trials=1, seed=seed).passed


def test_a_hook_makes_a_layer_unknown() -> None:
    model = mlp()
    model[0].register_forward_hook(lambda module, inputs, output: output.cumsum(1))  # type: ignore[index]
    assert [space.name for space in trace(model, torch.zeros(3, 6)).spaces] == ["2"]


def test_a_replaced_forward_makes_a_layer_unknown() -> None:
    model = mlp()
    model.get_submodule("0").forward = lambda x: torch.zeros(3, 8)  # type: ignore[assignment, method-assign]
    assert [space.name for space in trace(model, torch.zeros(3, 6)).spaces] == ["2"]


def test_a_hook_on_the_whole_model_is_followed() -> None:
    model = mlp()
    model.register_forward_hook(lambda module, inputs, output: output.cumsum(1))
    assert [space.name for space in trace(model, torch.zeros(3, 6)).spaces] == ["0", "2"]


def test_a_weight_that_is_a_transposed_view_of_another_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[2].weight = nn.Parameter(model[0].weight.t())  # type: ignore[union-attr]
    assert trace(model, torch.zeros(2, 4)).spaces == ()


def test_parameters_in_one_block_of_memory_are_told_apart() -> None:
    model, flat = mlp(), torch.randn(1000)
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    assert [space.name for space in trace(model, torch.zeros(3, 6)).spaces] == ["0", "2"]


def test_a_whole_linear_has_no_spaces() -> None:
    assert trace(nn.Linear(3, 4), torch.zeros(2, 3)).spaces == ()


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_decides_by_its_data_is_refused_by_name() -> None:
    with pytest.raises(SymmetryError, match=r"decides by data, at test_discovery_of_layers\.py:\d+"):
        trace(Decides(), torch.zeros(2))


def test_an_example_of_another_shape_is_refused() -> None:
    with pytest.raises(SymmetryError, match=r"example inputs of shape \(3, 5\)"):
        trace(mlp(), torch.zeros(3, 5))


def test_the_model_is_left_as_it_was() -> None:
    model = ResNet()
    model.get_submodule("block1.bn1").eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    trace(model, torch.randn(2, 2, 6, 6))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Narrow(nn.Module):
    """A model with a kernel that takes single precision alone."""

    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Linear(4, 6)
        self.read = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.write(x)
        if hidden.dtype != torch.float32:
            raise TypeError("this kernel takes float32")
        return self.read(hidden.relu())


@pytest.mark.parametrize("batch", [2, 1], ids=["trains", "fails in training mode"])
def test_a_proof_runs_on_the_running_statistics_of_the_model(batch: int) -> None:
    # Those of the batch that was followed make EfficientNetV2 amplify rounding by 1e14.
    layers = (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4))
    with proving(nn.Sequential(*layers), torch.randn(batch, 3, 2, 2)) as prover:
        before = {name: tensor.clone() for name, tensor in prover.model.state_dict().items()}
        state = prover.model.state_dict(keep_vars=True)
        follow(prover.model, prover.inputs, {id(state[name]): name for name in prover.names})
        after = prover.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_units_in_more_parts_than_are_written_stay_and_the_others_move() -> None:
    # In one draw of twenty so few of these units are active that nothing is proven of them.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 1100, 2))
    found = discover(model, torch.randn(2, 1100, 2))
    assert [space.name for space in found.symmetry.spaces] == ["0"]
    assert [str(stop) for stop in found.stops] == [
        "a structure that the notation cannot express fixes the units of '2'"
    ]


def test_a_model_that_cannot_run_in_double_precision_is_told() -> None:
    with pytest.raises(SymmetryError, match=r"Narrow does not run .* in float64: this kernel takes float32"):
        discover(Narrow(), torch.zeros(2, 4))
    symmetry = parse("write S(6) write.weight[0] write.bias[0] read.weight[1]")
    with pytest.raises(SymmetryError, match=r"Narrow does not run on inputs of torch\.float64"):
        check(Narrow(), symmetry, torch.zeros(2, 4))


class Amplifying(nn.Module):
    """A network that multiplies rounding by a number that its inputs decide, up to 1e16."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(10 ** (6.5 + 3 * x[0, 0]) * self.head(torch.relu(self.first(x))))


def test_inputs_on_which_rounding_is_amplified_decide_nothing() -> None:
    torch.manual_seed(0)
    (space,) = discover(Amplifying(), torch.zeros(3, 4)).symmetry.spaces
    assert str(space.group) == "S(8)"


class Between(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), inner, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


@pytest.mark.parametrize(
    "inner",
    [
        lambda x: x.lerp(x.relu(), 0.3),
        lambda x: x.addcmul_(x.relu(), x.sigmoid()),
        lambda x: torch.logaddexp(x, 2 * x),
        # A composition may lay out its results otherwise than the operator, by which a view is possible or not.
        lambda x: x.mT.repeat(1, 1).view(-1).view(6, -1).mT,
    ],
    ids=["a mean", "in place", "of two tensors", "of another layout"],
)
def test_an_operator_without_a_rule_is_followed_through_its_composition(inner: Callable[[Tensor], Tensor]) -> None:
    model = Between(inner)
    (space,) = trace(model, torch.randn(5, 4)).spaces
    assert {axis.tensor for axis in space.axes} == {"first.weight", "first.bias", "last.weight"}
