"""A network of one frozen random layer, whose last layer a closed form finds in one round.

    outputs = A relu(W x + b) + a        W, b drawn from a seed; A, a from the clients' sums

It has learned no representation, so it is what every recipe that trains is to be held against. Sources: random
features, Rahimi and Recht 2007, NeurIPS 20; closed-form heads of a federation, Fani et al. 2024, arXiv 2402.01989, and
He et al. 2025, arXiv 2405.16240.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Features of unit variance from inputs of unit variance, and biases that spread the kinks.
_GAIN, _SHIFT = 1.4, 0.3


class RandomFeatures(nn.Module):
    """A frozen random layer of ReLUs under a linear last layer, which the recipe `head` fits in one round.

    It takes the place of an app's network, on the server and on the clients. An app that trains it trains the last
    layer alone, and the recipe replaces what comes of that.
    """

    def __init__(self, inputs: int, outputs: int, width: int = 1024, seed: int = 0) -> None:
        """Draw the random layer.

        Args:
            inputs: number of numbers in an example, after flattening.
            outputs: number of outputs, as classes.
            width: number of random features.
            seed: seed of the random layer, the same for all clients.

        Raises:
            ValueError: a size is below 1.
        """
        super().__init__()
        for name, size in (("inputs", inputs), ("outputs", outputs), ("width", width)):
            if size < 1:
                raise ValueError(f"{name} = {size}: random features need 1 or more")
        draw = torch.Generator().manual_seed(seed)
        self.flatten = nn.Flatten()
        self.features = nn.Linear(inputs, width).requires_grad_(requires_grad=False)
        self.features.weight.copy_(torch.randn(inputs, width, generator=draw).T * _GAIN / inputs**0.5)
        self.features.bias.copy_(torch.randn(width, generator=draw) * _SHIFT)
        self.head = nn.Linear(width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch outputs"]:
        return self.head(torch.relu(self.features(self.flatten(x))))
