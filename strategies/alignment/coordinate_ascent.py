"""Coordinate ascent over the sites of a symmetry: each in turn gets the element that agrees best with the anchor.

    T_s  <-  argmax_T <T, M_s> T_s        M_s = sum over the site's tensors of  X^a (X^k)^T,  others held

M is the agreement of the anchor's units with those of the client as it is under all elements so far. A site is
visited again only when a neighbour, with which it shares a tensor, has moved.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedbasin.strategies.alignment.alignment_report import SiteReport
from fedbasin.strategies.alignment.identity_bound import (
    Drifts,
    Radii,
    drifts_of,
    is_certified,
    keeps_order,
)
from fedbasin.strategies.alignment.transformed_state import Moved
from fedbasin.strategies.diagnostics.geometry import fixed_points, largest_angle, skew
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.groups.groups import Group, Permutation, Wreath
from fedbasin.strategies.symmetry.symmetry import Member, Site, Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.parallel import one_core
from fedbasin.strategies.tensors.state import State

# Gains below this share of ||M|| are rounding, not progress.
PROGRESS = 1e-7

# Entries of the scores of sites that are visited at the same time: memory is to hold the largest, not all.
_SCORES = 2**25

Visit: TypeAlias = Callable[[Site], bool]


@dataclass
class Ascent:
    """One search: what has been found so far, and the client as it is under that.

    Attributes:
        symmetry: the sites, visited in this order.
        anchor: the state to align to.
        state: the client as it came.
        radii: the anchor's identity radii.
        prior: strength of the preference for the identity.
        distances: of the tensors whose distance to the anchor, as they came, was met on the way.
    """

    symmetry: Symmetry
    anchor: State
    state: State
    radii: Radii
    prior: float

    def __post_init__(self) -> None:
        self.client = Moved(self.symmetry, self.state, {})
        self.gains: dict[str, float] = {}
        self.certified: set[str] = set()
        self.distances: dict[str, float] = {}
        self.first_skews: dict[str, float] = {}
        self.last_skews: dict[str, float] = {}

    def moved(self) -> dict[str, Tensor]:
        """The client as it is now; tensors that did not move are the same objects."""
        return Transform(self.symmetry, self.client.elements).act(self.state)

    @property
    def transform(self) -> Transform:
        """What has been found so far, with an element for every site."""
        found = self.client.elements
        sites = self.symmetry.sites
        return Transform(
            self.symmetry, {s.name: found.get(s.name, s.group.identity()) for s in sites}
        )

    def run(self, max_sweeps: int) -> int:
        """Visit the sites in order until none can gain; returns the number of sweeps.

        A site is visited again only when a neighbour has moved since: otherwise its score is the same. Sites that
        are no neighbours do not meet, and are visited at the same time.
        """
        neighbours = _neighbours(self.symmetry)
        pending = set(neighbours)
        sweeps = 0
        with _cores() as visit_all:
            while pending and sweeps < max_sweeps:
                sweeps += 1
                for apart in _apart(self.symmetry.sites, neighbours):
                    due = [site for site in apart if site.name in pending]
                    pending -= {site.name for site in due}
                    for site, progress in zip(due, visit_all(self.visit, due), strict=True):
                        pending |= neighbours[site.name] if progress else set()
        return sweeps

    def visit(self, site: Site) -> bool:
        """Replace the site's element by the best one; whether that was any progress."""
        self.certified.discard(site.name)
        drifts = self._drifts(site)
        if is_certified(site, drifts, self.radii):
            self.certified.add(site.name)
            return False
        group = self._group(site, drifts)
        scores = agreement(site, group, self.anchor, self.client)
        self._see_skew(site, scores)
        step = group.maximiser(scores, self.prior)
        gain = group.value(scores, step) - group.value(scores, group.identity())
        scale = sum(float(torch.linalg.vector_norm(score)) for score in scores)
        if gain <= PROGRESS * scale or not self._step(site, step, gain):
            return False
        self._see_skew_after(site, scores, step)
        return True

    def _group(self, site: Site, drifts: Drifts) -> Group:
        """What is left to search: where the order of blocks is proven, only what they do in their places."""
        if isinstance(site.group, Wreath) and keeps_order(site, drifts, self.radii):
            return site.group.in_place
        return site.group

    def _drifts(self, site: Site) -> Drifts:
        """What changed at the site, if that can prove anything; what it says of whole tensors is noted."""
        if site.name not in self.radii:
            return {}
        drifts = drifts_of(site, self.anchor, self.client)
        for member, squares in drifts.items():
            if member.is_whole and not self.client.is_touched(member.tensor):
                self.distances[member.tensor] = float(squares.sum()) ** 0.5
        return drifts

    def _step(self, site: Site, step: Element, gain: float) -> bool:
        held = self.client.elements.get(site.name)
        before = self._objective(site) if site.quadratic else 0.0
        self.client.elements[site.name] = step if held is None else step.after(held)
        if site.quadratic:
            # A tensor with the site on both axes makes J quadratic: take the step only if J really rose.
            gain = self._objective(site) - before
            if gain <= 0:
                self._restore(site, held)
                return False
        self.gains[site.name] = self.gains.get(site.name, 0.0) + gain
        return True

    def _restore(self, site: Site, held: Element | None) -> None:
        del self.client.elements[site.name]
        if held is not None:
            self.client.elements[site.name] = held

    def _objective(self, site: Site) -> float:
        names = {member.tensor for member in site.scored}
        return sum(float((self.anchor[n].double() * self.client[n].double()).sum()) for n in names)

    def report(self, site: Site) -> SiteReport:
        """How the search went at one site."""
        element = self.client.elements.get(site.name, site.group.identity())
        return SiteReport(
            site=site.name,
            certified=site.name in self.certified and element.is_identity,
            moved=element.moved(),
            gain=self._relative_gain(site),
            fixed_points=fixed_points(element),
            largest_angle=largest_angle(element),
            skew_before=self.first_skews.get(site.name),
            skew_after=self.last_skews.get(site.name),
        )

    def _relative_gain(self, site: Site) -> float:
        gain = self.gains.get(site.name, 0.0)
        if not gain:
            return 0.0
        names = {member.tensor for member in site.scored}
        return gain / (_norm(self.anchor, names) * _norm(self.state, names))

    def _see_skew(self, site: Site, scores: tuple[Tensor, ...]) -> None:
        if _turns(site):
            self.last_skews[site.name] = skew(scores)
            self.first_skews.setdefault(site.name, self.last_skews[site.name])

    def _see_skew_after(self, site: Site, scores: tuple[Tensor, ...], step: Element) -> None:
        if not _turns(site):
            return
        if site.quadratic or _stretches(step):
            # M is not what it was with the step applied.
            scores = agreement(site, site.group, self.anchor, self.client)
        else:
            scores = tuple(_turned(score, step, leg) for leg, score in enumerate(scores))
        self.last_skews[site.name] = skew(scores)


def _stretches(step: Element) -> bool:
    return any(dual != leg for leg, dual in enumerate(step.duals))


def _turned(score: Tensor, step: Element, leg: int) -> Tensor:
    """M once the client has taken the step: `M T^T`."""
    exchanged = score if score.ndim < 4 else score[:, step.order]
    block = step.blocks[leg]
    return exchanged if block is None else exchanged @ block.mT.to(score.dtype)


def agreement(site: Site, group: Group, anchor: State, client: State) -> tuple[Tensor, ...]:
    """M of every leg, summed over the site's tensors, the parts that the group can use.

    Products are taken in single precision, or better where the weights are. Where units only change places M
    stays as it is on the tensors' device, as the assignment takes few entries of it; else it ends in double on
    the CPU.
    """
    totals: list[Tensor | None] = [None] * len(group.sizes)
    for member in site.scored:
        ours, theirs = _rows(site, member, anchor, client)
        totals[member.leg] = _added(totals[member.leg], group, ours, theirs, member.leg)
    return tuple(total for total in totals if total is not None)


def _added(total: Tensor | None, group: Group, ours: Tensor, theirs: Tensor, leg: int) -> Tensor:
    if isinstance(group, Permutation):
        # In place: this matrix may be larger than all of the site's tensors together.
        if total is not None and total.dtype == ours.dtype:
            return total.addmm_(ours, theirs.mT)
        score = group.score(ours, theirs, leg)
        return score if total is None else total + score
    score = group.score(ours, theirs, leg).double().cpu()
    return score if total is None else total.add_(score)


def _rows(site: Site, member: Member, anchor: State, client: State) -> tuple[Tensor, Tensor]:
    width = site.width(member.leg)
    ours, theirs = (member.rows(state[member.tensor], width) for state in (anchor, client))
    single = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
    return ours.to(single), theirs.to(single)


def _turns(site: Site) -> bool:
    """Whether its units can mix: where they only change places, skewness says nothing that they do not."""
    return max(site.group.sizes) > 1


@contextmanager
def _cores() -> Iterator[Callable[[Visit, Sequence[Site]], Iterable[bool]]]:
    """Something that visits sites on as many cores as torch may use, each on one; one after the other on one."""
    count = torch.get_num_threads()
    if count == 1:
        yield map
        return
    # What a thread sets holds for the others too, so it is set around all of them.
    with one_core(), ThreadPoolExecutor(count) as pool:
        yield lambda visit, sites: pool.map(visit, sites) if len(sites) > 1 else map(visit, sites)


def _apart(sites: Iterable[Site], neighbours: Mapping[str, set[str]]) -> Iterator[list[Site]]:
    """The sites in their order, in runs of such as are no neighbours and whose scores are small together."""
    run: list[Site] = []
    for site in sites:
        meets = any(
            site.name in neighbours[other.name] or other.name in neighbours[site.name]
            for other in run
        )
        if run and (meets or sum(map(_entries, (*run, site))) > _SCORES):
            yield run
            run = []
        run.append(site)
    if run:
        yield run


def _entries(site: Site) -> int:
    """Of its score, at most."""
    return max(site.width(leg) for leg in range(len(site.group.sizes))) ** 2


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


def _norm(state: State, names: set[str]) -> float:
    return math.hypot(*(_length(state[name]) for name in names))


def _length(tensor: Tensor) -> float:
    """The norm, in single precision or better: a norm of halves overflows."""
    single = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=single))
