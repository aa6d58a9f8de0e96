"""A network of one-hot buckets, whose last layer a closed form finds in one round.

    bits = [B x + b > 0]      code of a group = its bits as a number      outputs = sum over groups of E_group[code]

B and b are drawn from a seed; the tables E are the columns of a linear last layer on the groups' one-hot codes, so that
least squares finds a function that is not linear in x.

After the idea of Bacellar et al. 2025 (SAFLe), arXiv 2512.03336: there the bits are thresholds of a pretrained
network's features, several for each, which are shuffled and grouped. Here they are thresholds of random projections,
because examples of any scale and few features have to give as many bits: on letters, with 16 features and 1024 buckets,
projections had .852 and thresholds of single features .821.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedbasin.strategies.analytic.frozen import FrozenBody, check_sizes, empty_head

# Spread of the thresholds, for projections of unit variance.
_SHIFT = 0.5


class BucketedFeatures(nn.Module):
    """Frozen random buckets under a linear last layer, which the recipe `head` fits in one round.

    It takes the place of an app's network, on the server and on the clients. An app that trains it trains the last
    layer alone, and the recipe replaces what comes of that.
    """

    powers: Tensor

    def __init__(
        self, inputs: int, outputs: int, width: int = 1024, bits: int = 2, seed: int = 0, body: nn.Module | None = None
    ) -> None:
        """Draw the thresholds.

        Args:
            inputs: number of numbers in an example, or in an output of the body, after flattening.
            outputs: number of outputs, as classes.
            width: number of buckets of all groups, a multiple of `2 ** bits`.
            bits: number of bits of a group, which has `2 ** bits` buckets.
            seed: seed of the thresholds, the same for all clients.
            body: a module that the buckets read from, as a pretrained backbone; it is frozen in place, and stays in
                evaluation mode. None reads examples.

        Raises:
            ValueError: a size is below 1, or the width is no multiple of a group's buckets.
        """
        super().__init__()
        check_sizes("bucketed features", inputs=inputs, outputs=outputs, width=width, bits=bits)
        if width % 2**bits:
            raise ValueError(
                f"width = {width}: groups of {bits} bits have {2**bits} buckets each; give a multiple of that"
            )
        draw = torch.Generator().manual_seed(seed)
        count = width // 2**bits * bits
        self.body = FrozenBody(body)
        self.thresholds = nn.Linear(inputs, count).requires_grad_(requires_grad=False)
        self.thresholds.weight.copy_(torch.randn(inputs, count, generator=draw).T / inputs**0.5)
        self.thresholds.bias.copy_(torch.randn(count, generator=draw) * _SHIFT)
        self.register_buffer("powers", 2 ** torch.arange(bits), persistent=False)
        self.head = empty_head(width, outputs)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch outputs"]:
        projections = self.thresholds(self.body(x))
        bits = (projections > 0).unflatten(1, (-1, len(self.powers)))
        codes = (bits * self.powers).sum(2)
        buckets = one_hot(codes, 2 ** len(self.powers)).flatten(1)
        return self.head(buckets.to(projections.dtype))
