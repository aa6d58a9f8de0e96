"""Geometry of updates and of alignments, from the weights alone.

    cosine      <a - anchor, b - anchor> / (||a - anchor|| ||b - anchor||)
    skew        ||M - M^T|| / ||M||, with M the agreement of anchor and client units at a space

`M` is symmetric and positive semidefinite at the best rotation. The skew after alignment therefore measures how well
the alignment worked, and before it how far the client has rotated. Clients one SGD step from the anchor have none.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.tensors.state import State, floating

Angles = Float[Tensor, "count size"]


def cosine(anchor: State, a: State, b: State) -> float:
    """Return the cosine of two clients' updates, or zero where one of them equals the anchor."""
    update_a, update_b = _update(anchor, a), _update(anchor, b)
    scale = _norm(update_a.values()) * _norm(update_b.values())
    return _inner(update_a, update_b) / scale if scale else 0.0


def fixed_points(element: Element) -> float:
    """Return the fraction of units in their place; a rotated block counts as a whole, by the block's place."""
    home = (element.order == torch.arange(len(element.order))).double()
    inner = [_fixed_fraction(blocks) for blocks in element.blocks if blocks is not None]
    shares = torch.stack([share.cpu() for share in inner]).mean(0) if inner else torch.ones(())
    return float((home * shares).mean())


def _fixed_fraction(blocks: Float[Tensor, "count size size"]) -> Float[Tensor, " count"]:
    """Return for each block the fraction of its units that an inner permutation leaves in place."""
    if not ((blocks == 0) | (blocks == 1)).all():
        return torch.ones(len(blocks), dtype=torch.float64)
    return blocks.diagonal(dim1=-2, dim2=-1).double().mean(-1)


def largest_angle(element: Element) -> float | None:
    """Return the largest rotation angle of an element, 0 to pi radians, or None where it only permutes units."""
    return max((float(angles.max()) for angles in rotation_angles(element)), default=None)


def rotation_angles(element: Element) -> list[Angles]:
    """Return the angles by which the blocks rotate, for each role that has rotations.

    An orthogonal map rotates planes by the arguments of its eigenvalues: each plane's angle is listed twice, a fixed
    direction has 0 and a reflected one has pi. Radians, ascending.
    """
    return [_angles(b) for b in element.blocks if b is not None and not ((b == 0) | (b == 1)).all()]


def _angles(blocks: Float[Tensor, "count size size"]) -> Angles:
    # An orthogonal map is normal, so the eigenvalues of its symmetric part are the cosines; computing the map's own
    # complex eigenvalues takes ten times as long.
    symmetric = (blocks.double() + blocks.double().mT) / 2
    return torch.linalg.eigvalsh(symmetric).clamp(-1, 1).acos().sort(-1).values


def skew(scores: Sequence[Tensor]) -> float:
    """Return `||M - M^T|| / ||M||`, 0 to 2, over the agreements M of all roles in the form that their group stores."""
    # A group that stretches stores squared norms beside M.
    scores = [score[..., : score.shape[-2]] for score in scores]
    size = _norm(scores)
    return _norm(score - _transpose(score) for score in scores) / size if size else 0.0


def _transpose(score: Tensor) -> Tensor:
    """Return the transpose of M, also in the form with block axes, `[block, block, unit, unit]`."""
    return score.mT if score.ndim < 4 else score.permute(1, 0, 3, 2)


def _update(anchor: State, state: State) -> dict[str, Tensor]:
    shared = (name for name in floating(anchor) if name in state)
    return {name: state[name].double() - anchor[name].double() for name in shared}


def _inner(a: State, b: State) -> float:
    # Exact addition, so that the order of tensors does not matter.
    return math.fsum(float((tensor * b[name]).sum()) for name, tensor in a.items() if name in b)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors))
