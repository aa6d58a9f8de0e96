"""Nothing that one client sends ends a run, moves it unnamed, or is saved where it is not finite."""

import math

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedbasin.client import basin
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, plain
from fedbasin.proto.header import STATISTICS, read_header
from fedbasin.proto.report import IncidentKind
from fedbasin.server.exchange import client_paths, stage_attempt
from fedbasin.server.exchange.quorum import StageFailedError
from fedbasin.server.run.resumption.checkpoint import MODEL, load
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.alignment.matchers import Matcher
from fedbasin.strategies.recipes import RECIPES
from tests import running, tiny
from tests.federation import Federation

CLIENTS = 6
BAD = 103
RUN = {"align": "off", "fraction_evaluate": 0.0}


def arrays_key(reply):
    return next(iter(reply.content.array_records.keys() - {STATISTICS}), None)


def weights(change):
    """A way to spoil a reply: other floating tensors."""

    def spoil(reply):
        key = None if reply.has_error() else arrays_key(reply)
        if key is not None:
            state = plain.read_arrays(reply.content[key])
            changed = {n: change(n, t.clone()) if t.is_floating_point() else t for n, t in state.items()}
            reply.content[key] = plain.write_arrays(changed)
        return reply

    return spoil


def statistics(factor):
    """A way to spoil a reply: all statistics multiplied."""

    def spoil(reply):
        if not reply.has_error() and STATISTICS in reply.content:
            header = read_header(reply.content, pb.Reply())
            specs = [spec for entry in header.statistics for spec in (*entry.pieces, *entry.moment)]
            tensors = packing.unpack(reply.content[STATISTICS], specs)
            reply.content[STATISTICS], _ = packing.pack({name: factor * t for name, t in tensors.items()})
        return reply

    return spoil


def metrics(**values):
    """A way to spoil a reply: other metrics."""

    def spoil(reply):
        if not reply.has_error() and "metrics" in reply.content:
            named = {name.replace("_", "-"): value for name, value in values.items()}
            reply.content["metrics"] = MetricRecord({**reply.content["metrics"], **named})
        return reply

    return spoil


def both(*spoils):
    def spoil(reply):
        for change in spoils:
            reply = change(reply)
        return reply

    return spoil


def first_entry(value):
    def change(name, tensor):
        tensor.view(-1)[:1] = value
        return tensor

    return change


def start(folder, tamper, rounds=1, *, failing=(), **settings):
    federation = tiny.federation(CLIENTS, tamper=tamper, folder=str(folder), **{**RUN, **settings})
    for node in failing:
        federation.contexts[node].run_config["fail"] = True
    aligns = settings.get("align", "off") != "off"
    return running.run(federation, tiny.net(), rounds, symmetry=tiny.symmetry() if aligns else None)


def outcomes(result, node=BAD):
    return [c.outcome for r in result.reports for s in r.stages for c in s.clients if c.node_id == node]


def is_finite(state):
    return all(bool(t.isfinite().all()) for t in state.values())


ATTACKS = {
    "one weight of 1e30": weights(first_entry(1e30)),
    "one weight of 3.4e38": weights(first_entry(3.4e38)),
    "weights times 1e20": weights(lambda n, t: t * 1e20),
    "weights times -10": weights(lambda n, t: t if "running" in n else t * -10),
    "running variance of 3e38": weights(lambda n, t: torch.full_like(t, 3e38) if "running_var" in n else t),
    "running variance of -1": weights(lambda n, t: torch.full_like(t, -1) if "running_var" in n else t),
    "statistics times 1e30": statistics(1e30),
    "statistics times 1e6, weights times -10": both(
        statistics(1e6), weights(lambda n, t: t if "running" in n else t * -10)
    ),
    "2^53 examples, weights times -1": both(
        metrics(num_examples=2.0**53), weights(lambda n, t: t if "running" in n else -3 * t)
    ),
}
WITH_STATISTICS = ("fisher", "regmean", "kfac", "features", "auto")


LONE = {"fisher": "statistics times 1e6, weights times -10", "features": "one weight of 3.4e38"}
EVERY = [
    pytest.param(recipe, attack, marks=() if recipe == "fedavg" or LONE.get(recipe) == attack else pytest.mark.slow)
    for recipe in ("fedavg", *WITH_STATISTICS)
    for attack in ATTACKS
]


@pytest.mark.parametrize(("recipe", "attack"), EVERY)
def test_a_model_is_what_it_is_without_the_client_that_attacks(recipe, attack, tmp_path):
    unused = attack.startswith("statistics times 1e30") and not RECIPES[recipe].weighting
    attacked = start(tmp_path / "attacked", {BAD: ATTACKS[attack]}, recipe=recipe)
    without = start(tmp_path / "without", {}, failing=() if unused else [BAD], recipe=recipe)
    if unused and recipe != "fedavg":
        # Only what is fitted is spoiled: the client takes part in the fusion and is left out of the fit.
        assert set(outcomes(attacked)) >= {"accepted", "out_of_line"}
        assert is_finite(attacked.state_dict)
        return
    for name, tensor in without.state_dict.items():
        assert torch.equal(attacked.state_dict[name], tensor), name
    assert unused or set(outcomes(attacked)) <= {"out_of_line", "not_positive", "non_finite"}
    assert is_finite(load(attacked.folder).model)


@pytest.mark.parametrize("bad", [1e3, 1e15, 1e18, 1e19, 1e25, 1e38])
def test_weights_that_cannot_be_matched_are_the_clients_own_outcome(bad, tmp_path):
    result = start(tmp_path, {BAD: weights(first_entry(bad))}, align="server")
    assert outcomes(result) == ["out_of_line"]
    assert is_finite(result.state_dict)


def renamed(reply):
    key = arrays_key(reply)
    state = plain.read_arrays(reply.content[key])
    reply.content[key] = plain.write_arrays({f"module.{name}": tensor for name, tensor in state.items()})
    return reply


def shortened(reply):
    key = arrays_key(reply)
    state = plain.read_arrays(reply.content[key])
    reply.content[key] = plain.write_arrays({name: t for name, t in state.items() if name != "3.weight"})
    return reply


BAD_MODELS = {
    **{f"an entry of {value:g}": weights(first_entry(value)) for value in (math.nan, math.inf, 1e19, 1e30, 3e38)},
    "zeros": weights(lambda name, tensor: torch.zeros_like(tensor)),
    "another width": weights(lambda n, t: t[:-1] if n == "0.bias" else t),
    "names of DataParallel": renamed,
    "a tensor less": shortened,
}
ALIGNING = [
    {"align": "off"},
    *({"align": "client", "matcher": matcher} for matcher in Matcher.__members__),
    *({"align": "server", "matcher": matcher} for matcher in ("weights", "graph")),
]


def bad_models():
    for name in BAD_MODELS:
        for aligning in ALIGNING:
            # Six searches with the loss take seconds.
            is_slow = aligning.get("matcher") == "learned" and name != "an entry of 1e+19"
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(name, aligning, id=f"{name}-{'-'.join(aligning.values())}", marks=marks)


@pytest.mark.parametrize(("name", "aligning"), list(bad_models()))
def test_a_model_that_an_app_returns_is_refused_by_name_however_it_is_aligned(name, aligning, tmp_path):
    def spoiling(message, context, call_next):
        reply = call_next(message, context)
        return BAD_MODELS[name](reply) if context.node_id == BAD else reply

    settings = {**RUN, **aligning, "folder": str(tmp_path)}
    federation = tiny.federation(CLIENTS, tiny.make_app(train_mods=[spoiling]), **settings)
    result = running.run(federation, tiny.net(), 1, symmetry=tiny.symmetry() if len(aligning) > 1 else None)
    (outcome,) = outcomes(result)
    assert outcome not in {"accepted", "client_error", "not_handled"}
    assert is_finite(result.state_dict)


def overflowing(reply):
    return weights(lambda n, t: torch.full_like(t, 3e38) if n == "0.weight" else t)(reply)


def test_a_sum_that_overflows_is_summed_again_without_the_largest(tmp_path):
    spoiled = start(tmp_path / "a", {BAD: overflowing}, sum="fast", bounds=False)
    assert outcomes(spoiled) == ["overflow"]
    without = start(tmp_path / "b", {}, failing=[BAD], sum="fast", bounds=False)
    for name, tensor in without.state_dict.items():
        assert torch.equal(spoiled.state_dict[name], tensor), name


def in_round(number, spoil, federation_rounds):
    """The same, in one round alone; `federation_rounds` lists the clients' trainings."""
    return lambda reply: spoil(reply) if federation_rounds and federation_rounds[-1][1] == number else reply


def test_a_round_without_a_finite_model_is_rolled_back_and_the_run_goes_on(tmp_path):
    app = tiny.make_app()
    tamper = dict.fromkeys(range(100, 103), in_round(2, overflowing, app.trained))
    settings = {**RUN, "folder": str(tmp_path), "sum": "fast", "bounds": False}
    result = running.run(tiny.federation(3, app=app, tamper=tamper, **settings), tiny.net(), 3)
    first, second, third = result.reports
    assert second.model_digest == first.model_digest != third.model_digest
    (incident,) = [i for i in second.incidents if i.kind == IncidentKind.rolled_back.name]
    assert "infinite entries in '0.weight'" in incident.detail
    assert is_finite(result.state_dict)
    assert [len(s.clients) for s in second.stages] == [3]


def test_where_the_guard_only_warns_a_round_without_a_finite_model_ends_the_run(tmp_path):
    with pytest.raises(StageFailedError, match=r"0\.weight"):
        start(tmp_path, dict.fromkeys(range(100, 106), overflowing), sum="fast", bounds=False, guard="warn")
    assert not (tmp_path / "1" / MODEL).exists()


class Losses:
    """The server's own evaluation with these losses, from round 0 on."""

    def __init__(self, *losses):
        self.losses = losses

    def __call__(self, number, arrays):
        return MetricRecord({"loss": self.losses[number]})


@pytest.mark.parametrize("worse", [9.0, math.inf])
@pytest.mark.parametrize("guard", ["roll back", "warn", "off"])
def test_a_model_that_is_worse_than_the_one_before(guard, worse, tmp_path):
    settings = {**RUN, "folder": str(tmp_path), "guard": guard}
    federation = tiny.federation(3, **settings)
    result = running.run(federation, tiny.net(), 3, evaluate_fn=Losses(2.0, 1.0, worse, 1.0))
    first, second, third = result.reports
    kinds = [incident.kind for incident in second.incidents]
    expected = {"roll back": ["loss_rose", "rolled_back"], "warn": ["loss_rose"], "off": []}
    assert kinds == expected[guard]
    assert (second.model_digest == first.model_digest) == (guard == "roll back")
    assert not third.incidents
    digest = packing.digest(load(result.folder).model)
    assert digest == third.model_digest


def evaluations(*values):
    """A way to spoil a client's evaluations: the metrics of each, one after the other."""
    rest, trained = iter(values), []

    def spoil(reply):
        if not reply.metadata.message_type.startswith("evaluate"):
            trained.append(reply)
        elif trained:  # the first message of a run comes before
            return metrics(**next(rest))(reply)
        return reply

    return spoil


def test_one_client_cannot_undo_rounds_with_the_loss_that_it_reports(tmp_path):
    tamper = {node: evaluations({"loss": 1.0}, {"loss": 1.0}) for node in range(100, 100 + CLIENTS)}
    tamper[BAD] = evaluations({"loss": 1.0}, {"loss": 1e300})
    result = start(tmp_path, tamper, rounds=2, fraction_evaluate=1.0)
    assert [client.metrics["loss"] for client in result.reports[1].stages[-1].clients].count(1e300) == 1
    assert not [i for r in result.reports for i in r.incidents if i.kind == "rolled_back"]


def test_a_client_whose_loss_explodes_is_named(tmp_path):
    result = start(tmp_path, {BAD: metrics(loss=1e6)})
    (incident,) = result.reports[0].incidents
    assert incident.kind == "client_loss"
    assert incident.detail.startswith(f"node {BAD}: loss 1e+06")


def test_examples_are_capped_at_a_multiple_of_the_median_and_the_report_says_so(tmp_path):
    result = start(tmp_path, {BAD: metrics(num_examples=2.0**53)})
    (client,) = [c for c in result.reports[0].stages[0].clients if c.node_id == BAD]
    assert client.outcome == "accepted"
    # Honest clients have 20 to 25 examples.
    assert 5 * 20 < client.examples < 5 * 26
    assert client.detail.startswith("examples cut from 9.0072e+15 to")


@pytest.mark.parametrize("recipe", ["fedavg", "regmean", "auto"])
def test_a_counter_of_one_client_does_not_move_the_models(recipe, tmp_path):
    def spoil(reply):
        key = None if reply.has_error() else arrays_key(reply)
        if key is not None:
            state = plain.read_arrays(reply.content[key])
            if "1.num_batches_tracked" in state:
                state["1.num_batches_tracked"] = torch.tensor(2**63 - 1)
                reply.content[key] = plain.write_arrays(state)
        return reply

    result = start(tmp_path, {BAD: spoil}, recipe=recipe)
    (client,) = [c for c in result.reports[0].stages[0].clients if c.node_id == BAD]
    assert "changes of 1.num_batches_tracked cut from 9.22337e+18 to 15" in client.detail
    # Every client trains three batches.
    assert 3 <= int(result.state_dict["1.num_batches_tracked"]) <= 15


def test_a_client_that_is_refused_again_and_again_is_not_asked_for_some_rounds(tmp_path):
    settings = {"strikes": 2, "quarantine_rounds": 2}
    result = start(tmp_path, {BAD: weights(first_entry(math.nan))}, rounds=6, **settings)
    asked = [any(c.node_id == BAD for s in r.stages for c in s.clients) for r in result.reports]
    assert asked == [True, True, False, False, True, True]
    named = [[i.detail for i in r.incidents if i.kind == "quarantined"] for r in result.reports]
    assert named[2] == [f"node {BAD} is not asked up to round 4"]
    assert named[4] == []


def test_a_quarantine_goes_on_after_a_resume(tmp_path):
    settings = {"strikes": 2, "quarantine_rounds": 3}
    start(tmp_path, {BAD: weights(first_entry(math.nan))}, rounds=2, **settings)
    resumed = start(tmp_path, {}, rounds=4, resume=str(tmp_path / "1"), **settings)
    assert len(outcomes(resumed)) == 2


def test_whatever_fails_while_one_reply_is_handled_is_that_clients_outcome(tmp_path, monkeypatch):
    def checked_path(reply, request, node):
        return client_paths.checked_path(reply, request, node) if node != BAD else 1 / 0

    monkeypatch.setattr(stage_attempt, "checked_path", checked_path)
    result = start(tmp_path / "a", {})
    (client,) = [c for c in result.reports[0].stages[0].clients if c.node_id == BAD]
    assert (client.outcome, client.detail) == ("not_handled", "ZeroDivisionError: division by zero")
    monkeypatch.undo()
    without = start(tmp_path / "b", {}, failing=[BAD])
    for name, tensor in without.state_dict.items():
        assert torch.equal(result.state_dict[name], tensor), name


def test_a_damaged_checkpoint_falls_back_to_the_round_before_by_name(tmp_path):
    undisturbed = start(tmp_path / "a", {}, rounds=4)
    start(tmp_path / "b", {}, rounds=3)
    file = tmp_path / "b" / "1" / MODEL
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    resumed = start(tmp_path / "b", {}, rounds=4, resume=str(file.parent))
    for name, tensor in undisturbed.state_dict.items():
        assert torch.equal(resumed.state_dict[name], tensor), name
    (incident,) = resumed.reports[2].incidents
    assert incident.kind == "damaged_checkpoint"
    assert str(file) in incident.detail
    assert "checksum" in incident.detail


class Buffers(nn.Module):
    """A linear layer beside buffers of every kind: scale and zero point, a mask of -inf, a mask of bits, a hash."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(2, 2)
        self.register_buffer("zero_point", torch.tensor([0], dtype=torch.int32))
        self.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool))
        self.register_buffer("seen", torch.tensor(2**62, dtype=torch.int64))
        self.register_buffer("causal", torch.full((2, 2), -math.inf).triu(1))

    def forward(self, x):
        return self.fc(x)


def buffer_app(make, change):
    app = ClientApp(mods=[basin(model=lambda context: make())])

    @app.train()
    def train(message, context):
        state = change(dict(plain.read_arrays(message.content["arrays"])))
        content = {"arrays": plain.write_arrays(state), "metrics": MetricRecord({"num-examples": 5})}
        return Message(RecordDict(content), reply_to=message)

    return app


def run_buffers(folder, change, rounds=1, **settings):
    config = {"fedbasin.folder": str(folder), "fedbasin.poll-seconds": 0.001, "fedbasin.fraction-evaluate": 0.0}
    config |= {f"fedbasin.{key.replace('_', '-')}": value for key, value in settings.items()}
    return running.run(Federation(buffer_app(Buffers, change), config, 2), Buffers(), rounds)


@pytest.mark.parametrize("optimizer", ["", "momentum", "adam", "ema"])
def test_equal_updates_give_that_update_in_every_tensor(optimizer, tmp_path):
    trained = {
        "zero_point": torch.tensor([128], dtype=torch.int32),
        "mask": torch.tensor([[True, False], [False, True]]),
        "seen": torch.tensor(2**62 + 1),
    }
    result = run_buffers(tmp_path, lambda s: {**s, **trained}, rounds=2, server_optimizer=optimizer)
    assert outcomes(result, 100) == ["accepted"] * 2
    for name, tensor in {**Buffers().state_dict(), **trained}.items():
        assert torch.equal(result.state_dict[name], tensor), name


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_mask_of_infinities_must_stay_as_it_is(value, tmp_path):
    def change(state):
        return {**state, "causal": torch.full((2, 2), value)}

    federation_outcome = pytest.raises(Exception, match="non_finite") if not math.isfinite(value) else None
    if federation_outcome is None:
        assert outcomes(run_buffers(tmp_path, change), 100) == ["accepted"]
        return
    with federation_outcome:
        run_buffers(tmp_path, change)


@pytest.mark.parametrize(("mean", "variance"), [(1000.0, 0.01), (3000.0, 0.01), (1e5, 0.5), (1e7, 1.0), (1e9, 1.0)])
@pytest.mark.parametrize("how", ["reproducible", "fast"])
def test_running_variances_far_from_zero_keep_their_digits(mean, variance, how, tmp_path):
    def norm():
        return nn.BatchNorm1d(1)

    def change(state):
        return {**state, "running_mean": torch.tensor([mean]), "running_var": torch.tensor([variance])}

    config = {"fedbasin.folder": str(tmp_path), "fedbasin.fraction-evaluate": 0.0, "fedbasin.sum": how}
    federation = Federation(buffer_app(norm, change), {**config, "fedbasin.poll-seconds": 0.001}, 3)
    result = running.run(federation, norm())
    assert result.state_dict["running_mean"].item() == pytest.approx(mean)
    assert result.state_dict["running_var"].item() == pytest.approx(variance, rel=1e-6)


BROKEN = {
    "NaN": (lambda s: {**s, "0.weight": s["0.weight"] * math.nan}, "non_finite"),
    "infinity": (lambda s: {**s, "0.bias": s["0.bias"] + math.inf}, "non_finite"),
    "another shape": (lambda s: {**s, "3.weight": torch.zeros(5, 6), "3.bias": torch.zeros(5)}, "wrong_shape"),
    "a layer less": (lambda s: {n: t for n, t in s.items() if n[0] != "3"}, "missing_tensor"),
    "a layer more": (lambda s: {**s, "9.weight": torch.zeros(1)}, "unexpected_tensor"),
    "a wrapped module": (lambda s: {f"module.{n}": t for n, t in s.items()}, "missing_tensor"),
    "a compiled module": (lambda s: {f"_orig_mod.{n}": t for n, t in s.items()}, "missing_tensor"),
    "half precision": (lambda s: {n: t.half() for n, t in s.items()}, "wrong_dtype"),
    "a negative variance": (lambda s: {**s, "1.running_var": -s["1.running_var"]}, "not_positive"),
}


def breaking_app(change):
    broken = ClientApp(mods=[basin(model=tiny.own_net, data=tiny.batches)])

    @broken.train()
    def spoil(message, context):
        state = message.content["arrays"].to_torch_state_dict()
        changed = change(dict(state)) if context.node_id == BAD else state
        content = {"arrays": ArrayRecord(changed), "metrics": MetricRecord({"num-examples": 5, "loss": 1.0})}
        return Message(RecordDict(content), reply_to=message)

    return broken


@pytest.mark.parametrize("kind", BROKEN)
def test_a_client_names_what_is_wrong_with_its_model_as_the_server_does(kind, tmp_path):
    change, outcome = BROKEN[kind]
    named = {}
    for align in ("off", "server", "client"):
        app = breaking_app(change)
        federation = tiny.federation(4, app=app, folder=str(tmp_path / align), **{**RUN, "align": align})
        symmetry = None if align == "off" else tiny.symmetry()
        (report,) = running.run(federation, tiny.net(), symmetry=symmetry).reports
        (client,) = [c for c in report.stages[0].clients if c.node_id == BAD]
        named[align] = client.outcome, client.detail
    assert named["client"] == named["server"] == named["off"]
    assert named["off"][0] == outcome


@pytest.mark.parametrize("settings", [{}, {"statistics_budget_bytes": 400}])
@pytest.mark.parametrize("recipe", ["fisher", "regmean", "kfac", "features", "head"])
def test_statistics_that_are_not_finite_are_named(recipe, settings, tmp_path):
    if settings and recipe not in ("regmean", "features"):
        pytest.skip("this recipe has no budget")

    def spoiled(context):
        inputs, targets = tiny.examples(context)
        if context.node_id == BAD:
            inputs = inputs.clone()
            inputs[0, 0] = math.nan
        return [(inputs, targets)]

    app = tiny.make_app(mods=[basin(model=tiny.own_net, data=tiny.batches)])
    honest = app

    bad = ClientApp(mods=[basin(model=tiny.own_net, data=spoiled)])

    @bad.train()
    def train(message, context):
        state = message.content["arrays"].to_torch_state_dict()
        content = {"model": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 20, "loss": 1.0})}
        return Message(RecordDict(content), reply_to=message)

    def apps(message, context):
        return (bad if context.node_id == BAD else honest)(message, context)

    federation = tiny.federation(4, app=apps, folder=str(tmp_path), recipe=recipe, **RUN, **settings)
    result = running.run(federation, tiny.net())
    assert "non_finite" in outcomes(result)
    details = [c.detail for r in result.reports for s in r.stages for c in s.clients if c.outcome == "non_finite"]
    assert all("statistic of" in detail for detail in details)


def test_an_evaluation_that_fails_does_not_take_the_loss_of_training(tmp_path):
    values = {"loss": 0.25}, {"loss": 0.25, "num_examples": 0}, {"loss": 0.25}
    tamper = {node: evaluations(*values) for node in range(100, 100 + CLIENTS)}
    result = start(tmp_path, tamper, rounds=3, fraction_evaluate=1.0)
    assert [report.metrics.get("loss") for report in result.reports] == [0.25, None, 0.25]
    assert all("train_loss" in report.metrics for report in result.reports)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recipe", ["fedavg", "auto"])
def test_a_model_in_bfloat16_travels_in_float32(recipe, packed, tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()

    def wide(state):
        return {name: tensor.float() for name, tensor in state.items()}

    def data():
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        return [(inputs.bfloat16(), torch.arange(6) % 3)]

    app = ClientApp(mods=[basin(model=make, data=data)])

    @app.train()
    def train(message, context):
        model = make()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        model[0].bias.data += 0.125
        content = {"arrays": ArrayRecord(wide(model.state_dict())), "metrics": MetricRecord({"num-examples": 6})}
        return Message(RecordDict(content), reply_to=message)

    settings = {"folder": str(tmp_path), "recipe": recipe, "packed": packed, "fraction_evaluate": 0.0}
    federation = tiny.federation(3, app=app, **settings)
    strategy = FedBasin(model=make(), context=federation.server_context(), align="off")
    result = strategy.start(federation.grid(), ArrayRecord(wide(make().state_dict())), 1)
    assert {client.outcome for stage in result.reports[0].stages for client in stage.clients} == {"accepted"}
    assert is_finite(result.state_dict)
