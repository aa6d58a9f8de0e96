"""Building a client's reply: align the trained model, measure, collect statistics on it, pack.

anchor, trained  ->  aligned, precision, path, header

A model that alignment has made another function of is not sent: the reply says so, in place of the tensors.
"""

from flwr.app import MetricRecord, RecordDict
from torch import nn

from fedbasin.client.align import align
from fedbasin.client.measure.measure import measure
from fedbasin.client.refit.regression import read_layer_graph
from fedbasin.client.request import Data, Request, answer, required
from fedbasin.client.statistics.collect import collect
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, plain, wire
from fedbasin.proto.layer_graph import LayerGraph
from fedbasin.strategies.fusion.lora.lora_factors import widened
from fedbasin.strategies.tensors.state import State, floating


def build_reply(
    request: Request,
    trained: State,
    metrics: dict[str, float],
    model: nn.Module,
    data: Data | None = None,
    *,
    train_seconds: float = 0.0,
) -> RecordDict:
    """The reply to a stage: the model in the anchor's frame, and what the client knows about it.

    Args:
        request: the question.
        trained: the client's own model.
        metrics: what the app measured; `num-examples` is the client's weight.
        model: to run; its tensors are replaced.
        data: gives the client's own examples, afresh at every call.
        train_seconds: how long training took, for the round's report.

    Raises:
        MissingDataError: the stage needs data and there is none.
        KeyError: the metrics have no `num-examples`.
    """
    header = answer(request)
    header.examples = _examples(metrics)
    header.train_seconds = train_seconds
    content = RecordDict({"metrics": MetricRecord(dict(metrics))})
    if request.header.align:
        # A space of adapters is as wide as the anchor's rank.
        trained = widened(trained, request.anchor)
    aligned = align(request, trained, model, data, header)
    measure(request, trained, aligned, model, data, header)
    if not header.function_changed:
        collect(request, aligned, model, data, header, content)
        _pack(request, aligned, header, content)
    if request.header.order:
        _describe_order(header, read_layer_graph(model, required(data, "the layer graph")()))
    wire.write(content, header)
    return content


def _pack(request: Request, aligned: State, header: pb.UpdateHeader, content: RecordDict) -> None:
    aligned = widened(aligned, request.anchor)
    if request.header.anchor:
        content[wire.ARRAYS], specs = packing.pack(floating(aligned))
        header.tensors.extend(specs)
    else:
        content[wire.ARRAYS] = plain.write({name: aligned[name] for name in request.anchor})


def _describe_order(header: pb.UpdateHeader, found: LayerGraph) -> None:
    for level in found.levels:
        header.levels.add(blocks=[pb.Block(tensors=block) for block in level])
    if found.head:
        header.head.tensors.extend(found.head)
    for norm in found.norms:
        header.norms.add(name=norm.name, eps=norm.eps)


def _examples(metrics: dict[str, float]) -> float:
    if "num-examples" not in metrics:
        raise KeyError(
            "the reply's metrics lack 'num-examples', the weight of this client's update"
        )
    return metrics["num-examples"]
