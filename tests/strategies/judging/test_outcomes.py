"""Whatever one client replies, the round goes on: its outcome is named, and the sum holds the others alone."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import plain
from fedbasin.proto.encoding import GramForm
from fedbasin.proto.header import HEADER, STATISTICS, read_header
from fedbasin.proto.reply import LayerStatistic, Reply
from fedbasin.proto.report import LayerVariance
from fedbasin.proto.request import Refit, Request
from fedbasin.server.exchange.stage_attempt import RoundContext, StageAttempt, StageLimits
from fedbasin.server.exchange.streaming_grid import StageReplies, StreamingGrid
from fedbasin.strategies.fusion.compression.formats import decode, encode
from fedbasin.strategies.fusion.layers import known_blocks
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.fuse import fusing_stage
from fedbasin.strategies.round.refit import RefitLayers
from tests import tiny
from tests.proto.messages import header_record
from tests.waiting import LONG

BAD = 101
NODES = [100, BAD, 102]
POINTS = 3
LAYER = ("0.weight", "0.bias")
CONTEXT = RoundContext(1, packed=True)


def fuse_attempt(recipe, nodes, align="client", limits=StageLimits()):  # noqa: B008 - frozen
    model = tiny.net()
    anchor = model.state_dict()
    blocks = known_blocks(model, RECIPES[recipe].statistic)
    request = Request("", path_points=POINTS)
    stage = fusing_stage(anchor, RECIPES[recipe], request, tiny.symmetry(), align, blocks)
    return StageAttempt(lambda: stage, anchor, list(nodes), CONTEXT, limits)


def complete(attempt, federation):
    """Send an attempt's messages and finish the stage with the replies."""
    grid = StreamingGrid(federation.grid(), 0.001)
    early_end = attempt.limits.early_end(len(attempt.nodes))
    attempt.add_all(grid.stream(attempt.messages, attempt.limits.timeout_seconds, early_end))
    return attempt.finish()


def federation(**more):
    federation = tiny.federation(**more)
    federation.grid()  # sets what Flower needs to make a message
    return federation


@cache
def fused_by(recipe, nodes, align):
    """The stage that these honest clients alone end in."""
    honest_clients = federation()
    return complete(fuse_attempt(recipe, nodes, align), honest_clients)


def outcomes(report):
    return [(client.node_id, client.outcome) for client in report.clients]


@dataclass(frozen=True)
class Sent:
    """The request to a client, and Flower's message of it."""

    request: Request
    message: Message


# Ways to spoil a reply. Each takes the reply and what was sent, and gives the reply that travels back.
Spoil = Callable[[Message, Sent], Message | None]


def content(change: Callable[[RecordDict], object]) -> Spoil:
    def spoil(reply, sent):
        change(reply.content)
        return reply

    return spoil


def header(change: Callable[[pb.Reply], object]) -> Spoil:
    def spoil(record):
        changed = read_header(record, pb.Reply())
        change(changed)
        record[HEADER] = header_record(changed.SerializeToString())

    return content(spoil)


def header_field(**values):
    return header(lambda message: message.MergeFrom(pb.Reply(**values)))


def typed(change: Callable[[Reply], Reply]) -> Spoil:
    """The same reply with other fields, written as the mod writes it."""

    def spoil(reply, sent):
        changed = change(Reply.from_message(reply.content, sent.request))
        reply.content = changed.to_content(sent.request, packed=True)
        return reply

    return spoil


def fields(**values):
    return typed(lambda reply: replace(reply, **values))


def tensors(change: Callable[[dict], object]) -> Spoil:
    def changed(reply):
        state = {name: tensor.clone() for name, tensor in reply.parameters.items()}
        change(state)
        return replace(reply, parameters=state)

    return typed(changed)


def entry(name, value):
    return tensors(lambda state: state[name].view(-1)[:1].fill_(value))


def statistics(change: Callable[[dict], object]) -> Spoil:
    """The same reply with other statistics, by layer."""

    def changed(reply):
        values = {statistic.block: statistic for statistic in reply.statistics}
        change(values)
        renamed = (replace(statistic, block=block) for block, statistic in values.items())
        return replace(reply, statistics=tuple(renamed))

    return typed(changed)


def statistic(change, block=LAYER):
    """The same reply with another first tensor of a layer's statistic."""

    def changed(values):
        first, *rest = values[block].pieces
        values[block] = replace(values[block], pieces=(change(first.clone()), *rest))

    return statistics(changed)


def all_pieces(factor):
    """The same reply with every statistic multiplied."""

    def scaled(reply):
        grown = (replace(s, pieces=tuple(factor * piece for piece in s.pieces)) for s in reply.statistics)
        return replace(reply, statistics=tuple(grown))

    return typed(scaled)


def gram(change):
    """The same of a Gram matrix, which travels as a triangle."""

    def changed(triangle):
        square = decode({"values": triangle}, GramForm(), bias=True)
        return encode(change(square), GramForm(), bias=True)["values"]

    return statistic(changed)


def all_statistics(**values):
    return typed(lambda reply: replace(reply, statistics=tuple(replace(s, **values) for s in reply.statistics)))


def path(**values):
    return typed(lambda reply: replace(reply, path=replace(reply.path, **{k: tuple(v) for k, v in values.items()})))


def weight(value):
    return content(lambda record: record["metrics"].update({"num-examples": value}))


def truncated(record):
    (name, array), *_ = record["arrays"].items()
    short = Array(array.dtype, array.shape, array.stype, array.data[:-4])
    record["arrays"] = ArrayRecord({name: short})


def error(code, signed_by_superlink=False):
    def spoil(reply, sent):
        answer = Message(Error(code, "gone"), reply_to=sent.message)
        if signed_by_superlink:
            answer.metadata.__dict__["_src_node_id"] = 1
        return answer

    return spoil


def silence(reply, sent):
    return None


def without_the_mod(reply, sent):
    """What the app alone replies: its model's arrays, named as they are, and metrics."""
    read = Reply.from_message(reply.content, sent.request)
    reply.content = RecordDict(
        {
            "model": plain.write_arrays(read.parameters),
            "metrics": MetricRecord({**read.metrics, "num-examples": read.examples}),
        }
    )
    return reply


@dataclass(frozen=True)
class Case:
    outcome: Outcome
    spoil: Spoil
    recipe: str = "fedavg"
    detail: str = ""
    nodes: tuple[int, ...] = (100, BAD, 102)
    summed: tuple[int, ...] = (100, 102)
    fails: bool = False
    max_bytes: int = 2**31
    grace: float | None = None


def honest(reply, sent):
    return reply


O = Outcome  # noqa: E741 - the table's first column
NAN, INF = float("nan"), float("inf")
CASES = {
    "honest": Case(O.accepted, honest, summed=tuple(NODES)),
    "honest, with Fisher": Case(O.accepted, honest, "fisher", summed=tuple(NODES)),
    "honest, with Grams": Case(O.accepted, honest, "regmean", summed=tuple(NODES)),
    "honest, with Kronecker factors": Case(O.accepted, honest, "kfac", summed=tuple(NODES)),
    "the app raises": Case(O.client_error, honest, detail="out of memory", fails=True),
    "an error of the client": Case(O.client_error, error(2), detail="gone"),
    "silence": Case(O.timeout, silence, detail="2 others were enough", grace=0.0),
    "the app does not load": Case(O.client_error, error(1)),
    "a mod refuses": Case(O.client_error, error(6)),
    "the app crashes": Case(O.client_error, error(8)),
    "a message is lost": Case(O.unavailable, error(3, True), detail="error 3"),
    "a reply is lost": Case(O.unavailable, error(4, True)),
    "the node is lost": Case(O.unavailable, error(5, True)),
    "statistics from an app without the mod": Case(
        O.missing_mod, without_the_mod, "regmean", r"needs statistics \(gram\); add to the client"
    ),
    "Fisher from an app without the mod": Case(
        O.missing_mod, without_the_mod, "fisher", "fisher"
    ),
    "packed arrays without the header": Case(
        O.missing_tensor, content(lambda c: c.pop(HEADER)), detail="0.bias"
    ),
    "a header of another kind": Case(
        O.missing_tensor, content(lambda c: c.update({HEADER: MetricRecord({HEADER: 1})}))
    ),
    "a header that is no text": Case(
        O.malformed,
        content(lambda c: c.update({HEADER: ConfigRecord({HEADER: b"x"})})),
        detail="fedbasin",
    ),
    "a header that is no base64": Case(
        O.malformed, content(lambda c: c.update({HEADER: ConfigRecord({HEADER: "x"})}))
    ),
    "a header that does not parse": Case(
        O.malformed, content(lambda c: c.update({HEADER: header_record(b"\xff")}))
    ),
    "a truncated array": Case(O.malformed, content(truncated), detail="truncated"),
    "a manifest beyond the array": Case(
        O.malformed, header(lambda h: h.parameters[0].shape.extend([99])), detail="0.weight"
    ),
    "arrays that the header names and that are not there": Case(
        O.malformed, content(lambda c: c.pop("arrays")), detail="arrays"
    ),
    "statistics beyond their record": Case(
        O.malformed, header(lambda h: h.statistics[0].pieces[0].shape.extend([99])), "regmean"
    ),
    "statistics of another kind": Case(
        O.unexpected_statistic, all_statistics(kind="fisher"), "regmean"
    ),
    "a path that walks backwards": Case(
        O.missing_statistic, path(points=[1, 0.5, 0]), detail="points"
    ),
    "more correct than examples": Case(O.malformed, path(correct_after=[1, 2, 1e9])),
    "a path with fewer losses than points": Case(O.malformed, path(loss_after=[1, 2])),
    "a variance ratio of a layer that is not there": Case(
        O.malformed, fields(variance=(LayerVariance("x", 1.0),)), detail="'x'"
    ),
    "a negative variance ratio": Case(
        O.non_finite, fields(variance=(LayerVariance("0.weight", -1.0),)), detail="0.weight"
    ),
    "another schema version": Case(O.schema_version, header_field(schema_version=99), detail="99"),
    "another round": Case(O.wrong_round, fields(round=7), detail="round 7"),
    "another stage": Case(O.wrong_round, fields(stage="bootstrap"), detail="bootstrap"),
    "twice the same client": Case(
        O.duplicate, honest, nodes=(100, BAD, 102, BAD), summed=tuple(NODES)
    ),
    "another anchor": Case(O.wrong_anchor, fields(anchor_digest=b"x" * 32)),
    "no anchor": Case(O.wrong_anchor, fields(anchor_digest=b""), detail="missing"),
    "models that are lost": Case(O.lost_model, fields(lost=True), detail="round 1, fuse"),
    "another function": Case(O.function_changed, fields(function_changed=True), detail="own loss"),
    "another symmetry": Case(O.symmetry_mismatch, fields(symmetry_digest=b"x" * 32)),
    "not aligned": Case(O.symmetry_mismatch, fields(symmetry_digest=b"")),
    "no arrays": Case(O.missing_tensor, fields(parameters=None), detail="arrays"),
    "a tensor less": Case(O.missing_tensor, tensors(lambda s: s.pop("3.bias")), detail="3.bias"),
    "a tensor more": Case(
        O.unexpected_tensor, tensors(lambda s: s.update(extra=s["3.bias"])), detail="extra"
    ),
    "a tensor without a name": Case(
        O.unexpected_tensor, tensors(lambda s: s.update({"": s["3.bias"]})), detail="''"
    ),
    "a transposed tensor": Case(
        O.wrong_shape,
        tensors(lambda s: s.update({"0.weight": s["0.weight"].mT})),
        detail=r"0.weight is \(4, 6\)",
    ),
    "a tensor that would broadcast": Case(
        O.wrong_shape, tensors(lambda s: s.update({"0.weight": torch.ones(1)}))
    ),
    "a double tensor": Case(
        O.wrong_dtype, tensors(lambda s: s.update({"3.bias": s["3.bias"].double()})), detail="64"
    ),
    "NaN": Case(O.non_finite, entry("3.weight", NAN), detail="3.weight"),
    "infinity": Case(O.non_finite, entry("1.running_var", INF), detail="1.running_var"),
    "minus infinity": Case(O.non_finite, entry("3.bias", -INF), detail="3.bias"),
    "NaN in a Gram": Case(O.non_finite, statistic(lambda g: g * NAN), "regmean", "0.weight"),
    "infinity in a Fisher": Case(
        O.non_finite, statistic(lambda f: f + INF, ("0.weight",)), "fisher", "0.weight"
    ),
    "NaN in a Kronecker factor": Case(
        O.non_finite, statistic(lambda g: g * NAN), "kfac", "0.weight"
    ),
    "a path of NaN": Case(O.non_finite, path(loss_before=[1, NAN, 1]), detail="t = 0.5"),
    "no examples": Case(O.bad_weight, weight(-0.0), detail="0"),
    "a negative weight": Case(O.bad_weight, weight(-5), detail="-5"),
    "a weight of NaN": Case(O.bad_weight, weight(NAN)),
    "an infinite weight": Case(O.bad_weight, weight(INF)),
    "a weight that overflows the sum": Case(O.bad_weight, weight(1e308)),
    "a weight that is a list": Case(O.bad_weight, weight([1.0, 2.0])),
    "no weight": Case(O.bad_weight, content(lambda c: c["metrics"].pop("num-examples"))),
    "no Grams": Case(O.missing_statistic, fields(statistics=()), "regmean", "0.weight"),
    "no record of Grams": Case(
        O.missing_statistic, content(lambda c: c.pop(STATISTICS)), "regmean", "0.weight"
    ),
    "a Gram without tensors": Case(O.missing_statistic, all_statistics(pieces=()), "regmean"),
    "a Gram less": Case(
        O.missing_statistic, statistics(lambda s: s.pop(LAYER)), "regmean", r"0.weight\+0.bias"
    ),
    "no path": Case(O.missing_statistic, fields(path=None), detail="points"),
    "a Gram of another tensor": Case(
        O.unexpected_statistic,
        statistics(lambda s: s.update({("1.weight",): s.pop(LAYER)})),
        "regmean",
        "1.weight",
    ),
    "a Gram of no tensor": Case(
        O.unexpected_statistic, statistics(lambda s: s.update({("x",): s[LAYER]})), "regmean", "x"
    ),
    "two Grams of one layer": Case(
        O.unexpected_statistic, all_statistics(block=LAYER), "regmean", "twice"
    ),
    "a Gram that is another's": Case(
        O.unexpected_statistic, all_statistics(same=5, pieces=()), "regmean", "number 5 of 0"
    ),
    "statistics unasked": Case(
        O.unexpected_statistic,
        fields(statistics=(LayerStatistic(("0.weight",), "gram", (torch.ones(10),)),)),
        detail="0.weight",
    ),
    "a Gram of another size": Case(
        O.wrong_shape, gram(lambda g: g[:-1, :-1].contiguous()), "regmean", "0.weight"
    ),
    "no whole triangle": Case(O.wrong_shape, statistic(lambda g: g[:-1]), "regmean", "0.weight"),
    "a number in place of a Gram": Case(
        O.wrong_shape, statistic(lambda g: g[0]), "regmean", "0.weight"
    ),
    "a Gram of doubles": Case(O.wrong_dtype, statistic(torch.Tensor.double), "regmean", "0.weight"),
    "a part more": Case(
        O.wrong_shape, statistics(lambda s: s.update({LAYER: replace(s[LAYER], pieces=(*s[LAYER].pieces, torch.ones(0)))})), "regmean", "parts"
    ),
    "one Kronecker factor": Case(
        O.wrong_shape, statistics(lambda s: s.update({LAYER: replace(s[LAYER], pieces=s[LAYER].pieces[:1])})), "kfac", "two triangles"
    ),
    "a flat Fisher": Case(
        O.wrong_shape, statistic(lambda f: f.reshape(-1), ("0.weight",)), "fisher", "0.weight"
    ),
    "an indefinite Gram": Case(
        O.not_positive, gram(lambda g: g - 0.5 * g.diagonal().max() * torch.eye(5)), "regmean"
    ),
    "inputs without rows": Case(
        O.inconsistent, gram(lambda g: g * (torch.arange(5) < 4) * (torch.arange(5) < 4)[:, None]), "regmean", "no rows"
    ),
    "a negative Gram": Case(O.not_positive, statistic(torch.neg), "regmean", "0.weight"),
    "a negative Kronecker factor": Case(O.not_positive, statistic(torch.neg), "kfac", "0.weight"),
    "a negative Fisher": Case(
        O.not_positive, statistic(torch.neg, ("3.bias",)), "fisher", "3.bias"
    ),
    "names of a wrapped module": Case(
        O.missing_tensor,
        tensors(lambda s: [s.update({f"module.{name}": s.pop(name)}) for name in list(s)]),
        detail=r"0\.bias.*in place of them it has module\.0\.bias.*without 'module\.'",
    ),
    "one huge weight": Case(O.out_of_line, entry("3.weight", 1e30), detail="norm of its update|cannot be matched"),
    "the largest weight": Case(O.out_of_line, entry("0.bias", 3.4e38), detail="norm of its update|cannot be matched"),
    "one tensor far away": Case(O.out_of_line, entry("3.bias", 3.0), detail=r"update of 3\.bias|norm of its update"),
    "a model times -10": Case(
        O.out_of_line, tensors(lambda s: [s.update({n: s[n] * -10}) for n in s if n.endswith(("weight", "bias"))])
    ),
    "a negative variance": Case(O.not_positive, entry("1.running_var", -1.0), detail="running_var has the variance -1"),
    "a variance beyond all inputs": Case(O.out_of_line, entry("1.running_var", 3e38), detail="no finite inputs"),
    "a large variance": Case(O.out_of_line, entry("1.running_var", 1e9), detail="running_var"),
    "a Gram of a million times the inputs": Case(
        O.out_of_line, all_pieces(1e6), "regmean", "mean diagonal of the statistic"
    ),
    "a Fisher of a million times": Case(O.out_of_line, all_pieces(1e6), "fisher", "mean diagonal"),
    "a Kronecker factor of a million times": Case(O.out_of_line, all_pieces(1e6), "kfac", "mean diagonal"),
    "the client's own refusal": Case(
        O.non_finite, fields(outcome="non_finite", detail="0.weight of its own"), detail="0.weight of its own"
    ),
    "a refusal that accepts": Case(O.malformed, fields(outcome="accepted"), detail="'accepted'"),
    "a refusal of no name": Case(O.malformed, fields(outcome="x" * 99), detail="xxx"),
    "too many bytes": Case(O.too_large, tensors(lambda s: s.update(x=torch.ones(9999))), max_bytes=9999),
}  # fmt: skip


def test_the_table_covers_every_outcome():
    # No form of a Gram matrix can say an asymmetric one; `test_refit` has one all the same.
    # A factor is frozen in models with adapters, which this one has not: `test_fuse_adapters`.
    # So many clients as are too many for Kronecker factors are in `test_checks`.
    # What an app's own aggregate_train leaves out is below.
    # Where handling fails, and where a sum overflows, is in `test_guard`.
    # What comes after its round is in `test_retries`, an app without a function that evaluates in `test_dry_run`.
    elsewhere = {
        Outcome.not_symmetric,
        Outcome.frozen_changed,
        Outcome.too_many,
        Outcome.left_out,
        Outcome.not_handled,
        Outcome.overflow,
        Outcome.late,
        Outcome.no_evaluate,
    }
    assert {case.outcome for case in CASES.values()} == set(Outcome) - elsewhere


# A Fisher diagonal and Kronecker factors are not aligned by the server, and nobody asks its clients to align themselves.
RUNS = [(name, "client") for name in CASES] + [
    (name, "server") for name, case in CASES.items() if case.recipe not in ("fisher", "kfac") and name != "not aligned"
]


@pytest.mark.parametrize(("name", "align"), RUNS)
def test_a_bad_reply_is_named_and_leaves_the_sum_untouched(name, align):
    case = CASES[name]
    clients = federation()
    limits = StageLimits(LONG, 0.5, 1, case.max_bytes, case.grace)
    attempt = fuse_attempt(case.recipe, case.nodes, align, limits)
    clients.tamper = {BAD: lambda reply: case.spoil(reply, Sent(attempt.request, clients.asked[-1]))}
    clients.contexts[BAD].run_config["fail"] = case.fails

    result = complete(attempt, clients)

    expected = fused_by(case.recipe, case.summed, align)
    assert result.model.keys() == expected.model.keys()
    for tensor_name, tensor in expected.model.items():
        assert torch.equal(result.model[tensor_name], tensor), tensor_name
    assert result.path == expected.path
    assert result.metrics == expected.metrics
    assert result.nodes == list(case.summed)
    assert result.examples == expected.examples

    fates = outcomes(result.report)
    assert len(fates) == len(case.nodes)
    assert (BAD, case.outcome.name) in fates
    for node in (100, 102):
        assert fates.count((node, "accepted")) == 1
    (client,) = [c for c in result.report.clients if (c.node_id, c.outcome) == (BAD, case.outcome.name)]
    assert bool(client.detail) == (case.outcome is not Outcome.accepted)
    assert re.search(case.detail, client.detail), client.detail
    counted = sum(outcome == case.outcome.name for _, outcome in fates)
    assert counted == 1 + 2 * (case.outcome is Outcome.accepted)


@pytest.mark.parametrize("align", ["client", "server", "off"])
def test_an_app_without_the_mod_takes_part_where_weights_are_enough(align):
    clients = federation()
    attempt = fuse_attempt("fedavg", NODES, align)
    clients.tamper = {BAD: lambda reply: without_the_mod(reply, Sent(attempt.request, reply))}
    result = complete(attempt, clients)
    expected = fused_by("fedavg", tuple(NODES), align)
    for name, tensor in expected.model.items():
        assert torch.equal(result.model[name], tensor), name
    assert result.metrics == expected.metrics
    assert result.path.clients == 2
    assert outcomes(result.report) == [(node, "accepted") for node in NODES]
    details = [client.detail for client in result.report.clients]
    not_aligned = "not aligned: the app lacks the mod" if align == "client" else ""
    assert details == ["", not_aligned, ""]


def test_a_reply_that_the_apps_own_code_does_not_hand_on_is_left_out():
    clients = federation()
    attempt = fuse_attempt("fedavg", NODES)
    stream = StageReplies(StreamingGrid(clients.grid(), 0.001).stream(attempt.messages, LONG))
    handed_on = [reply for reply in stream if reply.metadata.src_node_id != BAD]
    attempt.add_all(stream.restored(handed_on))
    result = attempt.finish()
    assert outcomes(result.report) == [(100, "accepted"), (102, "accepted"), (BAD, "left_out")]
    assert result.report.clients[-1].detail == "read by aggregate_train and not handed on"
    expected = fused_by("fedavg", (100, 102), "client")
    for name, tensor in expected.model.items():
        assert torch.equal(result.model[name], tensor), name
    assert result.path == expected.path


def refit_result(clients, nodes):
    """The second stage of a round, which builds on what clients kept of the first; BAD has lost it."""
    anchor = tiny.net().state_dict()
    request = Request("", keep=True, layer_graph=True)
    stage = fusing_stage(anchor, RECIPES["features"], request, None, "off")
    fused = complete(StageAttempt(lambda: stage, anchor, NODES, CONTEXT, StageLimits()), clients).model
    clients.contexts[BAD].state.clear()
    refit = RefitLayers(fused, Refit((LAYER,), "features", 0), 1e-2)
    return complete(StageAttempt(lambda: refit, fused, list(nodes), CONTEXT, StageLimits()), clients)


def test_a_client_that_lost_its_models_is_named_and_leaves_the_sum_untouched():
    result = refit_result(federation(), NODES)
    expected = refit_result(federation(), [100, 102])
    for name, tensor in expected.model.items():
        assert torch.equal(result.model[name], tensor), name
    assert dict(outcomes(result.report)) == {100: "accepted", BAD: "lost_model", 102: "accepted"}


@pytest.mark.parametrize("outcome", Outcome)
def test_a_refusal_says_the_outcome_what_happened_and_the_advice(outcome):
    text = str(Refusal(outcome, "3.bias of node 7"))
    assert text == f"{outcome.name}: 3.bias of node 7; {outcome.value}"
