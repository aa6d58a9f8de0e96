"""The first message of a run, to one client, before all are asked to train.

The mod answers it without the app: that it is there, and that it can read the data that the recipe needs. An app
without the mod evaluates the initial model. So it is known before the training whether the mod is missing where it is
needed, whether its data is unreadable, and whether the app has a function that evaluates.
"""

from dataclasses import replace
from functools import partial

from flwr.app import ConfigRecord
from torch import Tensor

from fedbasin.proto.layer_graph import LayerGraph
from fedbasin.proto.request import CHECK, Request
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.exchange.stage_attempt import StageAttempt
from fedbasin.server.exchange.streaming_grid import StreamingGrid
from fedbasin.server.run.averaging import reason_of_client
from fedbasin.server.run.run_state import RunState
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.checks import check_layer_graph
from fedbasin.strategies.judging.outcomes import Outcome
from fedbasin.strategies.round.stage import Checked
from fedbasin.strategies.tensors.state import State

# Whoever takes longer evaluates much; the run begins without the answer.
PATIENCE_SECONDS = 60.0

# Errors of the mod that every client of the app has.
_PREVENTING = ("UnreadableDataError", "MissingDataError", "TaskError")


class Check:
    """A stage that asks a client whether it can take part."""

    layer_graph: LayerGraph | None = None
    average = None
    notes: tuple[str, ...] = ()

    def __init__(self, model: State, needs: Request) -> None:
        """Compose the request.

        Args:
            model: the initial model.
            needs: what clients will be asked for beside training.
        """
        self._model = model
        self.request = replace(needs, stage=CHECK, kind="evaluate")

    def check(self, update: Update) -> Checked:
        """Take any reply whose layers, if it has some, are the model's."""
        if update.layer_graph is not None:
            check_layer_graph(update.layer_graph, self._model)
        return Checked(update)

    def add(self, node: int, update: Update) -> None:  # noqa: ARG002 - one client is asked at a time
        """Take the layers that the client reports."""
        self.layer_graph = update.layer_graph

    def finish(self) -> dict[str, Tensor]:
        return dict(self._model)


def ask_first(
    state: RunState, grid: StreamingGrid, model: State, digest: bytes, config: ConfigRecord, number: int
) -> None:
    """Ask one client, and a second where it fails, whether it can take part, before all are asked to train.

    Where the recipe compares models and the client's app shows that nothing can be compared, the run only averages.

    Args:
        state: the state of the run.
        grid: the grid.
        model: the global model.
        digest: its digest.
        config: the app's own settings for its clients.
        number: number of the round that follows.

    Raises:
        QuorumLostError: no client of the app can take part.
    """
    settings, composition = state.settings, state.composition
    timeout = min(composition.limits.timeout_seconds, PATIENCE_SECONDS)
    limits = replace(composition.limits, timeout_seconds=timeout, quorum=1.0, attempts=1)
    make = partial(Check, model, composition.needs(number, state.recipe))
    # Two of those that will evaluate the round's model in any case.
    nodes = state.sample(grid, number, settings.fraction_evaluate, settings.min_evaluate_nodes)[:2]
    for node in nodes:
        attempt = StageAttempt(make, model, [node], state.round_context(0, config), limits, digest=digest)
        attempt.add_all(grid.stream(attempt.messages, limits.timeout_seconds))
        (client,) = attempt.report().clients
        if client.is_accepted:
            recipe = composition.recipe
            if recipe.chooses and (reason := reason_of_client(client, attempt.stage.layer_graph, recipe, model)):
                state.average(reason, steps=attempt.stage.layer_graph is not None)
            return
        state.note(attempt.report(), number)
        if client.outcome == Outcome.timeout.name:
            return  # nothing is known, and the training does not wait longer for it
        state.exclude_from_evaluation(attempt.report())
    if prevents_training(client.outcome, client.detail):
        raise QuorumLostError(attempt.report(), attempt.needed, len(nodes))


def prevents_training(outcome: str, detail: str) -> bool:
    """Return whether a client that answers so cannot be part of any round."""
    return outcome == Outcome.missing_mod.name or any(error in detail for error in _PREVENTING)
