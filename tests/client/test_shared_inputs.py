"""Layers that read the same tensors have one total: which they are, and that it is what each would have alone."""

import warnings

import hypothesis.strategies as st
import pytest
import torch
from flwr.app import Context, RecordDict
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

from fedbasin.client import build_reply, read_request
from fedbasin.client.client_state import keep_fused, keep_sent
from fedbasin.client.refit.refit_reply import refit_reply
from fedbasin.client.refit.regression import regress
from fedbasin.proto import packing
from fedbasin.proto.encoding import Encoding, GramForm, GramKind
from fedbasin.proto.header import STATISTICS
from fedbasin.proto.reply import Reply
from fedbasin.proto.request import Refit, Request
from fedbasin.strategies.fusion.compression.formats import encode
from fedbasin.strategies.fusion.layers import gram_layers
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.statistics.gram import gram_pieces, grams
from fedbasin.strategies.tensors.state import interpolate
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


TOGETHER = {
    "as they are": lambda m, x: m.a(x) + m.b(x),
    "in another order": lambda m, x: m.b(x) + m.a(x),
    "both twice": lambda m, x: m.a(x) + m.b(x) + m.b(y := 2 * x) + m.a(y),
    "rows that a router picked": lambda m, x: (m.a(p := x[:1]) + m.b(p)).expand(3, -1, -1),
    "one row an example": lambda m, x: (m.a(p := x[:, 0]) + m.b(p)).unsqueeze(1),
    "no example apart": lambda m, x: (m.a(p := x.flatten(0, 1)) + m.b(p)).unflatten(0, (3, -1)),
}
ALONE = {
    "an equal tensor": lambda m, x: m.a(x) + m.b(x.clone()),
    "written over between": between,
    "one of them twice": lambda m, x: m.a(x) + m.b(x) + m.b(2 * x),
    "the other twice": lambda m, x: m.a(x) + m.a(2 * x) + m.b(x),
    "both twice, one after the other": lambda m, x: m.a(x) + m.a(y := 2 * x) + m.b(x) + m.b(y),
    "equal rows": lambda m, x: m.a(x[:, 0]) + m.b(x[:, 0]),
}


def tokens(count=3):
    x = torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(0), dtype=W)
    return [(x, torch.zeros(count, dtype=torch.long))]


def reading(forward, **made):
    torch.manual_seed(0)
    return Reading(forward, **made).to(W)


def check_alone(found, model, data):
    """Each matrix is, to the last bit, that of its layer alone."""
    for block, gram in found.items():
        (alone,) = regress(model, own := model.state_dict(), own, [block], Target.weights, data).values()
        assert torch.equal(gram, (alone.gram + alone.gram.mT) / 2)


@pytest.mark.parametrize("forward", TOGETHER.values(), ids=TOGETHER)
def test_what_reads_the_same_tensors_shares(forward):
    found = grams(model := reading(forward), tokens())
    assert shared(found) == [("a", "b")]
    check_alone(found, model, tokens())


@pytest.mark.parametrize("forward", ALONE.values(), ids=ALONE)
def test_what_reads_other_tensors_does_not_share(forward):
    model = reading(forward)
    found = grams(model, tokens())
    assert not shared(found)
    check_alone(found, model, tokens())


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
    half = {each: Encoding(GramForm(GramKind.half), inputs=5) for each in (a, b)}
    assert shared(gram_pieces(model, tokens(), encodings=half)) == [("a", "b")]
    del half[b]
    found = gram_pieces(model, tokens(), encodings=half)
    assert not shared(found)
    assert list(found[b]) == ["values"]


def test_layers_that_are_never_called_share_zeros_where_these_are_sent_alike():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 3), nn.Linear(5, 3, bias=False)).to(W)
    model.forward = lambda x: x
    half = {la.block: Encoding(GramForm(GramKind.half), inputs=5) for la in gram_layers(model)}
    found = gram_pieces(model, [(torch.ones(2, 4), torch.zeros(2))], encodings=half)
    assert not any(piece.any() for pieces in found.values() for piece in pieces.values())
    first, second, unbiased = found.values()
    assert first is second
    assert list(unbiased) == ["values", "root"]


def test_a_padded_batch_is_summed_without_its_padding():
    model, ((x, y),) = reading(TOGETHER["as they are"]), tokens()
    mask = torch.arange(5) < torch.tensor([5, 1, 3]).unsqueeze(1)
    found = grams(model, [(x, y, mask)])["b.weight", "b.bias"]
    rows = F.pad(x[mask], (0, 1), value=1.0)
    torch.testing.assert_close(found, rows.T @ rows)


LATER = {
    "the other is left out": lambda m, x: m.a(x),
    "the one is left out": lambda m, x: m.b(x),
    "the other reads something else": lambda m, x: m.a(x) + m.b(2 * x),
    "the other goes first, with something else": lambda m, x: m.b(2 * x) + m.a(x),
    "the other once more": lambda m, x: m.a(x) + m.b(x) + m.b(2 * x),
    "the one once more": lambda m, x: m.a(x) + m.b(x) + m.a(2 * x),
    "the one once more before the other": lambda m, x: m.a(x) + m.a(2 * x) + m.b(x),
}


def moody(later):
    """As together, but otherwise for a single example."""
    return reading(lambda m, x: m.a(x) + m.b(x) if len(x) > 1 else later(m, x))


@pytest.mark.parametrize("batches", [(3, 1), (1, 3), (3, 1, 3)])
@pytest.mark.parametrize("later", LATER.values(), ids=LATER)
def test_layers_part_where_they_no_longer_read_the_same(later, batches):
    data = [batch for count in batches for batch in tokens(count)]
    found = grams(model := moody(later), data)
    assert not shared(found)
    check_alone(found, model, data)


def test_layers_stay_together_through_a_batch_that_calls_neither():
    data = tokens(1) + tokens(3) + tokens(1) + tokens(3)
    found = grams(model := moody(lambda m, x: m.twice(x)), data)
    assert shared(found) == [("a", "b")]
    check_alone(found, model, data)


@pytest.mark.parametrize("later", LATER.values(), ids=LATER)
def test_fits_part_too_and_keep_their_moments(later):
    model, data = moody(later), tokens(3) + tokens(1) + tokens(3)
    own = {n: t.clone() for n, t in model.state_dict().items()}
    fused = {n: t + 0.1 for n, t in own.items()}
    blocks = [layer.block for layer in gram_layers(model)]
    for block, sums in regress(model, own, fused, blocks, Target.weights, data).items():
        (alone,) = regress(model, own, fused, [block], Target.weights, data).values()
        assert torch.equal(sums.gram, alone.gram)
        torch.testing.assert_close(sums.moment, alone.moment)


class Programme(nn.Module):
    """Three layers, and for each batch which of them reads which tensor."""

    def __init__(self, batches):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.batches = batches

    def forward(self, x, number):
        given = [x, 2 * x, 3 * x]
        reads = self.batches[int(number)]
        return sum((self.get_submodule(layer)(given[tensor]) for layer, tensor in reads), x)


READS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=6)


@settings(deadline=None, max_examples=60)
@given(batches=st.lists(READS, min_size=1, max_size=4), sketched=st.booleans())
def test_whatever_layers_read_each_has_the_total_that_it_would_have_alone(batches, sketched):
    torch.manual_seed(0)
    model = Programme(batches).to(W)
    data = [
        ({"x": x + number, "number": torch.tensor(number)}, y) for number in range(len(batches)) for x, y in tokens()
    ]
    form = GramForm(GramKind.sketch, 2) if sketched else GramForm()
    known = {layer.block: Encoding(form, inputs=5) for layer in gram_layers(model)}
    found = gram_pieces(model, data, encodings=known)
    for block, pieces in found.items():
        alone = gram_pieces(model, data, encodings=known, blocks=[block])[block]
        assert all(torch.equal(piece, alone[name]) for name, piece in pieces.items())
    reads = {n: [[t for layer, t in reads if layer == n] for reads in batches] for n in "abc"}
    groups = {}
    for block, pieces in found.items():
        groups.setdefault(id(pieces), []).append(reads[block[0][0]])
    assert all(other == first for first, *others in groups.values() for other in others)


def test_projections_share_in_a_transformer_that_leaves_early_for_some():
    """Without its last block, a batch of one leaves those of the others as they are."""
    model = library("llama_alone")
    layers = model.config.num_hidden_layers

    def leave(module, args):
        module.config.num_hidden_layers = layers if len(args[0]) > 1 else 1

    model.register_forward_pre_hook(leave)
    found = grams(model, data := DATA + DATA)
    assert shared(found).count(ATTENTION["llama_alone"]) == layers
    check_alone(found, model, data)


def test_every_batch_is_run_once_by_each_model():
    model, passes = library("llama_alone"), []
    model.register_forward_hook(lambda module, *_: passes.append(module is model))
    own = {n: t.clone() for n, t in model.state_dict().items()}
    blocks = [layer.block for layer in gram_layers(model)]
    grams(model, DATA)
    assert passes == [True] * len(DATA)
    passes.clear()
    regress(model, own, own, blocks, Target.features, DATA)
    assert sorted(passes) == [False] * len(DATA) + [True] * len(DATA)


def triangle(inputs):
    return 4 * inputs * (inputs + 1) // 2


def replied(model):
    """A reply of the recipe regmean, and its content as it is sent."""
    anchor = {n: t.clone() for n, t in model.state_dict().items()}
    asked = read_request(Request("fuse", round=1, anchor=anchor, statistic="gram").to_content())
    reply = build_reply(asked, anchor, {"num-examples": 3.0}, model, lambda: DATA)
    return asked, reply.to_content(asked)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_replys_statistics_take_these_bytes_and_no_more(name):
    model = library(name, torch.float32)
    _, content = replied(model)
    width, inner = model.config.hidden_size, model.config.intermediate_size
    if "llama" in name:  # q k v, o, gate up, down; and the head, none with a bias
        each, last = (width, width, width, inner), (width,)
    else:  # q k v, o, up, down; and the pooler and the classifier
        each, last = (width + 1, width + 1, width + 1, inner + 1), (width + 1, width + 1)
    values = model.config.num_hidden_layers * sum(map(triangle, each)) + sum(map(triangle, last))
    header = 128
    assert packing.nbytes(content[STATISTICS]) == values + header
    alone = sum(triangle(layer.inputs) for layer in gram_layers(model)) + header
    assert values + header < 0.75 * alone


def fitted(model, blocks):
    """The content of a reply to a refit of these layers."""
    own = {n: t.clone() for n, t in model.state_dict().items()}
    context = Context(1, 100, {}, RecordDict(), {})
    asked = Request("refit", round=1, anchor=own, refit=Refit(tuple(blocks), "features"))
    sent = Reply(1, "fuse", parameters=own, examples=3)
    keep_sent(context, asked, sent.to_content(asked, packed=True))
    keep_fused(context, asked, asked.to_content(packed=True))
    return refit_reply(asked, asked.refit, context, model, lambda: DATA).to_content(asked)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_fits_statistics_take_one_gram_and_a_moment_for_each_layer(name):
    model = library(name, torch.float32)
    layers = [la for la in gram_layers(model) if la.block[0].split(".")[-2] in ATTENTION[name]][:3]
    content = fitted(model, [layer.block for layer in layers])
    moments = sum(4 * layer.outputs * layer.inputs for layer in layers)
    size = packing.nbytes(content[STATISTICS])
    assert size == triangle(layers[0].inputs) + moments + 128


@pytest.mark.parametrize("name", ATTENTION)
def test_a_server_reads_what_layers_have_in_common_as_that(name):
    model = library(name, torch.float32)
    asked, content = replied(model)
    statistics = Reply.from_message(content, asked).statistics
    own = grams(model, DATA)
    found = {s.block: statistics[i if s.same is None else s.same] for i, s in enumerate(statistics)}
    assert shared(found) == shared(own)
    for block, gram in own.items():
        expected = encode(gram, GramForm(), bias=len(block) > 1)["values"]
        torch.testing.assert_close(found[block].pieces, (expected,))
