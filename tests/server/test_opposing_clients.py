"""A client that turns its update round is named, and counts less in every stage of the round that sums clients."""

import pytest
from flwr.app import ArrayRecord

from tests import running, tiny

CLIENTS, BAD = 8, 103


def turn(message, context, call_next):
    """Send an update of the same size in the opposite direction."""
    sent = message.content["arrays"].to_torch_state_dict()
    reply = call_next(message, context)
    if context.node_id == BAD:
        trained = reply.content["model"].to_torch_state_dict()
        weights = {name: tensor.is_floating_point() and "running" not in name for name, tensor in trained.items()}
        reply.content["model"] = ArrayRecord({n: 2 * sent[n] - t if weights[n] else t for n, t in trained.items()})
    return reply


@pytest.mark.parametrize(("recipe", "stages"), [("fedavg", {"fuse"}), ("features", {"fuse", "fit"})])
def test_it_counts_less_in_every_stage(recipe, stages, tmp_path):
    federation = tiny.federation(CLIENTS, tiny.make_app(train_mods=[turn]))
    settings = {"fraction_evaluate": 0.0, "min_train_nodes": CLIENTS, "align": "off", "folder": str(tmp_path)}
    (report,) = running.run(federation, tiny.net(), 1, recipe=recipe, **settings).reports
    clients = {stage.stage: {c.node_id: c for c in stage.clients} for stage in report.stages if stage.stage in stages}
    assert set(clients) == stages
    for stage in clients.values():
        assert {client.outcome for client in stage.values()} == {"accepted"}
        assert {node for node, client in stage.items() if "points against" in client.detail} == {BAD}
        # Each client has twenty examples and its partition's number.
        assert stage[BAD].examples < 0.5 * 23
        assert stage[BAD + 1].examples == 24
