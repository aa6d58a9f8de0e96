"""A residual network whose blocks and last layer a closed form finds, block by block, in one round.

    Phi_0 = relu(A x + a)      F_t = relu(B_t Phi_t + b_t)      Phi_{t+1} = Phi_t + Omega_t F_t
    outputs = W [Phi_t; F_t] + w      t the first block that is not fitted

A, B_t are drawn from a seed, Omega_t are zero until they are fitted (`block_fit`). The features of the first block that
is not fitted stand beside the stream in the inputs of the last layer. The Gram matrix of these inputs and their
cross-moment with the targets are what clients send for a last layer, and determine the block: fitting one needs no
message of its own kind. The last block is never fitted: the last layer reads its features as they are, which is at
least as close to the targets as a block under a last layer.

Source: Tang et al. 2026 (DeepAFL), arXiv 2603.00579, where the last layer reads the stream alone.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.strategies.analytic.frozen import FrozenBody, check_sizes, empty_head, random_layer
from fedbasin.strategies.tensors.state import State

_FITTED_BLOCKS = "fitted_blocks"
_HEAD = ("head.weight", "head.bias")


class AnalyticBlock(nn.Module):
    """A frozen random layer of ReLUs, and the matrix by which its features are added to the stream."""

    def __init__(self, width: int, draw: torch.Generator) -> None:
        super().__init__()
        self.random = random_layer(width, width, draw)
        self.fitted = nn.Linear(width, width, bias=False).requires_grad_(requires_grad=False)
        nn.init.zeros_(self.fitted.weight)

    def forward(
        self, stream: Float[Tensor, "batch width"]
    ) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch width"]]:
        """Return the features F_t of a stream, and the stream with what they add to it."""
        features = torch.relu(self.random(stream))
        return features, stream + self.fitted(features)


class DeepAnalytic(nn.Module):
    """A residual network of random features, whose blocks the recipe `deep-analytic` fits in one round.

    It takes the place of an app's network, on the server and on the clients. An app that trains it trains the last
    layer alone, and the recipe replaces what comes of that.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int = 512, depth: int = 3, seed: int = 0, body: nn.Module | None = None
    ) -> None:
        """Draw the random layers.

        Args:
            inputs: number of numbers in an example, or in an output of the body, after flattening.
            outputs: number of outputs, as classes.
            width: number of features in the stream and in each block; the last layer has twice as many inputs.
            depth: number of blocks; a round has one stage without training for each.
            seed: seed of the random layers, the same for all clients.
            body: a module that the first layer reads from, as a pretrained backbone; it is frozen in place, and stays
                in evaluation mode. None reads examples.

        Raises:
            ValueError: a size is below 1.
        """
        super().__init__()
        check_sizes("deep analytic networks", inputs=inputs, outputs=outputs, width=width, depth=depth)
        draw = torch.Generator().manual_seed(seed)
        self.body = FrozenBody(body)
        self.first = random_layer(inputs, width, draw)
        self.blocks = nn.ModuleList(AnalyticBlock(width, draw) for _ in range(depth))
        self.head = empty_head(2 * width, outputs)
        self.fitted_blocks: Tensor
        self.register_buffer(_FITTED_BLOCKS, torch.tensor(0))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch outputs"]:
        stream, of_blocks = torch.relu(self.first(self.body(x))), []
        for block in self.blocks:
            # Blocks that are not fitted add nothing, so that this ends as the stream of those that are.
            features, stream = block(stream)
            of_blocks.append(features)
        return self.head(torch.cat([stream, torch.stack(of_blocks)[self.fitted_blocks]], 1))


def count_blocks(model: State) -> int:
    """Return the number of blocks of a network."""
    return sum(name.startswith("blocks.") and name.endswith(".fitted.weight") for name in model)


def unfitted(model: State) -> dict[str, Tensor]:
    """Return a network whose blocks add nothing, with an empty last layer, as it was drawn from its seed."""
    names = (*_HEAD, _FITTED_BLOCKS, *(_fitted(number) for number in range(count_blocks(model))))
    return {**model, **{name: torch.zeros_like(model[name]) for name in names}}


def with_block(model: State, matrix: Float[Tensor, "width width"]) -> dict[str, Tensor]:
    """Return a network with its next block fitted.

    Args:
        model: the network.
        matrix: the matrix Omega of the block.
    """
    number = model[_FITTED_BLOCKS]
    name = _fitted(int(number))
    changed: Mapping[str, Tensor] = {name: matrix.to(model[name]), _FITTED_BLOCKS: number + 1}
    return {**model, **changed}


def _fitted(number: int) -> str:
    return f"blocks.{number}.fitted.weight"
