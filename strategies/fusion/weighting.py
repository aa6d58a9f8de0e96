"""Statistics that clients send, and the weightings of the mean by them."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, TypeAlias, TypeVar

from fedbasin.strategies.fusion.accumulator import Ridge


class Statistic(Enum):
    """A statistic that a client sends beside its weights and its number of examples."""

    none = "nothing: the number of examples is all that is known"
    fisher = "the diagonal Fisher information of every parameter"
    gram = "the Gram matrix of every linear and convolutional layer's inputs"
    kronecker = "the second moments of every layer's inputs and of the gradients at its outputs"


@dataclass(frozen=True)
class FisherWeighting:
    """A mean weighted by the diagonal Fisher information (Matena and Raffel 2022, arXiv 2111.09832)."""

    ridge: Ridge
    statistic: ClassVar[Statistic] = Statistic.fisher


@dataclass(frozen=True)
class KroneckerWeighting:
    """A mean weighted by Kronecker factors: second moments of inputs and of gradients at outputs."""

    ridge: Ridge
    statistic: ClassVar[Statistic] = Statistic.kronecker


@dataclass(frozen=True)
class GramWeighting:
    """A mean weighted by Gram matrices of the layers' inputs (RegMean, Jin et al. 2023, arXiv 2212.09849).

    Attributes:
        ridge: regulariser of the solution.
        shrink: factor on the off-diagonal of Gram matrices (RegMean's alpha); 1 leaves them unchanged.
    """

    ridge: Ridge
    shrink: float = 1.0
    statistic: ClassVar[Statistic] = Statistic.gram


@dataclass(frozen=True)
class SketchedGramWeighting:
    """A mean weighted by sketches of Gram matrices, twice as wide as the adapters' rank unless a budget says otherwise."""

    # There is no `shrink`: the off-diagonal of a sketch is the product of its rows and cannot be scaled alone.
    ridge: Ridge
    statistic: ClassVar[Statistic] = Statistic.gram


ModelWeighting: TypeAlias = FisherWeighting | KroneckerWeighting | GramWeighting
# Sketches are as wide as adapters, so they occur only within the fusion of adapters.
Weighting: TypeAlias = ModelWeighting | SketchedGramWeighting
_Weighting = TypeVar("_Weighting", bound=Weighting)


def override_weighting(weighting: _Weighting, ridge: float, shrink: float) -> _Weighting:
    """Return the weighting with another strength (0 keeps it) and, for Gram matrices, another factor."""
    if ridge:
        weighting = replace(weighting, ridge=replace(weighting.ridge, strength=ridge))
    if isinstance(weighting, GramWeighting):
        weighting = replace(weighting, shrink=shrink)
    return weighting
