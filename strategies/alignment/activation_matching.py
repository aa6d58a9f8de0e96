"""Activation matching: the transform under which client and anchor compute the same features on the client's data.

    maximise  <T, C>        C = sum over rows of (z^a - mean)(z^k - mean)^T,  features of one site on the same inputs

Sites are independent: the client's features do not change when another site moves, so there is nothing to iterate
and every group's maximiser is the same as for weights, of another score (Ainsworth et al. 2023, arXiv 2209.04836,
section 3.1). Only the client can do it: it has the anchor and its own data.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedbasin.strategies.alignment.alignment_report import AlignmentReport, SiteReport
from fedbasin.strategies.alignment.coordinate_ascent import PROGRESS
from fedbasin.strategies.alignment.weight_matching import Alignment, distances, folded
from fedbasin.strategies.diagnostics.geometry import fixed_points, largest_angle
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Site, Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.state import State

Correlations = Mapping[str, tuple[Tensor, ...]]
"""C of every leg, as the site's group keeps it, by site name."""


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
    go to the identity; no site's correlation falls and the distance to the anchor never rises: where the best
    correlated client would be further away, it stays as it is.

    Args:
        symmetry: the sites; `symmetry.check(anchor)` must hold.
        anchor: the state to align to.
        client: the state to align; what is returned is folded.
        correlations: of anchor and client; sites without stay as they are.
        prior: strength of the preference for the identity.

    Raises:
        FoldError: a norm's gain vanishes where it would have to be divided by.
        ValueError: features are not finite.
    """
    anchor, client = folded(symmetry, anchor), folded(symmetry, client)
    steps = {
        site.name: _best(site, correlations.get(site.name, ()), prior) for site in symmetry.sites
    }
    transform = Transform(symmetry, {name: element for name, (element, _) in steps.items()})
    state = transform.act(client)
    before, after = (_distance(symmetry, anchor, each) for each in (client, state))
    if after > before:
        return match_activations(symmetry, anchor, client, {}, prior=prior)
    reports = tuple(_report(site, *steps[site.name]) for site in symmetry.sites)
    return Alignment(state, transform, AlignmentReport(reports, 1, before, after))


def _distance(symmetry: Symmetry, anchor: State, client: State) -> float:
    return math.hypot(*distances(symmetry, anchor, client).values())


def _best(site: Site, scores: tuple[Tensor, ...], prior: float) -> tuple[Element, float]:
    """The element that correlates best, and by how much better, as a share of `||C||`."""
    held = site.group.identity()
    scale = sum(float(torch.linalg.vector_norm(score)) for score in scores)
    if not scale:
        return held, 0.0
    if not math.isfinite(scale):
        raise ValueError(
            f"{site.name}: the features of the anchor or of the client's model are not finite on the client's data; "
            "look for a running variance below zero or a model that diverged, or set matcher = 'weights'"
        )
    step = site.group.maximiser(scores, prior)
    gain = (site.group.value(scores, step) - site.group.value(scores, held)) / scale
    return (step, gain) if gain > PROGRESS else (held, 0.0)


def _report(site: Site, element: Element, gain: float) -> SiteReport:
    return SiteReport(
        site=site.name,
        certified=False,
        moved=element.moved(),
        gain=gain,
        fixed_points=fixed_points(element),
        largest_angle=largest_angle(element),
    )
