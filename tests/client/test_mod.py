"""An ordinary app with the mod in front: what it is given, what it must return, what goes on the wire."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedbasin.client import basin
from fedbasin.client.mod import AppReplyError
from fedbasin.proto import packing, wire
from fedbasin.strategies.messages import broadcast, requests
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.stages import Ask, Bootstrap, Evaluate, Start, fusing
from tests import tiny

NODE = 101


def question(recipe="fedavg", number=1, packed=True, **more):
    anchor = tiny.net().state_dict()
    stage = fusing(anchor, RECIPES[recipe], Ask(**more), "client")
    return broadcast(stage, anchor, number, ConfigRecord({"lr": 0.5}), packed=packed)


class Seen:
    """An app that answers as it is told and remembers what it was given."""

    def __init__(self, reply=None, data=None):
        self.app = ClientApp(mods=[basin(model=tiny.own_net, data=data)])
        self.contents = []

        def answer(message, context):
            self.contents.append(RecordDict(message.content))
            content = reply(message) if reply else trained(message)
            return content if isinstance(content, Message) else Message(content, reply_to=message)

        self.app.train()(answer)
        self.app.evaluate()(answer)

    def ask(self, sent, federation=None):
        federation = federation or tiny.federation(app=self.app)
        federation.grid()
        (message,) = requests(sent, [NODE])
        return self.app(message, federation.contexts[NODE])


def trained(message, step=0.0):
    state = message.content["arrays"].to_torch_state_dict()
    state = {n: t + step if t.is_floating_point() else t for n, t in state.items()}
    metrics = MetricRecord({"num-examples": 5, "loss": 0.25})
    return RecordDict({"weights": ArrayRecord(state), "metrics": metrics})


def parameters(reply):
    header = wire.read_update(reply.content)
    return packing.unpack(reply.content[wire.ARRAYS], header.tensors)


@pytest.mark.parametrize("packed", [True, False])
def test_the_app_is_given_an_ordinary_message(packed):
    seen = Seen()
    seen.ask(question(packed=packed))
    (content,) = seen.contents
    assert set(content) == {"arrays", "config"}
    assert dict(content["config"]) == {"lr": 0.5, "server-round": 1}
    anchor = tiny.net().state_dict()
    given = content["arrays"].to_torch_state_dict()
    assert list(given) == list(anchor)
    assert all(torch.equal(given[name], anchor[name]) for name in anchor)


def test_radii_are_not_for_the_app():
    seen, anchor = Seen(), tiny.net().state_dict()
    stage = fusing(anchor, RECIPES["fedavg"], Ask(symmetry=tiny.symmetry()), "client")
    sent = broadcast(stage, anchor, 1, ConfigRecord())
    assert wire.RADII in sent.content
    seen.ask(sent)
    assert set(seen.contents[0]) == {"arrays", "config"}


def test_an_own_start_is_the_clients_own_model():
    seen = Seen()
    reply = seen.ask(question(start=Start.own))
    own = tiny.net(10 + 1).state_dict()
    given = seen.contents[0]["arrays"].to_torch_state_dict()
    assert all(torch.equal(given[name], own[name]) for name in own)
    assert torch.equal(parameters(reply)["0.weight"], own["0.weight"])


def test_what_the_app_trained_is_replied_with_its_metrics():
    reply = Seen(lambda message: trained(message, 1.0)).ask(question())
    anchor = tiny.net().state_dict()
    found = parameters(reply)
    assert all(torch.equal(found[n], anchor[n] + 1) for n in found)
    assert set(found) == {n for n, t in anchor.items() if t.is_floating_point()}
    assert dict(reply.content["metrics"]) == {"num-examples": 5, "loss": 0.25}
    header = wire.read_update(reply.content)
    assert (header.examples, header.round, header.stage) == (5, 1, "fuse")
    assert header.train_seconds > 0
    assert reply.metadata.dst_node_id == 1


def test_a_plain_question_has_a_plain_answer_in_the_questions_order():
    def shuffled(message):
        content = trained(message)
        content["weights"] = ArrayRecord(dict(reversed(content["weights"].items())))
        return content

    reply = Seen(shuffled).ask(question(packed=False))
    assert list(reply.content[wire.ARRAYS]) == list(tiny.net().state_dict())


def test_messages_of_other_servers_pass_untouched():
    seen = Seen()
    content = RecordDict({"arrays": ArrayRecord(tiny.net().state_dict())})
    federation = tiny.federation(app=seen.app)
    federation.grid()
    reply = seen.app(Message(content, NODE, "train"), federation.contexts[NODE])
    assert set(reply.content) == {"weights", "metrics"}


def test_an_evaluation_passes_the_apps_reply_through():
    metrics = RecordDict({"metrics": MetricRecord({"accuracy": 1.0, "num-examples": 2})})
    seen, model = Seen(lambda message: metrics), tiny.net().state_dict()
    reply = seen.ask(broadcast(Evaluate(model), model, 1, ConfigRecord()))
    assert reply.content == metrics
    assert set(seen.contents[0]) == {"arrays", "config"}


def test_an_error_of_the_app_is_its_own():
    reply = Seen(lambda message: Message(Error(2, "tired"), reply_to=message)).ask(question())
    assert reply.error.reason == "tired"


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda c: c.pop("weights"), "0 ArrayRecords and 1 MetricRecords"),
        (lambda c: c.pop("metrics"), "1 ArrayRecords and 0 MetricRecords"),
        (lambda c: c.update(more=ArrayRecord()), "2 ArrayRecords and 1 MetricRecords"),
    ],
)
def test_a_reply_of_the_app_that_says_too_little_or_too_much_is_refused(change, counts):
    def reply(message):
        content = trained(message)
        change(content)
        return content

    with pytest.raises(AppReplyError, match=f"{counts}; reply with one of each"):
        Seen(reply).ask(question())


class TestStages:
    def bootstrap(self, number=1):
        model = tiny.net().state_dict()
        return broadcast(Bootstrap(model), model, number, ConfigRecord())

    def test_a_later_stage_of_the_round_takes_what_was_trained(self):
        seen = Seen()
        federation = tiny.federation(app=seen.app)
        first = seen.ask(self.bootstrap(), federation)
        second = seen.ask(question(start=Start.own), federation)
        assert len(seen.contents) == 1
        assert torch.equal(parameters(first)["0.weight"], parameters(second)["0.weight"])
        assert wire.read_update(second.content).stage == "fuse"
        assert dict(second.content["metrics"]) == {"num-examples": 5, "loss": 0.25}

    def test_the_last_stage_leaves_nothing_behind(self):
        seen = Seen()
        federation = tiny.federation(app=seen.app)
        seen.ask(self.bootstrap(), federation)
        assert len(federation.contexts[NODE].state) > 0
        seen.ask(question(start=Start.own), federation)
        assert len(federation.contexts[NODE].state) == 0
        seen.ask(question(start=Start.own), federation)
        assert len(seen.contents) == 2

    def test_the_same_stage_asked_anew_does_not_train_again(self):
        seen = Seen()
        federation = tiny.federation(app=seen.app)
        seen.ask(self.bootstrap(), federation)
        seen.ask(self.bootstrap(), federation)
        assert len(seen.contents) == 1

    def test_another_round_trains_again(self):
        seen = Seen()
        federation = tiny.federation(app=seen.app)
        seen.ask(self.bootstrap(1), federation)
        seen.ask(self.bootstrap(2), federation)
        assert len(seen.contents) == 2
