"""The statistics that a client sends with its aligned model: Gram matrices, Kronecker factors or Fisher information."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedbasin.client.lora_names import complete_state, model_names
from fedbasin.client.request_reader import Data, required
from fedbasin.proto.encoding import GramForm
from fedbasin.proto.layer_graph import Block
from fedbasin.proto.reply import LayerStatistic
from fedbasin.proto.request import Request
from fedbasin.strategies.fusion.compression.formats import Pieces, encode
from fedbasin.strategies.fusion.weighting import Statistic
from fedbasin.strategies.statistics.finite import check_statistic
from fedbasin.strategies.statistics.fisher import diagonal_fisher, normalise
from fedbasin.strategies.statistics.gram import gram_pieces
from fedbasin.strategies.statistics.kronecker_factors import kronecker_factors
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.state import State


def collect(
    request: Request, aligned: State, examples: float, model: nn.Module, data: Data | None, task: Task | None = None
) -> tuple[LayerStatistic, ...]:
    """Collect the statistics that a request asks for, on the client's aligned model.

    Args:
        request: the request.
        aligned: the client's model in the anchor's frame.
        examples: weight of the client's model.
        model: module that runs the state; its tensors are replaced.
        data: gives the client's own batches, anew at every call.
        task: the task; None takes the one that the first batch shows.

    Raises:
        MissingDataError: statistics are requested and there is no data.
        Refusal: a statistic is not finite.
    """
    kind = Statistic[request.statistic]
    if kind is Statistic.none:
        return ()
    batches = required(data, f"the statistic {kind.name!r}")
    model.load_state_dict(complete_state(model, aligned))
    if kind is Statistic.gram:
        return gram_statistics(_grams(request, model, batches))
    # The same request again draws the same labels, so that it has the same reply.
    generator = torch.Generator().manual_seed(request.seed)
    if kind is Statistic.fisher:
        fisher = diagonal_fisher(model, batches(), generator, task)
        return tuple(
            LayerStatistic((name,), kind.name, (normalise(check_statistic((name,), diagonal), examples).float(),))
            for name, diagonal in fisher.items()
        )
    factors = kronecker_factors(model, batches(), generator, task)
    return tuple(
        LayerStatistic(
            block, kind.name, tuple(_triangle(check_statistic(block, side)) for side in (pair.inputs, pair.outputs))
        )
        for block, pair in factors.items()
    )


def gram_statistics(
    grams: Mapping[Block, Pieces], moments: Mapping[Block, Pieces] | None = None
) -> tuple[LayerStatistic, ...]:
    """Return Gram matrices as they are sent, each once.

    Args:
        grams: pieces of the Gram matrices; layers that share a matrix have the same object.
        moments: pieces of the cross-moments of layers that are refitted.
    """
    statistics: list[LayerStatistic] = []
    places: dict[int, int] = {}
    for place, (block, pieces) in enumerate(grams.items()):
        # By identity: comparing the values would cost more than it saves.
        same = places.setdefault(id(pieces), place)
        moment = tuple(moments[block].values()) if moments else ()
        is_first = same == place
        statistics.append(
            LayerStatistic(
                block,
                Statistic.gram.name,
                tuple(pieces.values()) if is_first else (),
                moment,
                None if is_first else same,
            )
        )
    return tuple(statistics)


def _grams(request: Request, model: nn.Module, batches: Data) -> dict[Block, Pieces]:
    """Return the Gram matrices of the requested layers, under the names in the request."""
    encodings = request.encodings
    if not request.blocks:
        return gram_pieces(model, batches(), request.shrink, encodings)
    # Adapters that travel alone have other names in the model than in the request.
    names = model_names(model, request.anchor)
    requested = {tuple(names[name] for name in block): block for block in request.blocks}
    renamed = {key: encodings[block] for key, block in requested.items() if block in encodings}
    grams = gram_pieces(model, batches(), request.shrink, renamed, requested)
    return {requested[block]: pieces for block, pieces in grams.items()}


def _triangle(factor: Tensor) -> Tensor:
    return encode(factor.cpu(), GramForm(), bias=False)["values"]
