"""Limits on everything in a reply: headers, metrics, names, settings, errors, and the bytes of its transfer."""

import tracemalloc

import httpx
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.header import read_header, write_header
from fedbasin.proto.reply import Reply, _bound
from fedbasin.proto.request import Request
from fedbasin.server.exchange.message_limits import LONGEST_NAME, MOST_METRICS, MOST_NUMBERS, MOST_RECORDS, check_limits
from fedbasin.server.exchange.receive import receive
from fedbasin.server.exchange.reply_pulls import TOO_LARGE, _ByteLimit
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from tests import running, tiny
from tests.server.fake_grid import FakeGrid

ANCHOR = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
REQUEST = Request("fuse", anchor=ANCHOR, round=1)


def reply_content(metrics=None):
    return Reply(1, "fuse", parameters=ANCHOR, metrics=metrics or {}, examples=5.0).to_content(REQUEST)


def taken(content):
    FakeGrid([], lambda message: None)
    sent = Message(RecordDict(), 7, "train")
    return receive(Message(content, reply_to=sent), REQUEST, 5000)


def refusal(content):
    with pytest.raises(Refusal) as refused:
        taken(content)
    return refused.value.outcome, refused.value.detail


def header_of(**fields):
    content = reply_content()
    write_header(content, pb.Reply(round=1, stage="fuse", **fields))
    return content


FLOODS = {
    "spaces": {"alignment": pb.AlignmentReport(spaces=[pb.SpaceReport()] * 600_000)},
    "spaces that fit": {"alignment": pb.AlignmentReport(spaces=[pb.SpaceReport()] * 5000)},
    "statistics": {"statistics": [pb.LayerStatistic()] * 5000},
    "levels": {"layer_graph": pb.LayerGraph(levels=[pb.Level(blocks=[pb.Block()] * 50)] * 50)},
    "variances": {"variance": [pb.LayerVariance()] * 5000},
    "a name": {"variance": [pb.LayerVariance(layer="x" * 100_000)]},
    "points": {"path": pb.PathSums(points=[0.0] * 100_000)},
}


@pytest.mark.parametrize("fields", FLOODS.values(), ids=FLOODS)
def test_a_header_with_more_than_the_model_has_use_for_is_refused_before_it_is_decoded(fields):
    content = header_of(**fields)
    tracemalloc.start()
    outcome, detail = refusal(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcome is Outcome.too_large
    assert "a header of" in detail
    assert peak < 500_000


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 80), st.booleans(), st.integers(0, 101))
def test_the_largest_honest_header_is_taken(tensors, length, packed, points):
    names = [f"{number:02d}{'x' * length}" for number in range(tensors)]
    anchor = dict.fromkeys(names, torch.zeros(2, 2))
    request = Request("fuse", anchor=anchor, round=1, path_points=points)
    header = pb.Reply(
        round=1,
        stage="fuse",
        parameters=[pb.TensorSpec(name=n, dtype="float32", shape=[2, 2]) for n in names] if packed else [],
        statistics=[
            pb.LayerStatistic(
                block=pb.Block(tensors=[n, n]),
                kind="gram",
                pieces=[pb.TensorSpec(name=f"{n} piece {i}", dtype="float32", shape=[9, 9]) for i in range(3)],
            )
            for n in names
        ],
        alignment=pb.AlignmentReport(spaces=[pb.SpaceReport(space=n, moved=1.0, gain=1.0) for n in names]),
        variance=[pb.LayerVariance(layer=n, ratio=1.0) for n in names],
        layer_graph=pb.LayerGraph(
            levels=[pb.Level(blocks=[pb.Block(tensors=[n, n])]) for n in names],
            norms=[pb.BatchNorm(name=n, eps=1e-5) for n in names],
        ),
        path=pb.PathSums(points=[0.0] * points, loss_before=[1.0] * points, loss_after=[1.0] * points),
    )
    content = RecordDict()
    write_header(content, header)
    assert len(read_header(content, pb.Reply(), _bound(request)).variance) == tensors


METRICS = {
    "many": ({str(i): 1.0 for i in range(MOST_METRICS)}, "metrics where"),
    "numbers": ({"curve": [0.0] * (MOST_NUMBERS + 1)}, "numbers where"),
    "a long name": ({"x" * (LONGEST_NAME + 1): 1.0}, "characters where"),
}


@pytest.mark.parametrize(("metrics", "named"), METRICS.values(), ids=METRICS)
def test_metrics_without_an_end_are_refused(metrics, named):
    outcome, detail = refusal(reply_content(metrics))
    assert outcome is Outcome.too_large
    assert named in detail


@pytest.mark.parametrize("name", ["\x1b[31mred", "line\nbreak", "\x00", "\u202eevil", ""])
def test_a_name_that_cannot_be_printed_is_refused(name):
    outcome, detail = refusal(reply_content({name: 1.0}))
    assert outcome is Outcome.malformed
    assert "\x1b" not in detail
    assert "cannot be printed" in detail


@given(st.dictionaries(st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20), st.floats(0, 1)))
def test_names_of_letters_digits_and_punctuation_are_taken(metrics):
    check_limits(reply_content({**metrics}), 5000)


def test_settings_and_arrays_without_an_end_are_refused():
    content = reply_content()
    content["extra"] = ConfigRecord({"text": "x" * 2_000_000})
    assert refusal(content)[0] is Outcome.too_large
    empty = Array(np.zeros((0,), np.float32))
    empty = Array(empty.dtype, empty.shape, empty.stype, b"")
    content = RecordDict({"arrays": ArrayRecord({str(i): empty for i in range(20_000)}), "metrics": MetricRecord()})
    assert refusal(content)[0] is Outcome.too_large


def test_lists_of_settings_count_with_all_that_is_in_them():
    content = reply_content()
    content["extra"] = ConfigRecord({"texts": ["x" * 100_000] * 20})
    outcome, detail = refusal(content)
    assert outcome is Outcome.too_large
    assert "settings of 2000005 bytes" in detail


def test_records_without_an_end_are_refused():
    content = reply_content()
    for number in range(MOST_RECORDS):
        content[str(number)] = ConfigRecord({})
    outcome, detail = refusal(content)
    assert outcome is Outcome.too_large
    assert f"{MOST_RECORDS} are allowed" in detail


def test_the_name_of_a_tensor_does_not_fill_the_report(tmp_path):
    federation = tiny.federation()

    def rename(reply):
        if "arrays" in reply.content:
            reply.content["arrays"] = ArrayRecord({"x" * 200_000: Array(np.zeros(3, np.float32))})
        return reply

    federation.tamper = {100: rename}
    run = running.run(federation, tiny.net(), align="off", fraction_evaluate=0.0, folder=str(tmp_path))
    (refused,) = [c for c in run.reports[0].stages[0].clients if not c.is_accepted]
    assert refused.outcome == "missing_tensor"
    assert len(refused.detail) < 3000


def test_a_long_error_is_cut_off_with_a_remark(tmp_path):
    federation = tiny.federation()
    federation.tamper = {100: lambda reply: Message(Error(2, "x" * 100_000), reply_to=federation.asked[-1])}
    run = running.run(federation, tiny.net(), align="off", fraction_evaluate=0.0, folder=str(tmp_path))
    (detail,) = [c.detail for c in run.reports[0].stages[0].clients if not c.is_accepted]
    assert len(detail) < 3000
    assert "more characters" in detail


class Read(httpx.SyncByteStream):
    """A body that notes whether it was read."""

    def __init__(self, size):
        self.size, self.sent = size, 0

    def __iter__(self):
        for _ in range(self.size // 1000):
            self.sent += 1000
            yield bytes(1000)


class Call:
    """A call of Flower's client, as its interceptors see it."""

    rpc_method = "/flwr.proto.Runtime/PullObject"
    request = httpx.Request("POST", "http://superlink/v1/runtime/pull-object")

    def __init__(self, object_id):
        self.message = PullObjectRequest(object_id=object_id)


@pytest.fixture
def transfer():
    """A limit of a million bytes on objects of 400 000, and the bodies of the responses."""
    bodies = []

    def answer(request):
        bodies.append(Read(400_000))
        return httpx.Response(200, headers={"content-length": "400000"}, stream=bodies[-1])

    return _ByteLimit(httpx.Client(transport=httpx.MockTransport(answer)), 1_000_000), bodies


def test_a_transfer_ends_before_the_object_that_exceeds_the_limit(transfer):
    limit, bodies = transfer
    for name in "abc":
        assert len(limit.intercept(Call(name), None).content) == 400_000
    with pytest.raises(ObjectPullError, match=TOO_LARGE):
        limit.intercept(Call("d"), None)
    assert [body.sent for body in bodies] == [400_000] * 3 + [0]


def test_an_object_that_is_requested_again_counts_once(transfer):
    limit, bodies = transfer
    for _ in range(9):
        limit.intercept(Call("a"), None)
    assert len(bodies) == 9
