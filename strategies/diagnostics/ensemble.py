"""The ensemble of the clients: the best that fusing could reach if all of their models were kept.

    p(y | x) = sum_k w_k p_k(y | x)  /  sum_k w_k

The ensemble is a sum, so clients are added one by one and none is stored. An ensemble costs K forward passes and one
model costs one; the distance between the two is what fusing has lost. Deep ensembles: Lakshminarayanan et al. 2017,
arXiv 1612.01474.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Probability in place of zero where no client gives an example's class a chance: that example costs about 708 nats.
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class Ensemble:
    """The weighted sum of some models' probabilities on the same examples, in float64 and on the CPU.

    Law: a commutative monoid under addition with `Ensemble.zero`.

    Attributes:
        total: weighted sum of the probabilities.
        weight: sum of the weights.
    """

    total: Float[Tensor, "examples classes"]
    weight: float

    @classmethod
    def zero(cls, examples: int, classes: int) -> "Ensemble":
        """Return the ensemble of no models."""
        return cls(torch.zeros(examples, classes, dtype=torch.float64), 0.0)

    @classmethod
    def of(cls, probabilities: Float[Tensor, "examples classes"], weight: float = 1.0) -> "Ensemble":
        """Return the ensemble of one model.

        Raises:
            ValueError: rows are not probabilities, or the weight is not positive and finite.
        """
        wide = probabilities.detach().cpu().double()
        # The tolerance grows with the classes, as half precision rounds each of them by itself.
        slack = 8 * torch.finfo(probabilities.dtype).eps * wide.shape[-1]
        if not (wide >= 0).all() or ((wide.sum(-1) - 1).abs() > slack).any():
            raise ValueError("rows of an ensemble are not probabilities; pass logits.softmax(-1)")
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
        """The ensemble's class probabilities for each example.

        Raises:
            ValueError: the ensemble has no models.
        """
        if not self.weight:
            raise ValueError("an ensemble of no models has no probabilities; add a model first")
        return self.total / self.weight

    def accuracy(self, targets: Int[Tensor, " examples"]) -> float:
        """Return the fraction of the examples classified correctly."""
        return float((self.probabilities.argmax(-1) == targets.cpu()).double().mean())

    def loss(self, targets: Int[Tensor, " examples"]) -> float:
        """Return the cross entropy per example, nats.

        Law: never more than the weighted mean of the single models' losses.
        """
        chosen = self.probabilities.gather(-1, targets.cpu()[:, None])
        return float(-chosen.clamp_min(_TINY).log().mean())
