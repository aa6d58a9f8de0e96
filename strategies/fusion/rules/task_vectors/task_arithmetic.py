"""Task arithmetic: task vectors are added, or with a negative weight subtracted, to forget a task.

    t = anchor + lambda sum_k w_k (t_k - anchor)

Ilharco et al. 2023, arXiv 2212.04089.
"""

from collections.abc import Sequence

from torch import Tensor

from fedbasin.strategies.fusion.rules.task_vectors.consensus import add_task_vectors


def task_arithmetic(
    anchor: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool, scale: float
) -> Tensor:
    """Return the anchor plus the scaled sum of the task vectors."""
    return add_task_vectors(anchor, tensors, weights, consensus=False, normalize=normalize, scale=scale)
