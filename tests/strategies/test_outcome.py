"""Whatever one client answers, the round goes on: its outcome is named, and the sum holds the others alone."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from prometheus_client import CollectorRegistry

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.proto.encoding import GramForm
from fedbasin.server.observe.telemetry import Telemetry
from fedbasin.server.run.stage_loop import Budget, Question, run_stage
from fedbasin.server.run.streaming_grid import StreamingGrid
from fedbasin.strategies.fusion.compression.formats import decode, encode
from fedbasin.strategies.fusion.layers import known_blocks
from fedbasin.strategies.recipes import RECIPES, Target
from fedbasin.strategies.round.outcomes import Outcome, Refusal
from fedbasin.strategies.round.refit import Fit
from fedbasin.strategies.round.stages import Ask, Fitting, fusing
from tests import tiny

BAD = 101
NODES = [100, BAD, 102]
POINTS = 3


def stage_result(federation, recipe, nodes, align="client", max_bytes=2**31, grace=None):
    model = tiny.net()
    anchor = model.state_dict()
    ask = Ask(symmetry=tiny.symmetry(), path_points=POINTS)
    blocks = known_blocks(model, RECIPES[recipe].statistic)
    question = Question(
        lambda: fusing(anchor, RECIPES[recipe], ask, align, blocks), anchor, 1, ConfigRecord()
    )
    budget = Budget(60.0, 0.5, 1, max_bytes, grace)
    return run_stage(StreamingGrid(federation.grid(), 0.001), question, nodes, budget)


@cache
def fused_by(recipe, nodes, align):
    """What these honest clients alone fuse to."""
    return stage_result(tiny.federation(), recipe, list(nodes), align)


# Ways to spoil a reply. Each takes the reply and the request, and gives what travels back.


def header(change: Callable[[pb.UpdateHeader], None]):
    def spoil(reply, request):
        found = wire.read_update(reply.content)
        change(found)
        reply.content[wire.HEADER] = ConfigRecord({"header": found.SerializeToString()})
        return reply

    return spoil


def field(**values):
    return header(lambda found: found.MergeFrom(pb.UpdateHeader(**values)))


def tensors(change: Callable[[dict], None]):
    """The same reply with other tensors, packed as the mod packs them."""

    def spoil(reply, request):
        found = wire.read_update(reply.content)
        unpacked = packing.unpack(reply.content[wire.ARRAYS], found.tensors)
        state = {name: tensor.clone() for name, tensor in unpacked.items()}
        change(state)
        reply.content[wire.ARRAYS], specs = packing.pack(state)
        del found.tensors[:]
        found.tensors.extend(specs)
        return header(lambda old: old.CopyFrom(found))(reply, request)

    return spoil


def entry(name, value):
    return tensors(lambda state: state[name].view(-1)[:1].fill_(value))


def statistics(change: Callable[[dict], None]):
    """The same reply with other statistics, by the names of their tensors."""

    def spoil(reply, request):
        found = wire.read_update(reply.content)
        old = packing.unpack(
            reply.content[wire.STATISTICS], [p.statistic for p in found.precisions]
        )
        values = {tuple(p.tensors): old[p.statistic.name].clone() for p in found.precisions}
        change(values)
        named = {"+".join(block): value for block, value in values.items()}
        reply.content[wire.STATISTICS], specs = packing.pack(named)
        kind = found.precisions[0].kind
        del found.precisions[:]
        for block, spec in zip(values, specs, strict=True):
            found.precisions.add(tensors=block, kind=kind, statistic=spec)
        return header(lambda now: now.CopyFrom(found))(reply, request)

    return spoil


def statistic(change, block=("0.weight", "0.bias")):
    return statistics(lambda values: values.update({block: change(values[block])}))


def gram(change):
    """The same of a Gram matrix, which travels as a triangle."""

    def changed(triangle):
        square = decode({"values": triangle}, GramForm(), bias=True)
        return encode(change(square), GramForm(), bias=True)["values"]

    return statistic(changed)


def drop_path(found):
    found.ClearField("path")


def path(**values):
    def change(found):
        for name, value in values.items():
            found.path.ClearField(name)
            getattr(found.path, name).extend(value)

    return header(change)


def content(change):
    def spoil(reply, request):
        change(reply.content)
        return reply

    return spoil


def truncated(reply, request):
    (name, array), *_ = reply.content[wire.ARRAYS].items()
    short = Array(array.dtype, array.shape, array.stype, array.data[:-4])
    reply.content[wire.ARRAYS] = ArrayRecord({name: short})
    return reply


def error(code, signed_by_superlink=False):
    def spoil(reply, request):
        answer = Message(Error(code, "gone"), reply_to=request)
        if signed_by_superlink:
            answer.metadata.__dict__["_src_node_id"] = 1
        return answer

    return spoil


def silence(reply, request):
    return None


def twice(found):
    del found.precisions[1].tensors[:]
    found.precisions[1].tensors.extend(found.precisions[0].tensors)


def unasked(reply, request):
    gram = torch.eye(tiny.PIXELS)
    reply.content[wire.STATISTICS], (spec,) = packing.pack({"0.weight": gram})
    add = {"tensors": ["0.weight"], "kind": pb.PRECISION_KIND_GRAM, "statistic": spec}
    return header(lambda found: found.precisions.add(**add))(reply, request)


def without_a_kind(found):
    for precision in found.precisions:
        precision.kind = pb.PRECISION_KIND_DIAGONAL


@dataclass(frozen=True)
class Case:
    outcome: Outcome
    spoil: Callable[[Message, Message], Message | None]
    recipe: str = "fedavg"
    detail: str = ""
    nodes: tuple[int, ...] = (100, BAD, 102)
    summed: tuple[int, ...] = (100, 102)
    fails: bool = False
    max_bytes: int = 2**31
    grace: float | None = None


def honest(reply, request):
    return reply


O = Outcome  # noqa: E741 - the table's first column
LAYER = ("0.weight", "0.bias")
NAN, INF = float("nan"), float("inf")
CASES = {
    "honest": Case(O.accepted, honest, summed=tuple(NODES)),
    "honest, with Fisher": Case(O.accepted, honest, "fisher", summed=tuple(NODES)),
    "honest, with Grams": Case(O.accepted, honest, "regmean", summed=tuple(NODES)),
    "the app raises": Case(O.client_error, honest, detail="out of memory", fails=True),
    "an error of the client": Case(O.client_error, error(2), detail="gone"),
    "silence": Case(O.timeout, silence, detail="2 others were enough", grace=0.0),
    "the app does not load": Case(O.client_error, error(1)),
    "a mod refuses": Case(O.client_error, error(6)),
    "the app crashes": Case(O.client_error, error(8)),
    "a message is lost": Case(O.unavailable, error(3, True), detail="error 3"),
    "a reply is lost": Case(O.unavailable, error(4, True)),
    "the node is lost": Case(O.unavailable, error(5, True)),
    "no header": Case(O.malformed, content(lambda c: c.pop(wire.HEADER)), detail="fedbasin"),
    "a header of another kind": Case(
        O.malformed, content(lambda c: c.update({wire.HEADER: MetricRecord({"header": 1})}))
    ),
    "a header that is no bytes": Case(
        O.malformed, content(lambda c: c.update({wire.HEADER: ConfigRecord({"header": "x"})}))
    ),
    "a header that does not parse": Case(
        O.malformed, content(lambda c: c.update({wire.HEADER: ConfigRecord({"header": b"\xff"})}))
    ),
    "a truncated array": Case(O.malformed, truncated, detail="truncated"),
    "a manifest beyond the array": Case(
        O.malformed, header(lambda h: h.tensors[0].shape.extend([99])), detail="0.weight"
    ),
    "statistics of another kind": Case(O.unexpected_statistic, header(without_a_kind), "regmean"),
    "a path that walks backwards": Case(
        O.missing_statistic, path(points=[1, 0.5, 0]), detail="points"
    ),
    "more correct than examples": Case(O.malformed, path(correct_after=[1, 2, 1e9])),
    "another schema version": Case(O.schema_version, field(schema_version=99), detail="99"),
    "another round": Case(O.wrong_round, field(round=7), detail="round 7"),
    "another stage": Case(O.wrong_round, field(stage="bootstrap"), detail="bootstrap"),
    "twice the same client": Case(
        O.duplicate, honest, nodes=(100, BAD, 102, BAD), summed=tuple(NODES)
    ),
    "another anchor": Case(O.wrong_anchor, field(anchor_digest=b"x" * 32)),
    "no anchor": Case(O.wrong_anchor, header(lambda h: h.ClearField("anchor_digest"))),
    "another function": Case(O.function_changed, field(function_changed=True), detail="own loss"),
    "another symmetry": Case(O.symmetry_mismatch, field(symmetry_digest=b"x" * 32)),
    "not aligned": Case(O.symmetry_mismatch, header(lambda h: h.ClearField("symmetry_digest"))),
    "no arrays": Case(O.missing_tensor, content(lambda c: c.pop(wire.ARRAYS)), detail="arrays"),
    "a tensor less": Case(O.missing_tensor, tensors(lambda s: s.pop("3.bias")), detail="3.bias"),
    "a tensor more": Case(
        O.unexpected_tensor, tensors(lambda s: s.update(extra=s["3.bias"])), detail="extra"
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
    "a path of NaN": Case(O.non_finite, path(loss_before=[1, NAN, 1]), detail="t = 0.5"),
    "no examples": Case(O.bad_weight, field(examples=-0.0), detail="0"),
    "a negative weight": Case(O.bad_weight, field(examples=-5), detail="-5"),
    "a weight of NaN": Case(O.bad_weight, field(examples=NAN)),
    "an infinite weight": Case(O.bad_weight, field(examples=INF)),
    "a weight that overflows the sum": Case(O.bad_weight, field(examples=1e308)),
    "no Grams": Case(
        O.missing_statistic, header(lambda h: h.ClearField("precisions")), "regmean", "0.weight"
    ),
    "no record of Grams": Case(
        O.missing_statistic, content(lambda c: c.pop(wire.STATISTICS)), "regmean", "statistics"
    ),
    "a Gram less": Case(
        O.missing_statistic, statistics(lambda s: s.pop(LAYER)), "regmean", r"0.weight\+0.bias"
    ),
    "no path": Case(O.missing_statistic, header(drop_path), detail="points"),
    "a Gram of another tensor": Case(
        O.unexpected_statistic,
        statistics(lambda s: s.update({("1.weight",): s.pop(LAYER)})),
        "regmean",
        "1.weight",
    ),
    "a Gram of no tensor": Case(
        O.unexpected_statistic, statistics(lambda s: s.update({("x",): s[LAYER]})), "regmean", "x"
    ),
    "two Grams of one layer": Case(O.unexpected_statistic, header(twice), "regmean", "twice"),
    "statistics unasked": Case(O.unexpected_statistic, unasked, detail="0.weight"),
    "a Gram of another size": Case(
        O.wrong_shape, gram(lambda g: g[:-1, :-1].contiguous()), "regmean", "0.weight"
    ),
    "no whole triangle": Case(O.wrong_shape, statistic(lambda g: g[:-1]), "regmean", "0.weight"),
    "a number in place of a Gram": Case(
        O.wrong_shape, statistic(lambda g: g[0]), "regmean", "0.weight"
    ),
    "a Gram of doubles": Case(O.wrong_dtype, statistic(torch.Tensor.double), "regmean", "0.weight"),
    "a part more": Case(
        O.wrong_shape, header(lambda h: h.precisions[0].more.add(name="more", dtype="float32", shape=[0])), "regmean", "parts"
    ),
    "a flat Fisher": Case(
        O.wrong_shape, statistic(lambda f: f.reshape(-1), ("0.weight",)), "fisher", "0.weight"
    ),
    "an indefinite Gram": Case(
        O.not_positive, gram(lambda g: g - 0.5 * g.diagonal().max() * torch.eye(5)), "regmean"
    ),
    "a negative Gram": Case(O.not_positive, statistic(torch.neg), "regmean", "0.weight"),
    "a negative Fisher": Case(
        O.not_positive, statistic(torch.neg, ("3.bias",)), "fisher", "3.bias"
    ),
    "too many bytes": Case(O.too_large, tensors(lambda s: s.update(x=torch.ones(9999))), max_bytes=9999),
}  # fmt: skip


def test_the_table_covers_every_outcome():
    # No form of a Gram matrix can say an asymmetric one; `check_update` refuses it all the same. Models are
    # lost between two stages, and the table is of one.
    # A factor is frozen in models with adapters, which this one has not.
    # So many clients as are too many for Kronecker factors are in `test_kronecker_round`.
    elsewhere = {
        Outcome.not_symmetric,
        Outcome.lost_model,
        Outcome.frozen_changed,
        Outcome.too_many,
    }
    assert {case.outcome for case in CASES.values()} == set(Outcome) - elsewhere


def fit_result(federation, nodes):
    """The second stage of a round, which builds on what clients kept of the first; BAD has lost it."""
    anchor, grid = tiny.net().state_dict(), StreamingGrid(federation.grid(), 0.001)
    ask, recipe = Ask(keep=True, layer_graph=True), RECIPES["features"]
    fuse = Question(lambda: fusing(anchor, recipe, ask, "off"), anchor, 1, ConfigRecord())
    fused = run_stage(grid, fuse, NODES, Budget()).model
    federation.contexts[BAD].state.clear()
    fitting = Fitting((LAYER,), Target.features, 0)
    fit = Question(lambda: Fit(fused, fitting, 1e-2), fused, 1, ConfigRecord())
    return run_stage(grid, fit, nodes, Budget())


def test_a_client_that_lost_its_models_is_named_and_leaves_the_sum_untouched():
    result = fit_result(tiny.federation(), NODES)
    expected = fit_result(tiny.federation(), [100, 102])
    for name, tensor in expected.model.items():
        assert torch.equal(result.model[name], tensor), name
    fates = {client.node_id: client.outcome for client in result.report.clients}
    assert fates == {100: "accepted", BAD: "lost_model", 102: "accepted"}
    assert counted(result.report, Case(Outcome.lost_model, honest, "features")) == 1


# A Fisher diagonal is not aligned by the server, and nobody asks its clients to align themselves.
RUNS = [(name, "client") for name in CASES] + [
    (name, "server")
    for name, case in CASES.items()
    if case.recipe != "fisher" and name != "not aligned"
]


@pytest.mark.parametrize(("name", "align"), RUNS)
def test_a_bad_reply_is_named_and_leaves_the_sum_untouched(name, align):
    case = CASES[name]
    federation = tiny.federation()
    federation.tamper = {BAD: lambda reply: case.spoil(reply, federation.asked[-1])}
    federation.contexts[BAD].run_config["fail"] = case.fails

    result = stage_result(
        federation, case.recipe, list(case.nodes), align, case.max_bytes, case.grace
    )

    expected = fused_by(case.recipe, case.summed, align)
    assert result.model.keys() == expected.model.keys()
    for tensor_name, tensor in expected.model.items():
        assert torch.equal(result.model[tensor_name], tensor), tensor_name
    assert result.path == expected.path
    assert result.metrics == expected.metrics

    assert len(result.report.clients) == len(case.nodes)
    fates = [(c.node_id, c.outcome) for c in result.report.clients]
    assert (BAD, case.outcome.name) in fates
    for node in (100, 102):
        assert fates.count((node, "accepted")) == 1
    (client,) = [
        c for c in result.report.clients if (c.node_id, c.outcome) == (BAD, case.outcome.name)
    ]
    assert bool(client.detail) == (case.outcome is not Outcome.accepted)
    assert re.search(case.detail, client.detail), client.detail
    assert counted(result.report, case) == 1 + 2 * (case.outcome is Outcome.accepted)


def counted(report, case):
    """The counter of this outcome; no label names a client."""
    registry = CollectorRegistry()
    Telemetry(registry).observe(pb.RoundReport(run_id="r", recipe=case.recipe, stages=[report]))
    labels = {
        value
        for metric in registry.collect()
        for sample in metric.samples
        for value in sample.labels.values()
    }
    assert not labels & {str(node) for node in NODES}
    own = {"recipe": case.recipe, "outcome": case.outcome.name}
    return registry.get_sample_value("fedbasin_updates_total", own)


@pytest.mark.parametrize("outcome", Outcome)
def test_a_refusal_says_the_outcome_what_happened_and_the_advice(outcome):
    text = str(Refusal(outcome, "3.bias of node 7"))
    assert text == f"{outcome.name}: 3.bias of node 7; {outcome.value}"
