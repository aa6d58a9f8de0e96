"""A client's update, and the blocks of weights that its statistics describe."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block, LayerGraph
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Precision, Sketched, common
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.state import State

# Suffix of a weight's name in a block, where the model stores the weight as `[in, out]`.
TRANSPOSED = ".T"


@dataclass(frozen=True, eq=False)
class Update:
    """A client's contribution to the sum of a round.

    Attributes:
        parameters: tensors of the client's model; those that are not floating may be left out.
        examples: number of training examples, the weight of every tensor without a precision.
        precisions: precision of each block. Layers that read the same inputs share one Gram matrix object.
        cross_moments: `Lambda . theta` of blocks that are fitted to targets, for which there is no theta to multiply.
        layer_graph: layers of the client's model in their order of use, if the stage asked for it.
    """

    parameters: State
    examples: float
    precisions: Mapping[Block, Precision] = field(default_factory=dict)
    cross_moments: Mapping[Block, Tensor] = field(default_factory=dict)
    layer_graph: LayerGraph | None = None

    def apply(self, transform: Transform) -> "Update":
        """Return the update with a transform applied to weights and statistics.

        Raises:
            ValueError: the transform rotates a block with a diagonal precision, which would not stay diagonal; or
                there are cross-moments or Gram matrices of a grouped convolution, which cannot be transformed.
        """
        if self.cross_moments:
            raise ValueError("cross-moments cannot be transformed; align on the client before they are collected")
        precisions: dict[Block, Precision] = {}
        for block, *sharing in common(self.precisions):
            # Applied once for all blocks that share an object, so that the result is one object as well.
            precision = _apply(block, self.precisions[block], self.parameters, transform)
            precisions |= dict.fromkeys([block, *sharing], precision)
        return replace(self, parameters=transform.act(self.parameters), precisions=precisions)

    def scaled(self, factor: float) -> "Update":
        """Return the update with another weight in every sum."""
        precisions: dict[Block, Precision] = {}
        for block, *sharing in common(self.precisions):
            precisions |= dict.fromkeys([block, *sharing], self.precisions[block].scaled(factor))
        moments = {block: factor * moment for block, moment in self.cross_moments.items()}
        return replace(self, examples=factor * self.examples, precisions=precisions, cross_moments=moments)

    def cpu(self) -> "Update":
        """Return the update with all of its tensors on the CPU."""
        precisions: dict[Block, Precision] = {}
        for block, *sharing in common(self.precisions):
            precision: Any = self.precisions[block]
            tensors = {name: value.cpu() for name, value in vars(precision).items() if isinstance(value, Tensor)}
            precisions |= dict.fromkeys([block, *sharing], replace(precision, **tensors))
        parameters = {name: tensor.cpu() for name, tensor in self.parameters.items()}
        moments = {block: moment.cpu() for block, moment in self.cross_moments.items()}
        return replace(self, parameters=parameters, precisions=precisions, cross_moments=moments)


def tensor_names(block: Block) -> tuple[str, ...]:
    """Return the names of the block's tensors in a state."""
    return *(name.removesuffix(TRANSPOSED) for name in block[:1]), *block[1:]


def weight_of(block: Block, state: State) -> Tensor:
    """Return the block's weight as `[out, in, ...]`, however the model stores it."""
    weight = state[tensor_names(block)[0]]
    return weight.T if block[0].endswith(TRANSPOSED) else weight


def join(block: Block, state: State) -> Tensor:
    """Return the block as one tensor: a vector, a matrix `[out, in]`, or `[out, in + 1]` with the bias last."""
    weight = weight_of(block, state)
    # The bias is the weight of an input that is always one, so that it is solved for with the weight.
    matrix = weight.flatten(1) if weight.dim() > 1 else weight
    return matrix if len(block) == 1 else torch.cat([matrix, state[block[1]][:, None]], dim=1)


def split(block: Block, joined: Tensor, like: State) -> dict[str, Tensor]:
    """Return the block's tensors by name from a joined tensor, with the shapes and dtypes of `like`."""
    weight, name = weight_of(block, like), tensor_names(block)[0]
    matrix = joined if len(block) == 1 else joined[:, :-1]
    shaped = matrix.reshape(weight.shape).to(weight.dtype)
    parts = {name: (shaped.T if block[0].endswith(TRANSPOSED) else shaped).contiguous()}
    if len(block) > 1:
        parts[block[1]] = joined[:, -1].to(like[block[1]].dtype).contiguous()
    return parts


def _apply(block: Block, precision: Precision, state: State, transform: Transform) -> Precision:
    weight = tensor_names(block)[0]
    if isinstance(precision, Sketched):
        # A sketch's diagonal would not stay diagonal under a rotation.
        precision = Gram(precision.matrix)
    if isinstance(precision, Gram):
        if precision.matrix.dim() > 2:
            raise ValueError(
                f"{weight}: the Gram matrices of a grouped convolution cannot be transformed; align on the client"
            )
        inputs = weight_of(block, state).shape[1]
        axis = 0 if block[0].endswith(TRANSPOSED) else 1
        return Gram(transform.act_on_inputs(weight, precision.matrix, inputs, axis))
    if isinstance(precision, Diagonal):
        if transform.mixes(weight):
            raise ValueError(
                f"{weight}: a diagonal precision cannot follow a rotation; collect it on the aligned "
                "model (align on the client), or restrict the symmetry to permutations"
            )
        return Diagonal(transform.act_on_squares({weight: precision.values})[weight])
    return precision
