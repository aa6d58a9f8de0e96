"""Weight matching: the transform that brings a client closest to the anchor.

    maximise  J(T) = sum_w <W_w^a, T . W_w^k>        over the product of the sites' groups

by coordinate ascent: J is linear in each site while the others are held, and each group knows its exact
maximiser, so J never falls and the distance to the anchor never rises. Git Re-Basin (Ainsworth, Hayase,
Srinivasa 2023, arXiv 2209.04836) for permutations; the rotations of attention heads follow Zhang et al. 2025
(arXiv 2502.00264). Data-free.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbasin.strategies.alignment.certificate import Radii, is_certified
from fedbasin.strategies.chunks import one_core
from fedbasin.strategies.diagnostics.geometry import fixed_points, largest_angle, skew
from fedbasin.strategies.state import State, distance, floating
from fedbasin.strategies.symmetry.element import Element
from fedbasin.strategies.symmetry.sites import Site, Symmetry
from fedbasin.strategies.symmetry.transform import Transform

# Gains below this share of ||M|| are rounding, not progress.
_PROGRESS = 1e-7


@dataclass(frozen=True)
class SiteReport:
    """How one site went.

    Attributes:
        site: its name.
        certified: whether the identity was proven optimal and the site stayed as it was.
        moved: distance of the element from the identity, 0 to 1.
        gain: rise of J, as a share of `||anchor|| ||client||` over the site's tensors.
        fixed_points: share of the units that stayed in their place.
        largest_angle: of the rotations, radians; None where units only change places.
        skew_before: skew ratio when the search came to the site, 0 to 2; None where nothing can turn.
        skew_after: the same where it ended; near 0 where a rotation was found exactly.
    """

    site: str
    certified: bool
    moved: float
    gain: float
    fixed_points: float = 1.0
    largest_angle: float | None = None
    skew_before: float | None = None
    skew_after: float | None = None


@dataclass(frozen=True)
class AlignmentReport:
    """How the whole alignment went.

    Attributes:
        sites: how each site went, in the symmetry's order.
        sweeps: passes over the sites.
        distance_before: Euclidean, client to anchor, over all tensors that count in matching; running
            statistics do not.
        distance_after: the same after alignment, never more.
    """

    sites: tuple[SiteReport, ...]
    sweeps: int
    distance_before: float
    distance_after: float


@dataclass(frozen=True, eq=False)
class Alignment:
    """A client's state in the anchor's frame, and the transform that took it there."""

    state: dict[str, Tensor]
    transform: Transform
    report: AlignmentReport


def match_weights(
    symmetry: Symmetry,
    anchor: State,
    client: State,
    radii: Radii | None = None,
    *,
    prior: float = 1e-6,
    max_sweeps: int = 100,
) -> Alignment:
    """Align `client` to `anchor` by coordinate ascent from the identity.

    Laws: a planted permutation is undone exactly and a planted rotation to the prior's size; aligning twice
    changes nothing; ties go to the identity.

    Args:
        symmetry: the sites; `symmetry.check(anchor)` must hold.
        anchor: the state to align to.
        client: the state to align.
        radii: the anchor's identity radii (`identity_radii`); None searches every site.
        prior: strength of the preference for the identity.
        max_sweeps: bound on the passes over all sites.
    """
    counted = _counted(symmetry, anchor)
    with one_core():
        before = distance(counted, client)
    search = _Search(symmetry, floating(anchor), dict(client), radii or {}, prior)
    sweeps = search.run(max_sweeps)
    transform = Transform(symmetry, search.elements)
    reports = tuple(search.report(site) for site in symmetry.sites)
    after = before if transform.is_identity else distance(counted, search.state)
    return Alignment(search.state, transform, AlignmentReport(reports, sweeps, before, after))


@dataclass
class _Search:
    """The state of one ascent: what has been applied so far, and the client as it is under that."""

    symmetry: Symmetry
    anchor: Mapping[str, Tensor]
    state: dict[str, Tensor]
    radii: Radii
    prior: float

    def __post_init__(self) -> None:
        self.elements = {site.name: site.group.identity() for site in self.symmetry.sites}
        self.gains = dict.fromkeys(self.elements, 0.0)
        self.certified: set[str] = set()
        self.first_skews: dict[str, float] = {}
        self.last_skews: dict[str, float] = {}
        self.neighbours = _neighbours(self.symmetry)

    def run(self, max_sweeps: int) -> int:
        """Visit the sites in order until none can gain; returns the number of sweeps.

        A site is visited again only when a neighbour has moved since: otherwise its score is the same.
        """
        pending = set(self.elements)
        sweeps = 0
        while pending and sweeps < max_sweeps:
            sweeps += 1
            for site in self.symmetry.sites:
                if site.name in pending:
                    pending.discard(site.name)
                    if self.visit(site):
                        pending |= self.neighbours[site.name]
        return sweeps

    def visit(self, site: Site) -> bool:
        """Replace the site's element by the best one; whether that was any progress."""
        self.certified.discard(site.name)
        if is_certified(site, self.anchor, self.state, self.radii):
            self.certified.add(site.name)
            return False
        scores = _scores(site, self.anchor, self.state)
        if _turns(site):
            self.last_skews[site.name] = skew(scores)
            self.first_skews.setdefault(site.name, self.last_skews[site.name])
        step = site.group.maximiser(scores, self.prior)
        held = site.group.value(scores, site.group.identity())
        gain = site.group.value(scores, step) - held
        scale = sum(float(torch.linalg.vector_norm(score)) for score in scores)
        if gain <= _PROGRESS * scale:
            return False
        return self._apply(site, step, gain)

    def _apply(self, site: Site, step: Element, gain: float) -> bool:
        moved = {m.tensor: self.state[m.tensor] for m in site.members}
        for member in site.members:
            moved[member.tensor] = member.act(step, moved[member.tensor])
        if site.quadratic:
            # A tensor with the site on both axes makes J quadratic: take the step only if J really rose.
            gain = self._objective(site, moved) - self._objective(site, self.state)
            if gain <= 0:
                return False
        self.state.update(moved)
        self.last_skews.pop(site.name, None)
        self.elements[site.name] = step.after(self.elements[site.name])
        self.gains[site.name] += gain
        return True

    def _objective(self, site: Site, state: State) -> float:
        names = {member.tensor for member in site.scored}
        return sum(float((self.anchor[n].double() * state[n].double()).sum()) for n in names)

    def report(self, site: Site) -> SiteReport:
        """The site's share of the alignment report."""
        gain = self.gains[site.name]
        if gain:
            names = {member.tensor for member in site.scored}
            gain /= _norm(self.anchor, names) * _norm(self.state, names)
        element = self.elements[site.name]
        return SiteReport(
            site=site.name,
            certified=site.name in self.certified and element.is_identity,
            moved=element.moved(),
            gain=gain,
            fixed_points=fixed_points(element),
            largest_angle=largest_angle(element),
            skew_before=self.first_skews.get(site.name),
            skew_after=self._last_skew(site),
        )

    def _last_skew(self, site: Site) -> float | None:
        """Where the last visit ended in a step, the score is another one since."""
        if site.name in self.last_skews or not _turns(site):
            return self.last_skews.get(site.name)
        return skew(_scores(site, self.anchor, self.state))


def _turns(site: Site) -> bool:
    """Whether its units can mix: where they only change places, skewness says nothing that they do not."""
    return max(site.group.sizes) > 1


def _neighbours(symmetry: Symmetry) -> dict[str, set[str]]:
    """For each site the sites whose score it changes when it moves: those that share a tensor with it."""
    moved = {site.name: {member.tensor for member in site.members} for site in symmetry.sites}
    read = {site.name: {member.tensor for member in site.scored} for site in symmetry.sites}
    return {
        site.name: {
            other
            for other, names in read.items()
            if names & moved[site.name] and (other != site.name or site.quadratic)
        }
        for site in symmetry.sites
    }


def _counted(symmetry: Symmetry, anchor: State) -> dict[str, Tensor]:
    """The tensors whose distance the search can only lower."""
    silent = {m.tensor for site in symmetry.sites for m in site.members if not m.scored}
    return {name: tensor for name, tensor in floating(anchor).items() if name not in silent}


def _scores(site: Site, anchor: State, client: State) -> tuple[Tensor, ...]:
    """M of every leg, summed over the site's tensors: products in single, the sum in double.

    They end on the CPU, where the assignment problem is solved.
    """
    totals: list[Tensor | None] = [None] * len(site.group.sizes)
    for member in site.scored:
        width = site.width(member.leg)
        ours, theirs = (member.rows(state[member.tensor], width) for state in (anchor, client))
        single = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
        score = site.group.score(ours.to(single), theirs.to(single), member.leg).double().cpu()
        total = totals[member.leg]
        totals[member.leg] = score if total is None else total.add_(score)
    return tuple(total for total in totals if total is not None)


def _norm(state: State, names: set[str]) -> float:
    norms = [torch.linalg.vector_norm(state[name], dtype=torch.float64) for name in names]
    return math.hypot(*map(float, norms))
