"""The search for an anchor among clients that never shared an initial model: a random global model is no anchor."""

import math
from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor

from fedbasin.proto.request import Request, Start
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.checks import check_update
from fedbasin.strategies.round.stage import Checked
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State

Choice = Literal["first", "largest", "medoid", "best"]


class Bootstrap:
    """A stage in which clients train from their own initial weights, and one client's model becomes the anchor.

    `first` takes the client with the lowest node id; `largest` the one with most examples; `medoid` the one that is
    closest to all others after aligning every pair; `best` the one with the lowest score.
    """

    stage = "bootstrap"
    layer_graph = None
    average = None
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        template: State,
        choice: Choice = "first",
        symmetry: Symmetry | None = None,
        score: Callable[[State], float] | None = None,
    ) -> None:
        """Compose the stage.

        Args:
            template: names and shapes of the model.
            choice: the rule by which the client is chosen.
            symmetry: the symmetry of the model, by which pairs are aligned and norms folded.
            score: lower is better; needed for `best`.
        """
        self.request = Request(self.stage, start=Start.own, keep=True)
        self._template = template
        self._choice = choice
        self._symmetry = symmetry
        self._score = score
        # Choosing needs the models themselves and no sum of them, so this stage does not stream.
        self._models: dict[int, dict[str, Tensor]] = {}
        self._examples: dict[int, float] = {}

    def check(self, update: Update) -> Checked:
        return Checked(update, check_update(update, self._template, ()))

    def add(self, node: int, update: Update) -> None:
        self._examples[node] = update.examples
        if self._choice in ("first", "largest"):
            # These rules need no weights, so a single model is kept, and only a possible anchor is copied.
            if self._choose([*self._models, node]) != node:
                return
            self._models.clear()
        self._models[node] = {name: t.clone() for name, t in update.parameters.items()}

    def finish(self) -> dict[str, Tensor]:
        if not self._models:
            return dict(self._template)
        model = {**self._template, **self._models[self._choose(self._models)]}
        return model if self._symmetry is None else self._symmetry.fold(model)

    def _choose(self, nodes: Iterable[int]) -> int:
        """Return the node with the lowest cost; ties go to the lowest node id."""
        return min(sorted(nodes), key=self._cost)

    def _cost(self, node: int) -> float:
        if self._choice == "best" and self._score is not None:
            score = self._score({**self._template, **self._models[node]})
            return math.inf if math.isnan(score) else score
        if self._choice == "medoid" and self._symmetry is not None:
            return self._distance_to_all(node, self._symmetry)
        return -self._examples[node] if self._choice == "largest" else node

    def _distance_to_all(self, node: int, symmetry: Symmetry) -> float:
        anchor = self._models[node]
        rest = (model for key, model in self._models.items() if key != node)
        return math.fsum(match_weights(symmetry, anchor, model).report.distance_after for model in rest)
