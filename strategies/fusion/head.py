"""A closed-form head: linear discriminants from labels, with the regulariser that maximises the evidence.

    C = sum_c sum_{x in c} (x - m_c) (x - m_c)^T / n      m_c  mean of class c, p_c its share of the n examples
    w_c = (C + rho I)^-1 m_c      b_c = log p_c - w_c^T m_c / 2

Least squares on labels needs the same sums, but masks classes where there are many of them. The scale of the
discriminants is a compromise: as log-probabilities they are overconfident on features that were trained on the same
labels, and scaled to fit labels of +MARGIN and -MARGIN best they are too small where classes are many. Later training
does best from a scale between the two, so the geometric mean is taken.

    -evidence(rho) = n log(||Y||^2 - tr Y X^T (G + rho I)^-1 X Y^T) + log det (G + rho I) - p log rho      is minimal

The evidence is the likelihood of the labels in a linear model whose weights are integrated out, with G = X X^T of p
inputs. It needs no held-out data and no message, because it follows from the sums G, Y X^T and n. Generalised
cross-validation needs the same sums, but chooses too weak a regulariser for features trained on the same labels.

Sources: Fisher 1936, "The use of multiple measurements in taxonomic problems", Annals of Eugenics 7(2); Friedman 1989,
"Regularized discriminant analysis", JASA 84(405); in a federation Luo et al. 2021 (CCVR), arXiv 2106.05001; MacKay
1992, "Bayesian interpolation", Neural Computation 4(3).
"""

from dataclasses import dataclass
from math import inf, log

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.precisions import Gram, Precision, Scalar
from fedbasin.strategies.tasks.likelihoods import MARGIN
from fedbasin.strategies.tensors.eigenvalues import eigendecompose

# Least number of examples of a class, its added example included: inexact sums can make counts negative.
_LEAST = 0.5
# Relative error of sums that travel in inexact forms.
_ROUNDING = 1e-2
# Strengths that are compared, half a decade apart, relative to the mean diagonal of G.
_STRENGTHS = tuple(10 ** (half / 2) for half in range(-8, 5))


@dataclass(frozen=True)
class Evidence:
    """A regulariser whose strength maximises the evidence of the clients' sums.

    Attributes:
        otherwise: strength for sums without the number of rows, as of a layer without a bias.
    """

    otherwise: float = 1e-3


def closed_form(
    block: Block, precision: Precision, sums: Float[Tensor, "classes inputs"], ridge: Ridge | Evidence
) -> Float[Tensor, "classes inputs"]:
    """Return the head that the clients' sums determine.

    The head consists of discriminants if the sums tell how many examples each class has. A head without a bias, or
    with a sketch of its inputs' Gram matrix, is least squares on the labels.

    Args:
        block: names of the head's weight and bias.
        precision: sum of the inputs' Gram matrices; the last input is a one for the bias.
        sums: sum of the inputs of each class.
        ridge: regulariser towards zero.
    """
    gram = precision.matrix if len(block) > 1 and isinstance(precision, Gram) else None
    scale = 1.0 if gram is None else row_scale(gram, sums)
    if gram is not None:
        precision, gram, sums = Gram(gram / scale**2), gram / scale**2, sums / scale
    prior = precision.isotropic(_strength(ridge, gram, sums))
    if not prior.weight:
        return torch.zeros_like(sums)  # no example reaches the head
    if gram is None:
        return (precision + prior).solve(label_moment(sums))
    return discriminants(gram, sums, prior) / scale


def row_scale(gram: Float[Tensor, "inputs inputs"], sums: Float[Tensor, "classes inputs"]) -> float:
    """Return the factor between a head's own output and the model's, as of a temperature.

    Clients send rows as they reach the output of the model, so that the bias's input is this factor and no longer one,
    and every row belongs to one class.
    """
    squares, factors = float(gram[-1, -1]), float(sums[:, -1].sum())
    # Inexact sums differ a little from those of ones.
    is_one = factors <= 0 or squares <= 0 or abs(squares / factors - 1) < _ROUNDING
    return 1.0 if is_one else squares / factors


def label_moment(sums: Float[Tensor, "classes inputs"]) -> Float[Tensor, "classes inputs"]:
    """Return the cross-moment of labels and inputs; an example has +MARGIN for its class, -MARGIN for all others."""
    return MARGIN * (2 * sums - sums.sum(0))


def _strength(ridge: Ridge | Evidence, gram: Tensor | None, sums: Tensor) -> float:
    if isinstance(ridge, Ridge):
        return ridge.strength
    strength = None if gram is None else maximise_evidence(gram, sums)
    return strength or ridge.otherwise


def discriminants(
    gram: Float[Tensor, "inputs inputs"], sums: Float[Tensor, "classes inputs"], prior: Scalar
) -> Float[Tensor, "classes inputs"]:
    """Return linear discriminants of the classes, scaled between log-probabilities and labels.

    Args:
        gram: Gram matrix of the inputs; the last input is a one for the bias.
        sums: sum of the inputs of each class.
        prior: regulariser of the scatter within classes.
    """
    # In double, because differences of large sums follow.
    gram, sums = gram.double(), sums.double()
    # Each class gets one more example, at the mean of all: a class without examples then competes with none.
    smoothed = sums + gram[-1] / gram[-1, -1]
    counts = smoothed[:, -1:].clamp(min=_LEAST)
    means = smoothed / counts
    crossed = sums.mT @ means
    within = gram - crossed - crossed.mT + means.mT @ (sums[:, -1:] * means)
    values, vectors = eigendecompose(within[:-1, :-1])
    # Inexact sums can make the scatter indefinite.
    ridged = vectors / (values.clamp(min=0) + prior.weight)
    slopes = means[:, :-1] @ ridged @ vectors.mT * gram[-1, -1]
    offsets = counts.log() - (slopes * means[:, :-1]).sum(1, keepdim=True) / 2
    scores = torch.cat([slopes, offsets], 1)
    # An offset that all classes share changes no prediction, but would enter the scale.
    scores -= scores.mean(0)
    explained = (scores @ gram * scores).sum()
    labelled = (scores * label_moment(sums)).sum().clamp(min=0)
    # A single class has no discriminant, and inexact sums can make the explained energy negative.
    return scores * (labelled / explained).sqrt() if explained > 0 else torch.zeros_like(scores)


def maximise_evidence(gram: Float[Tensor, "inputs inputs"], sums: Float[Tensor, "classes inputs"]) -> float | None:
    """Return the strength with most evidence, relative to the mean diagonal; None if no example reaches the head.

    Args:
        gram: Gram matrix of the inputs; the last input is a one for the bias.
        sums: sum of the inputs of each class.
    """
    rows = float(gram[-1, -1])
    if not rows:
        return None
    energy = rows * len(sums) * MARGIN**2
    values, vectors = eigendecompose(gram.double())
    # Rounding and inexact forms leave small negative eigenvalues.
    values = values.clamp(min=0)
    projections = (label_moment(sums.double()) @ vectors).square().sum(0)

    def negative_evidence(strength: float) -> float:
        prior = strength * values.mean()
        residual = energy - float((projections / (values + prior)).sum())
        # An inexact Gram matrix can explain more than the labels' energy; such a strength is too weak.
        if residual <= 0:
            return inf
        return rows * log(residual) + float((values / prior).log1p().sum())

    return min(_STRENGTHS, key=negative_evidence)
