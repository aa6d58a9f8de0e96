"""Whole runs over a federation in this process: stages, bootstrap, checkpoints and resume."""

from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedbasin.client import basin
from fedbasin.proto import packing
from fedbasin.server.run import checkpoint
from fedbasin.server.run.checkpoint import CheckpointError
from fedbasin.server.run.reporter import summary
from fedbasin.server.run.serve import Hooks, serve
from fedbasin.server.run.settings import SettingsError
from fedbasin.server.run.stage_loop import QuorumLostError
from fedbasin.strategies.symmetry.discover.tracing import trace
from fedbasin.strategies.symmetry.symmetry import SymmetryError, parse
from tests import tiny

HIDDEN = trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.zeros(2, 4))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs"


def start(federation, folder, rounds=1, model=None, symmetry=None, hooks=None, **config):
    federation.run_config.setdefault("fedbasin.fraction-evaluate", 0.0)
    settings = {f"fedbasin.{name.replace('_', '-')}": value for name, value in config.items()}
    context = federation.server_context(**{"fedbasin.folder": str(folder), **settings})
    symmetry = symmetry or tiny.symmetry()
    model = model or tiny.net()
    return serve(federation.grid(), context, model, rounds, symmetry=symmetry, hooks=hooks)


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
        assert equal(checkpoint.load(result.folder).model, result.model)
        first, last = result.reports
        assert [s.stage for s in first.stages] == ["bootstrap"] * (begin == "own") + [
            "fuse",
            "evaluate",
        ]
        assert [s.stage for s in last.stages] == ["fuse", "evaluate"]
        assert (first.recipe, first.rounds, first.last, last.last) == (recipe, 2, False, True)
        assert last.model_digest == packing.digest(result.model)
        assert set(last.metrics) == {"loss", "accuracy"}
        assert list(last.path.points) == [0, 1]
        assert last.path.loss_after[1] <= last.path.loss_before[1] * 1.0001
        assert last.metrics["accuracy"] > 0.4

    def test_does_not_touch_the_model_that_it_was_given(self, folder):
        model = tiny.net()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        result = start(tiny.federation(), folder, model=model)
        assert equal(dict(model.state_dict()), before)
        model[0].weight.data.zero_()
        assert result.model["0.weight"].any()
        assert torch.equal(result.model["1.num_batches_tracked"], before["1.num_batches_tracked"])

    def test_that_aligns_on_the_server_gives_what_aligning_clients_give(self, folder):
        on_client = start(tiny.federation(), folder / "a", start="own", align="client")
        on_server = start(tiny.federation(), folder / "b", start="own", align="server")
        off = start(tiny.federation(), folder / "c", start="own", align="off")
        assert equal(on_client.model, on_server.model)
        assert not torch.equal(on_client.model["0.weight"], off.model["0.weight"])
        moved = [
            [space.moved for c in run.reports[0].stages[1].clients for space in c.alignment.spaces]
            for run in (on_client, on_server)
        ]
        assert moved[0] == moved[1]
        assert any(moved[0])

    def test_with_the_fast_sum_is_close(self, folder):
        exact = start(tiny.federation(), folder / "a")
        fast = start(tiny.federation(), folder / "b", sum="fast")
        for name, tensor in exact.model.items():
            torch.testing.assert_close(fast.model[name], tensor)

    def test_asks_the_share_of_the_nodes_that_the_settings_say(self, folder):
        app = tiny.make_app()
        federation = tiny.federation(4, app, fraction_train=0.5, fraction_evaluate=0.25)
        result = start(federation, folder, 3)
        for report in result.reports:
            assert [len(stage.clients) for stage in report.stages] == [2, 1]
        asked = [{node for node, number in app.trained if number == n} for n in (1, 2, 3)]
        assert len(set().union(*asked)) > 2

    def test_goes_on_where_no_client_can_evaluate(self, folder, caplog):
        federation = tiny.federation()
        federation.tamper = {
            node: lambda reply: (
                gone(federation)(reply)
                if federation.asked[-1].metadata.message_type == "evaluate"
                else reply
            )
            for node in federation.contexts
        }
        result = start(federation, folder, fraction_evaluate=1.0)
        (report,) = result.reports
        assert {c.outcome for c in report.stages[1].clients} == {"unavailable"}
        assert set(report.metrics) == {"loss"}
        assert "stage evaluate: 0 of 3 clients accepted" in caplog.text

    def test_that_loses_its_quorum_keeps_the_rounds_before(self, folder):
        federation = tiny.federation()

        def fail_in_round_2(number, state):
            for context in federation.contexts.values():
                context.run_config["fail"] = number == 1
            return {}

        with pytest.raises(QuorumLostError, match="stage fuse: 0 of 3"):
            start(federation, folder, 3, hooks=Hooks(evaluate=fail_in_round_2))
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
        result, model = tied_run(folder, "regmean")
        plain, _ = tied_run(folder / "fedavg", "fedavg")
        assert torch.equal(result.model["0.weight"], result.model["2.weight"])
        assert not torch.equal(result.model["0.weight"], plain.model["0.weight"])
        model.load_state_dict(result.model)
        assert torch.equal(model[0].weight, result.model["0.weight"])


def tied_net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
    )
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
        return [
            c.node_id
            for c in stages["fuse"].clients
            if c.HasField("alignment") and c.alignment.distance_before == 0
        ], stages["bootstrap"]

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
        nodes, report = self.chosen(result)
        assert nodes == [102]
        assert sorted((c.node_id, c.outcome) for c in report.clients) == [
            (100, "client_error"),
            (101, "unavailable"),
            (102, "accepted"),
        ]

    def test_first_that_nobody_answers_names_them_all(self, folder):
        federation = tiny.federation()
        federation.tamper = {node: gone(federation) for node in federation.contexts}
        with pytest.raises(QuorumLostError, match=r"bootstrap: 0 of 3.*node 100.*101.*102"):
            start(federation, folder, start="own")

    def test_medoid_takes_the_model_that_is_closest_to_all_others(self, folder):
        app = tiny.make_app([basin(model=spread_net, data=tiny.batches)])
        nodes, report = self.chosen(
            start(tiny.federation(app=app), folder, start="own", bootstrap="medoid")
        )
        assert nodes == [101]
        assert len(report.clients) == 3

    @pytest.mark.parametrize("best", [100, 101, 102])
    def test_best_takes_the_model_with_the_lowest_score(self, folder, best):
        counts = {100: 20, 101: 21, 102: 22}
        norms, federation = {}, tiny.federation()
        start(federation, folder / "first", start="own", hooks=Hooks(observe=remember(norms)))

        def score(state):
            # Bias of the head is moved by no permutation, so it tells the clients apart.
            return float((state["3.bias"] - norms[best]).abs().sum())

        hooks = Hooks(score=score)
        result = start(tiny.federation(), folder, start="own", bootstrap="best", hooks=hooks)
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
        assert equal(again.model, start(tiny.federation(), folder / "b", **config).model)


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


class StoppedError(RuntimeError):
    pass


def stop_after(number):
    def evaluate(server_round, state):
        if server_round == number + 1:
            raise StoppedError
        return {}

    return Hooks(evaluate=evaluate)


class TestResume:
    @pytest.mark.parametrize(
        "config",
        [{}, {"recipe": "regmean", "start": "own"}, {"fraction_train": 0.67, "recipe": "fisher"}],
    )
    def test_gives_bit_for_bit_the_undisturbed_run(self, folder, config):
        whole = start(tiny.federation(), folder / "whole", 4, **config)
        with pytest.raises(StoppedError):
            start(tiny.federation(), folder / "cut", 4, hooks=stop_after(2), **config)
        (cut,) = (folder / "cut").iterdir()
        assert checkpoint.load(cut).server_round == 2

        app = tiny.make_app()
        resumed = start(tiny.federation(app=app), folder, 4, resume=str(cut), **config)
        assert equal(resumed.model, whole.model)
        assert resumed.folder == cut
        assert {number for _, number in app.trained} == {3, 4}
        assert [r.round for r in resumed.reports] == [1, 2, 3, 4]
        digests = [[r.model_digest for r in run.reports] for run in (resumed, whole)]
        assert digests[0] == digests[1]

    def test_of_a_finished_run_gives_its_model_and_asks_nobody(self, folder):
        done = start(tiny.federation(), folder)
        federation = tiny.federation()
        again = start(federation, folder, resume=str(done.folder))
        assert equal(again.model, done.model)
        assert not federation.asked

    def test_repeats_a_round_whose_model_was_not_written(self, folder):
        whole = start(tiny.federation(), folder / "whole", 2)
        done = start(tiny.federation(), folder / "cut", 1)
        checkpoint.append_report(done.folder, whole.reports[1])  # written before the model
        resumed = start(tiny.federation(), folder, 2, resume=str(done.folder))
        assert equal(resumed.model, whole.model)
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
        assert (
            len(start(tiny.federation(), folder, 2, resume=str(done.folder), **patient).reports)
            == 2
        )

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
    text = summary(result.reports[0].stages[0])
    assert text.startswith("fuse: 2 of 3 clients in ")
    assert text.endswith(" s (client_error)")


class TestProof:
    """With an example the symmetry is run before the first message."""

    def test_a_symmetry_that_changes_the_function_is_refused_by_its_spaces(self):
        federation = tiny.federation()
        grid = federation.grid()
        # The hidden units without the layer that reads them.
        wrong = parse("hidden  S(6)  0.weight[0] 0.bias[0] 1.weight[0] 1.bias[0]")
        with pytest.raises(SymmetryError, match=r"another function.*hidden"):
            serve(
                grid,
                federation.server_context(),
                tiny.net(),
                1,
                symmetry=wrong,
                example=torch.zeros(2, tiny.PIXELS),
            )
        assert grid.pushed == 0

    def test_a_right_one_is_used(self, tmp_path):
        federation = tiny.federation(folder=str(tmp_path))
        example = torch.zeros(2, tiny.PIXELS)
        serve(
            federation.grid(),
            federation.server_context(),
            tiny.net(),
            1,
            symmetry=tiny.symmetry(),
            example=(example,),
        )
        (run,) = tmp_path.iterdir()
        assert (run / "rounds.jsonl").read_text().count("\n") == 1
