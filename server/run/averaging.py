"""Why a run whose recipe compares models averages them and does nothing else: what is missing, and what to add.

The mean is what `FedAvg` would give, to the bit, so a recipe that compares takes every app that `FedAvg` takes.
"""

from torch import nn

from fedbasin.proto.layer_graph import LayerGraph
from fedbasin.proto.report import ClientReport
from fedbasin.server.exchange.stage_attempt import CANNOT_REPORT, LACKS_MOD
from fedbasin.server.run.settings import Settings
from fedbasin.strategies.fusion.lora.lora_factors import adapter_pairs
from fedbasin.strategies.recipes import HeadRefit, Recipe
from fedbasin.strategies.round.fit_plan import left_out
from fedbasin.strategies.round.stage import StageResult
from fedbasin.strategies.tensors.state import State

FLOWERS_LOOP = "Flower's own loop and its wrappers ask clients once a round; run it with FedBasin.start"
OWN_METHODS = (
    "this subclass of FedBasin has its own configure_train or aggregate_train, which further stages would pass by; "
    "name a recipe that is to follow them, as recipe='head', or override neither"
)
NO_JUDGES = (
    "rounds go no farther than the mean of the clients' models: no client keeps examples that its app does not train on; pass "
    "held_out=... to basin, as the batches that the app evaluates on"
)
_MOD = "from fedbasin import basin; app = ClientApp(mods=[basin(model=Net, data=train_batches)])"


def reason_before(settings: Settings, model: nn.Module | None, state: State) -> str:
    """Return what keeps a run from comparing models, as far as the server knows before its first message.

    Args:
        settings: the settings of the run.
        model: the app's model, if it is known.
        state: the initial model.

    Returns:
        the reason, with the remedy; empty where there is none.
    """
    if settings.rule.strip():
        return f"rule = {settings.rule!r} takes the place of the mean that others would be compared with; leave it out"
    if settings.merge != "star":
        return f"merge = {settings.merge!r} merges models in pairs; set merge = 'star'"
    if settings.align == "server":
        return "align = 'server': only a client can fit layers to its aligned model; set align = 'client'"
    if adapter_pairs(state):
        return "the arrays hold low-rank adapters; set recipe = 'lora', which fuses their products"
    return "" if model is not None else "the server does not know the layers; pass model=Net() to FedBasin"


def reason_of_client(client: ClientReport, layer_graph: LayerGraph | None, recipe: Recipe, model: State) -> str:
    """Return what keeps a client's app from comparing models; empty where there is nothing.

    Args:
        client: report of the client's reply.
        layer_graph: the layers that it has reported; None for none.
        recipe: the recipe.
        model: the global model.
    """
    if layer_graph is None:
        remedy = f"; add to the client: {_MOD}" if LACKS_MOD in client.detail else ""
        return f"node {client.node_id} {client.detail}{remedy}"
    if not isinstance(recipe.refit, HeadRefit):
        return ""  # what can be fitted is compared
    lacking = left_out(recipe.refit, layer_graph, model)
    return f"the clients' model has no {lacking.removeprefix('a ')}" if lacking else ""


def reason_of_round(fused: StageResult, lacking: str) -> str:
    """Return why a round has left out a part of its recipe.

    Args:
        fused: the result of the stage in which clients trained.
        lacking: what the round lacked.
    """
    silent = _without_layers(fused)
    if silent:
        remedy = f"; add to the client: {_MOD}" if LACKS_MOD in silent[0].detail else ""
        return f"{len(silent)} of {len(fused.nodes)} clients, as node {silent[0].node_id}: {silent[0].detail}{remedy}"
    return f"the clients' model has no {lacking.removeprefix('a ')}"


def is_lasting(fused: StageResult) -> bool:
    """Return whether the next rounds will lack the same; where only some clients are at fault, others may be asked."""
    return len(_without_layers(fused)) in (0, len(fused.nodes))


def _without_layers(fused: StageResult) -> list[ClientReport]:
    return [client for client in fused.report.accepted if CANNOT_REPORT in client.detail]
