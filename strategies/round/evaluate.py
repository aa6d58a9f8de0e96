"""Federated evaluation of a model, and of the path from it to the models that the clients sent."""

from torch import Tensor

from fedbasin.proto.request import Request
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.checks import check_examples
from fedbasin.strategies.round.stage import Checked
from fedbasin.strategies.tensors.state import State


class Evaluate:
    """A stage in which clients evaluate a model with the app's own function.

    Metrics and sums come back. A client that has lost the model that it sent leaves the path out.
    """

    stage = "evaluate"
    layer_graph = None
    average = None
    notes: tuple[str, ...] = ()

    def __init__(self, model: State, path_points: int = 0) -> None:
        self.request = Request(self.stage, "evaluate", path_points=path_points)
        self._model = model

    def check(self, update: Update) -> Checked:
        check_examples(update.examples)
        return Checked(update)

    def add(self, node: int, update: Update) -> None:
        """Nothing is summed here."""

    def finish(self) -> dict[str, Tensor]:
        return dict(self._model)
