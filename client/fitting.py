"""The reply to a fit: no training, only how well layers agree with what the client's own model computes.

The client builds on what it kept in this round: its own model as it was sent, and the fused model so far, of
which every request brings the part that is new.
"""

from flwr.app import Context, MetricRecord, RecordDict
from torch import Tensor, nn

from fedbasin.client.context import (
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
from fedbasin.proto import packing, wire
from fedbasin.strategies.recipe import Target
from fedbasin.strategies.state import State

_TARGET = {
    pb.FIT_TARGET_FEATURES: Target.features,
    pb.FIT_TARGET_WEIGHTS: Target.weights,
    pb.FIT_TARGET_LABELS: Target.labels,
}


def fit_reply(
    request: Request, context: Context, model: nn.Module, data: Data | None
) -> RecordDict:
    """Sums over the client's own examples, of the layers that the request names or of the path it asks for.

    Args:
        request: the question; its anchor is what is new of the fused model.
        context: where the client kept its models.
        model: to run; its tensors are replaced.
        data: gives the client's own examples, afresh at every call.

    Raises:
        MissingDataError: there is no data.
    """
    header, content = answer(request), RecordDict()
    own, fused = sent(context, request.header.round), _fused(request, context)
    if own is None or fused is None:
        header.lost = True
    else:
        batches = required(data, "a fit")
        header.examples = sent_examples(context)
        content["metrics"] = MetricRecord({"num-examples": header.examples})
        _fit(request, own, fused, model, batches, header, content)
        if request.path_points:
            start = fused_at_first(context)
            path = path_losses(model, start, fused, batches(), request.path_points)
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
    sums = regress(model, own, fused, blocks, _TARGET[asked.target], batches())
    tensors = {f"gram {'+'.join(b)}": s.gram.float() for b, s in sums.items()}
    tensors |= {f"moment {'+'.join(b)}": s.moment.float() for b, s in sums.items()}
    content[wire.STATISTICS], specs = packing.pack(tensors)
    for block, gram, moment in zip(sums, specs, specs[len(sums) :], strict=False):
        header.precisions.add(
            tensors=block, kind=pb.PRECISION_KIND_GRAM, statistic=gram, moment=moment
        )


def _fused(request: Request, context: Context) -> dict[str, Tensor] | None:
    """The fused model so far; None where a piece of it has not come."""
    number, sequence = request.header.round, request.header.fit.sequence
    before = fused_so_far(context, number, sequence) if sequence else {}
    if before is None:
        return None
    fused = {**before, **request.anchor}
    keep_fused(context, number, sequence, fused)
    return fused
