"""Weight matching: the transform that brings a client closest to the anchor.

    maximise  J(T) = sum_w <W_w^a, T . W_w^k>        over the product of the spaces' groups

by coordinate ascent: J is linear in each space while the others are held, and each group knows its exact
maximiser, so J never falls and the distance to the anchor never rises. Git Re-Basin (Ainsworth, Hayase,
Srinivasa 2023, arXiv 2209.04836) for permutations; the rotations of attention heads follow Zhang et al. 2025
(arXiv 2502.00264). Data-free.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from fedbasin.strategies.alignment.alignment_report import AlignmentReport as AlignmentReport
from fedbasin.strategies.alignment.alignment_report import SpaceReport as SpaceReport
from fedbasin.strategies.alignment.coordinate_ascent import Ascent
from fedbasin.strategies.alignment.identity_bound import Radii
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.parallel import one_core
from fedbasin.strategies.tensors.state import State, distance


@dataclass(frozen=True, eq=False)
class Found:
    """The transform that takes a client into the anchor's frame, and how it was found."""

    transform: Transform
    report: AlignmentReport


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
    """Align `client` to `anchor` by coordinate ascent from the identity, both folded where the symmetry folds.

    Laws: a planted permutation is undone exactly and a planted rotation to the prior's size; aligning twice
    changes nothing; ties go to the identity.

    Args:
        symmetry: the spaces; `symmetry.check(anchor)` must hold.
        anchor: the state to align to.
        client: the state to align; what is returned is folded.
        radii: the anchor's identity radii (`identity_radii`); None searches every space.
        prior: strength of the preference for the identity.
        max_sweeps: bound on the passes over all spaces.

    Raises:
        FoldError: a norm's gain vanishes where it would have to be divided by.
    """
    anchor, client = folded(symmetry, anchor), folded(symmetry, client)
    return finished(Ascent(symmetry, anchor, client, radii or {}, prior), max_sweeps)


def finished(ascent: Ascent, max_sweeps: int) -> Alignment:
    """The alignment in which a search ends, from where it is now."""
    sweeps = ascent.run(max_sweeps)
    state = ascent.moved()
    return Alignment(state, ascent.transform, _report(ascent, sweeps, state))


def find_by_weights(
    symmetry: Symmetry,
    anchor: State,
    client: State,
    radii: Radii | None = None,
    *,
    prior: float = 1e-6,
    max_sweeps: int = 100,
) -> Found:
    """The transform of `match_weights` without the aligned state, which `Moved` or `Transform.act` gives.

    Tensors are read space by space and not kept: states may be mappings that read from files, and memory beside
    them is that of one space's score. Both are folded already.
    """
    ascent = Ascent(symmetry, anchor, client, radii or {}, prior)
    sweeps = ascent.run(max_sweeps)
    return Found(ascent.transform, _report(ascent, sweeps, ascent.client))


def _report(ascent: Ascent, sweeps: int, moved: State) -> AlignmentReport:
    """How a search went.

    Args:
        ascent: the search.
        sweeps: its passes over the spaces.
        moved: the client after it; only what has moved is measured again.
    """
    symmetry, anchor = ascent.symmetry, ascent.anchor
    before = distances(symmetry, anchor, ascent.state, ascent.distances)
    touched = [name for name in before if ascent.client.is_touched(name)]
    after = before | _distances(touched, anchor, moved)
    return AlignmentReport(
        tuple(ascent.report(space) for space in symmetry.spaces),
        sweeps,
        math.hypot(*before.values()),
        math.hypot(*after.values()),
    )


def folded(symmetry: Symmetry, state: State) -> State:
    """The state in the parametrisation on which the symmetry acts; without folds the same object."""
    return symmetry.fold(state) if symmetry.folds else state


def distances(
    symmetry: Symmetry,
    anchor: State,
    client: State,
    known: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Anchor to client, by tensor, of all floating tensors whose distance matching can only lower.

    Args:
        symmetry: the spaces.
        anchor: the state to align to.
        client: the state to align.
        known: those that need not be measured again.
    """
    silent = {m.tensor for space in symmetry.spaces for m in space.axes if not m.scored}
    unknown = (name for name in anchor if name not in silent and name not in known)
    return {**known, **_distances(unknown, anchor, client)}


def _distances(names: Iterable[str], anchor: State, client: State) -> dict[str, float]:
    pairs = ((name, anchor[name]) for name in names)
    with one_core():
        return {
            name: distance({name: tensor}, client)
            for name, tensor in pairs
            if tensor.is_floating_point()
        }
