"""How an alignment went: what was proven, what was searched, what moved and how much it helped."""

from dataclasses import dataclass
from enum import Enum


class Decision(Enum):
    """What alignment decided for one client, and why."""

    certified = "nothing was searched: the identity is proven best at every space"
    identity = "searched: nothing agrees better with the anchor than the client as it is"
    aligned = "moved: the client agrees better with the anchor in another order or frame"


@dataclass(frozen=True)
class SpaceReport:
    """How one space went.

    Attributes:
        space: its name.
        certified: whether the identity was proven optimal and the space stayed as it was.
        moved: distance of the element from the identity, 0 to 1.
        gain: rise of J, as a share of `||anchor|| ||client||` over the space's tensors.
        fixed_points: share of the units that stayed in their place.
        largest_angle: of the rotations, radians; None where units only change places.
        skew_before: skew ratio when the search came to the space, 0 to 2; None where nothing can turn.
        skew_after: the same where it ended; near 0 where a rotation was found exactly.
    """

    space: str
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
        spaces: how each space went, in the symmetry's order.
        sweeps: passes over the spaces.
        distance_before: Euclidean, client to anchor, over all tensors that count in matching; running
            statistics do not.
        distance_after: the same after alignment; matching by weights never raises it.
    """

    spaces: tuple[SpaceReport, ...]
    sweeps: int
    distance_before: float
    distance_after: float

    @property
    def decision(self) -> Decision:
        """Whether the client was proven to be in place, stayed where it was, or moved."""
        if any(space.moved for space in self.spaces):
            return Decision.aligned
        proven = all(space.certified for space in self.spaces)
        return Decision.certified if proven else Decision.identity
