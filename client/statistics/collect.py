"""What a client collects on its aligned model for the round's sum: Gram matrices, Kronecker factors, Fisher."""

import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from fedbasin.client.lora_names import completed, model_names
from fedbasin.client.request import Data, Request, required
from fedbasin.client.statistics.fisher import diagonal_fisher
from fedbasin.client.statistics.gram import gram_pieces
from fedbasin.client.statistics.kronecker_factors import kronecker_factors
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.encodings import read_encodings, write_grams, write_kroneckers
from fedbasin.strategies.fusion.compression.formats import Pieces
from fedbasin.strategies.tensors.state import State


def collect(
    request: Request,
    aligned: State,
    model: nn.Module,
    data: Data | None,
    header: pb.UpdateHeader,
    content: RecordDict,
) -> None:
    """Add the statistics that the request asks for to a reply.

    Args:
        request: the question.
        aligned: the client's model in the anchor's frame.
        model: to run; its tensors are replaced.
        data: gives the client's own examples, afresh at every call.
        header: of the reply, with the client's examples.
        content: of the reply.

    Raises:
        MissingDataError: statistics are asked for and there is no data.
    """
    kind = request.header.precision
    if kind == pb.PRECISION_KIND_SCALAR:
        return
    batches = required(data, pb.PrecisionKind.Name(kind))
    model.load_state_dict(completed(model, aligned))
    if kind == pb.PRECISION_KIND_GRAM:
        write_grams(header, content, _gram_pieces(request, model, batches), {})
    elif kind == pb.PRECISION_KIND_KRONECKER:
        factors = kronecker_factors(model, batches(), _generator(request, model))
        pairs = {block: (found.inputs, found.outputs) for block, found in factors.items()}
        write_kroneckers(header, content, pairs)
    else:
        fisher = diagonal_fisher(model, batches(), _generator(request, model))
        _write_fisher(header, content, fisher)


def _write_fisher(header: pb.UpdateHeader, content: RecordDict, fisher: dict[str, Tensor]) -> None:
    named = {name: _normalised(f, header.examples).float() for name, f in fisher.items()}
    content[wire.STATISTICS], specs = packing.pack(named)
    for name, spec in zip(named, specs, strict=True):
        header.precisions.add(tensors=(name,), kind=pb.PRECISION_KIND_DIAGONAL, statistic=spec)


def _generator(request: Request, model: nn.Module) -> torch.Generator:
    """Draws the same labels whenever this client is asked the same again."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.Generator(device).manual_seed(request.seed)


def _gram_pieces(request: Request, model: nn.Module, batches: Data) -> dict[Block, Pieces]:
    """Of the blocks that were asked for, under the names that they were asked by."""
    encodings, shrink = read_encodings(request.header.encodings), request.header.shrink
    asked = [tuple(block.tensors) for block in request.header.blocks]
    if not asked:
        return gram_pieces(model, batches(), shrink, encodings)
    names = model_names(model, request.anchor)
    own = {tuple(names[name] for name in block): block for block in asked}
    known = {block: encodings[asked] for block, asked in own.items() if asked in encodings}
    found = gram_pieces(model, batches(), shrink, known, own)
    return {own[block]: pieces for block, pieces in found.items()}


def _normalised(fisher: Tensor, examples: float) -> Tensor:
    """Fisher information with mean `examples`: clients weigh by their data, entries by what it says.

    A confident client's Fisher information is orders of magnitude below a hesitant one's, which says
    nothing about whose weights are right.
    """
    mean = fisher.double().mean()
    if not mean > 0:
        return torch.full_like(fisher, examples)
    return fisher * (examples / mean).to(fisher.dtype)
