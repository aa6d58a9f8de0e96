"""Adapters of a tiny transformer over a federation in this process: only they travel, by every recipe."""

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from peft import LoraConfig, get_peft_model
from peft import get_peft_model_state_dict as saved
from torch import nn

from fedbasin.client import basin
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.header import read_header
from fedbasin.proto.request import Request
from fedbasin.server.run.settings import SettingsError
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.fusion.lora.lora_factors import as_module, find_adapters
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Refusal
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.fuse import fusing_stage
from tests import adapted, running, tiny
from tests.accepting import accept
from tests.server.fake_grid import ListGrid

# peft asks transformers under a name that the latter is about to drop.
# It also takes a bias, which has one axis, for a factor of which a part is missing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape"),
]

ADAPTING = [name for name, recipe in RECIPES.items() if recipe.lora]
COMPARING = [name for name in ADAPTING if RECIPES[name].compares]


class Run:
    def __init__(self, folder, rounds=1, app=None, rank=adapted.RANK, tamper=None, **config):
        self.app = app or adapted.make_app()
        self.federation = adapted.federation(app=self.app, folder=str(folder), tamper=tamper, **config)
        self.start = adapted.server_model(rank)
        self.result = running.run(self.federation, self.start, rounds)
        self.model = self.result.state_dict

    def outcomes(self, number=1):
        stage = next(s for s in self.result.reports[number - 1].stages if s.stage == "fuse")
        return {client.node_id: client.outcome for client in stage.clients}

    def mean(self, of):
        weights = {node: len(adapted.examples(node)[1]) for node in self.app.sent}
        total = sum(weights[node] * of(state).double() for node, state in self.app.sent.items())
        return (total / sum(weights.values())).float()


def products(state):
    return {a: state[a.up] @ state[a.down] for a in find_adapters(state)}


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("recipe", ADAPTING)
def test_adapters_travel_alone_and_every_recipe_learns(tmp_path, recipe):
    run = Run(tmp_path, 2, recipe=recipe)
    assert list(run.model) == list(saved(adapted.model()))
    for number in (1, 2):
        assert run.outcomes(number) == dict.fromkeys((100, 101, 102), "accepted")
    net = adapted.model()
    before = score(net)
    adapted.load(net, run.model)
    assert score(net) < before
    close(run.model["base_model.model.classifier.bias"], run.mean(lambda s: s["base_model.model.classifier.bias"]))  # fmt: skip


def score(net):
    inputs, targets = adapted.examples(50)
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(net.eval()(**inputs).logits, targets)


def test_products_are_averaged_and_factors_are_not(tmp_path):
    run = Run(tmp_path, recipe="lora-products")
    for adapter, found in products(run.model).items():
        mean = run.mean(lambda state, a=adapter: products(state)[a])
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        rank = adapted.RANK
        close(found, u[:, :rank] * s[:rank] @ v[:rank])
    factors = Run(tmp_path / "factors", recipe="lora-factors")
    for name, found in factors.model.items():
        close(found, factors.mean(lambda state, n=name: state[n]))


def test_clients_of_smaller_ranks_take_part(tmp_path):
    run = Run(tmp_path, 2, app=adapted.make_app(rank=lambda node: 1 + node), recipe="lora-products")
    assert run.outcomes(2) == dict.fromkeys((100, 101, 102), "accepted")
    assert {len(s[a.down]) for s in run.app.sent.values() for a in find_adapters(s)} == {1, 2, 3}
    for adapter, found in products(run.model).items():
        mean = run.mean(lambda state, a=adapter: products(state)[a])
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        close(found, u[:, :3] * s[:3] @ v[:3])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("recipe", [name for name in ADAPTING if name not in COMPARING])
def test_flowers_own_loop_gives_what_the_server_gives(tmp_path, recipe, packed):
    expected = Run(tmp_path, 2, recipe=recipe).model
    federation = adapted.federation()
    strategy = FedBasin(recipe, packed=packed, fraction_evaluate=0.0, min_available_nodes=3, min_train_nodes=3)
    start = ArrayRecord(adapted.server_model().state_dict())
    grid = ListGrid(federation.contexts, federation.answer)
    found = Strategy.start(strategy, grid, start, 2).arrays.to_torch_state_dict()
    assert strategy.refusals == {}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


class OwnMethods(FedBasin):
    """A strategy with a method of its own, which further stages would pass by."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, replies)


@pytest.mark.parametrize("recipe", COMPARING)
def test_the_mean_weighted_by_inputs_is_taken_where_clients_are_asked_once_a_round(tmp_path, recipe, caplog):
    how = {"fraction_evaluate": 0.0, "min_available_nodes": 3, "min_train_nodes": 3}
    ends = []
    for strategy, start in (
        (FedBasin(recipe, **how), Strategy.start),
        (OwnMethods(recipe, **how, folder=tmp_path), FedBasin.start),
    ):
        federation = adapted.federation()
        grid = ListGrid(federation.contexts, federation.answer)
        result = start(strategy, grid, ArrayRecord(adapted.server_model().state_dict()), 2)
        ends.append(result.arrays.to_torch_state_dict())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-6, rtol=1e-6)
    reasons = [record.getMessage() for record in caplog.records if "compares no models" in record.getMessage()]
    assert ["once a round" in reasons[0], "own configure_train" in reasons[1]] == [True, True]


@pytest.mark.parametrize("recipe", COMPARING)
def test_clients_choose_between_two_means_of_the_products(tmp_path, recipe):
    run = Run(tmp_path, 3, recipe=recipe)
    for report in run.result.reports:
        assert [stage.stage for stage in report.stages] == ["fuse", "probe", "probe"]
        assert all(client.is_accepted for stage in report.stages for client in stage.clients)
        assert report.choice.loss <= report.choice.average_loss
        assert (report.choice.trained_on, report.choice.pause) == ("products", 0)
    losses = [report.choice.loss for report in run.result.reports]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


@pytest.mark.parametrize("recipe", ["lora-factors", "lora-rotated", "lora-gram", "lora"])
def test_smaller_ranks_are_taken_by_every_recipe_that_can(tmp_path, recipe):
    run = Run(tmp_path, 2, app=adapted.make_app(rank=lambda node: 1 + node), recipe=recipe)
    assert run.outcomes(2) == dict.fromkeys((100, 101, 102), "accepted")


def test_a_rank_above_the_servers_is_refused_by_name():
    anchor = adapted.server_model(2).state_dict()
    wide = saved(adapted.model(3))
    stage = fusing_stage(anchor, RECIPES["lora"], Request(""), None, "off")
    with pytest.raises(Refusal, match=r"wrong_shape: .*lora_embedding_A is \(3, 12\)"):
        accept(stage, 1, Update(wide, 5.0))
    assert all(torch.equal(stage.finish()[name], tensor) for name, tensor in anchor.items())


def test_factors_turn_to_the_anchors_where_that_is_asked(tmp_path):
    run = Run(tmp_path, 2, recipe="lora-rotated")
    stage = run.result.reports[1].stages[0]
    spaces = [space for client in stage.clients for space in client.alignment.spaces]
    assert len(spaces) == 3 * len(find_adapters(run.model))
    assert all(c.alignment.distance_after <= c.alignment.distance_before for c in stage.clients)


def test_one_factor_is_frozen_in_every_round_of_lorm_and_stays_bit_by_bit(tmp_path):
    run = Run(tmp_path, recipe="lorm")
    assert [config["frozen-factor"] for config in run.app.configs] == 3 * ["lora_A"]
    begun = run.start.state_dict()
    for adapter in find_adapters(begun):
        assert torch.equal(run.model[adapter.down], begun[adapter.down])
        assert not torch.equal(run.model[adapter.up], begun[adapter.up])
    longer = Run(tmp_path / "longer", 2, recipe="lorm")
    for adapter in find_adapters(begun):
        assert torch.equal(longer.model[adapter.up], run.model[adapter.up])
        assert not torch.equal(longer.model[adapter.down], run.model[adapter.down])


def test_whoever_trains_a_frozen_factor_is_refused_by_name(tmp_path):
    app = adapted.make_app(ignores_frozen=(1,))
    run = Run(tmp_path, app=app, recipe="lorm")
    assert run.outcomes() == {100: "accepted", 101: "frozen_changed", 102: "accepted"}


@pytest.mark.parametrize(("recipe", "sides"), [("lora-gram", [{16}]), ("lorm", [{3}, {16}])])
def test_statistics_are_of_the_adapters_inputs_alone(tmp_path, recipe, sides):
    seen = []

    def spy(reply):
        header = read_header(reply.content, pb.Reply())
        own = [entry for entry in header.statistics if not entry.HasField("same")]
        triangles = [entry.pieces[0].shape[-1] for entry in own]
        seen.append({int((8 * n + 1) ** 0.5 // 2) for n in triangles})
        return reply

    Run(tmp_path, 2, recipe=recipe, tamper={100: spy})
    assert [sides for sides in seen if sides] == (sides if len(sides) == 2 else 2 * sides)


def biased():
    """A small network with adapters whose factor B has a bias."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return get_peft_model(net, LoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"], lora_bias=True))


def biased_app():
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    app = ClientApp(mods=[basin(model=biased, data=[(inputs, inputs[:, :3].argmax(1))])])

    @app.train()
    def train(message, context):
        frozen = message.content["config"].get("frozen-factor", "none")
        state = message.content["arrays"].to_torch_state_dict()
        draw = torch.Generator().manual_seed(2)
        app.sent = {n: t + (frozen not in n) * 0.3 * torch.randn(t.shape, generator=draw) for n, t in state.items()}
        content = {"arrays": ArrayRecord(app.sent), "metrics": MetricRecord({"num-examples": 20})}
        return Message(RecordDict(content), reply_to=message)

    return app


@pytest.mark.parametrize("recipe", ADAPTING)
def test_equal_adapters_with_biases_give_that_adapter(tmp_path, recipe):
    app = biased_app()
    federation = adapted.federation(app=app, folder=str(tmp_path), recipe=recipe)
    result = running.run(federation, as_module(saved(biased())), 1)
    assert {c.outcome for s in result.reports[0].stages for c in s.clients} == {"accepted"}
    for adapter, product in products(result.state_dict).items():
        close(product, app.sent[adapter.up] @ app.sent[adapter.down])
        bias = f"{adapter.up.removesuffix('weight')}bias"
        close(result.state_dict[bias], app.sent[bias])


def test_a_model_of_peft_beside_its_adapters_is_told_how_to_be_passed(tmp_path):
    model = biased()
    strategy = FedBasin(model=model, recipe="lora", folder=tmp_path)
    with pytest.raises(SettingsError, match=r"where adapters alone travel, pass FedBasin\(model=as_module\(state\)\)"):
        strategy.start(adapted.federation().grid(), ArrayRecord(dict(saved(model))), 1)


def test_own_starts_keep_the_base_at_home(tmp_path):
    run = Run(tmp_path, recipe="lora", start="own")
    assert list(run.model) == list(saved(adapted.model()))


def test_paths_run_through_the_whole_model(tmp_path):
    run = Run(tmp_path, recipe="lora", barrier_points=3, fused_points=3, fraction_evaluate=1.0)
    assert run.result.reports[0].path.examples == 24 + 25 + 26


@pytest.mark.parametrize("recipe", ADAPTING)
def test_a_model_without_adapters_is_refused_before_the_first_message(tmp_path, recipe):
    federation = tiny.federation(recipe=recipe, folder=str(tmp_path))
    with pytest.raises(SettingsError, match="no tensor named lora_A"):
        running.run(federation, tiny.net())
    assert not federation.asked


def test_factors_that_are_to_be_turned_need_somebody_to_turn_them(tmp_path):
    with pytest.raises(SettingsError, match="choose the recipe lora-factors"):
        Run(tmp_path, recipe="lora-rotated", align="off")


def test_statistics_of_adapters_keep_to_a_budget(tmp_path):
    run = Run(tmp_path, recipe="lora-gram", statistics_budget_bytes=500)
    stage = run.result.reports[0].stages[0]
    assert set(stage.encodings) == {(a.down,) for a in find_adapters(run.model) if a.is_linear}
    assert run.outcomes() == dict.fromkeys((100, 101, 102), "accepted")
