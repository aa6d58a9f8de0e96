"""A client's measurements: losses along paths, the endpoint error of its alignment, singular vectors, variances.

They are diagnostics: no measurement enters the round's sum.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fedbasin.client.align import AlignedModel
from fedbasin.client.lora_names import complete_state
from fedbasin.client.request_reader import Data, required
from fedbasin.proto.reply import Reply
from fedbasin.proto.report import AlignmentReport, LayerVariance, PathSums, SingularVectors
from fedbasin.proto.request import Request
from fedbasin.strategies.capture.preactivations import preactivation_moments
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.diagnostics.endpoint_proof import EndpointError, EndpointVerdict, endpoint_error
from fedbasin.strategies.diagnostics.loss_path import path_losses
from fedbasin.strategies.diagnostics.singular_vectors import affordable, matrices, spectral_alignment
from fedbasin.strategies.diagnostics.variance_ratios import variance_ratios
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.state import State, floating

# Multiplications that comparing singular vectors may take: about a tenth of a second on one core for all models.
_SPECTRAL_BUDGET = 2**23


@dataclass(frozen=True)
class Measurement:
    """A client's measurements of its model before and after alignment.

    Attributes:
        path: loss along the path from the anchor to the client's model; None where none was requested.
        endpoint_error: relative change of the client's own loss by alignment; None where it was not measured.
        singular_vectors: agreement of the singular vectors with the anchor's; None where it was not measured.
        function_changed: whether the change of the loss is more than rounding, so that the model must not be sent.
        seconds: duration of all measurements.
    """

    path: PathSums | None = None
    endpoint_error: float | None = None
    singular_vectors: SingularVectors | None = None
    function_changed: bool = False
    seconds: float = 0.0


def measure(
    request: Request,
    trained: State,
    aligned: AlignedModel,
    model: nn.Module,
    data: Data | None,
    task: Task | None = None,
) -> Measurement:
    """Measure a client's model before and after alignment, as far as the request asks for it.

    Args:
        request: the request.
        trained: the client's model before alignment.
        aligned: the client's model after alignment.
        model: module that runs the states; its tensors are replaced.
        data: gives the client's own batches, anew at every call.
        task: the task; None takes the one that the first batch shows.

    Raises:
        MissingDataError: a path is requested and there is no data.
    """
    started = time.perf_counter()
    path, error = None, None
    if request.path_points:
        batches = required(data, "the barrier to the anchor")
        to_trained, to_aligned = _paths(request, trained, aligned.state, model, batches, task)
        path = path_sums(to_aligned, to_trained)
        error = _endpoint_error(to_trained, to_aligned, trained) if request.aligns else None
    vectors = None
    if aligned.report is not None:
        vectors = _singular_vectors(request, trained, aligned.state, aligned.report)
    # An undecided comparison says nothing: the data itself differs from pass to pass.
    decided = error is not None and error.verdict is not EndpointVerdict.undecided
    return Measurement(
        path,
        error.client if error is not None and decided else None,
        vectors,
        error is not None and error.verdict is EndpointVerdict.broken,
        time.perf_counter() - started,
    )


def measure_fused(
    request: Request, sent: State, model: nn.Module, data: Data | None, task: Task | None = None
) -> Reply:
    """Evaluate the path from the fused model to the model that this client sent, as a reply to an evaluation.

    The reply also compares the variances of the two models' preactivations, which shows a fused model whose features
    have collapsed.

    Args:
        request: the request, whose anchor is the fused model.
        sent: tensors that the client sent in the same round.
        model: module that runs the states; it is left as it was.
        data: gives the client's own batches, anew at every call.
        task: the task; None takes the one that the first batch shows.

    Raises:
        MissingDataError: there is no data.
    """
    batches = required(data, "the path from the fused model")
    started = time.perf_counter()
    # Tensors that the client did not send are the anchor's in both ends, so they do not contribute to the path.
    fused = complete_state(model, request.anchor)
    client = complete_state(model, {**request.anchor, **sent})
    path = path_sums(path_losses(model, fused, client, batches(), request.path_points, task))
    return Reply(
        request.round,
        request.stage,
        request.anchor_digest,
        path=path,
        variance=tuple(_variances(fused, client, model, batches)),
        probe_seconds=time.perf_counter() - started,
    )


def path_sums(path: Path, to_trained: Path | None = None) -> PathSums:
    """Return the sums along a path as they are sent.

    Args:
        path: path to the client's model as aligned, or a path that has nothing to do with alignment.
        to_trained: path to the client's model as trained, if that was evaluated.
    """
    return PathSums(
        points=path.points,
        loss_before=to_trained.loss if to_trained else (),
        loss_after=path.loss,
        correct_before=to_trained.correct if to_trained else (),
        correct_after=path.correct,
        examples=path.examples,
        clients=1,
    )


def _paths(
    request: Request, trained: State, aligned: State, model: nn.Module, batches: Data, task: Task | None
) -> tuple[Path, Path]:
    """Return the path to the client's model as trained, and the path to it as aligned."""
    points, start = request.path_points, complete_state(model, request.anchor)
    to_trained = path_losses(model, start, complete_state(model, trained), batches(), points, task)
    # Every path costs a pass over the data for each point.
    if aligned is trained:
        return to_trained, to_trained
    return to_trained, path_losses(model, start, complete_state(model, aligned), batches(), points, task)


def _endpoint_error(to_trained: Path, to_aligned: Path, trained: State) -> EndpointError:
    # The coarsest number format of the model sets the rounding that an alignment may cause.
    dtypes = {tensor.dtype for tensor in floating(trained).values()}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return endpoint_error(to_trained, to_aligned, coarsest)


def _singular_vectors(
    request: Request, trained: State, aligned: State, report: AlignmentReport
) -> SingularVectors | None:
    """Compare singular vectors with the anchor's, within a budget.

    Where nothing was searched and no path is requested, nothing is compared: such a reply shall cost no decomposition.
    """
    is_searched = not all(space.certified for space in report.spaces)
    # A matrix of zeros has no direction.
    layers = [n for n in affordable(request.anchor, _SPECTRAL_BUDGET) if request.anchor[n].any() and trained[n].any()]
    if not layers or not (is_searched or request.path_points):
        return None
    trained_vectors = vectors = spectral_alignment(request.anchor, trained, layers=layers)
    if any(aligned[name] is not trained[name] for name in layers):
        vectors = spectral_alignment(request.anchor, aligned, layers=layers)
    total = len(matrices(request.anchor))
    measured = len(trained_vectors.layers)
    return SingularVectors(trained_vectors.total, vectors.total, measured, total)


def _variances(fused: State, client: State, model: nn.Module, batches: Data) -> Iterator[LayerVariance]:
    moments = [preactivation_moments(model, state, batches()) for state in (fused, client)]
    for layer, ratio in variance_ratios(moments[0], moments[1:]).items():
        # A layer that does not vary in the client's own model has no ratio.
        if math.isfinite(ratio.layer):
            yield LayerVariance(layer, ratio.layer)
