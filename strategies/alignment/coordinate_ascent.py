"""Coordinate ascent over the spaces of a symmetry: each in turn gets the element that agrees best with the anchor.

    T_s  <-  argmax_T <T, M_s> T_s        M_s = sum over the space's tensors of  X^a (X^k)^T,  others held

M is the agreement of the anchor's units with those of the client as it is under all elements so far. A space is
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

from fedbasin.strategies.alignment.alignment_report import SpaceReport
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
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.parallel import one_core
from fedbasin.strategies.tensors.state import State

# Gains below this share of ||M|| are rounding, not progress.
PROGRESS = 1e-7

# Entries of the scores of spaces that are visited at the same time: memory is to hold the largest, not all.
_SCORES = 2**25

Visit: TypeAlias = Callable[[Space], bool]


@dataclass
class Ascent:
    """One search: what has been found so far, and the client as it is under that.

    Attributes:
        symmetry: the spaces, visited in this order.
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
        """What has been found so far, with an element for every space."""
        found = self.client.elements
        spaces = self.symmetry.spaces
        return Transform(
            self.symmetry, {s.name: found.get(s.name, s.group.identity()) for s in spaces}
        )

    def run(self, max_sweeps: int) -> int:
        """Visit the spaces in order until none can gain; returns the number of sweeps.

        A space is visited again only when a neighbour has moved since: otherwise its score is the same. Spaces that
        are no neighbours do not meet, and are visited at the same time.
        """
        neighbours = _neighbours(self.symmetry)
        pending = set(neighbours)
        sweeps = 0
        with _cores() as visit_all:
            while pending and sweeps < max_sweeps:
                sweeps += 1
                for apart in _apart(self.symmetry.spaces, neighbours):
                    due = [space for space in apart if space.name in pending]
                    pending -= {space.name for space in due}
                    for space, progress in zip(due, visit_all(self.visit, due), strict=True):
                        pending |= neighbours[space.name] if progress else set()
        return sweeps

    def visit(self, space: Space) -> bool:
        """Replace the space's element by the best one; whether that was any progress."""
        self.certified.discard(space.name)
        drifts = self._drifts(space)
        if is_certified(space, drifts, self.radii):
            self.certified.add(space.name)
            return False
        group = self._group(space, drifts)
        scores = agreement(space, group, self.anchor, self.client)
        self._see_skew(space, scores)
        step = group.maximiser(scores, self.prior)
        gain = group.value(scores, step) - group.value(scores, group.identity())
        scale = sum(float(torch.linalg.vector_norm(score)) for score in scores)
        if gain <= PROGRESS * scale or not self._step(space, step, gain):
            return False
        self._see_skew_after(space, scores, step)
        return True

    def _group(self, space: Space, drifts: Drifts) -> Group:
        """What is left to search: where the order of blocks is proven, only what they do in their places."""
        if isinstance(space.group, Wreath) and keeps_order(space, drifts, self.radii):
            return space.group.in_place
        return space.group

    def _drifts(self, space: Space) -> Drifts:
        """What changed at the space, if that can prove anything; what it says of whole tensors is noted."""
        if space.name not in self.radii:
            return {}
        drifts = drifts_of(space, self.anchor, self.client)
        for axis, squares in drifts.items():
            if axis.is_whole and not self.client.is_touched(axis.tensor):
                self.distances[axis.tensor] = float(squares.sum()) ** 0.5
        return drifts

    def _step(self, space: Space, step: Element, gain: float) -> bool:
        held = self.client.elements.get(space.name)
        before = self._objective(space) if space.quadratic else 0.0
        self.client.elements[space.name] = step if held is None else step.after(held)
        if space.quadratic:
            # A tensor with the space on both axes makes J quadratic: take the step only if J really rose.
            gain = self._objective(space) - before
            if gain <= 0:
                self._restore(space, held)
                return False
        self.gains[space.name] = self.gains.get(space.name, 0.0) + gain
        return True

    def _restore(self, space: Space, held: Element | None) -> None:
        del self.client.elements[space.name]
        if held is not None:
            self.client.elements[space.name] = held

    def _objective(self, space: Space) -> float:
        names = {axis.tensor for axis in space.scored}
        return sum(float((self.anchor[n].double() * self.client[n].double()).sum()) for n in names)

    def report(self, space: Space) -> SpaceReport:
        """How the search went at one space."""
        element = self.client.elements.get(space.name, space.group.identity())
        return SpaceReport(
            space=space.name,
            certified=space.name in self.certified and element.is_identity,
            moved=element.moved(),
            gain=self._relative_gain(space),
            fixed_points=fixed_points(element),
            largest_angle=largest_angle(element),
            skew_before=self.first_skews.get(space.name),
            skew_after=self.last_skews.get(space.name),
        )

    def _relative_gain(self, space: Space) -> float:
        gain = self.gains.get(space.name, 0.0)
        if not gain:
            return 0.0
        names = {axis.tensor for axis in space.scored}
        return gain / (_norm(self.anchor, names) * _norm(self.state, names))

    def _see_skew(self, space: Space, scores: tuple[Tensor, ...]) -> None:
        if _turns(space):
            self.last_skews[space.name] = skew(scores)
            self.first_skews.setdefault(space.name, self.last_skews[space.name])

    def _see_skew_after(self, space: Space, scores: tuple[Tensor, ...], step: Element) -> None:
        if not _turns(space):
            return
        if space.quadratic or _stretches(step):
            # M is not what it was with the step applied.
            scores = agreement(space, space.group, self.anchor, self.client)
        else:
            scores = tuple(_turned(score, step, role) for role, score in enumerate(scores))
        self.last_skews[space.name] = skew(scores)


def _stretches(step: Element) -> bool:
    return any(dual != role for role, dual in enumerate(step.duals))


def _turned(score: Tensor, step: Element, role: int) -> Tensor:
    """M once the client has taken the step: `M T^T`."""
    exchanged = score if score.ndim < 4 else score[:, step.order]
    block = step.blocks[role]
    return exchanged if block is None else exchanged @ block.mT.to(score.dtype)


def agreement(space: Space, group: Group, anchor: State, client: State) -> tuple[Tensor, ...]:
    """M of every role, summed over the space's tensors, the parts that the group can use.

    Products are taken in single precision, or better where the weights are. Where units only change places M
    stays as it is on the tensors' device, as the assignment takes few entries of it; else it ends in double on
    the CPU.
    """
    totals: list[Tensor | None] = [None] * len(group.sizes)
    for axis in space.scored:
        ours, theirs = _rows(space, axis, anchor, client)
        totals[axis.role] = _added(totals[axis.role], group, ours, theirs, axis.role)
    return tuple(total for total in totals if total is not None)


def _added(total: Tensor | None, group: Group, ours: Tensor, theirs: Tensor, role: int) -> Tensor:
    if isinstance(group, Permutation):
        # In place: this matrix may be larger than all of the space's tensors together.
        if total is not None and total.dtype == ours.dtype:
            return total.addmm_(ours, theirs.mT)
        score = group.score(ours, theirs, role)
        return score if total is None else total + score
    score = group.score(ours, theirs, role).double().cpu()
    return score if total is None else total.add_(score)


def _rows(space: Space, axis: Axis, anchor: State, client: State) -> tuple[Tensor, Tensor]:
    width = space.width(axis.role)
    ours, theirs = (axis.rows(state[axis.tensor], width) for state in (anchor, client))
    single = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
    return ours.to(single), theirs.to(single)


def _turns(space: Space) -> bool:
    """Whether its units can mix: where they only change places, skewness says nothing that they do not."""
    return max(space.group.sizes) > 1


@contextmanager
def _cores() -> Iterator[Callable[[Visit, Sequence[Space]], Iterable[bool]]]:
    """Something that visits spaces on as many cores as torch may use, each on one; one after the other on one."""
    count = torch.get_num_threads()
    if count == 1:
        yield map
        return
    # What a thread sets holds for the others too, so it is set around all of them.
    with one_core(), ThreadPoolExecutor(count) as pool:
        yield (
            lambda visit, spaces: pool.map(visit, spaces) if len(spaces) > 1 else map(visit, spaces)
        )


def _apart(spaces: Iterable[Space], neighbours: Mapping[str, set[str]]) -> Iterator[list[Space]]:
    """The spaces in their order, in runs of such as are no neighbours and whose scores are small together."""
    run: list[Space] = []
    for space in spaces:
        meets = any(
            space.name in neighbours[other.name] or other.name in neighbours[space.name]
            for other in run
        )
        if run and (meets or sum(map(_entries, (*run, space))) > _SCORES):
            yield run
            run = []
        run.append(space)
    if run:
        yield run


def _entries(space: Space) -> int:
    """Of its score, at most."""
    return max(space.width(role) for role in range(len(space.group.sizes))) ** 2


def _neighbours(symmetry: Symmetry) -> dict[str, set[str]]:
    """For each space the spaces whose score it changes when it moves: those that share a tensor with it."""
    moved = {space.name: {axis.tensor for axis in space.axes} for space in symmetry.spaces}
    read = {space.name: {axis.tensor for axis in space.scored} for space in symmetry.spaces}
    return {
        space.name: {
            other
            for other, names in read.items()
            if names & moved[space.name] and (other != space.name or space.quadratic)
        }
        for space in symmetry.spaces
    }


def _norm(state: State, names: set[str]) -> float:
    return math.hypot(*(_length(state[name]) for name in names))


def _length(tensor: Tensor) -> float:
    """The norm, in single precision or better: a norm of halves overflows."""
    single = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=single))
