"""What a client measures of models: losses along paths, the proof of its alignment, directions and variances.

Nothing here goes into the round's sum.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedbasin.client.capture.preactivations import preactivation_moments
from fedbasin.client.lora_names import completed
from fedbasin.client.measure.loss_path import path_losses
from fedbasin.client.request import Data, Request, answer, required
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.diagnostics.endpoint_proof import Verdict, endpoint_error
from fedbasin.strategies.diagnostics.singular_vectors import (
    affordable,
    matrices,
    spectral_alignment,
)
from fedbasin.strategies.diagnostics.variance_ratios import variance_ratios
from fedbasin.strategies.tensors.state import State, floating

# What comparing singular vectors may take: about a tenth of a second on one core for all models.
_PRODUCTS = 2**23


def measure(
    request: Request,
    trained: State,
    aligned: State,
    model: nn.Module,
    data: Data | None,
    header: pb.UpdateHeader,
) -> None:
    """Add what the request asks to be measured to a reply's header.

    Args:
        request: the question.
        trained: the client's own model.
        aligned: the same in the anchor's frame.
        model: to run; its tensors are replaced.
        data: gives the client's own examples, afresh at every call.
        header: of the reply.

    Raises:
        MissingDataError: a path is asked for and there is no data.
    """
    with _probing(header):
        if request.path_points:
            _probe(
                request,
                trained,
                aligned,
                model,
                required(data, "the barrier to the anchor"),
                header,
            )
        _compare_directions(request, trained, aligned, header)


def fused_path(
    request: Request, own: State, model: nn.Module, data: Data | None
) -> pb.UpdateHeader:
    """What goes with an evaluation: the path from the model that is evaluated to the client's own.

    With it, whether the fused model's hidden layers vary as the client's do.

    Args:
        request: the question; its anchor is the new global model.
        own: the floating tensors that this client sent in the same round.
        model: to run; it is left as it was.
        data: gives the client's own examples, afresh at every call.

    Raises:
        MissingDataError: there is no data.
    """
    batches = required(data, "the path from the fused model")
    start, end = completed(model, request.anchor), completed(model, {**request.anchor, **own})
    header = answer(request)
    with _probing(header):
        path = path_losses(model, start, end, batches(), request.path_points)
        header.path.CopyFrom(path_message(path))
        header.variance.extend(_variance(start, end, model, batches))
    return header


def path_message(path: Path) -> pb.PathSums:
    """Sums along a path that has nothing to do with alignment."""
    return pb.PathSums(
        points=path.points, loss_after=path.loss, correct_after=path.correct, examples=path.examples
    )


def _probe(
    request: Request,
    trained: State,
    aligned: State,
    model: nn.Module,
    batches: Data,
    header: pb.UpdateHeader,
) -> None:
    points = request.path_points
    start, end = completed(model, request.anchor), completed(model, trained)
    before = path_losses(model, start, end, batches(), points)
    after = before
    if aligned is not trained:
        after = path_losses(model, start, completed(model, aligned), batches(), points)
    header.path.CopyFrom(_sums(before, after))
    if request.header.align:
        _prove(before, after, trained, header)


def _prove(before: Path, after: Path, trained: State, header: pb.UpdateHeader) -> None:
    """Say how far alignment moved the client's own loss, and whether that is more than rounding."""
    dtypes = {tensor.dtype for tensor in floating(trained).values()}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    error = endpoint_error(before, after, coarsest)
    if error.verdict is not Verdict.undecided:
        header.alignment.endpoint_error = error.client
    header.function_changed = error.verdict is Verdict.broken


def _sums(before: Path, after: Path) -> pb.PathSums:
    return pb.PathSums(
        points=before.points,
        loss_before=before.loss,
        loss_after=after.loss,
        correct_before=before.correct,
        correct_after=after.correct,
        examples=before.examples,
    )


def _compare_directions(
    request: Request, trained: State, aligned: State, header: pb.UpdateHeader
) -> None:
    """Singular-vector alignment with the anchor, as far as its budget goes.

    Where nothing was searched and no path is asked for, a reply is to cost what it cost without this.
    """
    searched = not all(space.certified for space in header.alignment.spaces)
    layers = affordable(request.anchor, _PRODUCTS)
    if not (request.header.align and layers and (searched or request.path_points)):
        return
    before = spectral_alignment(request.anchor, trained, layers=layers)
    moved = any(aligned[name] is not trained[name] for name in layers)
    after = spectral_alignment(request.anchor, aligned, layers=layers) if moved else before
    header.alignment.spectral.CopyFrom(
        pb.Spectral(
            before=before.total,
            after=after.total,
            matrices=len(before.layers),
            of=len(matrices(request.anchor)),
        )
    )


def _variance(
    fused: State, own: State, model: nn.Module, batches: Data
) -> Iterator[pb.VarianceRatio]:
    """Layer by layer; one that does not vary in the client's own model has no ratio."""
    ours, theirs = (preactivation_moments(model, state, batches()) for state in (fused, own))
    for layer, found in variance_ratios(ours, [theirs]).items():
        if math.isfinite(found.layer):
            yield pb.VarianceRatio(layer=layer, ratio=found.layer)


@contextmanager
def _probing(header: pb.UpdateHeader) -> Iterator[None]:
    """Say what the probes took, apart from all else."""
    started = time.perf_counter()
    yield
    header.probe_seconds += time.perf_counter() - started
