"""Coordinate ascent over the spaces of a symmetry: each in turn gets the element that agrees best with the anchor.

    T_s  <-  argmax_T <T, M_s> T_s        M_s = sum over the space's tensors of  X^a (X^k)^T,  other spaces fixed

M is the agreement of the anchor's units with those of the client under all elements chosen so far. A space is visited
again only when a neighbour, with which it shares a tensor, has changed since.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedbasin.proto.report import SpaceReport
from fedbasin.strategies.alignment.identity_bound import Drifts, IdentityBounds, drifts_of, is_certified, keeps_order
from fedbasin.strategies.alignment.transformed_state import TransformedState
from fedbasin.strategies.diagnostics.geometry import fixed_points, largest_angle, skew
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.groups.groups import Group
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.parallel import one_core
from fedbasin.strategies.tensors.state import State

# Gains below this share of ||M|| are rounding.
PROGRESS = 1e-7

# Largest number of score entries of spaces that are visited at the same time: without a limit, memory would have to
# hold the scores of all spaces and not only that of the largest.
_SCORES = 2**25

Visit: TypeAlias = Callable[[Space], bool]


@dataclass
class Ascent:
    """A search by coordinate ascent, with the elements chosen so far.

    Attributes:
        symmetry: the spaces, visited in this order.
        anchor: the state to align to.
        state: the client before alignment.
        bounds: the anchor's identity bounds; spaces without are searched.
        prior: strength of the preference for the identity.
        client: the client under the elements chosen so far.
        distances: distance of client to anchor before alignment, for tensors where the search measured it anyway.
    """

    symmetry: Symmetry
    anchor: State
    state: State
    bounds: IdentityBounds
    prior: float

    def __post_init__(self) -> None:
        self.client = TransformedState(self.symmetry, self.state, {})
        self.gains: dict[str, float] = {}
        self.certified: set[str] = set()
        self.distances: dict[str, float] = {}
        self.first_skews: dict[str, float] = {}
        self.last_skews: dict[str, float] = {}

    def transformed_state(self) -> dict[str, Tensor]:
        """Return the client under the present elements; tensors on which none acts are the same objects."""
        return Transform(self.symmetry, self.client.elements).act(self.state)

    @property
    def transform(self) -> Transform:
        """The present elements, with the identity for spaces that have none."""
        spaces = self.symmetry.spaces
        identities = {space.name: space.group.identity() for space in spaces}
        return Transform(self.symmetry, identities | self.client.elements)

    def run(self, max_sweeps: int) -> int:
        """Visit the spaces in order until none can gain, and return the number of sweeps.

        A space is visited again only when a neighbour has changed since: otherwise its score is the same. Spaces that
        are not neighbours share no tensor and are visited at the same time.
        """
        neighbours = _neighbours(self.symmetry)
        pending = set(neighbours)
        sweeps = 0
        with _parallel_map() as visit_all:
            while pending and sweeps < max_sweeps:
                sweeps += 1
                for batch in _independent_batches(self.symmetry.spaces, neighbours):
                    due = [space for space in batch if space.name in pending]
                    # Removed before the visits: a space with a tensor on two of its axes is its own neighbour.
                    pending -= {space.name for space in due}
                    for space, progress in zip(due, visit_all(self.visit, due), strict=True):
                        pending |= neighbours[space.name] if progress else set()
        return sweeps

    def visit(self, space: Space) -> bool:
        """Replace the space's element by the best one, and return True if that was progress."""
        self.certified.discard(space.name)
        drifts = self._measure_drifts(space)
        # First the bound: it costs one pass over the weights, where a score costs a product of matrices.
        if is_certified(space, drifts, self.bounds):
            self.certified.add(space.name)
            return False
        group = self._remaining_group(space, drifts)
        scores = agreement(space, group, self.anchor, self.client)
        self._record_skew(space, scores)
        step = group.maximiser(scores, self.prior)
        gain = group.value(scores, step) - group.value(scores, group.identity())
        scale = sum(float(torch.linalg.vector_norm(score)) for score in scores)
        if gain <= PROGRESS * scale or not self._take_step(space, step, gain):
            return False
        self._record_skew_after(space, scores, step)
        return True

    def _remaining_group(self, space: Space, drifts: Drifts) -> Group:
        """Return the group to search: where the order of blocks is proven, only rotations of blocks in their places."""
        return space.group.in_place if keeps_order(space, drifts, self.bounds) else space.group

    def _measure_drifts(self, space: Space) -> Drifts:
        """Measure what changed at the space if it has a bound, and note the distances of whole tensors."""
        if space.name not in self.bounds:
            return {}
        drifts = drifts_of(space, self.anchor, self.client)
        for axis, squares in drifts.items():
            if axis.is_whole and not self.client.is_touched(axis.tensor):
                self.distances[axis.tensor] = float(squares.sum()) ** 0.5
        return drifts

    def _take_step(self, space: Space, step: Element, gain: float) -> bool:
        elements = self.client.elements
        previous = elements.get(space.name)
        objective = self._objective(space) if space.quadratic else 0.0
        elements[space.name] = step if previous is None else step.after(previous)
        if space.quadratic:
            # A tensor with the space on both axes makes J quadratic: take the step only if J really rose.
            gain = self._objective(space) - objective
            if gain <= 0:
                del elements[space.name]
                if previous is not None:
                    elements[space.name] = previous
                return False
        self.gains[space.name] = self.gains.get(space.name, 0.0) + gain
        return True

    def _objective(self, space: Space) -> float:
        names = {axis.tensor for axis in space.scored}
        return sum(float((self.anchor[n].double() * self.client[n].double()).sum()) for n in names)

    def report(self, space: Space) -> SpaceReport:
        """Describe the search at one space."""
        element = self.client.elements.get(space.name, space.group.identity())
        return SpaceReport(
            space=space.name,
            # A space that was searched and moved may lie within its bounds afterwards; it is not certified.
            certified=space.name in self.certified and element.is_identity,
            moved=element.displacement(),
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

    def _record_skew(self, space: Space, scores: tuple[Tensor, ...]) -> None:
        if _can_mix_units(space):
            self.last_skews[space.name] = skew(scores)
            self.first_skews.setdefault(space.name, self.last_skews[space.name])

    def _record_skew_after(self, space: Space, scores: tuple[Tensor, ...], step: Element) -> None:
        if not _can_mix_units(space):
            return
        stretches = any(dual != role for role, dual in enumerate(step.duals))
        if space.quadratic or stretches:
            # Here the step changes M by more than a factor on its right, so it has to be computed again.
            scores = agreement(space, space.group, self.anchor, self.client)
        else:
            scores = tuple(_apply_to_score(step, score, role) for role, score in enumerate(scores))
        self.last_skews[space.name] = skew(scores)


def _apply_to_score(step: Element, score: Tensor, role: int) -> Tensor:
    """Return `M T^T`, the score after the client has taken the step."""
    exchanged = score if score.ndim < 4 else score[:, step.order]
    block = step.blocks[role]
    return exchanged if block is None else exchanged @ block.mT.to(score.dtype)


def agreement(space: Space, group: Group, anchor: State, client: State) -> tuple[Tensor, ...]:
    """Compute the score M of every role, summed over the space's tensors, in the form that the group uses.

    Products are taken in single precision, or in the weights' own where that is better. The score of a permutation
    stays on the tensors' device, because the assignment reads few of its entries; other scores are returned in double
    precision on the CPU.
    """
    totals: list[Tensor | None] = [None] * len(group.sizes)
    for axis in space.scored:
        rows = _paired_rows(space, axis, anchor, client)
        totals[axis.role] = _add_score(totals[axis.role], group, *rows, axis.role)
    return tuple(total for total in totals if total is not None)


def _add_score(total: Tensor | None, group: Group, anchor_rows: Tensor, client_rows: Tensor, role: int) -> Tensor:
    if group.is_permutation:
        # In place: this matrix may be larger than all of the space's tensors together.
        if total is not None and total.dtype == anchor_rows.dtype:
            return total.addmm_(anchor_rows, client_rows.mT)
        score = group.score(anchor_rows, client_rows, role)
        return score if total is None else total + score
    score = group.score(anchor_rows, client_rows, role).double().cpu()
    return score if total is None else total.add_(score)


def _paired_rows(space: Space, axis: Axis, anchor: State, client: State) -> tuple[Tensor, Tensor]:
    width = space.width(axis.role)
    anchor_rows, client_rows = (axis.rows(state[axis.tensor], width) for state in (anchor, client))
    common = torch.promote_types(anchor_rows.dtype, client_rows.dtype)
    single = torch.promote_types(common, torch.float32)
    return anchor_rows.to(single), client_rows.to(single)


def _can_mix_units(space: Space) -> bool:
    """Return True if the group mixes units; the skew of a plain permutation's score is not reported."""
    return max(space.group.sizes) > 1


@contextmanager
def _parallel_map() -> Iterator[Callable[[Visit, Sequence[Space]], Iterable[bool]]]:
    """Provide a `map` that visits spaces on as many cores as torch may use, each visit on one core."""
    count = torch.get_num_threads()
    if count == 1:
        yield map
        return
    # torch's number of threads is global, so it is set around the pool and not inside a worker.
    # Threads suffice, because torch and SciPy release the interpreter lock while they compute.
    with one_core(), ThreadPoolExecutor(count) as pool:
        yield (lambda visit, spaces: pool.map(visit, spaces) if len(spaces) > 1 else map(visit, spaces))


def _independent_batches(spaces: Iterable[Space], neighbours: Mapping[str, set[str]]) -> Iterator[list[Space]]:
    """Split the spaces, in their order, into batches without neighbours whose scores fit into memory together."""
    batch: list[Space] = []
    for space in spaces:
        meets = any(space.name in neighbours[member.name] or member.name in neighbours[space.name] for member in batch)
        if batch and (meets or sum(map(_score_entries, (*batch, space))) > _SCORES):
            yield batch
            batch = []
        batch.append(space)
    if batch:
        yield batch


def _score_entries(space: Space) -> int:
    """Return an upper bound on the number of entries of a space's score."""
    return max(space.width(role) for role in range(len(space.group.sizes))) ** 2


def _neighbours(symmetry: Symmetry) -> dict[str, set[str]]:
    """Map each space to the spaces whose score it changes: those that score a tensor on which it acts."""
    acts_on = {space.name: {axis.tensor for axis in space.axes} for space in symmetry.spaces}
    scores = {space.name: {axis.tensor for axis in space.scored} for space in symmetry.spaces}
    return {
        space.name: {
            name
            for name, tensors in scores.items()
            if tensors & acts_on[space.name] and (name != space.name or space.quadratic)
        }
        for space in symmetry.spaces
    }


def _norm(state: State, names: set[str]) -> float:
    return math.hypot(*(_tensor_norm(state[name]) for name in names))


def _tensor_norm(tensor: Tensor) -> float:
    """Return the norm in single precision or better: in half precision it would overflow."""
    single = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=single))
