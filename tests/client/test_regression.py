"""What a client says of fitted layers: sums whose solution is known, for every kind of model."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedbasin.client.refit.regression import FlowError, regress
from fedbasin.client.refit.used_layers import read_layer_graph
from fedbasin.proto.layer_graph import LayerGraph
from fedbasin.strategies.fusion.layers import gram_layers
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.update import join
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.statistics.gram import grams
from fedbasin.strategies.tasks.model_task import TASKS
from tests.double_precision import Doubled
from tests.strategies.symmetry.tiny_transformers import MODELS

W = torch.float64
OF_ITSELF = [Target.features, Target.weights]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=W)


def labels(count, classes=3):
    return torch.arange(count) % classes


class Residual(nn.Module):
    """A small residual network; its activations and sums are in place, as in common ones."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.one, self.one_norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.two, self.two_norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.down, self.head = nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        y = self.two_norm(self.two(self.relu(self.one_norm(self.one(x)))))
        y += self.down(x)
        return self.head(self.relu(y).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x).mean(1))


class Library(nn.Module):
    """A tiny model of the transformers library, with weights that are far from those of a new one."""

    def __init__(self, name):
        super().__init__()
        self.inner = MODELS[name].make()
        for parameter in self.inner.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)

    def forward(self, x):
        with Doubled():
            return self.inner(x).logits


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def grouped():
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    )


MADE = {
    "mlp": (mlp, normal(40, 4)),
    "residual": (Residual, normal(6, 2, 5, 5)),
    "grouped": (grouped, normal(6, 4, 6, 6)),
    "pre-LN": (lambda: Encoder(True), normal(6, 5, 8)),
    "post-LN": (lambda: Encoder(False), normal(6, 5, 8)),
    **{name: (lambda name=name: Library(name), next(iter(MODELS[name].inputs.values()))) for name in ("bert", "vit", "llama")},
}  # fmt: skip


@pytest.fixture(params=MADE)
def made(request):
    """A model with random weights and running statistics, and its data."""
    make, x = MADE[request.param]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the library says of its own future
        model = make().to(W)
        model.train()(x)
    return model.eval(), [(x, labels(len(x)))]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def other(state, seed=1, step=0.3):
    """Another client's state: the same, moved."""
    return {
        n: t + step * normal(*t.shape, seed=seed + i) if t.is_floating_point() and t.dim() > 1 else t
        for i, (n, t) in enumerate(state.items())
    }  # fmt: skip


def targets(sums, block, fused):
    """`Z X~^T`, from what was left to explain by the layer as it was fused."""
    return sums.moment + Gram(sums.gram).weigh(join(block, fused))


def solves(sums, block, weights, fused):
    """How far the normal equations of one layer are from being solved by weights, relative to their size."""
    moment, wanted = Gram(sums.gram).weigh(join(block, weights)), targets(sums, block, fused)
    return float((moment - wanted).norm() / moment.norm().clamp(min=1e-9))


def blocks_of(model):
    return [layer.block for layer in gram_layers(model)]


@pytest.mark.parametrize("target", OF_ITSELF)
def test_where_the_fused_model_is_the_clients_own_its_own_weights_solve_everything(made, target):
    model, data = made
    own = state(model)
    for block, sums in regress(model, own, own, blocks_of(model), target, data).items():
        assert solves(sums, block, own, own) < 1e-9, block
        assert sums.moment.abs().max() <= 1e-9 * sums.gram.abs().max()


@pytest.mark.parametrize("target", OF_ITSELF)
def test_on_the_first_layer_a_fit_is_regmean(made, target):
    """Its inputs are the same under every model."""
    model, data = made
    own, fused = state(model), other(state(model))
    first, *_ = read_layer_graph(model, data, TASKS["tokens"]).levels[0]
    # What stands below the first layer, embeddings and norms, is fused before.
    fused |= {n: t for n, t in own.items() if "embed" in n and n not in first}
    expected = grams(model, data)[first]
    found = regress(model, own, fused, [first], target, data)[first]
    torch.testing.assert_close(found.gram, expected)
    torch.testing.assert_close(targets(found, first, fused), Gram(expected).weigh(join(first, own)))


def test_features_are_what_the_clients_own_model_computes_there():
    torch.manual_seed(0)
    model, x = mlp().to(W), normal(40, 4)
    own, fused = state(model), other(state(model))
    z = model[:3](x).detach()
    block = ("2.weight", "2.bias")
    found = regress(model, own, fused, [block], Target.features, [(x, labels(40))])[block]
    rows = F.pad(F.relu(F.linear(x, fused["0.weight"], fused["0.bias"])), (0, 1), value=1.0)
    torch.testing.assert_close(found.gram, rows.T @ rows)
    torch.testing.assert_close(targets(found, block, fused), z.T @ rows)


def test_weights_are_what_the_clients_own_weights_make_of_the_fused_features():
    torch.manual_seed(0)
    model, x = mlp().to(W), normal(40, 4)
    own, fused = state(model), other(state(model))
    block = ("2.weight", "2.bias")
    found = regress(model, own, fused, [block], Target.weights, [(x, labels(40))])[block]
    rows = F.pad(F.relu(F.linear(x, fused["0.weight"], fused["0.bias"])), (0, 1), value=1.0)
    torch.testing.assert_close(found.gram, rows.T @ rows)
    torch.testing.assert_close(targets(found, block, fused), join(block, own) @ rows.T @ rows)


def test_a_residual_branch_is_fitted_to_the_clients_stream():
    """The fused stream is what the branch's targets are taken from, so that their sum is the client's."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.stem(x)
            return x + self.branch(F.relu(x))

    torch.manual_seed(0)
    model, x = Block().to(W), normal(30, 4)
    own, fused = state(model), other(state(model))
    stream, block = model(x).detach(), ("branch.weight", "branch.bias")
    found = regress(model, own, fused, [block], Target.features, [(x, labels(30))])[block]
    skip = F.linear(x, fused["stem.weight"], fused["stem.bias"])
    rows = F.pad(F.relu(skip), (0, 1), value=1.0)
    torch.testing.assert_close(targets(found, block, fused), (stream - skip).T @ rows)


def test_a_normalised_convolution_is_fitted_to_the_clients_normalised_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)).to(W)
    x = normal(5, 2, 4, 4)
    model.train()(x)
    own, fused = state(model.eval()), other(state(model))
    fused["1.running_mean"] = normal(3, seed=3)
    fused["1.running_var"] = normal(3, seed=4).exp()
    fused["1.weight"] = normal(3, seed=5)
    wanted = model(x).detach()
    block = ("0.weight",)
    found = regress(model, own, fused, [block], Target.features, [(x, labels(5))])[block]
    scale = fused["1.weight"] * (fused["1.running_var"] + 1e-5).rsqrt()
    shaped = (1, 3, 1, 1)
    shift = fused["1.bias"] - fused["1.running_mean"] * scale
    goal = ((wanted - shift.view(shaped)) / scale.view(shaped)).transpose(0, 1).flatten(1)
    rows = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(targets(found, block, fused), goal @ rows.T)


@settings(deadline=None, max_examples=15)
@given(cuts=st.sets(st.integers(1, 19), max_size=4), target=st.sampled_from(OF_ITSELF))
def test_the_split_over_batches_does_not_show(cuts, target):
    torch.manual_seed(0)
    model, x, y = mlp().to(W), normal(20, 4), labels(20)
    own, fused = state(model), other(state(model))
    blocks = blocks_of(model)
    whole = regress(model, own, fused, blocks, target, [(x, y)])
    parts = [part.tolist() for part in torch.arange(20).tensor_split(sorted(cuts))]
    split = regress(model, own, fused, blocks, target, [(x[p], y[p]) for p in parts])
    for block, sums in whole.items():
        torch.testing.assert_close(split[block].gram, sums.gram)
        torch.testing.assert_close(split[block].moment, sums.moment)


HEAD = ("4.weight", "4.bias")


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(F.relu(self.body(x)))


@pytest.mark.parametrize("target", OF_ITSELF)
def test_padding_is_left_out(target):
    torch.manual_seed(0)
    model, x = Tagger().to(W), normal(3, 5, 4)
    own, fused = state(model), other(state(model))
    mask = torch.arange(5) < torch.tensor([5, 1, 3]).unsqueeze(1)
    y = labels(15).view(3, 5).masked_fill(~mask, -100)  # as tokenizers pad labels
    blocks = [("head.weight", "head.bias")]
    padded = x.masked_fill(~mask.unsqueeze(-1), 1e6)
    (found,) = regress(model, own, fused, blocks, target, [(padded, y, mask)]).values()
    (alone,) = regress(model, own, fused, blocks, target, [(x[mask], y[mask])]).values()
    torch.testing.assert_close(found.gram, alone.gram)
    torch.testing.assert_close(found.moment, alone.moment)


def test_behind_a_layer_of_a_request_features_are_the_clients_own():
    """As if the layer had been fitted already, so that no layer mends what another one of the request mends."""
    torch.manual_seed(0)
    model, x = mlp().to(W), normal(40, 4)
    own, fused = state(model), other(state(model))
    _, first, second = blocks_of(model)
    expected = grams(model, [(x, labels(40))])[second]
    found = regress(model, own, fused, [first, second], Target.features, [(x, labels(40))])
    torch.testing.assert_close(found[second].gram, expected)
    torch.testing.assert_close(targets(found[second], second, fused), Gram(expected).weigh(join(second, own)))


@pytest.mark.parametrize("target", OF_ITSELF)
def test_between_the_layers_of_one_request_the_clients_own_weights_are_at_work(target):
    torch.manual_seed(0)
    model, data = mlp().to(W), [(normal(30, 4), labels(30))]
    own, fused = state(model), other(state(model))
    first, second, _ = blocks_of(model)
    together = regress(model, own, fused, [first, second], target, data)
    between = {**fused, **{name: own[name] for name in first}}
    alone = regress(model, own, between, [second], target, data)
    torch.testing.assert_close(together[second].gram, alone[second].gram)
    torch.testing.assert_close(together[second].moment, alone[second].moment)


def test_a_layer_that_two_names_share_is_one_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).to(W)
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    x = normal(30, 4)
    own, fused = state(model), other(state(model))
    fused["2.weight"] = fused["0.weight"].clone()
    shared, head = ("0.weight", "0.bias"), ("3.weight", "3.bias")
    data = [(x, labels(30))]

    sums = regress(model, own, fused, [shared], Target.weights, data)[shared]
    assert solves(sums, shared, own, fused) < 1e-9
    assert sums.gram[-1, -1] == 60

    # Later pieces bring a fitted layer under its first name alone.
    fitted = {**fused, "0.weight": normal(4, 4, seed=9)}
    found = regress(model, own, fitted, [head], Target.weights, data)[head]
    w, b = fitted["0.weight"], fused["0.bias"]
    rows = F.pad(F.linear(torch.tanh(F.linear(x, w, b)), w, b), (0, 1), value=1.0)
    torch.testing.assert_close(found.gram, rows.T @ rows)


def test_a_layer_that_is_never_called_says_nothing():
    model = mlp().to(W)
    model.unused = nn.Linear(3, 3, dtype=W)
    model.forward = model[:5].forward
    block = ("unused.weight", "unused.bias")
    own = state(model)
    (sums,) = regress(model, own, own, [block], Target.features, [(normal(4, 4), labels(4))]).values()
    assert not sums.gram.any()
    assert not sums.moment.any()


def test_a_layer_that_the_model_has_not_is_refused_by_name():
    model = mlp()
    own = state(model)
    with pytest.raises(ValueError, match=r"8\.weight\+8\.bias is not a linear layer.*same model class"):
        regress(model, own, own, [("8.weight", "8.bias")], Target.features, [])


class Wandering(nn.Module):
    """Takes its own weights' word for where to go."""

    def __init__(self, places):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gate = nn.Parameter(torch.zeros(1))
        self.places = places

    def forward(self, x):
        for name in self.places[self.gate.item() > 0]:
            x = self.get_submodule(name)(x)
        return x


@pytest.mark.parametrize(
    "places",
    [(["left"], ["right"]), (["left"], ["left", "right"]), (["left", "right"], ["left"])],
    ids=["another layer", "one more", "one less"],
)
def test_a_model_whose_course_depends_on_its_weights_is_refused_by_name(places):
    model = Wandering(places).to(W)
    own = state(model)
    fused = {**own, "gate": torch.ones(1, dtype=W)}
    with pytest.raises(FlowError, match=r"(left|right)\.weight is not used in the same place"):
        regress(model, own, fused, blocks_of(model), Target.features, [(normal(5, 4), labels(5))])


def test_no_data_is_refused():
    model = mlp()
    own = state(model)
    with pytest.raises(ValueError, match="no examples"):
        regress(model, own, own, [HEAD], Target.features, [])


class TestOrder:
    def test_of_a_stack_is_its_layers_and_its_last_one_the_head(self):
        found = read_layer_graph(mlp(), [(torch.zeros(2, 4), labels(2))])
        assert found == LayerGraph(((("0.weight", "0.bias"),), (("2.weight", "2.bias"),), ((HEAD),)), HEAD)

    def test_is_that_of_the_calls_and_not_of_the_modules(self):
        found = read_layer_graph(Residual(), [(torch.zeros(2, 2, 4, 4), labels(2))])
        names = [[block[0].split(".")[0] for block in level] for level in found.levels]
        # The stem's images, activated in place, are read by the branch and by the way around it.
        assert names == [["stem"], ["one"], ["two"], ["down"], ["head"]]
        assert found.head == ("head.weight", "head.bias")

    def test_of_an_encoder_goes_block_by_block(self):
        found = read_layer_graph(Encoder(True), [(torch.zeros(2, 5, 8), labels(2))])
        levels = [block[0] for level in found.levels for block in level]
        inner = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")  # fmt: skip
        expected = [f"body.layers.{i}.{name}" for i in (0, 1) for name in inner]
        assert levels == [*expected, "head.weight"]
        assert all(len(level) == 1 for level in found.levels)

    @pytest.mark.parametrize(
        ("name", "level"), [("bert", ("query", "key", "value")), ("llama", ("q_proj", "k_proj", "v_proj"))]
    )  # fmt: skip
    def test_layers_that_read_the_same_tensor_stand_together(self, name, level):
        model, inputs = MODELS[name].model(), next(iter(MODELS[name].inputs.values()))
        found = read_layer_graph(model, [(inputs, labels(2))], TASKS["tokens"])
        named = [tuple(block[0].split(".")[-2] for block in group) for group in found.levels]
        assert named.count(level) == 2
        if name == "llama":
            assert named.count(("gate_proj", "up_proj")) == 2

    def test_names_a_shared_layer_where_it_is_used_first(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
        model[2].weight, model[2].bias = model[0].weight, model[0].bias
        found = read_layer_graph(model, [(torch.zeros(2, 4), labels(2))])
        assert found.levels == ((("0.weight", "0.bias"),), (("3.weight", "3.bias"),))

    def test_leaves_out_what_is_never_called(self):
        model = mlp()
        model.unused = nn.Linear(3, 3)
        model.forward = model[:5].forward
        found = read_layer_graph(model, [(torch.zeros(2, 4), labels(2))])
        assert len(found.levels) == 3

    @pytest.mark.parametrize("last", [nn.Tanh(), nn.Softmax(-1), nn.LayerNorm(3)])
    def test_a_model_that_does_something_to_its_logits_has_no_head(self, last):
        model, data = nn.Sequential(nn.Linear(4, 3), last), [(torch.zeros(2, 4), labels(2))]
        found = read_layer_graph(model, data, TASKS["classification"])
        assert found == LayerGraph(((("0.weight", "0.bias"),),), None)

    def test_a_model_without_such_layers_has_an_empty_order(self):
        assert read_layer_graph(nn.Tanh(), [(torch.zeros(2, 4), labels(2))]) == LayerGraph((), None)

    def test_no_data_is_refused(self):
        with pytest.raises(ValueError, match="no examples"):
            read_layer_graph(mlp(), [])
