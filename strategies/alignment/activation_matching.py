"""Activation matching: the transform under which client and anchor compute the same features on the client's data.

    maximise  <T, C>        C = sum over rows of (z^a - mean)(z^k - mean)^T,  features of one space on the same inputs

Spaces are independent: the client's features do not change when another space moves, so there is nothing to iterate
and every group's maximiser is the same as for weights, of another score (Ainsworth et al. 2023, arXiv 2209.04836,
section 3.1). Only the client can do it: it has the anchor and its own data.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedbasin.strategies.alignment.alignment_report import AlignmentReport, SpaceReport
from fedbasin.strategies.alignment.coordinate_ascent import PROGRESS
from fedbasin.strategies.alignment.weight_matching import Alignment, distances, folded
from fedbasin.strategies.diagnostics.geometry import fixed_points, largest_angle
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.state import State

Correlations = Mapping[str, tuple[Tensor, ...]]
"""C of every role, as the space's group keeps it, by space name."""


def match_activations(
    symmetry: Symmetry,
    anchor: State,
    client: State,
    correlations: Correlations,
    *,
    prior: float = 1e-6,
) -> Alignment:
    """Align `client` to `anchor` by what they compute; both folded where the symmetry folds.

    Laws: a planted transform is undone, to the prior's size where it rotates; aligning twice changes nothing; ties
    go to the identity; no space's correlation falls and the distance to the anchor never rises: where the best
    correlated client would be further away, it stays as it is.

    Args:
        symmetry: the spaces; `symmetry.check(anchor)` must hold.
        anchor: the state to align to.
        client: the state to align; what is returned is folded.
        correlations: of anchor and client; spaces without stay as they are.
        prior: strength of the preference for the identity.

    Raises:
        FoldError: a norm's gain vanishes where it would have to be divided by.
        ValueError: features are not finite.
    """
    anchor, client = folded(symmetry, anchor), folded(symmetry, client)
    steps = {
        space.name: _best(space, correlations.get(space.name, ()), prior)
        for space in symmetry.spaces
    }
    transform = Transform(symmetry, {name: element for name, (element, _) in steps.items()})
    state = transform.act(client)
    before, after = (_distance(symmetry, anchor, each) for each in (client, state))
    if after > before:
        return match_activations(symmetry, anchor, client, {}, prior=prior)
    reports = tuple(_report(space, *steps[space.name]) for space in symmetry.spaces)
    return Alignment(state, transform, AlignmentReport(reports, 1, before, after))


def _distance(symmetry: Symmetry, anchor: State, client: State) -> float:
    return math.hypot(*distances(symmetry, anchor, client).values())


def _best(space: Space, scores: tuple[Tensor, ...], prior: float) -> tuple[Element, float]:
    """The element that correlates best, and by how much better, as a share of `||C||`."""
    held = space.group.identity()
    scale = sum(float(torch.linalg.vector_norm(score)) for score in scores)
    if not scale:
        return held, 0.0
    if not math.isfinite(scale):
        raise ValueError(
            f"{space.name}: the features of the anchor or of the client's model are not finite on the client's data; "
            "look for a running variance below zero or a model that diverged, or set matcher = 'weights'"
        )
    step = space.group.maximiser(scores, prior)
    gain = (space.group.value(scores, step) - space.group.value(scores, held)) / scale
    return (step, gain) if gain > PROGRESS else (held, 0.0)


def _report(space: Space, element: Element, gain: float) -> SpaceReport:
    return SpaceReport(
        space=space.name,
        certified=False,
        moved=element.moved(),
        gain=gain,
        fixed_points=fixed_points(element),
        largest_angle=largest_angle(element),
    )
