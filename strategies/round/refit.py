"""A stage that trains nothing: clients say how layers of the model so far fit to what they know.

    W* = W + (sum_k X~_k X~_k^T + rho I)^-1  sum_k (Z_k - W X~_k) X~_k^T        X~ features of the model so far
                                                                               Z  what a client wants there

The targets Z are the client's own features (feature regression), what its own weights make of the same inputs
(RegMean++, Nguyen et al. 2025, arXiv 2508.03121), or labels (closed-form heads: Fani et al. 2024, arXiv
2402.01989; Zhuang et al. 2024, arXiv 2405.16240), for which W is zero. The regulariser holds on to W, so
directions that no client has seen stay as they are. Clients send what is left to explain, and not `Z X~^T`: an
inexact `X~ X~^T` then changes how far the step goes, and not where steps end.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block, LayerGraph
from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge
from fedbasin.strategies.fusion.batchnorm import restated
from fedbasin.strategies.fusion.head import Evidence, closed_form
from fedbasin.strategies.fusion.precisions import Precision
from fedbasin.strategies.fusion.update import Update, split, stored
from fedbasin.strategies.round.checks import check_examples, check_fit
from fedbasin.strategies.round.stages import Along, Ask, Fitting, Kind
from fedbasin.strategies.tensors.state import State, interpolate


class Fit:
    """Fit layers of the model so far."""

    name = "fit"
    kind: Kind = "train"
    layer_graph: LayerGraph | None = None

    def __init__(
        self,
        model: State,
        fitting: Fitting,
        strength: float,
        share: float = 1.0,
        *,
        encodings: Mapping[Block, Encoding] | None = None,
    ) -> None:
        """Compose the stage.

        Args:
            model: the model so far, on whose features the layers are fitted, and to which they are drawn.
            fitting: which layers, and to what.
            strength: of the regulariser, relative to the mean diagonal of the clients' sum.
            share: of the solution in the fitted layers; the rest stays as the model so far has it.
            encodings: how clients send their sums; those of other layers may be among them.
        """
        self.ask = _ask(fitting, encodings)
        self._ridge = Ridge(strength, "anchor")
        self._share = share
        self._sums = _Sums(model, fitting)

    def accept(self, node: int, update: Update) -> None:  # noqa: ARG002 - the sum forgets who
        self._sums.add(update)

    def finish(self) -> dict[str, Tensor]:
        model = self._sums.model
        step = self._sums.solved(self._ridge)
        solution = {name: model[name] + change for name, change in step.items()}
        return self._sums.restated({**model, **interpolate(model, solution, self._share)})


class Head:
    """Fit the last layer to labels, whatever it has been so far."""

    name = "head"
    kind: Kind = "train"
    layer_graph: LayerGraph | None = None

    def __init__(
        self,
        model: State,
        fitting: Fitting,
        ridge: Ridge | Evidence,
        *,
        encodings: Mapping[Block, Encoding] | None = None,
    ) -> None:
        """Compose the stage.

        Args:
            model: the model so far, on whose features the layer is fitted.
            fitting: which layer.
            ridge: the regulariser.
            encodings: how clients send their sums; those of other layers may be among them.
        """
        self.ask = _ask(fitting, encodings)
        self._ridge = ridge
        self._sums = _Sums(model, fitting)

    def accept(self, node: int, update: Update) -> None:  # noqa: ARG002 - the sum forgets who
        self._sums.add(update)

    def finish(self) -> dict[str, Tensor]:
        ((block, sums),) = self._sums.of_blocks.items()
        model = self._sums.model
        solution = split(block, closed_form(block, *sums, self._ridge), model)
        return self._sums.restated({**model, **solution})


class _Sums:
    """Normal equations of some layers over the clients, what solves them, and running statistics."""

    def __init__(self, model: State, fitting: Fitting) -> None:
        self.model = model
        self._blocks = fitting.blocks
        self._norms = fitting.norms
        self._measured = {name: model[name] for norm in self._norms for name in norm.measured}
        self._accumulator = Accumulator.zero({})
        self._statistics = Accumulator.zero(self._measured)

    def add(self, update: Update) -> None:
        check_fit(update, self.model, self._blocks, self._measured, self._accumulator.blocks)
        self._accumulator.add(update)
        self._statistics.add(Update(update.parameters, update.examples))

    def restated(self, fitted: State) -> dict[str, Tensor]:
        """The fitted model with the statistics that the clients have measured."""
        measured = self._statistics.finalize(self._measured)
        return restated(fitted, measured, self._norms)

    @property
    def of_blocks(self) -> dict[Block, tuple[Precision, Tensor]]:
        """For each layer its precision and its moment."""
        return self._accumulator.blocks

    def solved(self, ridge: Ridge) -> dict[str, Tensor]:
        """The layers' solution, drawn to zero."""
        zero = {
            name: torch.zeros_like(self.model[name]) for b in self._blocks for name in stored(b)
        }
        return self._accumulator.finalize(zero, ridge)


def _ask(fitting: Fitting, encodings: Mapping[Block, Encoding] | None) -> Ask:
    known = encodings or {}
    own = {block: known[block] for block in fitting.blocks if block in known}
    return Ask(fit=fitting, encodings=own)


class Probe:
    """Evaluate a path among the models of the round.

    Only sums come back: of the loss and of what was right, at each point.
    """

    name = "probe"
    kind: Kind = "evaluate"
    layer_graph: LayerGraph | None = None

    def __init__(self, model: State, sequence: int, along: Along, points: int) -> None:
        """Compose the stage.

        Args:
            model: the fitted model, in which the stage ends.
            sequence: of the last piece of it.
            along: which path.
            points: at how many points.
        """
        self.ask = Ask(fit=Fitting((), None, sequence, along), path_points=points)
        self._model = model

    def accept(self, node: int, update: Update) -> None:  # noqa: ARG002 - nothing is summed here
        check_examples(update.examples)

    def finish(self) -> dict[str, Tensor]:
        return dict(self._model)
