"""Feature regression: the normal equations of layers fitted to the features of the client's own model.

    W* = argmin_W  sum_k || W X~_k - Z_k ||^2        X~_k  inputs, computed by the layers already fused
                                                     Z_k   outputs, computed by client k's own model

A client sends `X~ X~^T` and `(Z - W X~) X~^T`, where W is the layer as it is before the fit: sums over its examples
without labels, gradients or single rows. It sends the cross-moment of the residual and not `Z X~^T`, because an inexact
`X~ X~^T` then changes the length of one step only, not the point at which steps end. RegMean is the special case in
which the fused inputs are the client's own. Where an output is added to a residual stream or normalised, the layer is
fitted to the sum or the normalised image (`invertible_path`).

Source: RegMean, Jin et al. 2023, arXiv 2212.09849; RegMean++, Nguyen et al. 2025, arXiv 2508.03121 (targets
`W_k X~_k`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.client.refit.invertible_path import InvertiblePath, InvertiblePaths
from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.capture.layer_calls import LayerCall, LayerCalls, layer_by_layer
from fedbasin.strategies.fusion.layers import Layer, gram_layers
from fedbasin.strategies.fusion.update import join, tensor_names
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.statistics.gram_accumulators import GramAccumulator
from fedbasin.strategies.statistics.shared_inputs import InputNumbers, SharedAccumulators
from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read_batches
from fedbasin.strategies.tensors.state import State, tied

# The layer of a call and the shape of its output, which identify the call in another model.
Use: TypeAlias = tuple[Layer, torch.Size]
Record = TypeVar("Record")


class FlowError(ValueError):
    """A model whose order of layers depends on its weights, so that two models' layers cannot be compared."""


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """The normal equations of one layer over a client's examples, in double.

    Attributes:
        inputs: accumulator of `X~ X~^T`, with the ones last where there is a bias, and one matrix for each group of a
            grouped convolution. Layers that read the same tensors share it, as one object.
        moment: `(Z - W X~) X~^T`, `[out, in]`.
    """

    inputs: GramAccumulator
    moment: Float[Tensor, "out inputs"]

    @property
    def gram(self) -> Float[Tensor, "*groups inputs inputs"]:
        """The Gram matrix of the inputs, as far as the accumulator keeps it."""
        return self.inputs.gram


def regress(
    model: nn.Module,
    own: State,
    fused: State,
    blocks: Sequence[Block],
    target: Literal[Target.features, Target.weights],
    batches: Batches,
    encodings: Mapping[Block, Encoding] | None = None,
) -> dict[Block, NormalEquations]:
    """Accumulate the normal equations of some layers over a client's data.

    Several levels may be fitted at once. Behind a layer that is fitted to features the model continues with the
    features of the client's own model, as if the layer were fitted already; with other targets it continues with the
    output of the client's own weights.

    Args:
        model: module that runs the states; its tensors are replaced.
        own: the client's model, in the frame of the others.
        fused: the model so far; floating tensors that it lacks are the client's own.
        blocks: the layers to fit.
        target: the values to which they are fitted.
        batches: the client's data, read once.
        encodings: encodings in which the sums will be sent; a sketch is made while reading.

    Raises:
        ValueError: there is no data, or a block is not a layer of the model.
        FlowError: the two models do not call the layers in the same order.
    """
    layers = select_layers(model, blocks)
    # The layer as it was fused, whose output is subtracted from the goals.
    bases = {block: join(block, fused).double() for block in blocks}
    load(model, {**fused, **{name: own[name] for block in blocks for name in tensor_names(block)}})
    teacher = None
    if target is Target.features:
        # A copy, because both models run on every batch, and the data is read once.
        teacher = deepcopy(model).eval()
        load(teacher, own)
    accumulators = SharedAccumulators(model, layers, encodings or {})
    moments = {layer.block: _zero_moment(model, layer) for layer in layers}
    with evaluating(model), layer_by_layer(), torch.no_grad():
        for batch in read_batches(batches, model):
            for call, number, goal in _goals(model, teacher, layers, batch):
                block = call.layer.block
                accumulator = accumulators.accumulator_for(block, number)
                _add(accumulator, moments[block], call, goal, bases[block], batch.mask)
            accumulators.end_pass()
    return {
        block: NormalEquations(accumulator, moments[block]) for block, accumulator in accumulators.accumulators.items()
    }


def _goals(
    model: nn.Module, teacher: nn.Module | None, layers: Sequence[Layer], batch: Batch
) -> Iterator[tuple[LayerCall, int, Tensor]]:
    """Run one batch and yield each call of the fitted layers, the number of its inputs, and the goal of its output."""
    numbers: list[int] = []
    leads = _run(teacher, layers, batch, _use) if teacher else []
    calls = _run(model, layers, batch, partial(_copy, InputNumbers(), numbers), leads)
    if teacher:
        _check_flow([use for use, _ in leads], [_use(call) for call, _ in calls])
    for index, (call, path) in enumerate(calls):
        # Without a teacher the layer's own weights, which the model holds, give the goal.
        goal = path.invert(leads[index][1].value) if teacher else call.output
        yield call, numbers[index], goal


def load(model: nn.Module, state: State) -> None:
    """Replace the tensors of a model; a tensor with several names follows the first of them."""
    tensors = {**model.state_dict(), **state}
    names = tied(model.state_dict())
    model.load_state_dict({name: tensors[first_name] for name, first_name in names.items()})


def select_layers(model: nn.Module, blocks: Sequence[Block]) -> list[Layer]:
    """Return the layers of some blocks; raises a ValueError if the model has no such layer."""
    layers = {layer.block: layer for layer in gram_layers(model)}
    if unknown := [block for block in blocks if block not in layers]:
        raise ValueError(
            f"{'+'.join(unknown[0])} is not a linear layer or convolution of this {type(model).__name__}; use the "
            "same model class as the server"
        )
    return [layers[block] for block in blocks]


def _zero_moment(model: nn.Module, layer: Layer) -> Tensor:
    device = model.get_parameter(tensor_names(layer.block)[0]).device
    return torch.zeros(layer.outputs, layer.inputs, dtype=torch.float64, device=device)


def _copy(inputs: InputNumbers, numbers: list[int], call: LayerCall) -> LayerCall:
    numbers.append(inputs.number(call))
    return call.copy()


def _run(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: Batch,
    record: Callable[[LayerCall], Record],
    leads: Sequence[tuple[Use, InvertiblePath]] = (),
) -> list[tuple[Record, InvertiblePath]]:
    """Run one forward pass.

    Args:
        model: the model.
        layers: the layers to observe.
        batch: the batch.
        record: function of a call whose result is kept.
        leads: uses and paths of another model's calls, whose values the model continues with.

    Returns:
        the record of each call, with the path of its output.
    """
    records: list[tuple[Record, InvertiblePath]] = []
    paths = InvertiblePaths()

    def observe(call: LayerCall) -> None:
        use, lead = leads[len(records)] if len(records) < len(leads) else (None, None)
        # Recorded before the path is followed, which may write over the output.
        entry = record(call)
        path = paths.follow(call.output, lead if use == _use(call) else None)
        records.append((entry, path))

    with paths, LayerCalls(model, layers, observe):
        forward(model, batch)
    return records


def _check_flow(own: Sequence[Use], fused: Sequence[Use]) -> None:
    for own_use, fused_use in zip_longest(own, fused):
        if own_use != fused_use:
            raise FlowError(
                f"{(own_use or fused_use)[0].block[0]} is not used in the same place by the client's model and by the "
                "fused one; a model whose order of layers depends on its weights needs the recipe regmean or fedavg"
            )


def _use(call: LayerCall) -> Use:
    return call.layer, call.output.shape


def _add(
    accumulator: GramAccumulator | None,
    moment: Tensor,
    call: LayerCall,
    goal: Tensor,
    base: Tensor,
    mask: Tensor | None,
) -> None:
    """Add one call to a layer's sums; the accumulator is None where another layer has added the same inputs."""
    groups = call.layer.groups
    moment = moment.unflatten(0, (groups, -1))
    base = base.to(moment.device).unflatten(0, (groups, -1))
    for rows, columns in zip(call.rows(mask), call.columns(goal, mask), strict=True):
        if accumulator is not None:
            accumulator.add(rows)
        moment.baddbmm_((columns - rows @ base.mT).mT, rows)
