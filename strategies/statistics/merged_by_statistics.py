"""Models merged by statistics of each on its own data: Fisher merging, RegMean and RegMean++.

    theta = (sum_k w_k Lambda_k + ridge)^-1 (sum_k w_k Lambda_k theta_k + ridge mean)

The models share one module, which runs them in turn. Sums and solutions are those of a round.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.capture.layer_calls import LayerCall, LayerCalls, layer_by_layer
from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge
from fedbasin.strategies.fusion.layers import gram_layers
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Precision
from fedbasin.strategies.fusion.update import Update, tensor_names
from fedbasin.strategies.statistics.fisher import diagonal_fisher, normalise
from fedbasin.strategies.statistics.gram import grams
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batches, evaluating, forward, read_batches
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True, eq=False)
class Contribution:
    """One model of a merge.

    Attributes:
        state: all tensors of the model.
        batches: its own data, which can be read several times.
        weight: factor of its statistics.
    """

    state: State
    batches: Batches
    weight: float


Collect = Callable[[nn.Module, Batches], dict[Block, Precision]]


def collect_fisher(module: nn.Module, batches: Batches, *, task: Task | None, scaled: bool) -> dict[Block, Precision]:
    """Return the diagonal Fisher information of each parameter.

    Args:
        module: the model.
        batches: its data.
        task: the task; None takes the one that the first batch shows.
        scaled: scale each tensor's information to the mean 1, so that a confident model is not outweighed.
    """
    return fisher_precisions(diagonal_fisher(module, batches, torch.Generator().manual_seed(0), task), scaled)


def fisher_precisions(fisher: State, scaled: bool) -> dict[Block, Precision]:
    """Return the precisions of Fisher information by parameter; `scaled` as in `collect_fisher`."""
    return {
        (name,): Diagonal((normalise(values, 1.0) if scaled else values).double()) for name, values in fisher.items()
    }


def collect_grams(
    module: nn.Module, batches: Batches, *, shrink: float, blocks: Sequence[Block] | None = None
) -> dict[Block, Precision]:
    """Return the Gram matrix of the inputs of each layer, or of some layers."""
    return {block: Gram(matrix) for block, matrix in grams(module, batches, shrink, blocks).items()}


def collect_updates(module: nn.Module, models: Iterable[Contribution], collect: Collect) -> Iterator[Update]:
    """Yield the update of each model, with the statistics of its own activations.

    Args:
        module: runs the models; its tensors are replaced.
        models: the models.
        collect: returns the precisions of the module on data.

    Raises:
        ValueError: the data do not fit the module.
    """
    for model in models:
        module.load_state_dict(model.state, strict=False)
        yield Update(model.state, 1.0, collect(module, model.batches)).scaled(model.weight)


def merge_updates(anchor: State, updates: Iterable[Update], ridge: float) -> dict[str, Tensor]:
    """Return the model that updates are fused to, all at once.

    Args:
        anchor: state that gives names, shapes and dtypes.
        updates: the models with their statistics, at least one.
        ridge: strength of the regulariser, a client with the mean; relative to the mean diagonal of each sum.

    Raises:
        ValueError: the data do not fit the module, or a sum is singular.
    """
    total = Accumulator.zero(anchor)
    for update in updates:
        total.add(update)
    return total.finalize(anchor, Ridge(ridge) if ridge else None)


def merge_in_order(module: nn.Module, models: Sequence[Contribution], shrink: float, ridge: float) -> dict[str, Tensor]:
    """Return the merged model, each layer solved for on what the merged layers before it compute (RegMean++).

    Args:
        module: runs the models; its tensors are replaced.
        models: the models, at least one.
        shrink: factor on the entries of Gram matrices off the diagonal.
        ridge: strength of the regulariser, a client with the mean.

    Raises:
        ValueError: the data do not fit the module, or a sum is singular.
    """
    total = Accumulator.zero(models[0].state)
    for model in models:
        total.add(Update(model.state, 1.0).scaled(model.weight))
    fused = total.finalize(models[0].state)
    module.load_state_dict(fused, strict=False)
    for block in call_order(module, models[0].batches):
        collect = partial(collect_grams, module, shrink=shrink, blocks=[block])
        fused |= _solve(block, models, collect, ridge)
        module.load_state_dict(fused, strict=False)
    return fused


def call_order(module: nn.Module, batches: Batches) -> list[Block]:
    """Return the layers with Gram matrices in the order in which a model calls them first."""
    order: dict[Block, None] = {}

    def note(call: LayerCall) -> None:
        order.setdefault(call.layer.block)

    with evaluating(module), layer_by_layer(), torch.no_grad(), LayerCalls(module, gram_layers(module), note):
        forward(module, next(read_batches(batches, module)))
    return list(order)


def _solve(
    block: Block, models: Sequence[Contribution], collect: Callable[[Batches], dict[Block, Precision]], ridge: float
) -> dict[str, Tensor]:
    parts: Iterator[dict[str, Tensor]] = ({name: m.state[name] for name in tensor_names(block)} for m in models)
    anchor, *rest = parts
    total = Accumulator.zero(anchor)
    for model, part in zip(models, (anchor, *rest), strict=True):
        total.add(Update(part, 1.0, collect(model.batches)).scaled(model.weight))
    return total.finalize(anchor, Ridge(ridge) if ridge else None)
