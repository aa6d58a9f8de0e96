"""Stages without training: clients send how layers of the model so far fit to their own data.

    W* = W + (sum_k X~_k X~_k^T + rho I)^-1  sum_k (Z_k - W X~_k) X~_k^T        X~ features of the model so far
                                                                               Z  a client's targets there

The targets Z are the client's own features (feature regression), what its own weights make of the same inputs
(RegMean++, Nguyen et al. 2025, arXiv 2508.03121), or labels (closed-form heads: Fani et al. 2024, arXiv
2402.01989; Zhuang et al. 2024, arXiv 2405.16240), for which W is zero. The regulariser pulls towards W, so
directions that no client has seen stay as they are. Clients send the residual and not `Z X~^T`: an inexact `X~ X~^T`
then changes the length of a step, and not the point where steps end.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import BatchNorm, Block
from fedbasin.proto.request import STEPS, TRIAL, PathSpec, Refit, Request
from fedbasin.strategies.analytic.block_fit import fit_block
from fedbasin.strategies.analytic.deep_analytic import with_block
from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge
from fedbasin.strategies.fusion.batchnorm import replace_statistics
from fedbasin.strategies.fusion.head import Evidence, closed_form
from fedbasin.strategies.fusion.head_memory import HeadMemory, HeadSums
from fedbasin.strategies.fusion.precisions import Gram, Precision, Sketched
from fedbasin.strategies.fusion.update import Update, split, tensor_names
from fedbasin.strategies.judging.checks import check_alike, check_examples, check_fit, check_update
from fedbasin.strategies.judging.statistic_checks import check_head
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.round.stage import Accumulate, Checked
from fedbasin.strategies.tensors.state import State, interpolate


class _Summed:
    """A stage whose clients reply with sums over some layers."""

    layer_graph = None
    average = None
    _sums: "_Sums"

    @property
    def notes(self) -> tuple[str, ...]:
        return self._sums.notes

    def check(self, update: Update) -> Checked:
        return Checked(update, self._sums.check(update))

    def add(self, node: int, update: Update) -> None:  # noqa: ARG002 - the sum forgets who
        self._sums.add(update)


class RefitLayers(_Summed):
    """A stage that fits layers of the model so far to the clients' targets."""

    stage = "fit"

    def __init__(
        self,
        model: State,
        refit: Refit,
        strength: float,
        share: float = 1.0,
        *,
        encodings: Mapping[Block, Encoding] | None = None,
        accumulate: Accumulate = Accumulator.zero,
        holds_out: bool = False,
    ) -> None:
        """Compose the stage.

        Args:
            model: the model so far, on whose features the layers are fitted, and to which they are drawn.
            refit: the layers and their targets.
            strength: strength of the regulariser, relative to the mean diagonal of the clients' sum.
            share: share of the solution in the fitted layers; the rest stays as the model so far has it.
            encodings: forms in which clients send their sums; those of other layers are ignored.
            accumulate: makes an accumulator of the clients.
            holds_out: whether clients leave out the examples on which the fitted model will be judged.
        """
        self.request = _request(self.stage, refit, encodings, keep=holds_out)
        self._ridge = Ridge(strength, "anchor")
        self._share = share
        self._sums = _Sums(model, refit, accumulate)

    def finish(self) -> dict[str, Tensor]:
        model = self._sums.model
        step = self._sums.solve(self._ridge)
        solution = {name: model[name] + change for name, change in step.items()}
        return self._sums.restated({**model, **interpolate(model, solution, self._share)})


class MeasureNorms(_Summed):
    """A stage that measures the running statistics of a fused model anew, and changes nothing else.

    Models from independent initialisations that are aligned and mixed have units of a smaller variance than each of
    them, and pooled statistics are those of none (Jordan et al. 2023 (REPAIR), arXiv 2211.08403).
    """

    stage = "measure"

    def __init__(self, model: State, norms: tuple[BatchNorm, ...], accumulate: Accumulate = Accumulator.zero) -> None:
        """Compose the stage.

        Args:
            model: the fused model.
            norms: its BatchNorm layers.
            accumulate: makes an accumulator of the clients.
        """
        refit = Refit(norms=norms)
        self.request = _request(self.stage, refit, None, keep=False)
        self._sums = _Sums(model, refit, accumulate)

    def finish(self) -> dict[str, Tensor]:
        return {**self._sums.model, **self._sums.measured}


class RefitHead(_Summed):
    """A stage that fits the last layer to labels, whatever its weights have been so far.

    Clients that a round has not sampled take part by their sums of earlier rounds, as far as a memory holds them.
    """

    stage = "head"

    def __init__(
        self,
        model: State,
        refit: Refit,
        ridge: Ridge | Evidence,
        *,
        encodings: Mapping[Block, Encoding] | None = None,
        accumulate: Accumulate = Accumulator.zero,
        holds_out: bool = False,
        memory: HeadMemory | None = None,
        number: int = 0,
    ) -> None:
        """Compose the stage.

        Args:
            model: the model so far, on whose features the layer is fitted.
            refit: the layer.
            ridge: the regulariser.
            encodings: forms in which clients send their sums; those of other layers are ignored.
            accumulate: makes an accumulator of the clients.
            holds_out: whether clients leave out the examples on which the fitted model will be judged.
            memory: the sums of earlier rounds, to which those of this one are added; None forgets.
            number: number of the round.
        """
        self.request = _request(self.stage, refit, encodings, keep=holds_out)
        self._ridge = ridge
        self._sums = _Sums(model, refit, accumulate)
        self._memory, self._number = memory or HeadMemory(), number
        self._fresh, self._nodes = HeadMemory(self._memory.most_bytes), set[int]()

    def check(self, update: Update) -> Checked:
        checked = super().check(update)
        _check_heads(update)
        return checked

    def add(self, node: int, update: Update) -> None:
        super().add(node, update)
        self._nodes.add(node)
        for block, precision in update.precisions.items():
            # Without a bias nothing tells how many examples a class has.
            if isinstance(precision, Gram) and len(block) > 1:
                self._fresh.add(self._number, node, HeadSums(precision.matrix, update.cross_moments[block]))

    def finish(self) -> dict[str, Tensor]:
        ((block, (precision, moment)),) = self._sums.of_blocks.items()
        if isinstance(precision, Gram) and len(block) > 1:
            gram, moment = self._memory.complete(HeadSums(precision.matrix, moment), self._nodes)
            precision = Gram(gram)
        model = self._sums.model
        solution = split(block, closed_form(block, precision, moment, self._ridge), model)
        # What is not finite is summed again without one client, whose sums are then not to be remembered.
        if all(bool(tensor.isfinite().all()) for tensor in solution.values()):
            self._memory.merge(self._fresh)
        return self._sums.restated({**model, **solution})


class RefitBlock(_Summed):
    """A stage that fits a block of a `DeepAnalytic` to the targets, by the sums of the last layer above it."""

    stage = "block"

    def __init__(
        self,
        model: State,
        refit: Refit,
        ridge: Ridge | Evidence,
        *,
        encodings: Mapping[Block, Encoding] | None = None,
        accumulate: Accumulate = Accumulator.zero,
    ) -> None:
        """Compose the stage.

        Args:
            model: the network, with the blocks that are fitted so far.
            refit: its last layer.
            ridge: the regulariser of the last layer.
            encodings: forms in which clients send their sums; those of other layers are ignored.
            accumulate: makes an accumulator of the clients.
        """
        self.request = _request(self.stage, refit, encodings, keep=False)
        self._ridge = ridge
        self._has_labels = refit.target == Target.labels.name
        self._sums = _Sums(model, refit, accumulate)

    def check(self, update: Update) -> Checked:
        checked = super().check(update)
        if self._has_labels:
            _check_heads(update)
        return checked

    def finish(self) -> dict[str, Tensor]:
        ((precision, moment),) = self._sums.of_blocks.values()
        if not isinstance(precision, Gram | Sketched):
            raise TypeError(f"a block is fitted by a Gram matrix, not by a {type(precision).__name__}")
        return with_block(
            self._sums.model, fit_block(precision.matrix, moment, self._ridge, has_labels=self._has_labels)
        )


def _check_heads(update: Update) -> None:
    for block, precision in update.precisions.items():
        check_head(block, precision, update.cross_moments[block])


class _Sums:
    """Normal equations of some layers over the clients, with their solution, and running statistics."""

    def __init__(self, model: State, refit: Refit, accumulate: Accumulate) -> None:
        self.model = model
        self._blocks = refit.blocks
        self._norms = refit.norms
        self._measured = {name: model[name] for norm in self._norms for name in norm.statistics}
        self._accumulator = accumulate({})
        self._statistics = accumulate(self._measured)

    def check(self, update: Update) -> dict[str, float]:
        return check_fit(update, self.model, self._blocks, self._measured)

    def add(self, update: Update) -> None:
        check_alike(update, self._accumulator.blocks)
        self._accumulator.add(update)
        self._statistics.add(Update(update.parameters, update.examples))

    def restated(self, fitted: State) -> dict[str, Tensor]:
        """Return the fitted model with the running statistics that the clients have measured."""
        return replace_statistics(fitted, self.measured, self._norms)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a robust rule has made of each client's sums."""
        return self._accumulator.notes

    @property
    def measured(self) -> dict[str, Tensor]:
        """The running statistics that the clients have measured."""
        return self._statistics.finalize(self._measured)

    @property
    def of_blocks(self) -> dict[Block, tuple[Precision, Tensor]]:
        """The precision and the cross-moment of each layer."""
        return self._accumulator.total().blocks

    def solve(self, ridge: Ridge) -> dict[str, Tensor]:
        """Return the solution of the layers, regularised towards zero."""
        zero = {name: torch.zeros_like(self.model[name]) for b in self._blocks for name in tensor_names(b)}
        return self._accumulator.finalize(zero, ridge)


def _request(stage: str, refit: Refit, encodings: Mapping[Block, Encoding] | None, *, keep: bool) -> Request:
    chosen = {block: encoding for block, encoding in (encodings or {}).items() if block in refit.blocks}
    return Request(stage, refit=refit, encodings=chosen, keep=keep)


class ProbePath:
    """A stage in which clients evaluate a path among the models of the round.

    Only sums come back: of the loss and of the number of correct examples, at each point.
    """

    stage = "probe"
    layer_graph = None
    average = None
    notes: tuple[str, ...] = ()

    def __init__(self, model: State, sequence: int, path: PathSpec, points: int) -> None:
        """Compose the stage.

        Args:
            model: the refitted model, in which the stage ends.
            sequence: number of the last piece of it.
            path: the path.
            points: number of points.
        """
        refit = Refit(sequence=sequence, path=path)
        self.request = Request(self.stage, "evaluate", refit=refit, path_points=points)
        self._model = model

    def check(self, update: Update) -> Checked:
        check_examples(update.examples)
        return Checked(update)

    def add(self, node: int, update: Update) -> None:
        """Nothing is summed here."""

    def finish(self) -> dict[str, Tensor]:
        return dict(self._model)


class LocalSteps:
    """A stage in which clients take a few local steps from a model, and send the models where they end.

    Unlike the stage in which clients train, the app is not asked: the mod takes the steps, with the app's own optimizer.
    """

    stage = STEPS
    layer_graph = None
    average = None

    def __init__(self, model: State, accumulate: Accumulate = Accumulator.zero) -> None:
        """Compose the stage.

        Args:
            model: the model that the steps are taken from.
            accumulate: makes an accumulator of the clients.
        """
        self.request = Request(self.stage, refit=Refit(), keep=True)
        self._model = model
        self._accumulator = accumulate(model)

    @property
    def notes(self) -> tuple[str, ...]:
        return self._accumulator.notes

    def check(self, update: Update) -> Checked:
        return Checked(update, check_update(update, self._model, ()))

    def add(self, node: int, update: Update) -> None:  # noqa: ARG002 - the sum forgets who
        self._accumulator.add(update)

    def finish(self) -> dict[str, Tensor]:
        return self._accumulator.finalize(self._model)


class ProbeStep(ProbePath):
    """A stage in which clients evaluate steps beyond the mean, on examples that they do not train on."""

    stage = "beyond"


class ScaleOutputs(ProbePath):
    """A stage in which clients evaluate a model with the outputs of its last layer scaled."""

    stage = "scale"


class Trial(ProbePath):
    """A stage in which clients take their first local steps from a model, and keep nothing of them.

    Only sums come back: of the loss and of the number of correct examples, before the steps and after them.
    """

    stage = TRIAL

    def __init__(self, model: State, sequence: int, path: PathSpec) -> None:
        """Compose the stage.

        Args:
            model: the refitted model, in which the stage ends.
            sequence: number of the last piece of it.
            path: the path whose end the steps are taken from.
        """
        super().__init__(model, sequence, path, points=2)


# Stages in which clients choose between models. In a trial one client whose steps diverge is what is looked for.
CHOICES = (ProbePath.stage, ProbeStep.stage, ScaleOutputs.stage)
