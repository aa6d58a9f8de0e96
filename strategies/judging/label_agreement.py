"""Labels of one client against those of all others, from the sums of a closed-form head.

A head's sums tell the mean features of each class and client. Where labels agree, the mean of a client's class is near
the other clients' mean of that class. A client with exchanged labels (label flipping: Tolpegin et al. 2020, arXiv
2007.08432) has it near their mean of another class. For a class c with mean x, and others' means m, the margin is

    (||x - m_d||^2 - ||x - m_c||^2) / ||m_c - m_d||^2       d: the class other than c whose mean is nearest to x

in the metric of the scatter within classes: 1 at the others' mean of c, 0 half-way, and -1 at their mean of d. The
agreement of a client is the mean of its margins, weighted by examples. A class that nobody else has says nothing, so a
client with classes of its own is not judged by them.
"""

from collections.abc import Callable, Mapping
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.fusion.head import row_scale
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Outcome, Refusal

# Fewer clients have no majority that could be told from a minority.
_FEWEST_CLIENTS = 5
# Fewer examples of a class have a mean that tells little of it.
_FEWEST_EXAMPLES = 10
# Where the median client agrees with the others less than this, the features do not separate the classes, and nobody is
# judged. Honest clients reach -.6 there (glyphs of 26 classes from pixels), and elsewhere .3 or more, also with one
# class each or with features of their own.
_LEAST_AGREEMENT = 0.3
_AGAINST = -0.25
# Added to the scatter, relative to its mean diagonal.
_SHRINKAGE = 1e-2


def contradicting_labels(updates: Mapping[int, Callable[[], Update]]) -> dict[int, Refusal]:
    """Return the refusal of the client whose labels contradict the others' most; empty where none contradicts them.

    One at a time, because its examples are among those that the next ones are compared with.

    Args:
        updates: gives the sums of each client for one head.
    """
    if len(updates) < _FEWEST_CLIENTS:
        return {}
    agreements = _agreements(updates)
    if len(agreements) < _FEWEST_CLIENTS or median(agreements.values()) < _LEAST_AGREEMENT:
        return {}
    node = min(agreements, key=agreements.__getitem__)
    if agreements[node] >= _AGAINST:
        return {}
    what = f"its classes lie where other clients have other classes: agreement {agreements[node]:.2f} of at most 1"
    return {node: Refusal(Outcome.out_of_line, what)}


def _agreements(updates: Mapping[int, Callable[[], Update]]) -> dict[int, float]:
    """Return the agreement of each client that has classes in common with others; empty where it cannot be told."""
    grams = torch.zeros((), dtype=torch.float64)
    classes: dict[int, Tensor] = {}
    for node, get in updates.items():
        update = get()
        ((block, sums),) = update.cross_moments.items()
        precision = update.precisions[block]
        # The last input of a head with a bias is a one, whose sums count the examples.
        if len(block) == 1 or not isinstance(precision, Gram):
            return {}
        grams = grams + precision.matrix
        classes[node] = sums.double()
    total = torch.stack(list(classes.values())).sum(0)
    scale = row_scale(grams, total)
    factor = _factor(grams / scale**2, total / scale)
    if factor is None:
        return {}
    margins = {node: _margin(sums / scale, (total - sums) / scale, factor) for node, sums in classes.items()}
    return {node: margin for node, margin in margins.items() if margin is not None}


def _factor(gram: Float[Tensor, "inputs inputs"], sums: Float[Tensor, "classes inputs"]) -> Tensor | None:
    """Return the Cholesky factor of the scatter within classes; None where nothing varies in them."""
    means = sums / sums[:, -1:].clamp(min=_FEWEST_EXAMPLES)
    within = (gram - sums.mT @ means)[:-1, :-1]
    ridge = _SHRINKAGE * within.diagonal().mean()
    factor, error = torch.linalg.cholesky_ex(within + ridge * torch.eye(len(within), dtype=within.dtype))
    return None if error else factor


def _margin(
    sums: Float[Tensor, "classes inputs"], others: Float[Tensor, "classes inputs"], factor: Tensor
) -> float | None:
    """Return the mean margin of a client's classes that others have as well; None where there is none."""
    known = others[:, -1] >= _FEWEST_EXAMPLES
    shared = known & (sums[:, -1] >= _FEWEST_EXAMPLES)
    if not shared.any() or known.sum() < 2:
        return None
    means, centres = (_whiten(part[:, :-1] / part[:, -1:], factor) for part in (sums[shared], others[known]))
    distances = torch.cdist(means, centres).square()
    # The number of each shared class among the known ones.
    rows, labels = torch.arange(len(means)), known.cumsum(0)[shared] - 1
    right = distances[rows, labels].clone()
    distances[rows, labels] = torch.inf
    wrong, nearest = distances.min(1)
    apart = (centres[labels] - centres[nearest]).square().sum(1)
    margins = ((wrong - right) / apart.clamp(min=1e-300)).clamp(-1, 1)
    return float((margins * sums[shared, -1]).sum() / sums[shared, -1].sum())


def _whiten(means: Float[Tensor, "classes inputs"], factor: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, means.mT, upper=False).mT
