"""A stage that trains nothing: clients say how layers of the model so far fit to what they know.

    W* = W + (sum_k X~_k X~_k^T + rho I)^-1  sum_k (Z_k - W X~_k) X~_k^T        X~ features of the model so far
                                                                               Z  what a client wants there

The targets Z are the client's own features (feature regression), what its own weights make of the same inputs
(RegMean++, Nguyen et al. 2025, arXiv 2508.03121), or labels (closed-form heads: Fani et al. 2024, arXiv
2402.01989; Zhuang et al. 2024, arXiv 2405.16240), for which W is zero. The regulariser holds on to W, so
directions that no client has seen stay as they are. Clients send what is left to explain, and not `Z X~^T`: an
inexact `X~ X~^T` then changes how far the step goes, and not where steps end.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedbasin.strategies.fusion.compact import Encoding
from fedbasin.strategies.fusion.tally import Ridge, Tally
from fedbasin.strategies.fusion.update import Block, Order, Update
from fedbasin.strategies.recipe import Target
from fedbasin.strategies.stages import Along, Ask, Fitting, Kind
from fedbasin.strategies.state import State, interpolate
from fedbasin.strategies.validation import check_examples, check_fit


class Fit:
    """Fit layers of the model so far."""

    kind: Kind = "train"
    order: Order | None = None

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
            model: the model so far, on whose features the layers are fitted.
            fitting: which layers, and to what.
            strength: of the regulariser, relative to the mean diagonal of the clients' sum. A head to
                labels is drawn to zero, all else to the model so far.
            share: of the solution in the fitted layers; the rest stays as the model so far has it. A head
                to labels is the solution.
            encodings: how clients send their sums; those of other layers may be among them.
        """
        self.name = "head" if fitting.target is Target.labels else "fit"
        known = encodings or {}
        own = {block: known[block] for block in fitting.blocks if block in known}
        self.ask = Ask(fit=fitting, encodings=own)
        self._blocks = fitting.blocks
        self._model = model
        self._tally = Tally.zero({})
        self._ridge = Ridge(strength, "anchor")
        self._share = 1.0 if self.name == "head" else share
        self._zero = zeroed(model, fitting.blocks)
        self._base = self._zero if self.name == "head" else model

    def accept(self, node: int, update: Update) -> None:  # noqa: ARG002 - the sum forgets who
        check_fit(update, self._model, self._blocks, self._tally.blocks)
        self._tally.fold(update)

    def finish(self) -> dict[str, Tensor]:
        step = self._tally.finalize(self._zero, self._ridge)
        names = [name for block in self._tally.blocks for name in block]
        solution = {name: self._base[name] + step[name] for name in names}
        return {**self._model, **interpolate(self._model, solution, self._share)}


class Probe:
    """Evaluate a path among the models of the round.

    Only sums come back: of the loss and of what was right, at each point.
    """

    name = "probe"
    kind: Kind = "evaluate"
    order: Order | None = None

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


def zeroed(model: State, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """The model with some layers at zero."""
    return {**model, **{name: torch.zeros_like(model[name]) for b in blocks for name in b}}
