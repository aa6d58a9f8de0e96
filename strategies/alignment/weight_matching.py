"""Weight matching: find the transform that brings a client closest to the anchor.

    maximise  J(T) = sum_w <W_w^a, T . W_w^k>        over the product of the spaces' groups

The maximiser is found by coordinate ascent: J is linear in each space while the others are fixed, and each group has an
exact maximiser, so J never falls and the distance to the anchor never rises. Sources: Git Re-Basin for permutations
(Ainsworth, Hayase, Srinivasa 2023, arXiv 2209.04836); Zhang et al. 2025 (arXiv 2502.00264) for the rotations of
attention heads. Needs no data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from fedbasin.proto.report import AlignmentReport as AlignmentReport
from fedbasin.proto.report import SpaceReport as SpaceReport
from fedbasin.strategies.alignment.coordinate_ascent import Ascent
from fedbasin.strategies.alignment.identity_bound import IdentityBounds
from fedbasin.strategies.symmetry.symmetry import Axis, Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.parallel import one_core
from fedbasin.strategies.tensors.state import State, distance


@dataclass(frozen=True, eq=False)
class MatchResult:
    """The transform that takes a client into the anchor's frame, and the report of the search."""

    transform: Transform
    report: AlignmentReport


@dataclass(frozen=True, eq=False)
class Alignment:
    """A client's state in the anchor's frame, the transform that took it there, and the report of the search."""

    state: dict[str, Tensor]
    transform: Transform
    report: AlignmentReport


def match_weights(
    symmetry: Symmetry,
    anchor: State,
    client: State,
    bounds: IdentityBounds | None = None,
    *,
    prior: float = 1e-6,
    max_sweeps: int = 100,
) -> Alignment:
    """Align `client` to `anchor` by coordinate ascent from the identity.

    Both states are folded first where the symmetry has folds. Laws: a planted permutation is undone exactly and a
    planted rotation up to the size of the prior; aligning twice changes nothing; ties go to the identity.

    Args:
        symmetry: the spaces; `symmetry.check(anchor)` must hold.
        anchor: the state to align to.
        client: the state to align; the returned state is folded.
        bounds: the anchor's identity bounds (`identity_bounds`); None searches every space.
        prior: strength of the preference for the identity.
        max_sweeps: largest number of passes over all spaces.

    Raises:
        SymmetryError: a norm's weight is too close to zero to divide by.
    """
    anchor, client = fold_state(symmetry, anchor), fold_state(symmetry, client)
    return finish_ascent(Ascent(symmetry, anchor, client, bounds or {}, prior), max_sweeps)


def finish_ascent(ascent: Ascent, max_sweeps: int) -> Alignment:
    """Run a search from its present elements to its end and return the alignment."""
    sweeps = ascent.run(max_sweeps)
    state = ascent.transformed_state()
    return Alignment(state, ascent.transform, _report(ascent, sweeps, state))


def find_by_weights(
    symmetry: Symmetry,
    anchor: State,
    client: State,
    bounds: IdentityBounds | None = None,
    *,
    prior: float = 1e-6,
    max_sweeps: int = 100,
) -> MatchResult:
    """Find the transform of `match_weights` without computing the aligned state.

    `TransformedState` or `Transform.act` give the aligned state afterwards. Tensors are read space by space and
    released again: the states may be mappings that read from files, and the memory beside them is that of one space's
    score. Both states must be folded already.
    """
    ascent = Ascent(symmetry, anchor, client, bounds or {}, prior)
    sweeps = ascent.run(max_sweeps)
    return MatchResult(ascent.transform, _report(ascent, sweeps, ascent.client))


def _report(ascent: Ascent, sweeps: int, aligned: State) -> AlignmentReport:
    """Describe a search after `sweeps` passes; only tensors that an element acts on are measured again."""
    symmetry, anchor = ascent.symmetry, ascent.anchor
    # Distances per tensor and not in total, so that tensors which stay need not be read again.
    initial = distances(symmetry, anchor, ascent.state, ascent.distances)
    touched = [name for name in initial if ascent.client.is_touched(name)]
    final = initial | _tensor_distances(touched, anchor, aligned, _unscored(symmetry))
    return AlignmentReport(
        tuple(ascent.report(space) for space in symmetry.spaces),
        sweeps,
        math.hypot(*initial.values()),
        math.hypot(*final.values()),
    )


def fold_state(symmetry: Symmetry, state: State) -> State:
    """Return the state in the parametrisation on which the symmetry acts: the same object where nothing folds."""
    return symmetry.fold(state) if symmetry.folds else state


def distances(
    symmetry: Symmetry, anchor: State, client: State, measured: Mapping[str, float] = MappingProxyType({})
) -> dict[str, float]:
    """Measure the distance from anchor to client for each floating tensor that counts in matching.

    What a space carries along without scoring, such as running statistics and the keys' part of a fused bias, is left
    out: matching may raise its distance.

    Args:
        symmetry: the spaces.
        anchor: the state to align to.
        client: the state to align.
        measured: distances that need not be measured again, by tensor.
    """
    unscored = _unscored(symmetry)
    silent = {name for name, axes in unscored.items() if any(axis.is_whole for axis in axes)}
    missing = (name for name in anchor if name not in silent and name not in measured)
    return {**measured, **_tensor_distances(missing, anchor, client, unscored)}


def _unscored(symmetry: Symmetry) -> dict[str, list[Axis]]:
    """Return the axes that do not count in matching, by their tensors."""
    result: dict[str, list[Axis]] = {}
    for space in symmetry.spaces:
        for axis in space.axes:
            if not axis.scored:
                result.setdefault(axis.tensor, []).append(axis)
    return result


def _tensor_distances(
    names: Iterable[str], anchor: State, client: State, unscored: Mapping[str, Sequence[Axis]]
) -> dict[str, float]:
    pairs = ((name, anchor[name]) for name in names)
    with one_core():
        # `distance` wants states; one tensor at a time keeps no more than that in memory.
        return {
            name: distance({name: _with_parts_of(client, name, tensor, unscored.get(name, ()))}, client)
            for name, tensor in pairs
            if tensor.is_floating_point()
        }


def _with_parts_of(client: State, name: str, tensor: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return a tensor of the anchor with the client's entries on some axes, which then have no distance."""
    result = tensor.clone() if axes else tensor
    for axis in axes:
        axis.view(result).copy_(axis.view(client[name]))
    return result
