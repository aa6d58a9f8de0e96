"""The reply to a fit: no training, only how well layers agree with what the client's own model computes.

The client builds on what it kept in this round: its own model as it was sent, and the fused model so far, of
which every request brings the part that is new.
"""

from collections.abc import Mapping, Sequence

from flwr.app import Context, MetricRecord, RecordDict
from torch import Tensor, nn

from fedbasin.client.capture.batchnorm_statistics import Moments, measuring
from fedbasin.client.client_state import begun, fused_pieces, sent, sent_examples
from fedbasin.client.measure.loss_path import path_losses
from fedbasin.client.measure.measure import path_message
from fedbasin.client.refit.regression import regress
from fedbasin.client.request import Data, Request, answer, required
from fedbasin.client.statistics.gram_accumulators import finished
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import BatchNorm
from fedbasin.strategies.encodings import read_encodings, write_grams
from fedbasin.strategies.fusion.compression.formats import encode_moment
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.round.stages import Along
from fedbasin.strategies.tensors.state import State, tied

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
        request: the question.
        context: where the client kept its models, the piece of the fused model that came with the request included.
        model: to run; its tensors are replaced.
        data: gives the client's own examples, afresh at every call.
        probed: gives those on which models are compared.

    Raises:
        MissingDataError: there is no data.
    """
    header, content = answer(request), RecordDict()
    number, sequence = request.header.round, request.header.fit.sequence
    own, pieces = sent(context, number), fused_pieces(context, number, sequence)
    if own is None or not pieces:
        header.lost = True
    else:
        batches = required(data, "a fit")
        header.examples = sent_examples(context)
        content["metrics"] = MetricRecord({"num-examples": header.examples})
        fused = _merged(pieces, model)
        _fit(request, own, fused, model, batches, header, content)
        if request.path_points:
            first, asked = _merged(pieces[:1], model), request.header.fit.path
            ends = Along(asked.share, asked.reach).ends(begun(context), first, fused)
            path = path_losses(model, *ends, required(probed, "a path")(), request.path_points)
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
    norms = [BatchNorm(norm.name, norm.eps) for norm in asked.norms]
    with measuring(model, norms) as read:
        sums = regress(model, own, fused, blocks, _TARGET[asked.target], batches(), encodings)
    _write_measured(header, content, fused, read)
    moments = {
        block: encode_moment(found.moment, encodings.get(block, Encoding()).moment)
        for block, found in sums.items()
    }
    totals = {block: found.inputs for block, found in sums.items()}
    grams = finished(totals, lambda total: total.dividing())
    write_grams(header, content, grams, moments)


def _write_measured(
    header: pb.UpdateHeader, content: RecordDict, fused: State, read: Mapping[BatchNorm, Moments]
) -> None:
    """The running statistics that the fused model has on the client's data."""
    measured = {
        name: statistic
        for norm, moments in read.items()
        for name, statistic in zip(
            norm.measured, moments.statistics(*map(fused.__getitem__, norm.measured)), strict=True
        )
    }
    if measured:
        content[wire.ARRAYS], specs = packing.pack(measured)
        header.tensors.extend(specs)


def _merged(pieces: Sequence[State], model: nn.Module) -> dict[str, Tensor]:
    """One state. A piece brings a layer under its first name; the others are the same tensor."""
    known = {name: tensor for piece in pieces for name, tensor in piece.items()}
    first = tied(model.state_dict())
    return {name: known[first.get(name, name)] for name in known}
