"""Federations of adapters whose clients have other alphas, ranks and scaling rules: the products mean the same."""

import pytest
import torch
from peft import get_peft_model_state_dict as saved

from fedbasin.strategies.fusion.lora.adapter_scales import SCALE, read_scales, scales_of, to_scales, with_scales
from fedbasin.strategies.fusion.lora.lora_factors import AdapterError, as_module, find_adapters
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Refusal
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.fuse import fusing_stage
from tests import adapted, running
from tests.accepting import accept
from tests.server.test_lora import Run, close, products

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# 2, 8/3 * sqrt(3), and 1/3 with rank 3: as different as clients' configurations are.
SCALINGS = {0: {}, 1: {"lora_alpha": 8, "use_rslora": True}, 2: {"lora_alpha": 1}}


class ScaledRun(Run):
    """A run whose first state has scales, and whose clients choose their own."""

    def __init__(self, folder, rounds=1, **config):
        self.app = adapted.make_app(rank=config.pop("rank", lambda node: adapted.RANK), scaling=SCALINGS.__getitem__)
        self.federation = adapted.federation(app=self.app, folder=str(folder), **config)
        model = adapted.model()
        self.start = as_module(with_scales(model, saved(model)))
        self.result = running.run(self.federation, self.start, rounds)
        self.model = self.result.state_dict


def changes(state, scales):
    """The change of each weight: scale times product."""
    return {a.down: float(scales[a.down]) * product for a, product in products(state).items()}


def scales_by_adapter(node):
    net = adapted.model(**SCALINGS[node])
    return {
        a.down: read_scales(net, [name])[name]
        for a in find_adapters(saved(net))
        for name in [a.down.rpartition(".lora_")[0] + SCALE]
    }


@pytest.mark.parametrize("recipe", ["lora-factors", "lora"])
def test_every_recipe_takes_clients_of_other_scales_and_keeps_its_own(tmp_path, recipe):
    run = ScaledRun(tmp_path, recipe=recipe)
    assert run.outcomes() == dict.fromkeys((100, 101, 102), "accepted")
    assert scales_of(run.model).keys() == scales_of(run.start.state_dict()).keys()
    assert {float(scale) for scale in scales_of(run.model).values()} == {2.0}


def test_products_of_clients_with_other_scales_are_averaged_exactly(tmp_path):
    run = ScaledRun(tmp_path, recipe="lora-products")
    fused = changes(run.model, scales_by_adapter(0))
    for name, change in fused.items():
        mean = expected(run, name)
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        close(change, u[:, : adapted.RANK] * s[: adapted.RANK] @ v[: adapted.RANK])


def expected(run, name):
    total, weight = 0.0, 0
    for node, state in run.app.sent.items():
        examples = len(adapted.examples(node)[1])
        total = total + examples * changes(state, scales_by_adapter(node))[name].double()
        weight += examples
    return (total / weight).float()


def test_a_client_starts_from_the_global_change(tmp_path):
    app_state = {}
    run = ScaledRun(tmp_path, 1, recipe="lora-products")
    anchor = run.model
    for node in (0, 1, 2):
        net = adapted.model(**SCALINGS[node])
        state = to_scales(anchor, read_scales(net, scales_of(anchor)))
        app_state[node] = changes(state, scales_by_adapter(node))
    for name, change in app_state[0].items():
        close(app_state[1][name], change)
        close(app_state[2][name], change)


def test_a_frozen_factor_keeps_its_bits(tmp_path):
    run = ScaledRun(tmp_path, 2, recipe="lorm")
    for number in (1, 2):
        assert run.outcomes(number) == dict.fromkeys((100, 101, 102), "accepted")


def anchor_state():
    net = adapted.model()
    state = {name: tensor.clone() for name, tensor in saved(net).items()}
    for adapter in find_adapters(state):
        state[adapter.up] = torch.randn(state[adapter.up].shape, generator=torch.Generator().manual_seed(1))
    return with_scales(net, state)


def test_a_client_without_the_mod_is_rescaled_by_the_scale_that_it_sends():
    anchor = anchor_state()
    stage = fusing_stage(anchor, RECIPES["lora-products"], adapted_request(), None, "off")
    sent = to_scales(anchor, {name: scale * 5 for name, scale in scales_of(anchor).items()})
    accept(stage, 1, Update(sent, 10.0))
    for adapter, product in products(stage.finish()).items():
        close(product, anchor[adapter.up] @ anchor[adapter.down])


def adapted_request():
    from fedbasin.proto.request import Request

    return Request(1, "fuse", {})


def test_scales_that_are_missing_or_not_positive_are_refused():
    anchor = anchor_state()
    stage = fusing_stage(anchor, RECIPES["lora-products"], adapted_request(), None, "off")
    name = next(iter(scales_of(anchor)))
    with pytest.raises(Refusal, match="lora_scale"):
        accept(stage, 1, Update({key: t for key, t in anchor.items() if key != name}, 10.0))
    with pytest.raises(Refusal, match="lora_scale"):
        accept(stage, 1, Update({**anchor, name: torch.tensor(-1.0)}, 10.0))
    with pytest.raises(AdapterError, match="no adapter with a scale there"):
        read_scales(torch.nn.Linear(2, 2), [name])
