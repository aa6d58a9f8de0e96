"""A client's message becomes an update; bad messages are tested with the outcomes."""

from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict

from fedbasin.client.align import align
from fedbasin.client.request_reader import read_request
from fedbasin.proto import packing, plain
from fedbasin.proto.header import STATISTICS, records, without_header
from fedbasin.proto.reply import Reply
from fedbasin.proto.request import Refit, Request, Start
from fedbasin.server.exchange.receive import _OWN_OUTCOMES, receive
from fedbasin.server.exchange.stage_attempt import RoundContext, StageAttempt, StageLimits
from fedbasin.server.exchange.streaming_grid import NodeReply
from fedbasin.strategies.alignment.identity_bound import identity_bounds
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.layers import known_blocks
from fedbasin.strategies.fusion.precisions import Diagonal, Gram
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.bootstrap import Bootstrap
from fedbasin.strategies.round.evaluate import Evaluate
from fedbasin.strategies.round.fuse import fusing_stage
from tests import tiny

ANCHOR = tiny.net().state_dict()
NUMBERED = {name: str(number) for number, name in enumerate(ANCHOR)}


def attempt(recipe="fedavg", packed=True, config=None, names=None, **fields):
    """An attempt at a stage that asks one client, node 100, to train in round 4."""
    tiny.federation(1).grid()  # sets what Flower needs to make a message
    request = Request("", **fields)
    stage = fusing_stage(ANCHOR, RECIPES[recipe], request, tiny.symmetry(), "client")
    context = RoundContext(4, config or {}, packed=packed, array_names=names or {})
    return StageAttempt(lambda: stage, ANCHOR, [100], context, StageLimits())


def answer(sent):
    """What an honest client replies."""
    (message,) = sent.messages
    # The mod turns the message into the app's; the attempt's own stays as it is.
    copy = Message(RecordDict(dict(message.content)), 100, "train", group_id="4")
    return tiny.federation(1).answer(copy)


@pytest.mark.parametrize("packed", [True, False])
def test_a_client_reads_what_was_asked(packed):
    sent = attempt("regmean", packed, path_points=5, keep=True)
    request = read_request(sent.messages[0].content)
    assert (request.round, request.stage) == (4, "fuse")
    assert (request.statistic, request.path_points) == ("gram", 5)
    assert (request.aligns, request.keep) == (True, True)
    assert request.symmetry == str(tiny.symmetry())
    assert request.anchor_digest == packing.digest(ANCHOR)
    assert request.anchor.keys() == ANCHOR.keys()
    assert all(torch.equal(request.anchor[name], ANCHOR[name]) for name in ANCHOR)
    bounds = identity_bounds(tiny.symmetry(), ANCHOR)
    assert request.identity_bounds.keys() == bounds.keys()
    assert all(torch.equal(request.identity_bounds[name], bounds[name]) for name in bounds)


def test_the_apps_settings_are_copied_with_the_round_in_them():
    config = {"lr": 0.5}
    sent = attempt(config=config)
    settings = without_header(sent.messages[0].content["config"])
    assert dict(settings) == {"lr": 0.5, "server-round": 4}
    assert config == {"lr": 0.5}


@pytest.mark.parametrize("packed", [True, False])
def test_a_report_says_the_size_of_the_request(packed):
    sent = attempt(packed=packed)
    arrays = records(sent.messages[0].content, ArrayRecord)
    sent.add_all([NodeReply(100, None, 0.0, "no reply")])
    (client,) = sent.report().clients
    assert client.bytes_down == sum(packing.nbytes(record) for record in arrays.values()) > 0
    assert (client.outcome, client.bytes_up) == ("timeout", 0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("recipe", "kind"), [("fedavg", None), ("fisher", Diagonal), ("regmean", Gram), ("kfac", Kronecker)]
)
def test_an_honest_answer_becomes_an_update(packed, recipe, kind):
    sent = attempt(recipe, packed)
    received = receive(answer(sent), sent.request, 2**31)
    update = received.update
    assert update.examples == 20
    assert update.parameters["0.weight"].shape == ANCHOR["0.weight"].shape
    assert list(update.precisions) == known_blocks(tiny.net(), RECIPES[recipe].statistic)
    for precision in update.precisions.values():
        assert isinstance(precision, kind)
        for value in vars(precision).values():
            assert not isinstance(value, torch.Tensor) or value.dtype == torch.float64
    assert set(received.reply.metrics) == {"loss"}
    assert received.reply.payload_bytes > 0
    assert update.cross_moments == {}


def test_the_limit_on_bytes_is_the_size_of_the_reply():
    sent = attempt("regmean")
    reply = answer(sent)
    size = receive(reply, sent.request, 2**31).reply.payload_bytes
    receive(reply, sent.request, size)
    with pytest.raises(Refusal, match=f"{size} bytes where {size - 1} are allowed") as refused:
        receive(reply, sent.request, size - 1)
    assert refused.value.outcome is Outcome.too_large


def test_an_evaluation_has_metrics_alone():
    tiny.federation(1).grid()
    sent = StageAttempt(lambda: Evaluate(ANCHOR), ANCHOR, [7], RoundContext(1), StageLimits())
    (message,) = sent.messages
    assert message.metadata.message_type == "evaluate"
    metrics = MetricRecord({"accuracy": 0.5, "num-examples": 8, "curve": [1.0]})
    reply = Message(RecordDict({"any": metrics}), reply_to=message)
    received = receive(reply, sent.request, 1)
    assert (received.update.parameters, received.update.examples) == ({}, 8)
    assert received.reply.metrics == {"accuracy": 0.5, "curve": [1.0]}
    assert received.reply.scalars == {"accuracy": 0.5}
    with pytest.raises(Refusal, match=r"bad_weight: the reply's metrics \(none\) have no number 'num-examples'"):
        receive(Message(RecordDict(), reply_to=message), sent.request, 1)


FOR_THE_SERVER_TO_FIND = [outcome for outcome in Outcome if outcome.name not in _OWN_OUTCOMES]


@pytest.mark.parametrize("outcome", FOR_THE_SERVER_TO_FIND, ids=lambda outcome: outcome.name)
def test_no_client_names_an_outcome_that_is_for_the_server_to_find(outcome):
    sent = attempt()
    own = Reply(
        sent.request.round,
        sent.request.stage,
        sent.request.anchor_digest,
        outcome=outcome.name,
        detail="so it says",
        examples=5.0,
    )
    reply = Message(own.to_content(sent.request), reply_to=sent.messages[0])
    with pytest.raises(Refusal, match="which no client finds for itself") as refused:
        receive(reply, sent.request, 2**31)
    assert refused.value.outcome is Outcome.malformed
    assert outcome.name in refused.value.detail


@pytest.mark.parametrize("metrics", [{}, {"loss": 1.0}, {"num-examples": [5.0]}, {f"m{i}": 1.0 for i in range(9)}])
def test_a_reply_without_a_weight_says_what_its_metrics_have(metrics):
    sent = attempt()
    content = {"arrays": plain.write_arrays(ANCHOR), "metrics": MetricRecord(metrics)}
    with pytest.raises(Refusal, match=f"{next(iter(metrics), 'none')}.* have no number 'num-examples'") as refused:
        receive(app_reply(sent, content), sent.request, 2**31)
    assert refused.value.outcome is Outcome.bad_weight


def test_a_metric_of_two_records_is_refused():
    sent = attempt()
    content = {"arrays": plain.write_arrays(ANCHOR), "own": MetricRecord({"num-examples": 5, "loss": 1.0})}
    receive(app_reply(sent, {**content, "more": MetricRecord({"accuracy": 1.0})}), sent.request, 2**31)
    with pytest.raises(Refusal, match="'num-examples' is in 'more' and in another record") as refused:
        receive(app_reply(sent, {**content, "more": MetricRecord({"num-examples": 10**9})}), sent.request, 2**31)
    assert refused.value.outcome is Outcome.malformed


def test_a_record_without_arrays_is_not_called_missing():
    sent = attempt()
    content = {"arrays": ArrayRecord({}), "metrics": MetricRecord({"num-examples": 5})}
    with pytest.raises(Refusal, match="has a record without arrays"):
        receive(app_reply(sent, content), sent.request, 2**31)


def test_a_bootstrap_sends_no_symmetry():
    tiny.federation(1).grid()
    stage = Bootstrap(ANCHOR, "medoid", tiny.symmetry())
    sent = StageAttempt(lambda: stage, ANCHOR, [7], RoundContext(1), StageLimits())
    request = Request.from_message(sent.messages[0].content)
    assert (request.aligns, request.symmetry) == (False, "")
    assert (request.start, request.keep) == (Start.own, True)


def test_an_answer_to_another_question_is_refused():
    sent = attempt()
    with pytest.raises(Refusal) as refused:
        receive(answer(sent), replace(sent.request, anchor_digest=b"other"), 2**31)
    assert refused.value.outcome is Outcome.wrong_anchor


def test_how_an_alignment_went_is_written_down():
    other = tiny.net(1).state_dict()
    expected = match_weights(tiny.symmetry(), ANCHOR, other).report
    sent = attempt()
    aligned = align(read_request(sent.messages[0].content), other, 20.0, tiny.net(), None)
    (space,), (reported,) = expected.spaces, aligned.report.spaces
    assert (reported.space, reported.moved, reported.gain) == (space.space, space.moved, space.gain)
    assert aligned.report.distance_before > aligned.report.distance_after > 0
    assert aligned.report.sweeps == expected.sweeps
    reply = receive(answer(sent), sent.request, 2**31).reply
    assert [space.space for space in reply.alignment.spaces] == [space.space]
    assert reply.alignment.distance_before >= reply.alignment.distance_after > 0


def app_reply(sent, content):
    (message,) = sent.messages
    return Message(RecordDict(content), reply_to=message)


class TestWithoutTheMod:
    """Replies without this project's header."""

    def content(self, state=ANCHOR):
        metrics = MetricRecord({"num-examples": 5, "loss": 1})
        return {"any name": plain.write_arrays(state), "metrics": metrics}

    @pytest.mark.parametrize("align", ["client", "server", "off"])
    def test_is_accepted_where_weights_are_enough(self, align):
        sent = attempt(path_points=3)
        request = replace(sent.request, symmetry=sent.request.symmetry if align == "client" else "")
        received = receive(app_reply(sent, self.content()), request, 2**31)
        assert all(torch.equal(received.update.parameters[n], t) for n, t in ANCHOR.items())
        assert (received.update.examples, received.update.precisions) == (5.0, {})
        assert not received.reply.has_mod

    def test_its_arrays_have_the_apps_names(self):
        sent = attempt(packed=False, names=NUMBERED)
        numbered = {NUMBERED[name]: tensor for name, tensor in ANCHOR.items()}
        received = receive(app_reply(sent, self.content(numbered)), sent.request, 2**31)
        assert all(torch.equal(received.update.parameters[n], t) for n, t in ANCHOR.items())

    @pytest.mark.parametrize(
        ("fields", "needs"),
        [
            ({"statistic": "gram"}, r"statistics \(gram\)"),
            ({"statistic": "fisher"}, r"statistics \(fisher\)"),
            ({"statistic": "kronecker"}, r"statistics \(kronecker\)"),
            ({"refit": Refit((("w",),), "features")}, "a fit of layers"),
            ({"layer_graph": True}, "a fit of layers after the fusion"),
            ({"start": Start.own}, "training from the client's own initial weights"),
            ({"moving": ANCHOR}, "alignment to another client's model"),
            ({"merged_examples": 20.0}, "alignment to another client's model"),
        ],
    )
    def test_is_refused_with_the_remedy_where_the_mod_is_needed(self, fields, needs):
        sent = attempt()
        request = replace(sent.request, **fields)
        with pytest.raises(Refusal, match=rf"needs {needs}; add to the client: .*mods=\[basin") as refused:  # fmt: skip
            receive(app_reply(sent, self.content()), request, 2**31)
        assert refused.value.outcome is Outcome.missing_mod

    def test_a_path_within_a_refit_needs_the_mod_too(self):
        sent = attempt()
        request = replace(sent.request, kind="evaluate", refit=Refit())
        with pytest.raises(Refusal) as refused:
            receive(app_reply(sent, {"metrics": MetricRecord({"num-examples": 5})}), request, 1)
        assert refused.value.outcome is Outcome.missing_mod

    @pytest.mark.parametrize("count", [0, 2])
    def test_replies_with_one_record_of_arrays(self, count):
        sent = attempt()
        content = {f"arrays {number}": plain.write_arrays(ANCHOR) for number in range(count)}
        with pytest.raises(Refusal, match="does not have one record of arrays") as refused:
            receive(app_reply(sent, content), sent.request, 2**31)
        assert refused.value.outcome is Outcome.missing_tensor


@pytest.mark.parametrize("word", ["fitins.parameters", "evaluateins.parameters"])
def test_a_legacy_client_is_told_what_to_write(word):
    sent = attempt()
    error = Error(2, f"KeyError: '{word}'")
    with pytest.raises(Refusal, match=r"legacy Client.*@app\.train") as refused:
        receive(Message(error, reply_to=sent.messages[0]), sent.request, 1)
    assert refused.value.outcome is Outcome.client_error


@pytest.mark.parametrize("code", range(9))
def test_an_error_is_the_clients_or_the_superlinks(code):
    sent = attempt()
    with pytest.raises(Refusal, match=f"error {code}: no reason given") as refused:
        receive(Message(Error(code), reply_to=sent.messages[0]), sent.request, 1)
    of_client = code in (1, 2, 6, 7, 8)
    assert refused.value.outcome is (Outcome.client_error if of_client else Outcome.unavailable)


def test_statistics_are_read_from_a_record_of_their_own():
    sent = attempt("regmean")
    reply = answer(sent)
    assert isinstance(reply.content[STATISTICS], ArrayRecord)
    del reply.content[STATISTICS]
    assert receive(reply, sent.request, 2**31).update.precisions == {}
