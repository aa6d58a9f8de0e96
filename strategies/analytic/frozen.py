"""The frozen parts of a network whose last layer a closed form finds: a body, random layers, and the empty last layer."""

import torch
from torch import nn

# Features of unit variance from inputs of unit variance, and biases that spread the kinks.
_GAIN, _SHIFT = 1.4, 0.3


class FrozenBody(nn.Sequential):
    """A module whose outputs are the inputs of a network, one vector for each example; nothing in it ever changes.

    Its parameters take no gradient, and it stays in evaluation mode, so that running statistics and dropout do not act.
    """

    def __init__(self, body: nn.Module | None) -> None:
        """Freeze a module in place.

        Args:
            body: the module; None for the examples as they are.
        """
        super().__init__(*([] if body is None else [body]), nn.Flatten())
        self.requires_grad_(requires_grad=False).eval()

    def train(self, mode: bool = True) -> "FrozenBody":  # noqa: ARG002 - the signature is torch's
        return super().train(mode=False)


def random_layer(inputs: int, width: int, draw: torch.Generator) -> nn.Linear:
    """Return a frozen layer whose ReLUs are as large as its inputs.

    Args:
        inputs: number of inputs.
        width: number of outputs.
        draw: generator of its weights.
    """
    layer = nn.Linear(inputs, width).requires_grad_(requires_grad=False)
    layer.weight.copy_(torch.randn(inputs, width, generator=draw).T * _GAIN / inputs**0.5)
    layer.bias.copy_(torch.randn(width, generator=draw) * _SHIFT)
    return layer


def empty_head(inputs: int, outputs: int) -> nn.Linear:
    """Return a last layer of zeros, which is the only part of the network that an app can train."""
    head = nn.Linear(inputs, outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def check_sizes(network: str, **sizes: int) -> None:
    """Check that sizes are 1 or more.

    Args:
        network: what they are sizes of, in the plural.
        sizes: the sizes by the names of their arguments.

    Raises:
        ValueError: a size is below 1.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: {network} need 1 or more")
