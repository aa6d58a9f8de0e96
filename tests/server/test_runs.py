"""Whole runs over a federation in this process: stages, bootstrap, checkpoints and resume."""

import logging
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedbasin.client import basin
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing
from fedbasin.proto.header import read_header
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.run.log_lines import stage_line
from fedbasin.server.run.resumption import checkpoint
from fedbasin.server.run.resumption.checkpoint import CheckpointError
from fedbasin.server.run.settings import SettingsError
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.symmetry import SymmetryError, parse
from tests import running, tiny

HIDDEN = discover(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.zeros(2, 4)).symmetry


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs"


def start(federation, folder, rounds=1, model=None, symmetry=None, **arguments):
    if "fedbasin.fraction-evaluate" not in federation.run_config:
        arguments.setdefault("fraction_evaluate", 0.0)
    model, symmetry = model or tiny.net(), symmetry or tiny.symmetry()
    return running.run(federation, model, rounds, symmetry=symmetry, folder=str(folder), **arguments)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gone(federation):
    return lambda reply: Message(Error(5, "gone"), reply_to=federation.asked[-1])


class TestARun:
    @pytest.mark.parametrize("recipe", ["fedavg", "fisher", "regmean"])
    @pytest.mark.parametrize("begin", ["shared", "own"])
    def test_leaves_a_model_and_a_report_for_every_round(self, folder, recipe, begin):
        config = {"recipe": recipe, "start": begin, "barrier_points": 2, "fraction_evaluate": 1.0}
        result = start(tiny.federation(), folder, 2, **config)
        assert result.folder.parent == folder
        assert [r.round for r in result.reports] == [1, 2]
        assert equal(checkpoint.load(result.folder).model, result.state_dict)
        first, last = result.reports
        own = begin == "own"
        assert [s.stage for s in first.stages] == [
            *["bootstrap"] * own,
            "fuse",
            *["measure"] * own,
            *["probe", "probe"] * (recipe == "regmean"),
            "evaluate",
        ]
        assert {s.stage for s in last.stages} - {"probe"} == {"fuse", "evaluate"}
        assert (first.recipe, first.rounds, first.last, last.last) == (recipe, 2, False, True)
        assert last.model_digest == packing.digest(result.state_dict)
        assert set(last.train_metrics) == {"loss"}
        assert set(last.evaluate_metrics) == {"accuracy"}
        assert set(last.metrics) == {"train_loss", "accuracy"}
        assert last.path.points == (0, 1)
        assert last.path.loss_after[1] <= last.path.loss_before[1] * 1.0001
        assert last.metrics["accuracy"] > 0.4

    def test_does_not_touch_the_model_that_it_was_given(self, folder):
        model = tiny.net()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        result = start(tiny.federation(), folder, model=model)
        assert equal(dict(model.state_dict()), before)
        model[0].weight.data.zero_()
        assert result.state_dict["0.weight"].any()
        assert int(result.state_dict["1.num_batches_tracked"]) == 3

    def test_that_aligns_on_the_server_gives_what_aligning_clients_give(self, folder):
        on_client = start(tiny.federation(), folder / "a", start="own", align="client")
        on_server = start(tiny.federation(), folder / "b", start="own", align="server")
        off = start(tiny.federation(), folder / "c", start="own", align="off")
        assert equal(on_client.state_dict, on_server.state_dict)
        assert not torch.equal(on_client.state_dict["0.weight"], off.state_dict["0.weight"])
        moved = [
            [space.moved for c in run.reports[0].stages[1].clients for space in c.alignment.spaces]
            for run in (on_client, on_server)
        ]
        assert moved[0] == moved[1]
        assert any(moved[0])

    def test_with_the_fast_sum_is_close(self, folder):
        exact = start(tiny.federation(), folder / "a")
        fast = start(tiny.federation(), folder / "b", sum="fast")
        for name, tensor in exact.state_dict.items():
            torch.testing.assert_close(fast.state_dict[name], tensor)

    def test_asks_the_share_of_the_nodes_that_the_settings_say(self, folder):
        app = tiny.make_app()
        federation = tiny.federation(4, app, fraction_train=0.5, fraction_evaluate=0.25, min_evaluate_nodes=1)
        result = start(federation, folder, 3)
        for report in result.reports:
            assert [len(stage.clients) for stage in report.stages] == [2, 1]
        asked = [{node for node, number in app.trained if number == n} for n in (1, 2, 3)]
        assert len(set().union(*asked)) > 2

    def test_goes_on_where_no_client_can_evaluate(self, folder, caplog):
        caplog.set_level(logging.INFO, "flwr.fedbasin")
        federation = tiny.federation()
        federation.tamper = {
            node: lambda reply: (
                gone(federation)(reply) if federation.asked[-1].metadata.message_type == "evaluate" else reply
            )
            for node in federation.contexts
        }
        result = start(federation, folder, fraction_evaluate=1.0)
        (report,) = result.reports
        assert {c.outcome for c in report.stages[1].clients} == {"unavailable"}
        assert set(report.metrics) == {"train_loss"}
        assert "evaluate: 0 of 3 clients accepted" in caplog.text

    def test_that_loses_a_later_level_of_a_fit_counts_that_level_alone(self, folder):
        federation = tiny.federation()
        fits = []

        def lose_the_second_level(reply):
            # Two layers are fitted, one after the other.
            if read_header(reply.content, pb.Reply()).stage == "fit":
                fits.append(reply)
            return gone(federation)(reply) if len(fits) > 3 else reply

        federation.tamper = dict.fromkeys(federation.contexts, lose_the_second_level)
        with pytest.raises(QuorumLostError, match="stage fit: 0 of 3 clients accepted, 2 needed"):
            start(federation, folder, recipe="features", align="off")

    def test_that_loses_its_quorum_keeps_the_rounds_before(self, folder):
        federation = tiny.federation()

        def fail_in_round_2(number, arrays):
            for context in federation.contexts.values():
                context.run_config["fail"] = number == 1

        with pytest.raises(QuorumLostError, match="stage fuse: 0 of 3"):
            start(federation, folder, 3, evaluate_fn=fail_in_round_2)
        (run,) = folder.iterdir()
        assert checkpoint.load(run).server_round == 1
        assert [r.round for r in checkpoint.read_reports(run)] == [1]

    def test_refuses_the_symmetry_of_another_model_before_anything_is_sent(self, folder):
        federation = tiny.federation()
        other = parse("hidden  S(7)  0.weight[0] 3.weight[1]")
        with pytest.raises(SymmetryError, match="hidden"):
            start(federation, folder, symmetry=other)
        assert not federation.asked

    def test_fuses_a_tied_tensor_once(self, folder):
        result, model = tied_run(folder, "fisher")
        plain, _ = tied_run(folder / "fedavg", "fedavg")
        assert torch.equal(result.state_dict["0.weight"], result.state_dict["2.weight"])
        assert not torch.equal(result.state_dict["0.weight"], plain.state_dict["0.weight"])
        model.load_state_dict(result.state_dict)
        assert torch.equal(model[0].weight, result.state_dict["0.weight"])


def tied_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def tied_run(folder, recipe):
    app = ClientApp(mods=[basin(model=lambda context: tied_net(), data=tiny.batches)])

    @app.train()
    def train(message, context):
        model, (inputs, targets) = tied_net(), tiny.examples(context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        nn.functional.cross_entropy(model(inputs), targets).backward()
        for parameter in model.parameters():
            parameter.data -= parameter.grad
        metrics = MetricRecord({"num-examples": len(targets)})
        arrays = ArrayRecord(model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    model = tied_net()
    config = {"recipe": recipe, "align": "off"}
    return start(tiny.federation(app=app), folder, model=model, **config), model


class TestBootstrap:
    def chosen(self, result):
        """Whose model the anchor was: that client's distance to it is zero."""
        stages = {stage.stage: stage for stage in result.reports[0].stages}
        return [c.node_id for c in stages["fuse"].clients if c.alignment and c.alignment.distance_before == 0], stages[
            "bootstrap"
        ]

    def test_first_asks_the_first_node_alone(self, folder):
        federation = tiny.federation()
        nodes, report = self.chosen(start(federation, folder, start="own"))
        assert nodes == [100]
        assert [c.node_id for c in report.clients] == [100]

    def test_first_falls_over_to_the_next_node(self, folder):
        federation = tiny.federation()
        federation.contexts[100].run_config["fail"] = True
        federation.tamper = {101: gone(federation)}
        result = start(federation, folder, start="own", quorum=0.3, attempts=1)
        nodes, _ = self.chosen(result)
        assert nodes == [102]
        *asked, fuse, _ = result.reports[0].stages
        assert [(s.stage, c.node_id, c.outcome) for s in asked for c in s.clients] == [
            ("bootstrap", 100, "client_error"),
            ("bootstrap", 101, "unavailable"),
            ("bootstrap", 102, "accepted"),
        ]
        assert fuse.stage == "fuse"

    def test_first_that_nobody_answers_names_them_all(self, folder):
        federation = tiny.federation()
        federation.tamper = {node: gone(federation) for node in federation.contexts}
        with pytest.raises(
            QuorumLostError, match=r"stage bootstrap: 0 of 3.*nodes 100, 101, 102: unavailable, error 5"
        ):
            start(federation, folder, start="own")

    def test_medoid_takes_the_model_that_is_closest_to_all_others(self, folder):
        app = tiny.make_app([basin(model=spread_net, data=tiny.batches)])
        nodes, report = self.chosen(start(tiny.federation(app=app), folder, start="own", bootstrap="medoid"))
        assert nodes == [101]
        assert len(report.clients) == 3

    @pytest.mark.parametrize("best", [100, 101, 102])
    def test_best_takes_the_model_with_the_lowest_score(self, folder, best):
        counts = {100: 20, 101: 21, 102: 22}
        norms, federation = {}, tiny.federation()
        start(federation, folder / "first", start="own", client_metrics_fn=remember(norms))

        def score(state):
            # Bias of the head is moved by no permutation, so it tells the clients apart.
            return float((state["3.bias"] - norms[best]).abs().sum())

        config = {"start": "own", "bootstrap": "best"}
        result = start(tiny.federation(), folder, score_fn=score, **config)
        assert self.chosen(result)[0] == [best]
        assert {c.node_id: c.examples for c in result.reports[0].stages[0].clients} == counts

    def test_clients_train_once_in_a_round_of_two_stages(self, folder):
        app = tiny.make_app()
        start(tiny.federation(app=app), folder, 2, start="own", bootstrap="medoid")
        assert sorted(app.trained) == [(n, r) for n in (100, 101, 102) for r in (1, 2)]

    def test_a_client_that_lost_its_context_trains_again_to_the_same_end(self, folder):
        app = tiny.make_app()
        federation = tiny.federation(app=app)

        def lose(reply):
            if len(federation.asked) == 3:  # after the last reply of the bootstrap
                for context in federation.contexts.values():
                    context.state.clear()
            return reply

        federation.tamper = {102: lose}
        config = {"start": "own", "bootstrap": "medoid"}
        again = start(federation, folder / "a", **config)
        assert sorted(app.trained) == sorted([(n, 1) for n in (100, 101, 102)] * 2)
        assert equal(again.state_dict, start(tiny.federation(), folder / "b", **config).state_dict)


def remember(norms):
    def observe(node, state):
        norms[node] = state["3.bias"].clone()
        return {}

    return observe


def spread_net(context):
    """Three starts on a line, the middle one at node 101."""
    model = tiny.net()
    place = {0: -1.0, 1: 0.0, 2: 1.5}[context.node_config["partition-id"]]
    with torch.no_grad():
        model[3].bias += place
    return model


class StoppedError(BaseException):
    pass


def stop_after(number):
    def evaluate(server_round, arrays):
        if server_round == number + 1:
            raise StoppedError

    return evaluate


class TestResume:
    @pytest.mark.parametrize(
        "config", [{}, {"recipe": "regmean", "start": "own"}, {"fraction_train": 0.67, "recipe": "fisher"}]
    )
    def test_gives_bit_for_bit_the_undisturbed_run(self, folder, config):
        whole = start(tiny.federation(), folder / "whole", 4, **config)
        with pytest.raises(StoppedError):
            start(tiny.federation(), folder / "cut", 4, evaluate_fn=stop_after(2), **config)
        (cut,) = (folder / "cut").iterdir()
        assert checkpoint.load(cut).server_round == 2

        app = tiny.make_app()
        resumed = start(tiny.federation(app=app), folder, 4, resume=str(cut), **config)
        assert equal(resumed.state_dict, whole.state_dict)
        assert resumed.folder == cut
        assert {number for _, number in app.trained} == {3, 4}
        assert [r.round for r in resumed.reports] == [1, 2, 3, 4]
        digests = [[r.model_digest for r in run.reports] for run in (resumed, whole)]
        assert digests[0] == digests[1]

    def test_of_a_finished_run_gives_its_model_and_asks_nobody(self, folder):
        done = start(tiny.federation(), folder)
        federation = tiny.federation()
        again = start(federation, folder, resume=str(done.folder))
        assert equal(again.state_dict, done.state_dict)
        assert not federation.asked

    def test_repeats_a_round_whose_model_was_not_written(self, folder):
        whole = start(tiny.federation(), folder / "whole", 2)
        done = start(tiny.federation(), folder / "cut", 1)
        checkpoint.append_report(done.folder, whole.reports[1])  # written before the model
        resumed = start(tiny.federation(), folder, 2, resume=str(done.folder))
        assert equal(resumed.state_dict, whole.state_dict)
        assert [r.round for r in resumed.reports] == [1, 2]

    @pytest.mark.parametrize(
        "other",
        [
            {"recipe": "regmean"},
            {"recipe": "regmean", "shrink": 0.5},
            {"align": "off"},
            {"matcher": "sinkhorn"},
            {"layers": "first:1"},
            {"probe_share": 0.5},
            {"seed": 1},
        ],
    )
    def test_with_settings_that_compute_something_else_is_refused(self, folder, other):
        done = start(tiny.federation(), folder)
        federation = tiny.federation()
        with pytest.raises(SettingsError, match="use the same settings"):
            start(federation, folder, 2, resume=str(done.folder), **other)
        assert not federation.asked

    def test_with_settings_that_only_change_the_waiting_is_allowed(self, folder):
        done = start(tiny.federation(), folder)
        patient = {"round_timeout_seconds": 99, "quorum": 0.9, "attempts": 5}
        assert len(start(tiny.federation(), folder, 2, resume=str(done.folder), **patient).reports) == 2

    def test_with_another_model_is_refused(self, folder):
        done = start(tiny.federation(), folder)
        federation = tiny.federation()
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        with pytest.raises(SettingsError, match="another model"):
            start(federation, folder, 2, model, HIDDEN, resume=str(done.folder))
        assert not federation.asked

    def test_from_a_folder_without_a_run_is_refused(self, folder):
        federation = tiny.federation()
        with pytest.raises(CheckpointError, match="finished round"):
            start(federation, folder, resume=str(Path(folder) / "nowhere"))
        assert not federation.asked


def test_one_line_says_how_a_stage_went(folder):
    federation = tiny.federation()
    federation.contexts[102].run_config["fail"] = True
    result = start(federation, folder)
    text = stage_line(result.reports[0].stages[0])
    assert text.startswith("fuse: 2 of 3 clients accepted in ")
    assert "MB up" in text
    assert "; refused: node 102: client_error, error 2: RuntimeError: out of memory" in text


class TestProof:
    """With an example the symmetry is run before the first message."""

    EXAMPLE = torch.zeros(2, tiny.PIXELS)

    def test_a_symmetry_that_changes_the_function_is_refused_by_its_spaces(self, folder):
        federation = tiny.federation()
        # The hidden units without the layer that reads them.
        wrong = parse("hidden  S(6)  0.weight[0] 0.bias[0] 1.weight[0] 1.bias[0]")
        with pytest.raises(SymmetryError, match=r"another function.*hidden"):
            start(federation, folder, symmetry=wrong, example=self.EXAMPLE)
        assert not federation.asked

    def test_a_right_one_is_used(self, folder):
        result = start(tiny.federation(), folder, example=(self.EXAMPLE,))
        assert (result.folder / "rounds.jsonl").read_text().count("\n") == 1


class TestASecondStart:
    """The same strategy may be started again, which is a run of its own."""

    @pytest.fixture
    def strategy(self, folder):
        # Momentum, so that what is left of the first run would change the second.
        settings = {"folder": str(folder), "poll_seconds": 0.001, "min_available_nodes": 3}
        return FedBasin("fedavgm", model=tiny.net(), align="off", fraction_evaluate=0.0, **settings)

    def test_gives_the_same_model(self, strategy):
        first, second = (
            strategy.start(tiny.federation().grid(), ArrayRecord(tiny.net().state_dict()), 3) for _ in range(2)
        )
        assert equal(first.state_dict, second.state_dict)

    def test_may_have_another_deadline_and_another_model(self, strategy):
        arrays = ArrayRecord(tiny.net().state_dict())
        strategy.start(tiny.federation().grid(), arrays, 1, timeout=50)
        assert strategy.settings.round_timeout_seconds == 50
        strategy.start(tiny.federation().grid(), arrays, 1, timeout=60)
        assert strategy.settings.round_timeout_seconds == 60
        numbered = ArrayRecord([tensor.numpy() for tensor in tiny.net().state_dict().values()])
        result = strategy.start(tiny.federation(app=numbered_app()).grid(), numbered, 1)
        assert list(result.arrays) == list(numbered)


def numbered_app():
    """An app as of NumPy, whose arrays are called 0, 1, 2."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        arrays = ArrayRecord([array.numpy() for array in message.content["arrays"].values()])
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    return app


class TestEvaluationAlone:
    """With `fraction_train = 0` no client trains, and the initial model is evaluated in every round."""

    def test_leaves_the_model_as_it_is(self, folder):
        app = tiny.make_app()
        federation = tiny.federation(app=app, fraction_train=0.0, fraction_evaluate=1.0)
        evaluated = []
        result = start(federation, folder, 2, evaluate_fn=lambda n, _: evaluated.append(n))
        assert not app.trained
        assert equal(result.state_dict, dict(tiny.net().state_dict()))
        assert [[s.stage for s in r.stages] for r in result.reports] == [["evaluate"]] * 2
        assert result.train_metrics_clientapp == {}
        assert set(result.evaluate_metrics_clientapp) == {1, 2}
        assert set(result.reports[0].metrics) == {"accuracy"}
        assert evaluated == [0, 1, 2]

    @pytest.mark.parametrize("recipe", ["regmean", "features"])
    def test_is_possible_with_every_recipe(self, folder, recipe):
        federation = tiny.federation(recipe=recipe, fraction_train=0.0, fraction_evaluate=1.0)
        result = start(federation, folder)
        assert equal(result.state_dict, dict(tiny.net().state_dict()))

    def test_goes_on_after_a_cut(self, folder):
        config = {"fraction_train": 0.0, "fraction_evaluate": 1.0}
        done = start(tiny.federation(**config), folder)
        resumed = start(tiny.federation(**config), folder, 3, resume=str(done.folder))
        assert [r.round for r in resumed.reports] == [1, 2, 3]


@pytest.mark.parametrize("recipe", ["fedavg", "regmean", "features"])
def test_models_may_travel_packed(folder, recipe):
    config = {"recipe": recipe, "start": "own", "fraction_evaluate": 1.0}
    packed = start(tiny.federation(packed=True), folder / "packed", 2, **config)
    plain = start(tiny.federation(), folder / "plain", 2, **config)
    assert equal(packed.state_dict, plain.state_dict)
