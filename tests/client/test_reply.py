"""Align, collect, probe, pack: what a client's reply says, against the parts that it is made of."""

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from fedbasin.client import build_reply, read_request
from fedbasin.client.measure.loss_path import path_losses
from fedbasin.client.request import MissingDataError
from fedbasin.client.statistics.fisher import diagonal_fisher
from fedbasin.client.statistics.gram import grams
from fedbasin.proto import packing, wire
from fedbasin.proto.encoding import GramForm
from fedbasin.strategies.alignment.matchers import Matcher
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.fusion.compression.formats import encode
from fedbasin.strategies.messages import broadcast
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.stages import Ask, fusing
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.symmetry.transform import random
from tests import tiny

METRICS = {"num-examples": 21.0, "loss": 0.5}


def request(recipe="fedavg", align="client", packed=True, **more):
    anchor = tiny.net().state_dict()
    stage = fusing(anchor, RECIPES[recipe], Ask(symmetry=tiny.symmetry(), **more), align)
    return read_request(broadcast(stage, anchor, 1, ConfigRecord(), packed=packed).content)


def trained(seed=1, step=0.05):
    """A client near the anchor, in another order of its hidden units."""
    draw = torch.Generator().manual_seed(seed)
    near = {
        n: t + step * torch.randn(t.shape, generator=draw) if t.is_floating_point() else t + 4
        for n, t in tiny.net().state_dict().items()
    }
    return random(tiny.symmetry(), draw).act(near)


def data():
    draw = torch.Generator().manual_seed(3)
    return [(torch.randn(21, 4, generator=draw), torch.randint(3, (21,), generator=draw))]


def reply(asked, state=None, own_data=data, metrics=METRICS):
    content = build_reply(asked, state or trained(), metrics, tiny.net(5), own_data)
    header = wire.read_update(content)
    return content, header


def statistics(content, header):
    tensors = packing.unpack(content[wire.STATISTICS], [p.statistic for p in header.precisions])
    return {tuple(p.tensors): tensors[p.statistic.name] for p in header.precisions}


def test_the_model_is_sent_in_the_anchors_frame():
    asked = request()
    content, header = reply(asked)
    found = packing.unpack(content[wire.ARRAYS], header.tensors)
    expected = match_weights(tiny.symmetry(), asked.anchor, trained())
    assert not expected.transform.is_identity
    assert all(torch.equal(found[name], expected.state[name]) for name in found)
    assert header.alignment.distance_after == expected.report.distance_after
    assert header.symmetry_digest == tiny.symmetry().digest
    assert header.alignment.seconds > 0


def test_biases_that_attention_cannot_see_are_sent_as_the_anchors():
    symmetry = parse("+ 0.bias")
    anchor, client = tiny.net().state_dict(), trained()
    stage = fusing(anchor, RECIPES["fedavg"], Ask(symmetry=symmetry), "client")
    asked = read_request(broadcast(stage, anchor, 1, ConfigRecord(), packed=True).content)
    content, header = reply(asked, client)
    found = packing.unpack(content[wire.ARRAYS], header.tensors)
    torch.testing.assert_close(found["0.bias"], anchor["0.bias"])
    assert torch.equal(found["0.weight"], client["0.weight"])


def test_unasked_nothing_is_aligned():
    content, header = reply(request(align="off"))
    found = packing.unpack(content[wire.ARRAYS], header.tensors)
    assert all(torch.equal(found[name], trained()[name]) for name in found)
    assert not header.HasField("alignment")
    assert header.symmetry_digest == b""


def test_the_header_answers_the_question():
    asked = request()
    _, header = reply(asked)
    assert (header.round, header.stage, header.examples) == (1, "fuse", 21)
    assert header.anchor_digest == packing.digest(asked.anchor)


def test_counters_stay_at_home_unless_the_answer_is_plain():
    content, header = reply(request())
    assert "1.num_batches_tracked" not in {spec.name for spec in header.tensors}
    content, header = reply(request(packed=False))
    assert not header.tensors
    assert list(content[wire.ARRAYS]) == list(tiny.net().state_dict())


@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_grams_are_those_of_the_aligned_model(shrink):
    asked = request("regmean")
    asked.header.shrink = shrink
    content, header = reply(asked)
    model = tiny.net()
    model.load_state_dict(match_weights(tiny.symmetry(), asked.anchor, trained()).state)
    expected = grams(model, data(), shrink)
    found = statistics(content, header)
    assert found.keys() == expected.keys()
    for block, gram in expected.items():
        torch.testing.assert_close(found[block], encode(gram, GramForm(), bias=True)["values"])


def test_a_fisher_diagonal_has_the_number_of_examples_as_its_mean():
    asked = request("fisher")
    content, header = reply(asked)
    model = tiny.net()
    model.load_state_dict(match_weights(tiny.symmetry(), asked.anchor, trained()).state)
    raw = diagonal_fisher(model, data())
    found = statistics(content, header)
    assert set(found) == {(name,) for name in raw}
    for (name,), fisher in found.items():
        assert float(fisher.double().mean()) == pytest.approx(21)
        torch.testing.assert_close(fisher / fisher.sum(), raw[name] / raw[name].sum())


def test_a_parameter_that_the_data_says_nothing_of_counts_by_examples():
    state = trained()
    state["3.weight"] = torch.zeros(3, 6)  # nothing of the hidden units reaches the logits
    asked = request("fisher", align="off")
    content, header = reply(asked, state)
    assert torch.equal(statistics(content, header)["0.weight",], torch.full((6, 4), 21.0))


def test_the_path_is_probed_before_and_after_alignment():
    asked = request(path_points=3)
    _, header = reply(asked)
    aligned = match_weights(tiny.symmetry(), asked.anchor, trained()).state
    for end, loss, correct in (
        (trained(), header.path.loss_before, header.path.correct_before),
        (aligned, header.path.loss_after, header.path.correct_after),
    ):
        path = path_losses(tiny.net(), asked.anchor, end, data(), 3)
        assert tuple(loss) == path.loss
        assert tuple(correct) == path.correct
    assert header.path.loss_before[2] == pytest.approx(header.path.loss_after[2], rel=1e-5)
    assert header.path.loss_before[1] != pytest.approx(header.path.loss_after[1])
    assert (list(header.path.points), header.path.examples) == ([0, 0.5, 1], 21)


class TestTheProofOfAnAlignment:
    # The bias of the hidden units and their normalisation are forgotten.
    FORGETFUL = parse("hidden  S(6)  0.weight[0] 3.weight[1]")

    def asked(self, symmetry=None, **more):
        anchor, ask = tiny.net().state_dict(), Ask(symmetry=symmetry or tiny.symmetry(), **more)
        stage = fusing(anchor, RECIPES["regmean"], ask, "client")
        return read_request(broadcast(stage, anchor, 1, ConfigRecord()).content)

    def test_is_that_the_clients_own_loss_stays(self):
        _, header = reply(self.asked(path_points=2))
        error = header.alignment.endpoint_error
        before, after = header.path.loss_before[-1], header.path.loss_after[-1]
        assert error == pytest.approx(abs(after - before) / max(after, before))
        assert error < 1e-5
        assert not header.function_changed

    def test_that_fails_keeps_the_model_at_home(self):
        content, header = reply(self.asked(self.FORGETFUL, path_points=2))
        assert header.function_changed
        assert header.alignment.endpoint_error > 1e-3
        assert set(content) == {"metrics", wire.HEADER}
        assert not header.tensors
        assert not header.precisions

    def test_says_nothing_where_the_data_is_not_the_same_each_time(self):
        draw = torch.Generator().manual_seed(3)

        def augmented():
            return [(torch.randn(21, 4, generator=draw), torch.arange(21) % 3)]

        content, header = reply(self.asked(path_points=2), own_data=augmented)
        assert not header.alignment.HasField("endpoint_error")
        assert not header.function_changed
        assert wire.ARRAYS in content

    def test_is_not_made_where_no_path_is_asked_for(self):
        _, header = reply(self.asked(self.FORGETFUL))
        assert not header.alignment.HasField("endpoint_error")

    def test_is_not_asked_of_a_model_that_nobody_moved(self):
        asked = request(align="off", path_points=2)
        _, header = reply(asked)
        assert not header.HasField("alignment")


@pytest.mark.parametrize(
    ("recipe", "more", "what"),
    [
        ("regmean", {}, "PRECISION_KIND_GRAM"),
        ("fisher", {}, "PRECISION_KIND_DIAGONAL"),
        ("fedavg", {"path_points": 3}, "the barrier"),
    ],
)
def test_what_only_data_can_say_needs_data(recipe, more, what):
    with pytest.raises(MissingDataError, match=f"{what}.*needs the client's data; pass `data`"):
        reply(request(recipe, **more), own_data=None)


def test_fedavg_needs_no_data():
    assert wire.STATISTICS not in reply(request(), own_data=None)[0]


def test_metrics_without_a_weight_are_refused():
    with pytest.raises(KeyError, match="num-examples"):
        reply(request(), metrics={"loss": 1.0})


def test_a_message_that_is_no_request_is_refused_by_name():
    with pytest.raises(wire.WireError):
        read_request(RecordDict())


@pytest.mark.parametrize("name", [wire.ARRAYS, wire.RADII])
def test_a_request_without_its_tensors_is_refused_by_name(name):
    anchor = tiny.net().state_dict()
    stage = fusing(anchor, RECIPES["fedavg"], Ask(symmetry=tiny.symmetry()), "client")
    content = broadcast(stage, anchor, 1, ConfigRecord()).content
    del content[name]
    with pytest.raises(wire.WireError, match=f"no record '{name}'"):
        read_request(content)


# What is learned is held to the client's loss instead, in tests/server/test_linking.py.
@pytest.mark.parametrize("matcher", [m for m in Matcher if m is not Matcher.learned])
def test_every_matcher_that_compares_brings_the_client_back_and_the_reply_says_that_it_moved(
    matcher,
):
    asked = request(matcher=matcher)
    content, header = reply(asked)
    found = packing.unpack(content[wire.ARRAYS], header.tensors)
    expected = match_weights(tiny.symmetry(), asked.anchor, trained()).state
    torch.testing.assert_close(found, {name: expected[name] for name in found})
    assert header.alignment.decision == "aligned"


def test_a_client_that_is_proven_to_be_in_place_says_so():
    asked = request()
    _, header = reply(asked, state=tiny.net().state_dict())
    assert header.alignment.decision == "certified"


def test_matching_by_activations_needs_data():
    with pytest.raises(MissingDataError, match="activations"):
        reply(request(matcher=Matcher.activations), own_data=None)
