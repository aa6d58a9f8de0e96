"""Layers that read the same tensor have one sum over it: which they are, and that it is what each would have alone."""

import warnings

import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from torch import nn
from torch.nn import functional as F

from fedbasin.client import build_reply, read_request
from fedbasin.client.context import keep_fused, keep_sent
from fedbasin.client.fitting import fit_reply
from fedbasin.client.regression import regress
from fedbasin.client.sharing import FlowError
from fedbasin.client.statistics import gram_pieces, grams
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.strategies.encodings import statistics
from fedbasin.strategies.fusion.compact import Encoding, Form, Kind
from fedbasin.strategies.fusion.layers import gram_layers, known_blocks
from fedbasin.strategies.messages import broadcast
from fedbasin.strategies.recipe import RECIPES, Target
from fedbasin.strategies.stages import Ask, fusing
from fedbasin.strategies.state import interpolate
from tests.strategies.symmetry.tiny_transformers import MODELS, TOKENS

W = torch.float64
ATTENTION = {"bert_classes": ("query", "key", "value"), "llama_alone": ("q_proj", "k_proj", "v_proj")}  # fmt: skip
DATA = [(TOKENS[:, :5], torch.tensor([0, 1])), (TOKENS[:1], torch.tensor([1]))]


def library(name, dtype=W):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the library says of its own future
        return MODELS[name].make().to(dtype).eval()


def shared(found):
    """The last names of the modules whose values are one object, group by group."""
    groups = {}
    for block, value in found.items():
        groups.setdefault(id(value), []).append(block[0].split(".")[-2])
    return [tuple(group) for group in groups.values() if len(group) > 1]


@pytest.mark.parametrize("name", ATTENTION)
def test_projections_of_one_stream_share_a_gram_and_it_is_each_ones_own(name):
    model = library(name)
    found = grams(model, DATA)
    layers = model.config.num_hidden_layers
    assert shared(found).count(ATTENTION[name]) == layers
    assert shared(found).count(("gate_proj", "up_proj")) == (layers if "llama" in name else 0)
    for block, gram in found.items():
        alone = gram_pieces(model, DATA, blocks=[block])[block]["values"]
        rows, columns = torch.triu_indices(*gram.shape)
        torch.testing.assert_close(gram[rows, columns].float(), alone)


@pytest.mark.parametrize("target", [Target.features, Target.weights])
@pytest.mark.parametrize("name", ATTENTION)
def test_fits_share_their_inputs_and_keep_their_own_moments(name, target):
    model = library(name)
    own = {n: t.clone() for n, t in model.state_dict().items()}
    noise = {n: t + torch.randn_like(t) if t.is_floating_point() else t for n, t in own.items()}
    fused = interpolate(own, noise, 0.1)
    blocks = [
        layer.block for layer in gram_layers(model) if layer.block[0].split(".")[-2] in ATTENTION[name]
    ][:3]  # fmt: skip
    together = regress(model, own, fused, blocks, target, DATA)
    assert len({id(sums.inputs) for sums in together.values()}) == 1
    for block in blocks:
        (alone,) = regress(model, own, fused, [block], target, DATA).values()
        torch.testing.assert_close(together[block].gram, alone.gram)
        torch.testing.assert_close(together[block].moment, alone.moment)


class Reading(nn.Module):
    """Two layers, and what is done between them."""

    def __init__(self, forward, width=4, **made):
        super().__init__()
        self.a, self.b = nn.Linear(4, width), nn.Linear(4, width, **made)
        self.twice = nn.Linear(4, 4)
        self.body = forward

    def forward(self, x):
        return self.body(self, x + 0).mean(1)


def between(model, x):
    y = model.a(x)
    x += 1
    return y + model.b(x)


TOGETHER = {"as they are": lambda m, x: m.a(x) + m.b(x), "in another order": lambda m, x: m.b(x) + m.a(x)}  # fmt: skip
ALONE = {
    "an equal tensor": lambda m, x: m.a(x) + m.b(x.clone()),
    "written over between": between,
    "one of them twice": lambda m, x: m.a(x) + m.b(x) + m.b(2 * x),
    "the other twice": lambda m, x: m.a(x) + m.a(2 * x) + m.b(x),
    "a row that a router picked": lambda m, x: m.a(x[:, 0]) + m.b(x[:, 0]),
    "rows that a router picked": lambda m, x: (m.a(p := x[:1]) + m.b(p)).expand(3, -1, -1),
    "no example apart": lambda m, x: (m.a(p := x.flatten(0, 1)) + m.b(p)).unflatten(0, (3, -1)),
}


def tokens(count=3):
    x = torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(0), dtype=W)
    return [(x, torch.zeros(count, dtype=torch.long))]


def reading(forward, **made):
    torch.manual_seed(0)
    return Reading(forward, **made).to(W)


def expected(model, data):
    """Each layer's own, one at a time."""
    return {b: gram_pieces(model, data, blocks=[b])[b]["values"] for b in grams(model, data)}


@pytest.mark.parametrize("forward", TOGETHER.values(), ids=TOGETHER)
def test_what_reads_the_same_tensor_shares(forward):
    assert shared(grams(reading(forward), tokens())) == [("a", "b")]


@pytest.mark.parametrize("forward", ALONE.values(), ids=ALONE)
def test_what_may_not_always_read_the_same_tensor_does_not_share(forward):
    model = reading(forward)
    found = grams(model, tokens())
    assert not shared(found)
    for block, values in expected(model, tokens()).items():
        rows, columns = torch.triu_indices(*found[block].shape)
        torch.testing.assert_close(found[block][rows, columns].float(), values)


def test_a_layer_without_a_bias_does_not_share_with_one_that_has_it():
    found = grams(reading(TOGETHER["as they are"], bias=False), tokens())
    assert [gram.shape[0] for gram in found.values()][:2] == [5, 4]


def test_convolutions_share_where_they_see_the_same_patches():
    class Branches(nn.Module):
        def __init__(self, **made):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 4, 3, **made)

        def forward(self, x):
            return self.a(x).mean((2, 3)) + self.b(x).mean((2, 3)).sum(1, keepdim=True)

    data = [(torch.randn(3, 2, 5, 5), torch.zeros(3, dtype=torch.long))]
    assert shared(grams(Branches(padding=1), data)) == [("a", "b")]
    assert not shared(grams(Branches(), data))


def test_groups_of_channels_do_not_share():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Conv2d(4, 4, 3, groups=2) for _ in range(2))

        def forward(self, x):
            return (self.a(x) + self.b(x)).mean((2, 3))

    data = [(torch.randn(3, 4, 5, 5), torch.zeros(3, dtype=torch.long))]
    assert not shared(grams(Branches(), data))


def test_layers_that_are_sent_in_other_forms_do_not_share():
    model = reading(TOGETHER["as they are"])
    a, b = [("a.weight", "a.bias"), ("b.weight", "b.bias")]
    half = {each: Encoding(Form(Kind.half), inputs=5) for each in (a, b)}
    assert shared(gram_pieces(model, tokens(), encodings=half)) == [("a", "b")]
    del half[b]
    found = gram_pieces(model, tokens(), encodings=half)
    assert not shared(found)
    assert list(found[b]) == ["values"]


def test_a_padded_batch_is_summed_without_its_padding():
    model, ((x, y),) = reading(TOGETHER["as they are"]), tokens()
    mask = torch.arange(5) < torch.tensor([5, 1, 3]).unsqueeze(1)
    found = grams(model, [(x, y, mask)])["b.weight", "b.bias"]
    rows = F.pad(x[mask], (0, 1), value=1.0)
    torch.testing.assert_close(found, rows.T @ rows)


def test_a_model_that_reads_otherwise_in_a_later_batch_is_refused_by_name():
    def moody(model, x):
        return model.a(x) + (model.b(x) if len(x) > 1 else 0)

    with pytest.raises(
        FlowError, match=r"b\.weight and a\.weight read the same tensor in the first"
    ):
        grams(reading(moody), tokens(3) + tokens(1))


def test_layers_that_are_not_called_at_all_in_a_later_batch_are_in_order():
    def moody(model, x):
        return model.a(x) + model.b(x) if len(x) > 1 else x

    assert shared(grams(reading(moody), tokens(3) + tokens(1))) == [("a", "b")]


def triangle(inputs):
    return 4 * inputs * (inputs + 1) // 2


def replied(model):
    """A reply of the recipe regmean, as it is sent."""
    anchor = {n: t.clone() for n, t in model.state_dict().items()}
    blocks = known_blocks(model, RECIPES["regmean"].statistic)
    stage = fusing(anchor, RECIPES["regmean"], Ask(), "off", blocks)
    asked = read_request(broadcast(stage, anchor, 1, ConfigRecord()).content)
    return build_reply(asked, anchor, {"num-examples": 3.0}, model, lambda: DATA)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_replys_statistics_take_these_bytes_and_no_more(name):
    model = library(name, torch.float32)
    content = replied(model)
    width, inner = model.config.hidden_size, model.config.intermediate_size
    if "llama" in name:  # q k v, o, gate up, down; and the head, none with a bias
        each, last = (width, width, width, inner), (width,)
    else:  # q k v, o, up, down; and the pooler and the classifier
        each, last = (width + 1, width + 1, width + 1, inner + 1), (width + 1, width + 1)
    values = model.config.num_hidden_layers * sum(map(triangle, each)) + sum(map(triangle, last))
    header = 128
    assert packing.nbytes(content[wire.STATISTICS]) == values + header
    alone = sum(triangle(layer.inputs) for layer in gram_layers(model)) + header
    assert values + header < 0.75 * alone


def packed(state, header, specs):
    content = RecordDict()
    content[wire.ARRAYS], packed = packing.pack(state)
    specs.extend(packed)
    wire.write(content, header)
    return content


def fitted(model, blocks):
    """A reply to a fit of these layers."""
    own = {n: t.clone() for n, t in model.state_dict().items()}
    context = Context(1, 100, {}, RecordDict(), {})
    sent = pb.UpdateHeader(round=1, examples=3)
    keep_sent(context, packed(own, sent, sent.tensors))
    fit = pb.Fit(blocks=[pb.Block(tensors=b) for b in blocks], target=pb.FIT_TARGET_FEATURES)
    header = pb.Request(round=1, stage="fit", fit=fit)
    asked = packed(own, header, header.anchor)
    keep_fused(context, asked)
    return fit_reply(read_request(asked), context, model, lambda: DATA)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_fits_statistics_take_one_gram_and_a_moment_for_each_layer(name):
    model = library(name, torch.float32)
    layers = [la for la in gram_layers(model) if la.block[0].split(".")[-2] in ATTENTION[name]][:3]
    content = fitted(model, [layer.block for layer in layers])
    moments = sum(4 * layer.outputs * layer.inputs for layer in layers)
    size = packing.nbytes(content[wire.STATISTICS])
    assert size == triangle(layers[0].inputs) + moments + 128


@pytest.mark.parametrize("name", ATTENTION)
def test_a_server_reads_what_layers_have_in_common_as_that(name):
    model = library(name, torch.float32)
    content = replied(model)
    found = statistics(content, wire.read_update(content), pb.PRECISION_KIND_GRAM, {}).precisions
    own = grams(model, DATA)
    assert shared(found) == shared(own)
    for block, gram in own.items():
        torch.testing.assert_close(found[block].matrix, gram.float().double())
