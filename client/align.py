"""Alignment of a client's model to the anchor, by the matcher that the server requests."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedbasin.client.request_reader import Data, required
from fedbasin.proto.report import AlignmentReport
from fedbasin.proto.request import Request
from fedbasin.strategies.alignment.learned_matching import Search
from fedbasin.strategies.alignment.matchers import AUTO, Matcher, MatchingData, prepare_auto, prepare_match
from fedbasin.strategies.alignment.weight_matching import Alignment
from fedbasin.strategies.judging.matching import refusing_what_cannot_be_matched
from fedbasin.strategies.symmetry.symmetry import Symmetry, parse
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.state import State

# Share of the client in the merge for which learned matching optimises, where the server does not know the weights.
_UNKNOWN_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class AlignedModel:
    """A client's model after alignment.

    Attributes:
        state: the model in the anchor's frame; the trained model itself where the request has no symmetry.
        report: report of the alignment; None where the request has no symmetry.
        symmetry_digest: digest of the symmetry; empty where the request has none.
    """

    state: State
    report: AlignmentReport | None = None
    symmetry_digest: bytes = b""


@dataclass(frozen=True)
class FreshBatches:
    """Batches that are made anew by every iteration.

    Attributes:
        data: gives the client's batches.
    """

    data: Data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data())


def align(
    request: Request, trained: State, examples: float, model: nn.Module, data: Data | None, task: Task | None = None
) -> AlignedModel:
    """Align a client's model to the anchor of a request.

    Args:
        request: the request; without a symmetry the model stays as it is.
        trained: the client's own model.
        examples: weight of the client's model in a merge.
        model: module that runs the states; its tensors are replaced.
        data: gives the client's own batches, anew at every call.
        task: the task, whose loss learned matching lowers; None takes the one that the first batch shows.

    Raises:
        MissingDataError: the matcher needs data and there is none.
        Refusal: the matcher cannot align the model.
    """
    if not request.aligns:
        return AlignedModel(trained)
    symmetry = parse(request.symmetry)
    started = time.perf_counter()
    match = _prepared(request, symmetry, trained, examples, model, data, task)
    with refusing_what_cannot_be_matched():
        alignment = match()
    report = replace(alignment.report, seconds=time.perf_counter() - started)
    state = alignment.state
    # Learned matching has optimised the loss at this very point, so a translation would move away from it.
    if request.matcher != Matcher.learned.name:
        state = symmetry.translate(symmetry.fold(request.anchor), state)
    return AlignedModel(state, report, symmetry.digest)


def _prepared(
    request: Request,
    symmetry: Symmetry,
    trained: State,
    examples: float,
    model: nn.Module,
    data: Data | None,
    task: Task | None,
) -> Callable[[], Alignment]:
    """Return the match that a request asks for, with the client's features where it needs them."""
    bounds = request.identity_bounds
    if request.matcher == AUTO:
        given = None if data is None else MatchingData(model, FreshBatches(data))
        return prepare_auto(symmetry, request.anchor, trained, bounds, given)
    matcher = Matcher[request.matcher]
    given = _matching_data(request, examples, model, data, task) if matcher.reads_data else None
    return prepare_match(matcher, symmetry, request.anchor, trained, bounds, given)


def _matching_data(
    request: Request, examples: float, model: nn.Module, data: Data | None, task: Task | None
) -> MatchingData:
    batches = FreshBatches(required(data, f"matcher = {request.matcher!r}"))
    weights = examples, request.merged_examples
    share = examples / sum(weights) if all(weights) else _UNKNOWN_SHARE
    search = Search(request.learned_steps, smoothing=request.learned_smoothing)
    return MatchingData(model, batches, share, task, search)
