"""Rounds that merge in pairs, over a federation in this process."""

import pytest
import torch
from flwr.app import Error, Message
from torch.func import functional_call

from fedbasin.proto.request import Request
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.run.settings import SettingsError, read_settings
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.bootstrap import Bootstrap
from fedbasin.strategies.round.fuse import fusing_stage
from fedbasin.strategies.tensors.state import MEASURED, floating
from tests import running, tiny
from tests.accepting import accept
from tests.server.fake_grid import FakeGrid
from tests.strategies.symmetry.by_hand.residual_rotation import rotating_residual_transformer
from tests.strategies.symmetry.families import Transformer

CLIENTS = 4
NODES = [100, 101, 102, 103]
OWN = {"start": "own", "align": "client"}


def run(folder, tamper=None, rounds=1, fails=lambda node, stage: False, **config):
    app = tiny.make_app()
    settings = OWN | {"folder": str(folder), "quorum": 0.25} | config
    federation = tiny.federation(CLIENTS, app, tamper, **settings)
    federation.links = []

    def answer(message):
        # Before the mod makes an ordinary message of it.
        request = Request.from_message(message.content)
        if request.stage == "link":
            federation.links.append((message.metadata.dst_node_id, request))
        if fails(message.metadata.dst_node_id, request.stage):
            return Message(Error(2, "out of memory"), reply_to=message)
        return federation.answer(message)

    grid = FakeGrid(federation.contexts, answer)
    result = running.run(federation, tiny.net(), rounds, grid=grid, symmetry=tiny.symmetry())
    return result, federation


def own_models(folder):
    """Return what each client trains to; nothing is aligned yet."""
    models = {}

    def keep(node):
        def seen(reply):
            # The first reply that has a model is that of the training.
            if node not in models and "arrays" in reply.content:
                models[node] = reply.content["arrays"].to_torch_state_dict()
            return reply

        return seen

    run(folder, {node: keep(node) for node in NODES}, merge="chain")
    return models


def test_a_chain_is_the_mean_of_models_aligned_to_all_before_them(tmp_path):
    own = own_models(tmp_path / "own")
    result, federation = run(tmp_path / "run", merge="chain")
    merged, examples = own[100], 20.0
    for index, node in enumerate(NODES[1:], start=1):
        count = 20.0 + index
        found = match_weights(tiny.symmetry(), merged, own[node]).state
        share = count / (examples + count)
        merged = {n: torch.lerp(merged[n], found[n], share) for n in floating(merged)}
        examples += count
    # Running statistics are measured anew on the merged model.
    for name in (name for name in merged if not name.endswith(MEASURED)):
        torch.testing.assert_close(result.state_dict[name], merged[name], atol=1e-5, rtol=1e-5)
    assert [node for node, _ in federation.links] == NODES
    assert [request.merged_examples for _, request in federation.links] == [0, 20, 41, 63]
    assert [request.aligns for _, request in federation.links] == [False, True, True, True]


def test_every_client_trains_once_and_all_at_the_same_time(tmp_path):
    result, federation = run(tmp_path, merge="chain")
    assert sorted(federation.app.trained) == [(node, 1) for node in NODES]
    stages = [stage.stage for stage in result.reports[0].stages]
    assert stages == ["fuse", "link", "link", "link", "link", "measure", "evaluate"]
    assert not any(context.state for context in federation.contexts.values())


def test_a_tree_lets_a_client_align_the_merge_that_it_is_in(tmp_path):
    result, federation = run(tmp_path, merge="tree")
    asked = federation.links
    assert [node for node, _ in asked] == [100, 101, 102, 103, 102]
    assert [bool(request.moving) for _, request in asked] == [False] * 4 + [True]
    assert asked[-1][1].moving_examples == 22 + 23
    assert asked[-1][1].merged_examples == 20 + 21
    assert result.reports[0].metrics["accuracy"] > 0


@pytest.mark.parametrize("merge", ["chain", "tree"])
def test_a_client_that_fails_is_named_and_left_out(tmp_path, merge):
    result, _ = run(tmp_path, fails=lambda node, stage: (node, stage) == (101, "link"), merge=merge)
    (report,) = result.reports
    failed = [
        (client.node_id, client.outcome)
        for stage in report.stages
        for client in stage.clients
        if client.outcome != "accepted"
    ]
    assert failed == [(101, "client_error")]
    assert not report.problem


def test_a_chain_without_a_client_is_the_chain_of_the_others(tmp_path):
    result, _ = run(tmp_path, fails=lambda node, stage: node == 101 and stage != "fuse", merge="chain")
    without, _ = run(tmp_path / "without", fails=lambda node, stage: node == 101, merge="chain")
    torch.testing.assert_close(result.state_dict, without.state_dict, atol=1e-6, rtol=1e-6)


def test_where_nobody_can_link_the_round_is_the_mean(tmp_path):
    result, _ = run(tmp_path / "links", fails=lambda node, stage: stage == "link", merge="chain")
    mean, _ = run(tmp_path / "mean", align="off")
    torch.testing.assert_close(result.state_dict, mean.state_dict, rtol=0, atol=0)


def test_a_round_without_a_quorum_still_fails(tmp_path):
    with pytest.raises(QuorumLostError, match="stage fuse"):
        run(tmp_path, fails=lambda node, stage: True, merge="chain")


def test_only_the_round_of_own_starts_is_linked(tmp_path):
    result, _ = run(tmp_path, rounds=2, merge="chain")
    assert [stage.stage for stage in result.reports[1].stages] == ["fuse", "evaluate"]


def test_clients_learn_how_to_align_themselves_and_a_merge(tmp_path):
    result, _ = run(tmp_path, merge="tree", matcher="learned", barrier_points=2)
    outcomes = {client.outcome for stage in result.reports[0].stages for client in stage.clients}
    assert outcomes == {"accepted"}
    assert result.reports[0].metrics["accuracy"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge": "chain"}, "set start = 'own' and align = 'client'"),
        ({"merge": "tree", "start": "own", "align": "server"}, "which clients align"),
        ({"merge": "tree", "start": "own", "recipe": "regmean"}, "no statistics"),
        ({"merge": "chain", "start": "own", "fused-points": 3}, "set fused-points = 0"),
        ({"matcher": "learned", "align": "server"}, "only clients have the data"),
    ],
)
def test_what_pairs_cannot_do_is_refused_before_work_starts(settings, message):
    with pytest.raises(SettingsError, match=message):
        read_settings({f"fedbasin.{name}": value for name, value in settings.items()})


def turning():
    state = Small().state_dict()
    return rotating_residual_transformer(state, heads=2)


class Small(Transformer):
    def __init__(self):
        super().__init__(width=8, heads=2)


def test_statistics_are_not_to_follow_a_folded_norm_on_the_server(tmp_path):
    federation = tiny.federation(align="server", recipe="regmean", folder=str(tmp_path))
    with pytest.raises(SettingsError, match="folds norms into the layers that read"):
        running.run(federation, Small(), symmetry=turning())


def test_a_server_that_aligns_folds_each_update_first():
    torch.manual_seed(0)
    anchor, client = Small().state_dict(), Small().state_dict()
    for name, tensor in client.items():
        client[name] = tensor + 0.1 * torch.randn(tensor.shape)
    stage = fusing_stage(anchor, RECIPES["fedavg"], Request(""), turning(), "server")
    accept(stage, 1, Update(client, 1.0, {}))
    images = torch.randn(3, 8, 8)
    before, after = (functional_call(Small(), s, (images,)) for s in (client, stage.finish()))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)


def test_the_model_that_is_bootstrapped_is_folded():
    client = {name: 1.5 * tensor for name, tensor in Small().state_dict().items()}
    stage = Bootstrap(Small().state_dict(), symmetry=turning())
    accept(stage, 1, Update(client, 1.0, {}))
    assert torch.equal(stage.finish()["final_norm.weight"], torch.ones(8))
