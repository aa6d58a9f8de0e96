"""Align, collect, probe, pack: what a client's reply says, against the parts that it is made of."""

import pytest
import torch
from flwr.app import RecordDict

from fedbasin.client import build_reply, read_request
from fedbasin.client.reply_builder import WeightError
from fedbasin.client.request_reader import MissingDataError
from fedbasin.proto import packing
from fedbasin.proto.encoding import GramForm
from fedbasin.proto.header import HEADER, STATISTICS, WireError
from fedbasin.proto.reply import Reply
from fedbasin.proto.report import Decision
from fedbasin.proto.request import Request
from fedbasin.strategies.alignment.identity_bound import identity_bounds
from fedbasin.strategies.alignment.matchers import AUTO, Matcher
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.diagnostics.loss_path import path_losses
from fedbasin.strategies.fusion.compression.formats import encode
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.statistics.fisher import diagonal_fisher
from fedbasin.strategies.statistics.gram import grams
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.symmetry.transform import random
from tests import tiny

METRICS = {"num-examples": 21.0, "loss": 0.5}
ANCHOR = tiny.net().state_dict()


def request(recipe="fedavg", align=True, packed=True, symmetry=None, node=0, **fields):
    symmetry = symmetry or tiny.symmetry()
    if align:
        bounds = identity_bounds(symmetry, ANCHOR)
        fields |= {"symmetry": str(symmetry), "identity_bounds": bounds}
    sent = Request(
        "fuse",
        round=1,
        anchor=ANCHOR,
        anchor_digest=packing.digest(ANCHOR),
        statistic=RECIPES[recipe].statistic.name,
        **fields,
    )
    return read_request(sent.to_content(packed=packed), node)


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
    """The reply as the server reads it."""
    built = build_reply(asked, state or trained(), metrics, tiny.net(5), own_data)
    return Reply.from_message(built.to_content(asked, packed=asked.packed), asked)


def values(replied):
    return {statistic.block: statistic.pieces[0] for statistic in replied.statistics}


def test_the_model_is_sent_in_the_anchors_frame():
    asked = request()
    found = reply(asked)
    expected = match_weights(tiny.symmetry(), asked.anchor, trained())
    assert not expected.transform.is_identity
    assert all(torch.equal(t, expected.state[name]) for name, t in found.parameters.items())
    assert found.alignment.distance_after == expected.report.distance_after
    assert found.symmetry_digest == tiny.symmetry().digest
    assert found.alignment.seconds > 0


def test_biases_that_attention_cannot_see_are_sent_as_the_anchors():
    client = trained()
    found = reply(request(symmetry=parse("+ 0.bias")), client).parameters
    torch.testing.assert_close(found["0.bias"], ANCHOR["0.bias"])
    assert torch.equal(found["0.weight"], client["0.weight"])


def test_unasked_nothing_is_aligned():
    found = reply(request(align=False))
    assert all(torch.equal(t, trained()[name]) for name, t in found.parameters.items())
    assert found.alignment is None
    assert found.symmetry_digest == b""


def test_the_header_answers_the_question():
    asked = request()
    found = reply(asked)
    assert (found.round, found.stage, found.examples) == (1, "fuse", 21)
    assert found.metrics == {"loss": 0.5}
    assert found.anchor_digest == packing.digest(asked.anchor)


@pytest.mark.parametrize("packed", [True, False])
def test_all_tensors_of_the_anchor_are_sent_the_clients_own_counters_too(packed):
    asked = request(packed=packed)
    assert asked.packed == packed
    found = reply(asked)
    assert list(found.parameters) == list(ANCHOR)
    counter = "1.num_batches_tracked"
    assert torch.equal(found.parameters[counter], trained()[counter])


@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_grams_are_those_of_the_aligned_model(shrink):
    asked = request("regmean", shrink=shrink)
    found = values(reply(asked))
    model = tiny.net()
    model.load_state_dict(match_weights(tiny.symmetry(), asked.anchor, trained()).state)
    expected = grams(model, data(), shrink)
    assert found.keys() == expected.keys()
    for block, gram in expected.items():
        torch.testing.assert_close(found[block], encode(gram, GramForm(), bias=True)["values"])


def test_a_fisher_diagonal_has_the_number_of_examples_as_its_mean():
    asked = request("fisher")
    found = values(reply(asked))
    model = tiny.net()
    model.load_state_dict(match_weights(tiny.symmetry(), asked.anchor, trained()).state)
    raw = diagonal_fisher(model, data())
    assert set(found) == {(name,) for name in raw}
    for (name,), fisher in found.items():
        assert float(fisher.double().mean()) == pytest.approx(21)
        torch.testing.assert_close(fisher / fisher.sum(), raw[name] / raw[name].sum())


def test_a_parameter_that_the_data_says_nothing_of_counts_by_examples():
    state = trained()
    state["3.weight"] = torch.zeros(3, 6)  # nothing of the hidden units reaches the logits
    found = values(reply(request("fisher", align=False), state))
    assert torch.equal(found["0.weight",], torch.full((6, 4), 21.0))


def test_the_path_is_probed_before_and_after_alignment():
    asked = request(path_points=3)
    path = reply(asked).path
    aligned = match_weights(tiny.symmetry(), asked.anchor, trained()).state
    for end, loss, correct in (
        (trained(), path.loss_before, path.correct_before),
        (aligned, path.loss_after, path.correct_after),
    ):
        expected = path_losses(tiny.net(), asked.anchor, end, data(), 3)
        assert loss == expected.loss
        assert correct == expected.correct
    assert path.loss_before[2] == pytest.approx(path.loss_after[2], rel=1e-5)
    assert path.loss_before[1] != pytest.approx(path.loss_after[1])
    assert (path.points, path.examples) == ((0, 0.5, 1), 21)


def test_only_clients_of_the_sample_evaluate_the_path():
    draws = {node: request(node=node, path_points=3).seed for node in range(4)}
    bound = sorted(draws.values())[1]
    for node, seed in draws.items():
        asked = request(node=node, path_points=3, probe_bound=bound)
        assert (reply(asked).path is not None) == (seed <= bound)


class TestTheProofOfAnAlignment:
    # The bias of the hidden units and their normalisation are forgotten.
    FORGETFUL = parse("hidden  S(6)  0.weight[0] 3.weight[1]")

    def test_is_that_the_clients_own_loss_stays(self):
        found = reply(request("regmean", path_points=2))
        error = found.alignment.endpoint_error
        before, after = found.path.loss_before[-1], found.path.loss_after[-1]
        assert error == pytest.approx(abs(after - before) / max(after, before))
        assert error < 1e-5
        assert not found.function_changed

    def test_that_fails_keeps_the_model_at_home(self):
        asked = request("regmean", symmetry=self.FORGETFUL, path_points=2)
        built = build_reply(asked, trained(), METRICS, tiny.net(5), data)
        assert built.function_changed
        assert built.alignment.endpoint_error > 1e-3
        assert built.parameters is None
        assert not built.statistics
        assert set(built.to_content(asked, packed=True)) == {"metrics", HEADER}

    def test_says_nothing_where_the_data_is_not_the_same_each_time(self):
        draw = torch.Generator().manual_seed(3)

        def augmented():
            return [(torch.randn(21, 4, generator=draw), torch.arange(21) % 3)]

        found = reply(request("regmean", path_points=2), own_data=augmented)
        assert found.alignment.endpoint_error is None
        assert not found.function_changed
        assert found.parameters is not None

    def test_is_not_made_where_no_path_is_asked_for(self):
        found = reply(request("regmean", symmetry=self.FORGETFUL))
        assert found.alignment.endpoint_error is None

    def test_is_not_asked_of_a_model_that_nobody_moved(self):
        assert reply(request(align=False, path_points=2)).alignment is None


@pytest.mark.parametrize(
    ("recipe", "more", "what"),
    [
        ("regmean", {}, "the statistic 'gram'"),
        ("fisher", {}, "the statistic 'fisher'"),
        ("fedavg", {"path_points": 3}, "the barrier"),
    ],
)
def test_what_only_data_can_say_needs_data(recipe, more, what):
    with pytest.raises(MissingDataError, match=f"{what}.*needs the client's data; pass `data`"):
        reply(request(recipe, **more), own_data=None)


def test_fedavg_needs_no_data():
    asked = request()
    built = build_reply(asked, trained(), METRICS, tiny.net(5))
    assert STATISTICS not in built.to_content(asked)


@pytest.mark.parametrize("metrics", [{"loss": 1.0}, {"loss": 1.0, "num-examples": [1.0, 2.0]}])
def test_metrics_without_a_weight_are_refused(metrics):
    with pytest.raises(WeightError, match=r"num-examples.*as the number of training examples"):
        reply(request(), metrics=metrics)


def test_a_message_that_is_no_request_is_refused_by_name():
    with pytest.raises(WireError):
        read_request(RecordDict())


def test_a_request_without_its_tensors_is_refused_by_name():
    content = Request("fuse", anchor=ANCHOR).to_content(packed=True)
    del content["arrays"]
    with pytest.raises(WireError, match="no record 'arrays'"):
        read_request(content)


# What is learned is held to the client's loss instead, in tests/server/test_linking.py.
@pytest.mark.parametrize("matcher", [m for m in Matcher if m is not Matcher.learned])
def test_every_matcher_that_compares_brings_the_client_back_and_the_reply_says_that_it_moved(matcher):
    asked = request(matcher=matcher.name)
    found = reply(asked)
    expected = match_weights(tiny.symmetry(), asked.anchor, trained()).state
    torch.testing.assert_close(found.parameters, {name: expected[name] for name in found.parameters})
    assert found.alignment.decision is Decision.aligned


def test_a_client_that_is_proven_to_be_in_place_says_so():
    assert reply(request(), state=ANCHOR).alignment.decision is Decision.certified


@pytest.mark.parametrize("data", [True, False])
def test_a_matcher_that_is_left_to_the_client_takes_features_where_there_are_data(data):
    given = {} if data else {"own_data": None}
    ours = reply(request(matcher=AUTO), **given).parameters
    by = Matcher.activations if data else Matcher.weights
    theirs = reply(request(matcher=by.name), **given).parameters
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_matching_by_activations_needs_data():
    with pytest.raises(MissingDataError, match="activations"):
        reply(request(matcher=Matcher.activations.name), own_data=None)
