"""The reply to a fit: no training, only how well layers agree with what the client's own model computes.

The client builds on what it kept in this round: its own model as it was sent, and the fused model so far, of
which every request brings the part that is new.
"""

from flwr.app import Context, MetricRecord, RecordDict
from torch import Tensor, nn

from fedbasin.client.context import (
    begun,
    fused_at_first,
    fused_so_far,
    keep_fused,
    sent,
    sent_examples,
)
from fedbasin.client.probe import path_losses
from fedbasin.client.regression import regress
from fedbasin.client.reply import Data, Request, answer, path_message, required
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import wire
from fedbasin.strategies.encodings import read_encodings, write_grams
from fedbasin.strategies.fusion.compact import Encoding, encode_moment
from fedbasin.strategies.recipe import Target
from fedbasin.strategies.stages import Along
from fedbasin.strategies.state import State, tied

_TARGET = {
    pb.FIT_TARGET_FEATURES: Target.features,
    pb.FIT_TARGET_WEIGHTS: Target.weights,
    pb.FIT_TARGET_LABELS: Target.labels,
}


def fit_reply(
    request: Request,
    context: Context,
    model: nn.Module,
    data: Data | None,
    probed: Data | None = None,
) -> RecordDict:
    """Sums over the client's own examples, of the layers that the request names or of the path it asks for.

    Args:
        request: the question; its anchor is what is new of the fused model.
        context: where the client kept its models.
        model: to run; its tensors are replaced.
        data: gives the client's own examples, afresh at every call.
        probed: gives those on which models are compared.

    Raises:
        MissingDataError: there is no data.
    """
    header, content = answer(request), RecordDict()
    own, fused = sent(context, request.header.round), _fused(request, context, model)
    if own is None or fused is None:
        header.lost = True
    else:
        batches = required(data, "a fit")
        header.examples = sent_examples(context)
        content["metrics"] = MetricRecord({"num-examples": header.examples})
        _fit(request, own, fused, model, batches, header, content)
        if request.path_points:
            along = Along(request.header.fit.path.share, request.header.fit.path.reach)
            start, end = along.ends(begun(context), fused_at_first(context), fused)
            path = path_losses(model, start, end, required(probed, "a path")(), request.path_points)
            header.path.CopyFrom(path_message(path))
    # Nothing is forgotten yet: a stage that too few could answer is asked anew.
    wire.write(content, header)
    return content


def _fit(
    request: Request,
    own: State,
    fused: State,
    model: nn.Module,
    batches: Data,
    header: pb.UpdateHeader,
    content: RecordDict,
) -> None:
    asked = request.header.fit
    if not asked.blocks:
        return
    blocks = [tuple(block.tensors) for block in asked.blocks]
    encodings = read_encodings(request.header.encodings)
    sums = regress(model, own, fused, blocks, _TARGET[asked.target], batches(), encodings)
    moments = {
        block: encode_moment(found.moment, encodings.get(block, Encoding()).moment)
        for block, found in sums.items()
    }
    grams = {block: found.inputs.dividing() for block, found in sums.items()}
    write_grams(header, content, grams, moments)


def _fused(request: Request, context: Context, model: nn.Module) -> dict[str, Tensor] | None:
    """The fused model so far; None where a piece of it has not come.

    A piece brings a layer under its first name; the others are the same tensor.
    """
    number, sequence = request.header.round, request.header.fit.sequence
    before = fused_so_far(context, number, sequence) if sequence else {}
    if before is None:
        return None
    known, first = {**before, **request.anchor}, tied(model.state_dict())
    fused = {name: known[first.get(name, name)] for name in known}
    keep_fused(context, number, sequence, fused)
    return fused
