"""An ordinary app with the mod in front: the messages that it gets, must reply with, and sends."""

from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedbasin.client import basin
from fedbasin.client.mod import AppReplyError
from fedbasin.client.reply_builder import WeightError
from fedbasin.proto import packing
from fedbasin.proto.header import HEADER, MOVING
from fedbasin.proto.layer_graph import LayerGraph
from fedbasin.proto.reply import Reply
from fedbasin.proto.request import PathSpec, Refit, Request, Start
from fedbasin.strategies.alignment.identity_bound import identity_bounds
from tests import tiny

NODE = 101
ANCHOR = tiny.net().state_dict()
NUMBERS = {name: str(number) for number, name in enumerate(ANCHOR)}


def request(stage="fuse", anchor=ANCHOR, **fields):
    digest = packing.digest(anchor)
    defaults = {"round": 1, "anchor_digest": digest, "config": {"lr": 0.5}}
    return Request(stage, anchor=anchor, **{**defaults, **fields})


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

    def ask(self, asked, federation=None, packed=True):
        federation = federation or tiny.federation(app=self.app)
        federation.grid()
        (message,) = asked.to_messages(asked.to_content(packed=packed), [NODE])
        return self.app(message, federation.contexts[NODE])


def trained(message, step=0.0):
    state = message.content["arrays"].to_torch_state_dict()
    state = {n: t + step if t.is_floating_point() else t for n, t in state.items()}
    metrics = MetricRecord({"num-examples": 5, "loss": 0.25})
    return RecordDict({"weights": ArrayRecord(state), "metrics": metrics})


def parameters(reply, asked):
    return Reply.from_message(reply.content, asked).parameters


@pytest.mark.parametrize("array_names", [{}, NUMBERS], ids=["names", "numbers"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
class TestTheMessageOfTheApp:
    def test_is_the_one_that_fedavg_sends(self, packed, array_names):
        seen = Seen()
        seen.ask(request(array_names=array_names), packed=packed)
        (content,) = seen.contents
        arrays = ArrayRecord(ANCHOR)
        if array_names:
            arrays = ArrayRecord([tensor.numpy() for tensor in ANCHOR.values()])
        config = ConfigRecord({"lr": 0.5, "server-round": 1})
        assert list(content) == ["arrays", "config"]
        assert content == RecordDict({"arrays": arrays, "config": config})
        assert list(content["arrays"]) == list(arrays)
        for name, array in arrays.items():
            assert content["arrays"][name].numpy().dtype == array.numpy().dtype

    def test_is_read_and_replied_by_its_names(self, packed, array_names):
        seen, asked = Seen(lambda m: trained(m, 1.0)), request(array_names=array_names)
        found = parameters(seen.ask(asked, packed=packed), asked)
        assert list(found) == list(ANCHOR)
        for name, tensor in ANCHOR.items():
            step = 1 if tensor.is_floating_point() else 0
            assert torch.equal(found[name], tensor + step)
            assert found[name].dtype == tensor.dtype

    def test_has_the_records_and_the_weight_that_the_server_names(self, packed, array_names):
        names = {"arrays_key": "model", "config_key": "settings", "weight_key": "images"}

        def reply(message):
            assert list(message.content) == ["model", "settings"]
            metrics = MetricRecord({"images": 7, "losses": [0.5, 0.25]})
            return RecordDict({"model": message.content["model"], "metrics": metrics})

        asked = request(array_names=array_names, **names)
        content = Seen(reply).ask(asked, packed=packed).content
        found = Reply.from_message(content, asked)
        assert (found.examples, found.metrics) == (7, {"losses": [0.5, 0.25]})
        assert set(content) == {"model", "metrics", HEADER}
        assert list(found.parameters) == list(ANCHOR)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_an_evaluation_is_also_asked_as_fedavg_does(packed):
    seen = Seen()
    seen.ask(request("evaluate", kind="evaluate"), packed=packed)
    config = ConfigRecord({"lr": 0.5, "server-round": 1})
    assert seen.contents == [RecordDict({"arrays": ArrayRecord(ANCHOR), "config": config})]


def test_what_only_the_mod_reads_is_not_for_the_app():
    bounds = identity_bounds(tiny.symmetry(), ANCHOR)
    seen = Seen()
    seen.ask(request(symmetry=str(tiny.symmetry()), identity_bounds=bounds))
    assert set(seen.contents[0]) == {"arrays", "config"}


def test_a_frozen_factor_is_for_the_app():
    seen = Seen()
    seen.ask(request(frozen_factor="lora_A"))
    assert dict(seen.contents[0]["config"])["frozen-factor"] == "lora_A"


def test_an_own_start_is_the_clients_own_model():
    seen, asked = Seen(), request(start=Start.own)
    reply = seen.ask(asked)
    own = tiny.net(10 + 1).state_dict()
    start = seen.contents[0]["arrays"].to_torch_state_dict()
    assert all(torch.equal(start[name], own[name]) for name in own)
    assert torch.equal(parameters(reply, asked)["0.weight"], own["0.weight"])


def test_what_the_app_trained_is_replied_with_its_metrics():
    asked = request()
    reply = Seen(lambda message: trained(message, 1.0)).ask(asked)
    found = Reply.from_message(reply.content, asked)
    assert torch.equal(found.parameters["0.weight"], ANCHOR["0.weight"] + 1)
    assert dict(reply.content["metrics"]) == {"num-examples": 5, "loss": 0.25}
    assert (found.examples, found.round, found.stage) == (5, 1, "fuse")
    assert found.metrics == {"loss": 0.25}
    assert found.anchor_digest == asked.anchor_digest
    assert found.train_seconds > 0
    assert reply.metadata.dst_node_id == 1


def test_a_merged_model_is_aligned_in_place_of_the_clients_own():
    merged = {name: tensor + 1 for name, tensor in ANCHOR.items() if tensor.is_floating_point()}
    seen, asked = Seen(), request(moving=merged, moving_examples=12.0)
    content = seen.ask(asked).content
    found = Reply.from_message(content, asked)
    assert not seen.contents
    assert MOVING not in content
    assert found.examples == 12
    assert torch.equal(found.parameters["0.weight"], merged["0.weight"])


def test_a_plain_question_has_a_plain_answer_in_the_questions_order():
    def shuffled(message):
        content = trained(message)
        content["weights"] = ArrayRecord(dict(reversed(content["weights"].items())))
        return content

    reply = Seen(shuffled).ask(request(), packed=False)
    assert list(reply.content["arrays"]) == list(ANCHOR)


def test_messages_of_other_servers_pass_untouched():
    seen = Seen()
    content = RecordDict({"arrays": ArrayRecord(tiny.net().state_dict())})
    federation = tiny.federation(app=seen.app)
    federation.grid()
    reply = seen.app(Message(content, NODE, "train"), federation.contexts[NODE])
    assert set(reply.content) == {"weights", "metrics"}


def test_an_evaluation_passes_the_apps_reply_through():
    metrics = RecordDict({"metrics": MetricRecord({"accuracy": 1.0, "num-examples": 2})})
    seen = Seen(lambda message: metrics)
    reply = seen.ask(request("evaluate", kind="evaluate"))
    assert reply.content == metrics
    assert set(seen.contents[0]) == {"arrays", "config"}


def test_an_error_of_the_app_is_its_own():
    reply = Seen(lambda message: Message(Error(2, "tired"), reply_to=message)).ask(request())
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

    with pytest.raises(AppReplyError, match=f"{counts} .*; reply with one of each"):
        Seen(reply).ask(request())


def test_a_reply_of_the_app_without_a_weight_is_refused_with_the_metrics_that_came():
    def reply(message):
        return RecordDict({**trained(message), "metrics": MetricRecord({"loss": 1.0})})

    with pytest.raises(WeightError, match=r"\(loss\) have no number 'num-examples'"):
        Seen(reply).ask(request())


def test_a_reply_of_the_app_that_lacks_a_tensor_is_refused_by_its_name():
    def reply(message):
        content = trained(message)
        del content["weights"]["3.bias"]
        return content

    sent = Seen(reply).ask(request())
    answer = Reply.from_message(sent.content, request())
    assert (answer.outcome, answer.detail, answer.parameters) == ("missing_tensor", "3.bias", None)


class TestStages:
    def bootstrap(self, number=1):
        return request("bootstrap", start=Start.own, keep=True, round=number)

    def test_a_later_stage_of_the_round_takes_what_was_trained(self):
        seen = Seen()
        federation = tiny.federation(app=seen.app)
        first = seen.ask(self.bootstrap(), federation)
        second = seen.ask(request(start=Start.own), federation)
        assert len(seen.contents) == 1
        models = [parameters(reply, request()) for reply in (first, second)]
        assert torch.equal(models[0]["0.weight"], models[1]["0.weight"])
        assert Reply.from_message(second.content, request()).stage == "fuse"
        assert dict(second.content["metrics"]) == {"num-examples": 5, "loss": 0.25}

    def test_the_last_stage_leaves_nothing_behind(self):
        seen = Seen()
        federation = tiny.federation(app=seen.app)
        seen.ask(self.bootstrap(), federation)
        assert len(federation.contexts[NODE].state) > 0
        seen.ask(request(start=Start.own), federation)
        assert len(federation.contexts[NODE].state) == 0
        seen.ask(request(start=Start.own), federation)
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

    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
    def test_a_refit_and_an_evaluation_build_on_the_model_that_was_sent(self, packed):
        seen = Seen(lambda m: trained(m, 0.1), data=tiny.batches)
        federation = tiny.federation(app=seen.app)
        fuse = request(keep=True, layer_graph=True, array_names=NUMBERS)
        graph = Reply.from_message(seen.ask(fuse, federation, packed=packed).content, fuse).layer_graph
        assert isinstance(graph, LayerGraph)
        head = ("3.weight", "3.bias")
        refit = Refit((head,), "features", 0, PathSpec(), graph.norms)
        asked = replace(fuse, stage="refit", refit=refit, path_points=2)
        found = Reply.from_message(seen.ask(asked, federation, packed=packed).content, asked)
        assert (found.lost, found.examples) == (False, 5)
        assert [statistic.block for statistic in found.statistics] == [head]
        assert set(found.parameters) == set(graph.norms[0].statistics)
        assert len(found.path.points) == 2
        asked = replace(fuse, stage="evaluate", kind="evaluate", path_points=3, keep=False)
        reply = seen.ask(asked, federation, packed=packed)
        found = Reply.from_message(reply.content, asked)
        assert found.metrics == {"loss": 0.25}
        assert (found.path.points, found.path.clients) == ((0, 0.5, 1), 1)
        assert {ratio.layer for ratio in found.variance} == {"0.weight", "3.weight"}
        assert len(federation.contexts[NODE].state) == 0
