"""One client's contribution: its weights, how many examples they saw, and what it knows about them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block, LayerGraph
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Precision, Sketched, common
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.state import State

# Behind the name of a weight that a model stores as `[in, out]`.
TRANSPOSED = ".T"


@dataclass(frozen=True, eq=False)
class Update:
    """What one client adds to the sum.

    Attributes:
        parameters: the floating tensors of its model.
        examples: the weight of every tensor that has no precision of its own.
        precisions: what is known beyond that, block by block. Layers that read the same inputs have one Gram matrix
            in common, the same object.
        moments: `Lambda . theta` of blocks for which it is known without a theta, as a fit to targets.
        layer_graph: the layers of its model in the order of use, where that was asked for.
    """

    parameters: State
    examples: float
    precisions: Mapping[Block, Precision] = field(default_factory=dict)
    moments: Mapping[Block, Tensor] = field(default_factory=dict)
    layer_graph: LayerGraph | None = None

    def moved(self, transform: Transform) -> "Update":
        """The update in another frame: weights and statistics together.

        Raises:
            ValueError: a Diagonal would have to follow a rotation, which no diagonal can; or the statistics
                are of a kind that is only collected on an aligned model.
        """
        if self.moments:
            raise ValueError("moments belong to the frame that they were collected in")
        precisions = {
            block: moved
            for blocks in common(self.precisions)
            for moved in [_moved(blocks[0], self.precisions[blocks[0]], self.parameters, transform)]
            for block in blocks
        }
        return replace(self, parameters=transform.act(self.parameters), precisions=precisions)


def stored(block: Block) -> tuple[str, ...]:
    """The names of the block's tensors in a state."""
    return *(name.removesuffix(TRANSPOSED) for name in block[:1]), *block[1:]


def weight_of(block: Block, state: State) -> Tensor:
    """The block's weight as it multiplies, `[out, in, ...]`."""
    weight = state[stored(block)[0]]
    return weight.T if block[0].endswith(TRANSPOSED) else weight


def join(block: Block, state: State) -> Tensor:
    """The block as one tensor: a vector, a matrix `[out, in]`, or `[out, in + 1]` with the bias last."""
    weight = weight_of(block, state)
    matrix = weight.flatten(1) if weight.dim() > 1 else weight
    return matrix if len(block) == 1 else torch.cat([matrix, state[block[1]][:, None]], dim=1)


def split(block: Block, joined: Tensor, like: State) -> dict[str, Tensor]:
    """Undo `join`, with the shapes and dtypes of `like`."""
    weight, name = weight_of(block, like), stored(block)[0]
    matrix = joined if len(block) == 1 else joined[:, :-1]
    shaped = matrix.reshape(weight.shape).to(weight.dtype)
    found = {name: (shaped.T if block[0].endswith(TRANSPOSED) else shaped).contiguous()}
    if len(block) > 1:
        found[block[1]] = joined[:, -1].to(like[block[1]].dtype).contiguous()
    return found


def _moved(block: Block, precision: Precision, state: State, transform: Transform) -> Precision:
    weight = stored(block)[0]
    if isinstance(precision, Sketched):
        precision = Gram(precision.matrix)
    if isinstance(precision, Gram):
        if precision.matrix.dim() > 2:
            raise ValueError(
                f"{weight}: the Gram matrices of a grouped convolution cannot follow; align on the client"
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
