"""Apps as a new user has them: each runs as with Flower's FedAvg, or is refused with the line to add."""

import logging
import warnings

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, arrays_size_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from torch import nn
from torch.nn.functional import cross_entropy

from fedbasin import FedBasin, basin
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.run.settings import SettingsError
from fedbasin.strategies.recipes import RECIPES
from tests import tiny
from tests.federation import Federation

WEIGHTS_ALONE = ["fedavg", "fedavgm"]
NEEDS_THE_MOD = [name for name in tiny.OF_ANY_MODEL if name not in WEIGHTS_ALONE and not RECIPES[name].chooses]


class ListGrid:
    """A grid as Flower's own loop uses it: replies in a list."""

    def __init__(self, grid):
        self._grid = grid

    def send_and_receive(self, messages, *, timeout=None):
        del timeout
        keys = self._grid.push_messages(list(messages))
        return self._grid.pull_messages([key for key in keys if key])

    def __getattr__(self, name):
        return getattr(self._grid, name)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def data(context):
    partition = context.node_config["partition-id"]
    draw = torch.Generator().manual_seed(partition)
    inputs = torch.randn(20 + 5 * partition, 4, generator=draw)
    return [(inputs, inputs[:, :3].argmax(1))]


def torch_app(mods=(), train_mods=()):
    """An app in the shape of Flower's quickstart."""
    app = ClientApp(mods=list(mods))

    @app.train(mods=list(train_mods))
    def train(message: Message, context: Context) -> Message:
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        ((inputs, targets),) = data(context)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        for parameter in model.parameters():
            parameter.data -= message.content["config"]["lr"] * parameter.grad
        metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(targets)})
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        ((inputs, targets),) = data(context)
        hits = (model(inputs).argmax(1) == targets).double().mean().item()
        metrics = MetricRecord({"eval_acc": hits, "num-examples": len(targets)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def numpy_app():
    """An app without torch: arrays are a list, named 0, 1, 2, ...."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        weights = message.content["arrays"].to_numpy_ndarrays()
        step = 1 + context.node_config["partition-id"]
        weights = [w + np.asarray(step, w.dtype) for w in weights]
        metrics = MetricRecord({"num-examples": 10 * step})
        content = {"arrays": ArrayRecord(weights), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        del context
        total = float(sum(w.sum() for w in message.content["arrays"].to_numpy_ndarrays()))
        metrics = MetricRecord({"total": total, "num-examples": 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def run(strategy, app, arrays, rounds=2, clients=3, **arguments):
    federation = Federation(app, {}, clients)
    arguments.setdefault("train_config", ConfigRecord({"lr": 0.1}))
    return strategy.start(federation.grid(), arrays, rounds, **arguments)


def flower(strategy, app, arrays, rounds=2, clients=3, **arguments):
    federation = Federation(app, {}, clients)
    arguments.setdefault("train_config", ConfigRecord({"lr": 0.1}))
    return strategy.start(ListGrid(federation.grid()), arrays, rounds, **arguments)


def ours(tmp_path, recipe=None, **settings):
    return FedBasin(recipe, folder=tmp_path / "runs", poll_seconds=0.01, **settings)


def close(a, b):
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_allclose(a[name].numpy(), b[name].numpy(), rtol=1e-6)


ALIGNMENTS = {
    "nothing known": {},
    "aligned by clients": {"model": net(), "example": torch.zeros(1, 4)},
    "aligned by the server": {"model": net(), "example": torch.zeros(1, 4), "align": "server"},
}


class TestAnAppWithoutTheMod:
    @pytest.mark.parametrize("known", ALIGNMENTS.values(), ids=ALIGNMENTS)
    def test_ends_where_fedavg_ends(self, tmp_path, known):
        arrays = ArrayRecord(net().state_dict())
        result = run(ours(tmp_path, **known), torch_app(), arrays)
        expected = flower(FedAvg(), torch_app(), arrays)
        close(result.arrays, expected.arrays)
        for theirs, metrics in (
            (expected.train_metrics_clientapp, result.train_metrics_clientapp),
            (expected.evaluate_metrics_clientapp, result.evaluate_metrics_clientapp),
        ):
            assert theirs.keys() == metrics.keys()
            for number in theirs:
                assert dict(metrics[number]) == pytest.approx(dict(theirs[number]))

    @pytest.mark.parametrize("recipe", WEIGHTS_ALONE)
    @pytest.mark.parametrize("known", ALIGNMENTS.values(), ids=ALIGNMENTS)
    def test_runs_with_arrays_that_have_numbers_for_names(self, tmp_path, known, recipe):
        arrays = ArrayRecord([value.numpy() for value in net().state_dict().values()])
        result = run(ours(tmp_path, recipe, **known), numpy_app(), arrays, rounds=1)
        expected = flower(FedAvg(), numpy_app(), arrays, rounds=1)
        close(result.arrays, expected.arrays)
        assert list(result.arrays) == ["0", "1", "2", "3"]

    @pytest.mark.parametrize("recipe", NEEDS_THE_MOD)
    def test_is_told_the_line_to_add_where_the_recipe_needs_more(self, tmp_path, recipe):
        arrays = ArrayRecord(net().state_dict())
        with pytest.raises(QuorumLostError, match=r"missing_mod.*basin\(model=Net, data="):
            run(ours(tmp_path, recipe, model=net()), torch_app(), arrays)

    @pytest.mark.parametrize("recipe", NEEDS_THE_MOD)
    def test_is_refused_before_the_first_message_where_the_server_lacks_the_model(self, tmp_path, recipe):
        federation = Federation(torch_app(), {}, 3)
        strategy = ours(tmp_path, recipe)
        with pytest.raises(SettingsError, match=r"pass model=Net\(\) to FedBasin"):
            strategy.start(federation.grid(), ArrayRecord(net().state_dict()))
        assert not federation.asked

    def test_cannot_begin_from_its_own_weights(self, tmp_path):
        known = {"model": net(), "example": torch.zeros(1, 4)}
        with pytest.raises(QuorumLostError, match="own initial weights"):
            run(ours(tmp_path, start="own", **known), torch_app(), ArrayRecord(net().state_dict()))

    def test_says_that_it_is_not_aligned(self, tmp_path, caplog):
        caplog.set_level(logging.INFO, "flwr.fedbasin")
        known = {"model": net(), "example": torch.zeros(1, 4)}
        run(ours(tmp_path, **known), torch_app(), ArrayRecord(net().state_dict()), rounds=1)
        assert "3 not aligned, because their apps lack the mod" in caplog.text


def test_scikit_learn_runs(tmp_path):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="pip install scikit-learn")
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        coefficients, intercept = message.content["arrays"].to_numpy_ndarrays()
        ((inputs, targets),) = data(context)
        model = linear_model.LogisticRegression(max_iter=5, warm_start=True)
        model.classes_ = np.arange(3)
        model.coef_, model.intercept_ = coefficients.copy(), intercept.copy()
        model.fit(inputs.double().numpy(), targets.numpy())
        metrics = MetricRecord({"num-examples": len(targets)})
        content = {"arrays": ArrayRecord([model.coef_, model.intercept_]), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        coefficients, intercept = message.content["arrays"].to_numpy_ndarrays()
        ((inputs, targets),) = data(context)
        scores = inputs.double().numpy() @ coefficients.T + intercept
        hits = float((scores.argmax(1) == targets.numpy()).mean())
        metrics = MetricRecord({"accuracy": hits, "num-examples": len(targets)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    arrays = ArrayRecord([np.zeros((3, 4)), np.zeros(3)])
    with warnings.catch_warnings():
        # Five steps do not converge, which is what a round of a federation wants.
        warnings.simplefilter("ignore")
        result = run(ours(tmp_path), app, arrays)
        expected = flower(FedAvg(), app, arrays)
    close(result.arrays, expected.arrays)
    assert result.evaluate_metrics_clientapp[2]["accuracy"] > 0.6


class TestAStrategyOfTheUsersOwn:
    class Halved(FedBasin):
        """Takes half of the step, and sees the replies as Flower's strategies do."""

        def aggregate_train(self, server_round, replies):
            replies = [reply for reply in replies if reply.has_content()]
            self.seen = len(replies)
            arrays, metrics = super().aggregate_train(server_round, replies[1:])
            halved = {n: Array(a.numpy() / 2) for n, a in arrays.items()}
            return ArrayRecord(halved), metrics

    class Alone(FedBasin):
        """Does without this project's sum."""

        def aggregate_train(self, server_round, replies):
            del server_round
            return next(iter(replies)).content["arrays"], MetricRecord({"mine": 1.0})

    @pytest.mark.parametrize("recipe", ["fedavg", "regmean++"])
    def test_is_given_the_arrays_themselves(self, tmp_path, recipe):
        given = []

        class Watching(FedBasin):
            def configure_train(self, server_round, arrays, config, grid):
                given.append(arrays)
                return super().configure_train(server_round, arrays, config, grid)

            def configure_evaluate(self, server_round, arrays, config, grid):
                given.append(arrays)
                return super().configure_evaluate(server_round, arrays, config, grid)

        known = {"model": net(), "example": torch.zeros(1, 4)}
        strategy = Watching(recipe, folder=tmp_path, poll_seconds=0.01, **known)
        arrays = ArrayRecord(net().state_dict())
        result = run(strategy, torch_app([basin(model=net, data=data)]), arrays)
        # A copy would be one more model in memory, and would be hashed once more.
        trained, evaluated, trained_next, evaluated_last = given
        assert trained is arrays
        assert trained_next is evaluated
        assert result.arrays is evaluated_last

    def test_may_change_what_comes_back(self, tmp_path):
        strategy = self.Halved(folder=tmp_path, poll_seconds=0.01)
        result = run(strategy, torch_app(), ArrayRecord(net().state_dict()), rounds=1)
        assert strategy.seen == 3
        plain = run(ours(tmp_path / "b"), torch_app(), ArrayRecord(net().state_dict()), rounds=1)
        norm = torch.linalg.vector_norm
        a, b = (r.arrays.to_torch_state_dict()["0.weight"] for r in (result, plain))
        assert norm(a) < 0.6 * norm(b)
        outcomes = sorted(c.outcome for c in result.reports[0].stages[0].clients)
        assert outcomes == ["accepted", "accepted", "left_out"]

    def test_may_aggregate_by_itself(self, tmp_path):
        strategy = self.Alone(folder=tmp_path, poll_seconds=0.01)
        result = run(strategy, torch_app(), ArrayRecord(net().state_dict()), rounds=2)
        assert result.train_metrics_clientapp[2]["mine"] == 1.0
        assert [r.train_metrics for r in result.reports] == [{"mine": 1.0}] * 2


WRAPPERS = {
    "client, fixed": (DifferentialPrivacyClientSideFixedClipping, fixedclipping_mod),
    "client, adaptive": (DifferentialPrivacyClientSideAdaptiveClipping, adaptiveclipping_mod),
    "server, fixed": (DifferentialPrivacyServerSideFixedClipping, None),
    "server, adaptive": (DifferentialPrivacyServerSideAdaptiveClipping, None),
}


class TestDifferentialPrivacy:
    @pytest.mark.parametrize("order", ["clipping outside", "clipping inside", "no mod of ours"])
    @pytest.mark.parametrize(("wrapper", "clipping"), WRAPPERS.values(), ids=WRAPPERS)
    def test_by_flowers_wrappers_works(self, tmp_path, wrapper, clipping, order):
        clip = [] if clipping is None else [clipping]
        mods = [] if order == "no mod of ours" else [basin(model=net, data=data)]
        train_mods = []
        if order == "clipping outside":
            mods = [*clip, *mods]
        else:
            train_mods = clip
        known = {"model": net(), "example": torch.zeros(1, 4)}
        arguments = {"noise_multiplier": 0.0, "num_sampled_clients": 3}
        if "Fixed" in wrapper.__name__:
            arguments["clipping_norm"] = 1e6
        strategy = wrapper(ours(tmp_path, **known), **arguments)
        arrays = ArrayRecord(net().state_dict())
        result = flower(strategy, torch_app(mods, train_mods), arrays, rounds=1)
        if "Fixed" in wrapper.__name__:
            expected = flower(FedAvg(), torch_app(), arrays, rounds=1)
            for name, array in expected.arrays.items():
                np.testing.assert_allclose(result.arrays[name].numpy(), array.numpy(), rtol=1e-4, atol=1e-6)
        assert any((result.arrays[n].numpy() != arrays[n].numpy()).any() for n in arrays)


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("recipe", ["fedavg", "regmean", "auto-features"])
def test_a_mod_before_or_after_ours_sees_an_ordinary_message(tmp_path, recipe, position):
    seen = []

    def spy(message: Message, context: Context, call_next):
        seen.append(list(message.content["arrays"]))
        return call_next(message, context)

    mods = [basin(model=net, data=data)]
    mods = [spy, arrays_size_mod, *mods] if position == "before" else [*mods, spy, arrays_size_mod]
    known = {"model": net(), "example": torch.zeros(1, 4)}
    run(ours(tmp_path, recipe, **known), torch_app(mods), ArrayRecord(net().state_dict()))
    assert list(net().state_dict()) in seen


def test_a_legacy_client_is_told_how_to_be_written(tmp_path):
    from flwr.client import NumPyClient

    class Legacy(NumPyClient):
        def fit(self, parameters, config):
            return parameters, 1, {}

    app = ClientApp(client_fn=lambda context: Legacy().to_client())
    with pytest.raises(QuorumLostError, match=r"legacy Client.*@app.train"):
        run(ours(tmp_path), app, ArrayRecord(net().state_dict()))


def test_a_round_in_which_nobody_is_accepted_ends_the_run_with_equal_reasons_once(tmp_path):
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("no GPU")

    with pytest.raises(QuorumLostError) as lost:
        run(ours(tmp_path), app, ArrayRecord(net().state_dict()), clients=5)
    assert str(lost.value).count("no GPU") == 1
    assert "nodes 100, 101, 102 and 2 more" in str(lost.value)
