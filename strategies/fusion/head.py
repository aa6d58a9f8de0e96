"""A closed-form head: ridge regression from labels, its strength chosen by generalised cross-validation.

    W = Y X^T (G + rho I)^-1        G = X X^T,  Y is +MARGIN at an example's label and -MARGIN elsewhere
    GCV(rho) = ||Y - W X||^2 / (n - tr G (G + rho I)^-1)^2

This is the error on examples that are left out in turn, up to a rotation of the examples. It needs no held-out data and
no message of its own: all of it follows from the sums G, Y X^T and n. Features that were trained on the same labels are
no fresh ones, so it errs to the weak side. Golub, Heath and Wahba 1979, "Generalized cross-validation as a method for
choosing a good ridge parameter", Technometrics 21(2).
"""

from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.fusion.precision import Gram, Precision
from fedbasin.strategies.fusion.tally import Ridge
from fedbasin.strategies.fusion.update import Block

MARGIN = 5.0
# Half a decade apart; relative to the mean diagonal of G.
_STRENGTHS = tuple(10 ** (half / 2) for half in range(-8, 5))


@dataclass(frozen=True)
class CrossValidated:
    """A regulariser of which the clients' sums say how strong it is.

    Attributes:
        otherwise: its strength where they do not: a layer without a bias does not say how many rows there were.
    """

    otherwise: float = 1e-3

    def ridge(self, block: Block, sums: tuple[Precision, Float[Tensor, "out inputs"]]) -> Ridge:
        """The ridge with the least error on examples left out.

        Args:
            block: the head's weight, and its bias.
            sums: of its inputs, with a one as the last of them for the bias; of labels and inputs.
        """
        precision, moment = sums
        if len(block) == 1 or not isinstance(precision, Gram):
            return Ridge(self.otherwise, "anchor")
        return Ridge(least_error(precision.matrix, moment) or self.otherwise, "anchor")


def least_error(
    gram: Float[Tensor, "inputs inputs"], moment: Float[Tensor, "out inputs"]
) -> float | None:
    """The strength with the least error on examples left out, relative to the mean diagonal.

    Args:
        gram: of the inputs; the last one is the one that stands for the bias.
        moment: of labels and inputs.

    Returns:
        None where no example reaches the head.
    """
    rows = float(gram[-1, -1])
    if not rows:
        return None
    energy = rows * len(moment) * MARGIN**2
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp(min=0)
    seen = (moment.double() @ vectors).square().sum(0)

    def error(strength: float) -> float:
        ridged = values + strength * values.mean()
        left = energy - float((seen * (2 * ridged - values) / ridged.square()).sum())
        free = rows - float((values / ridged).sum())
        # An inexact Gram matrix can explain more than there is.
        return left / free**2 if left > 0 and free > 0 else inf

    return min(_STRENGTHS, key=error)
