"""The recipe kfac: a whole run of a federation in this process, and how many clients a round can keep."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedbasin.proto.request import Request
from fedbasin.server.run.settings import Settings, SettingsError, read_settings
from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.kronecker_precision import MOST_PRODUCTS, Kronecker
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.fuse import fusing_stage
from fedbasin.strategies.statistics.kronecker_factors import kronecker_factors
from tests import running, tiny
from tests.accepting import accept

KFAC = RECIPES["kfac"]
LAYER = ("0.weight", "0.bias")


def test_a_federation_runs_and_its_model_is_better_than_where_it_began(tmp_path):
    federation = tiny.federation(recipe="kfac", align="client", folder=str(tmp_path))
    result = running.run(federation, tiny.net(), 3, symmetry=tiny.symmetry())
    outcomes = {c.outcome for r in result.reports for s in r.stages for c in s.clients}
    assert outcomes == {"accepted"}
    losses = [mean_loss(state) for state in (tiny.net().state_dict(), result.state_dict)]
    assert losses[1] < 0.8 * losses[0]


def mean_loss(state):
    model = tiny.net().eval()
    model.load_state_dict(state)
    data = [tiny.examples(context) for context in tiny.federation().contexts.values()]
    losses = [cross_entropy(model(x), y).item() for x, y in data]
    return sum(losses) / len(losses)


def test_what_clients_send_is_fused_to_what_their_own_factors_give():
    anchor = tiny.net().state_dict()
    models = [tiny.net(seed) for seed in (1, 2)]
    data = [tiny.examples(context) for context in tiny.federation(2).contexts.values()]
    fuse = fusing_stage(anchor, KFAC, Request(""), None, "off")
    direct = Accumulator.zero(anchor)
    for node, (model, batch) in enumerate(zip(models, data, strict=True)):
        factors = kronecker_factors(model, [batch])
        precisions = {b: Kronecker(f.inputs[None], f.outputs[None]) for b, f in factors.items()}
        update = Update(model.state_dict(), float(len(batch[1])), precisions)
        accept(fuse, node, update)
        direct.add(update)
    assert set(direct.blocks) == {LAYER, ("3.weight", "3.bias")}
    expected = direct.finalize(anchor, KFAC.weighting.ridge)
    for name, tensor in fuse.finish().items():
        assert torch.equal(tensor, expected[name])


def test_clients_beyond_what_a_round_keeps_are_refused_and_the_others_stand():
    anchor = tiny.net().state_dict()
    fuse = fusing_stage(anchor, KFAC, Request(""), None, "off", [LAYER])
    one = {LAYER: Kronecker(torch.eye(5)[None], torch.eye(6)[None])}
    for node in range(MOST_PRODUCTS):
        accept(fuse, node, Update(anchor, 1.0, one))
    with pytest.raises(Refusal, match="fraction-train") as refused:
        accept(fuse, MOST_PRODUCTS, Update(anchor, 1.0, one))
    assert refused.value.outcome is Outcome.too_many
    torch.testing.assert_close(fuse.finish(), anchor)


def test_a_server_cannot_align_what_was_collected_on_the_client():
    with pytest.raises(SettingsError, match="Kronecker factors are collected on the aligned model"):
        read_settings({"fedbasin.recipe": "kfac", "fedbasin.align": "server"})
    assert Settings(recipe="kfac").composed.statistic is KFAC.statistic
