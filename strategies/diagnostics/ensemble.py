"""The ensemble of the clients: what fusing could reach at best, if all of their models were kept.

    p(y | x) = sum_k w_k p_k(y | x)  /  sum_k w_k

A sum, so clients are added one by one and none is kept. An ensemble costs K forward passes and one model costs
one; how far the fused model stays behind it is what fusing has lost. Deep ensembles: Lakshminarayanan et al. 2017,
arXiv 1612.01474.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# The most that one example can cost, where no client gives its class a chance: about 708 nats.
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Weighted sum of some models' probabilities on the same examples, in float64 and on the CPU.

    Law: a commutative monoid under addition with `Ensemble.zero`.
    """

    total: Float[Tensor, "examples classes"]
    weight: float

    @classmethod
    def zero(cls, examples: int, classes: int) -> "Ensemble":
        """The ensemble of no models."""
        return cls(torch.zeros(examples, classes, dtype=torch.float64), 0.0)

    @classmethod
    def of(
        cls, probabilities: Float[Tensor, "examples classes"], weight: float = 1.0
    ) -> "Ensemble":
        """The ensemble of one model.

        Raises:
            ValueError: Rows that are no probabilities, or a weight that is none.
        """
        wide = probabilities.detach().cpu().double()
        one = torch.ones(len(wide), dtype=torch.float64)
        # Half precision rounds each class by itself.
        slack = 8 * torch.finfo(probabilities.dtype).eps * wide.shape[-1]
        if not (wide >= 0).all() or not torch.allclose(wide.sum(-1), one, rtol=0, atol=slack):
            raise ValueError("rows of an ensemble are no probabilities; pass logits.softmax(-1)")
        if not 0 < weight < float("inf"):
            raise ValueError(f"a model of weight {weight} in an ensemble; choose a positive number")
        return cls(weight * wide, weight)

    def __add__(self, other: "Ensemble") -> "Ensemble":
        if self.total.shape != other.total.shape:
            raise ValueError(
                f"ensembles over {list(self.total.shape)} and {list(other.total.shape)} cannot be added; "
                "evaluate all models on the same examples"
            )
        return Ensemble(self.total + other.total, self.weight + other.weight)

    @property
    def probabilities(self) -> Float[Tensor, "examples classes"]:
        """What the ensemble says.

        Raises:
            ValueError: It has no models.
        """
        if not self.weight:
            raise ValueError("an ensemble of no models says nothing; add one first")
        return self.total / self.weight

    def accuracy(self, targets: Int[Tensor, " examples"]) -> float:
        """Share classified correctly."""
        return float((self.probabilities.argmax(-1) == targets.cpu()).double().mean())

    def loss(self, targets: Int[Tensor, " examples"]) -> float:
        """Cross entropy per example, nats.

        Law: never more than the weighted mean of the models' own losses.
        """
        chosen = self.probabilities.gather(-1, targets.cpu()[:, None])
        return float(-chosen.clamp_min(_TINY).log().mean())
