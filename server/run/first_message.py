"""The first message of a run, to one client, before all are asked to train.

The mod answers it without the app: that it is there, and that it can read the data that the recipe needs. An app
without the mod evaluates the initial model. So it is known before the training whether the mod is missing where it is
needed, whether its data is unreadable, and whether the app has a function that evaluates.
"""

from dataclasses import replace

from torch import Tensor

from fedbasin.proto.request import CHECK, Request
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Outcome
from fedbasin.strategies.round.stage import Checked
from fedbasin.strategies.tensors.state import State

# Whoever takes longer evaluates much; the run begins without the answer.
PATIENCE_SECONDS = 60.0


class Check:
    """A stage that asks a client whether it can take part."""

    layer_graph = None
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
        """Take any reply."""
        return Checked(update)

    def add(self, node: int, update: Update) -> None:
        """Sum nothing."""

    def finish(self) -> dict[str, Tensor]:
        return dict(self._model)


def prevents_training(outcome: str, detail: str) -> bool:
    """Return whether a client that answers so cannot be part of any round."""
    return outcome == Outcome.missing_mod.name or "UnreadableDataError" in detail or "MissingDataError" in detail
