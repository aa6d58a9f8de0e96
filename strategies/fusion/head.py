"""A closed-form head: linear discriminants from labels, their regulariser the one with most evidence.

    C = sum_c sum_{x in c} (x - m_c) (x - m_c)^T / n      m_c  mean of class c, p_c its share of the n examples
    w_c = (C + rho I)^-1 m_c      b_c = log p_c - w_c^T m_c / 2

Least squares on labels needs the same sums, but where classes are many they hide one another there. As they stand the
discriminants are log-probabilities, too sure of themselves on features that were trained on the same labels. In the size
that explains labels of +MARGIN and -MARGIN best they are too faint where classes are many. Training goes on from
them, and does best between the two: their size is the geometric mean.

    evidence(rho) = n log(||Y||^2 - tr Y X^T (G + rho I)^-1 X Y^T) + log det (G + rho I) - p log rho        the least

That is how likely the labels are with least squares behind them, G = X X^T of p inputs, whatever the weights: it weighs
what they explain against how well they had to be chosen. It needs no held-out data and no message of its own: all of it
follows from the sums G, Y X^T and n. Generalised cross-validation, which needs the same, errs to the weak side where
features were trained on the same labels.

Sources: Fisher 1936, "The use of multiple measurements in taxonomic problems", Annals of Eugenics 7(2); Friedman 1989,
"Regularized discriminant analysis", JASA 84(405); in a federation Luo et al. 2021 (CCVR), arXiv 2106.05001; MacKay 1992,
"Bayesian interpolation", Neural Computation 4(3).
"""

from dataclasses import dataclass
from math import inf, log

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.precisions import Gram, Precision, Scalar

MARGIN = 5.0
# Of a class, beside the example that it is given: inexact sums may say less than none.
_LEAST = 0.5
# Half a decade apart; relative to the mean diagonal of G.
_STRENGTHS = tuple(10 ** (half / 2) for half in range(-8, 5))


@dataclass(frozen=True)
class Evidence:
    """A regulariser of which the clients' sums say how strong it is.

    Attributes:
        otherwise: its strength where they do not: a layer without a bias does not say how many rows there were.
    """

    otherwise: float = 1e-3


def closed_form(
    block: Block,
    precision: Precision,
    sums: Float[Tensor, "classes inputs"],
    ridge: Ridge | Evidence,
) -> Float[Tensor, "classes inputs"]:
    """The head that the clients' sums stand for.

    Discriminants where the sums say how many examples each class has; a head without a bias, or one whose inputs are
    known by a sketch, is least squares on the labels.

    Args:
        block: the head's weight, and its bias.
        precision: of its inputs, with a one as the last of them for the bias.
        sums: of the inputs, for each class.
        ridge: the regulariser, drawn to zero.
    """
    gram = precision.matrix if len(block) > 1 and isinstance(precision, Gram) else None
    prior = precision.isotropic(_strength(ridge, gram, sums))
    if not prior.weight:
        return torch.zeros_like(sums)  # no example reaches the head
    if gram is None:
        return (precision + prior).solve(_labelled(sums))
    return discriminants(gram, sums, prior)


def _labelled(sums: Float[Tensor, "classes inputs"]) -> Float[Tensor, "classes inputs"]:
    """The product of labels and inputs: every example is of one class."""
    return MARGIN * (2 * sums - sums.sum(0))


def _strength(ridge: Ridge | Evidence, gram: Tensor | None, sums: Tensor) -> float:
    if isinstance(ridge, Ridge):
        return ridge.strength
    found = None if gram is None else most_evident(gram, sums)
    return found or ridge.otherwise


def discriminants(
    gram: Float[Tensor, "inputs inputs"], sums: Float[Tensor, "classes inputs"], prior: Scalar
) -> Float[Tensor, "classes inputs"]:
    """Linear discriminants of the classes, in a size between that of log-probabilities and that of the labels.

    Each class has one more example, at the mean of all: one that nobody has seen is where it stands in nobody's way.

    Args:
        gram: of the inputs; the last one is the one that stands for the bias.
        sums: of the inputs, for each class.
        prior: on the scatter within classes.
    """
    gram, sums = gram.double(), sums.double()
    smoothed = sums + gram[-1] / gram[-1, -1]
    counts = smoothed[:, -1:].clamp(min=_LEAST)
    means = smoothed / counts
    crossed = sums.mT @ means
    within = gram - crossed - crossed.mT + means.mT @ (sums[:, -1:] * means)
    values, vectors = torch.linalg.eigh(within[:-1, :-1])
    # Inexact sums may leave less than nothing within.
    ridged = vectors / (values.clamp(min=0) + prior.weight)
    slopes = means[:, :-1] @ ridged @ vectors.mT * gram[-1, -1]
    offsets = counts.log() - (slopes * means[:, :-1]).sum(1, keepdim=True) / 2
    scores = torch.cat([slopes, offsets], 1)
    scores -= scores.mean(0)
    explained = (scores @ gram * scores).sum()
    labelled = (scores * _labelled(sums)).sum().clamp(min=0)
    # One class alone has nothing to be told from, and inexact sums may explain less than nothing.
    return scores * (labelled / explained).sqrt() if explained > 0 else torch.zeros_like(scores)


def most_evident(
    gram: Float[Tensor, "inputs inputs"], sums: Float[Tensor, "classes inputs"]
) -> float | None:
    """The strength under which the labels are most likely, relative to the mean diagonal.

    Args:
        gram: of the inputs; the last one is the one that stands for the bias.
        sums: of the inputs, for each class.

    Returns:
        None where no example reaches the head.
    """
    rows = float(gram[-1, -1])
    if not rows:
        return None
    energy = rows * len(sums) * MARGIN**2
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp(min=0)
    seen = (_labelled(sums.double()) @ vectors).square().sum(0)

    def surprise(strength: float) -> float:
        prior = strength * values.mean()
        left = energy - float((seen / (values + prior)).sum())
        # An inexact Gram matrix can explain more than there is.
        return rows * log(left) + float((values / prior).log1p().sum()) if left > 0 else inf

    return min(_STRENGTHS, key=surprise)
