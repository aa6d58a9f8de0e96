"""Activation matching: find the transform under which client and anchor compute the same features on the client's data.

    maximise  <T, C>        C = sum over rows of (z^a - mean)(z^k - mean)^T,  features of one space on the same inputs

Source: Ainsworth et al. 2023, arXiv 2209.04836, section 3.1. The spaces are independent, because a client's features do
not change when another space is transformed. One pass is therefore enough, and each group's maximiser is the one that
weight matching uses, applied to C. Only a client can do this: it has both the anchor and its own data.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedbasin.proto.report import AlignmentReport, SpaceReport
from fedbasin.strategies.alignment.coordinate_ascent import PROGRESS
from fedbasin.strategies.alignment.weight_matching import Alignment, distances, fold_state
from fedbasin.strategies.diagnostics.geometry import fixed_points, largest_angle
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.state import State

Correlations = Mapping[str, tuple[Tensor, ...]]
"""The matrices C by space name, one for each role, in the form that the space's group stores."""


def match_activations(
    symmetry: Symmetry, anchor: State, client: State, correlations: Correlations, *, prior: float = 1e-6
) -> Alignment:
    """Align `client` to `anchor` by the features that both compute.

    Both states are folded first where the symmetry has folds. Laws: a planted permutation is undone exactly and a
    planted rotation up to the size of the prior; aligning twice changes nothing; ties go to the identity; no space's
    correlation falls. The distance to the anchor never rises: where the best correlated client would be further away,
    the client keeps its own frame.

    Args:
        symmetry: the spaces; `symmetry.check(anchor)` must hold.
        anchor: the state to align to.
        client: the state to align; the returned state is folded.
        correlations: features of anchor and client on the client's data; spaces without an entry stay as they are.
        prior: strength of the preference for the identity.

    Raises:
        SymmetryError: a norm's weight is too close to zero to divide by.
        ValueError: features are not finite.
    """
    anchor, client = fold_state(symmetry, anchor), fold_state(symmetry, client)
    steps = {space.name: _best_element(space, correlations.get(space.name, ()), prior) for space in symmetry.spaces}
    transform = Transform(symmetry, {name: element for name, (element, _) in steps.items()})
    state = transform.act(client)
    distance_before, distance_after = (
        math.hypot(*distances(symmetry, anchor, model).values()) for model in (client, state)
    )
    if distance_after > distance_before:
        # Without correlations every space takes the identity.
        return match_activations(symmetry, anchor, client, {}, prior=prior)
    reports = tuple(_space_report(space, *steps[space.name]) for space in symmetry.spaces)
    return Alignment(state, transform, AlignmentReport(reports, 1, distance_before, distance_after))


def _best_element(space: Space, scores: tuple[Tensor, ...], prior: float) -> tuple[Element, float]:
    """Return the element with the highest correlation and its gain over the identity, divided by `||C||`."""
    identity = space.group.identity()
    scale = sum(float(torch.linalg.vector_norm(score)) for score in scores)
    if not scale:
        return identity, 0.0
    if not math.isfinite(scale):
        raise ValueError(
            f"{space.name}: the features of the anchor or of the client's model are not finite on the client's data; "
            "look for a running variance below zero or a model that diverged, or set matcher = 'weights'"
        )
    step = space.group.maximiser(scores, prior)
    gain = (space.group.value(scores, step) - space.group.value(scores, identity)) / scale
    # Rounding alone must not move units that agree equally well.
    return (step, gain) if gain > PROGRESS else (identity, 0.0)


def _space_report(space: Space, element: Element, gain: float) -> SpaceReport:
    return SpaceReport(
        space=space.name,
        certified=False,
        moved=element.displacement(),
        gain=gain,
        fixed_points=fixed_points(element),
        largest_angle=largest_angle(element),
    )
