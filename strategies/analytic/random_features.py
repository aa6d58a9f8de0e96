"""A network of one frozen random layer, whose last layer a closed form finds in one round.

    outputs = A relu(W x + b) + a        W, b drawn from a seed; A, a from the clients' sums

It has learned no representation, so it is what every recipe that trains is to be held against. Sources: random
features, Rahimi and Recht 2007, NeurIPS 20; closed-form heads of a federation, Fani et al. 2024, arXiv 2402.01989, and
He et al. 2025, arXiv 2405.16240, who put them on a frozen pretrained network.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.strategies.analytic.frozen import FrozenBody, check_sizes, empty_head, random_layer


class RandomFeatures(nn.Module):
    """A frozen random layer of ReLUs under a linear last layer, which the recipe `head` fits in one round.

    It takes the place of an app's network, on the server and on the clients. An app that trains it trains the last
    layer alone, and the recipe replaces what comes of that.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int = 1024, seed: int = 0, body: nn.Module | None = None
    ) -> None:
        """Draw the random layer.

        Args:
            inputs: number of numbers in an example, or in an output of the body, after flattening.
            outputs: number of outputs, as classes.
            width: number of random features.
            seed: seed of the random layer, the same for all clients.
            body: a module that the random layer reads from, as a pretrained backbone; it is frozen in place, and stays
                in evaluation mode. None reads examples.

        Raises:
            ValueError: a size is below 1.
        """
        super().__init__()
        check_sizes("random features", inputs=inputs, outputs=outputs, width=width)
        self.body = FrozenBody(body)
        self.features = random_layer(inputs, width, torch.Generator().manual_seed(seed))
        self.head = empty_head(width, outputs)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch outputs"]:
        return self.head(torch.relu(self.features(self.body(x))))
