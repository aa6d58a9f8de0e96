"""A stage's question as a message, and an answer as an update; bad answers are tested with the outcomes."""

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedbasin.client.request import read_request
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.strategies.alignment.identity_bound import identity_radii
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.layers import known_blocks
from fedbasin.strategies.fusion.precisions import Diagonal, Gram
from fedbasin.strategies.messages import (
    alignment_message,
    broadcast,
    receive,
    receive_metrics,
    requests,
)
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.outcomes import Outcome, Refusal
from fedbasin.strategies.round.stages import Ask, Bootstrap, Evaluate, fusing
from tests import tiny


def ask(recipe="fedavg", packed=True, config=None, **more):
    anchor = tiny.net().state_dict()
    stage = fusing(anchor, RECIPES[recipe], Ask(symmetry=tiny.symmetry(), **more), "client")
    return anchor, broadcast(stage, anchor, 4, config or ConfigRecord(), packed=packed)


def answer(sent, tamper=None):
    """What an honest client replies."""
    federation = tiny.federation(1)
    federation.grid()  # sets what Flower needs to make a message
    (message,) = requests(sent, [100])
    return federation.answer(message)


@pytest.mark.parametrize("packed", [True, False])
def test_a_client_reads_what_was_asked(packed):
    anchor, sent = ask("regmean", packed, path_points=5, keep=True)
    found = read_request(sent.content)
    assert (found.header.round, found.header.stage) == (4, "fuse")
    assert (found.header.precision, found.header.path_points) == (pb.PRECISION_KIND_GRAM, 5)
    assert (found.header.align, found.header.keep) == (True, True)
    assert found.header.symmetry == str(tiny.symmetry())
    assert found.header.anchor_digest == packing.digest(anchor)
    assert found.anchor.keys() == anchor.keys()
    assert all(torch.equal(found.anchor[name], anchor[name]) for name in anchor)
    radii = identity_radii(tiny.symmetry(), anchor)
    assert found.radii.keys() == radii.keys()
    assert all(torch.equal(found.radii[name], radii[name]) for name in radii)


def test_the_apps_settings_are_copied_with_the_round_in_them():
    config = ConfigRecord({"lr": 0.5})
    _, sent = ask(config=config)
    assert dict(sent.content["config"]) == {"lr": 0.5, "server-round": 4}
    assert dict(config) == {"lr": 0.5}


def test_every_node_gets_the_same_content_which_flower_uploads_once():
    tiny.federation(1).grid()
    _, sent = ask()
    messages = requests(sent, [7, 9])
    assert [m.metadata.dst_node_id for m in messages] == [7, 9]
    assert all(m.content is sent.content for m in messages)
    assert {m.metadata.message_type for m in messages} == {"train"}
    assert {m.metadata.group_id for m in messages} == {"4"}


def test_a_packed_question_has_one_array_for_each_dtype_and_says_its_size():
    _, packed = ask()
    _, plain = ask(packed=False)
    assert sorted(packed.content[wire.ARRAYS]) == ["float32", "int64"]
    assert len(plain.content[wire.ARRAYS]) == len(tiny.net().state_dict())
    records = packed.content.array_records
    assert packed.payload_bytes == sum(packing.nbytes(record) for record in records.values())
    assert plain.payload_bytes > packed.payload_bytes


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("recipe", "kind"),
    [("fedavg", None), ("fisher", Diagonal), ("regmean", Gram), ("kfac", Kronecker)],
)
def test_an_honest_answer_becomes_an_update(packed, recipe, kind):
    anchor, sent = ask(recipe, packed)
    found = receive(answer(sent), sent, 2**31)
    assert found.update.examples == 20
    assert found.update.parameters["0.weight"].shape == anchor["0.weight"].shape
    blocks = known_blocks(tiny.net(), RECIPES[recipe].statistic)
    assert list(found.update.precisions) == blocks
    for precision in found.update.precisions.values():
        assert isinstance(precision, kind)
        for value in vars(precision).values():
            assert not isinstance(value, torch.Tensor) or value.dtype == torch.float64
    assert set(found.metrics) == {"loss"}
    assert found.payload_bytes > 0


def test_the_limit_on_bytes_is_the_size_of_the_reply():
    _, sent = ask("regmean")
    reply = answer(sent)
    size = receive(reply, sent, 2**31).payload_bytes
    receive(reply, sent, size)
    with pytest.raises(Refusal, match=f"{size} bytes where {size - 1} are allowed"):
        receive(reply, sent, size - 1)


def test_an_evaluation_has_metrics_alone():
    tiny.federation(1).grid()
    model = tiny.net().state_dict()
    sent = broadcast(Evaluate(model), model, 1, ConfigRecord())
    (message,) = requests(sent, [7])
    assert message.metadata.message_type == "evaluate"
    metrics = MetricRecord({"accuracy": 0.5, "num-examples": 8, "curve": [1.0]})
    found = receive(Message(RecordDict({"any": metrics}), reply_to=message), sent, 1)
    assert (found.update.examples, found.metrics) == (8, {"accuracy": 0.5})
    assert receive_metrics(Message(RecordDict(), reply_to=message)).update.examples == 0


def test_a_bootstrap_sends_no_symmetry():
    model = tiny.net().state_dict()
    sent = broadcast(Bootstrap(model, "medoid", tiny.symmetry()), model, 1, ConfigRecord())
    assert (sent.header.align, sent.header.symmetry) == (False, "")
    assert (sent.header.start, sent.header.keep) == (pb.START_OWN, True)


def test_an_answer_to_another_question_is_refused():
    _, sent = ask()
    _, moved = ask()
    moved.header.anchor_digest = b"other"
    with pytest.raises(Refusal) as refused:
        receive(answer(sent), moved, 2**31)
    assert refused.value.outcome is Outcome.wrong_anchor


def test_how_an_alignment_went_is_written_down():
    found = match_weights(tiny.symmetry(), tiny.net(0).state_dict(), tiny.net(1).state_dict())
    message = alignment_message(found.report, 1.5)
    (space,), (sent,) = found.report.spaces, message.spaces
    assert (sent.space, sent.moved, sent.gain) == (space.space, space.moved, space.gain)
    assert message.distance_before > message.distance_after > 0
    assert (message.sweeps, message.seconds) == (found.report.sweeps, 1.5)
