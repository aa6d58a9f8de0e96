"""A client moves its own model into the anchor's basin, by the matcher that the server asks for."""

import time

from torch import nn

from fedbasin.client.capture.feature_correlations import correlations
from fedbasin.client.learn_alignment import align_learned
from fedbasin.client.request import Data, Request, required
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.strategies.alignment.activation_matching import match_activations
from fedbasin.strategies.alignment.matchers import Matcher
from fedbasin.strategies.alignment.sinkhorn import match_sinkhorn
from fedbasin.strategies.alignment.weight_matching import Alignment, match_weights
from fedbasin.strategies.messages import alignment_message
from fedbasin.strategies.symmetry.symmetry import Symmetry, parse
from fedbasin.strategies.tensors.state import State


def align(
    request: Request, trained: State, model: nn.Module, data: Data | None, header: pb.UpdateHeader
) -> State:
    """The model in the anchor's frame; the header says how that went.

    Args:
        request: the question, with the symmetry; without one the model stays as it is.
        trained: the client's own model.
        model: to run; its tensors are replaced.
        data: gives the client's own examples, afresh at every call.
        header: of the reply, with the client's examples.

    Raises:
        MissingDataError: the matcher needs data and there is none.
    """
    if not request.header.align:
        return trained
    symmetry = parse(request.header.symmetry)
    started = time.perf_counter()
    found = _matched(request, symmetry, trained, model, data, header.examples)
    header.symmetry_digest = symmetry.digest
    seconds = time.perf_counter() - started
    header.alignment.CopyFrom(alignment_message(found.report, seconds))
    if request.header.matcher == Matcher.learned.name:
        # What was learned is this very point of the path.
        return found.state
    return symmetry.translate(symmetry.fold(request.anchor), found.state)


def _matched(
    request: Request,
    symmetry: Symmetry,
    trained: State,
    model: nn.Module,
    data: Data | None,
    examples: float,
) -> Alignment:
    matcher = Matcher[request.header.matcher or Matcher.weights.name]
    if matcher is Matcher.activations:
        batches = required(data, "matching by activations")
        seen = correlations(symmetry, model, request.anchor, trained, batches())
        return match_activations(symmetry, request.anchor, trained, seen)
    if matcher is Matcher.learned:
        batches, merged = required(data, "learned matching"), request.header.merged_examples
        pair = (request.anchor, trained)
        return align_learned(
            symmetry, model, *pair, batches, examples=examples, merged_examples=merged
        )
    match = match_sinkhorn if matcher is Matcher.sinkhorn else match_weights
    return match(symmetry, request.anchor, trained, request.radii)
