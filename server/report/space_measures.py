"""How alignment went at every space of the model, round by round: means over the accepted clients."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean

from fedbasin.proto.fedbasin_pb2 import RoundReport, SpaceReport
from fedbasin.server.observe.gauges import alignments


@dataclass(frozen=True)
class Space:
    """One space in one round.

    Attributes:
        moved: share of the units that changed place, or of the rotation's norm.
        gain: rise of the matching objective.
        certified: share of the clients for which the identity was proven optimal.
        fixed: share of the units that stayed in their place.
        angle: largest of the rotations, radians; NaN where units only change places.
        skew_before: how far the agreement with the anchor was from symmetric, 0 to 2; NaN where nothing turns.
        skew_after: the same after alignment.
    """

    moved: float
    gain: float
    certified: float
    fixed: float = math.nan
    angle: float = math.nan
    skew_before: float = math.nan
    skew_after: float = math.nan


MEASURES = {
    "moved": "Share of a space's units that changed place",
    "gain": "Rise of the matching objective",
    "certified": "Share of clients whose identity was proven optimal",
}


def spaces(report: RoundReport) -> dict[str, Space]:
    """The spaces of a round by name, in the model's order; empty where nothing was aligned."""
    found = defaultdict(list)
    for alignment in alignments(report):
        for space in alignment.spaces:
            found[space.space].append(_read(space))
    return {name: _mean(rows) for name, rows in found.items()}


def _read(space: SpaceReport) -> Space:
    return Space(
        space.moved,
        space.gain,
        space.certified,
        space.fixed_points if space.HasField("fixed_points") else math.nan,
        space.largest_angle if space.HasField("largest_angle") else math.nan,
        space.skew_before if space.HasField("skew_before") else math.nan,
        space.skew_after if space.HasField("skew_after") else math.nan,
    )


def binned(
    rounds: Sequence[tuple[int, Mapping[str, Space]]], most: int
) -> list[tuple[range, Mapping[str, Space]]]:
    """Neighbouring rounds drawn together until there are at most so many columns."""
    width = -(-len(rounds) // most) or 1
    return [_merged(rounds[start : start + width]) for start in range(0, len(rounds), width)]


def _merged(rounds: Sequence[tuple[int, Mapping[str, Space]]]) -> tuple[range, Mapping[str, Space]]:
    names = dict.fromkeys(name for _, found in rounds for name in found)
    merged = {name: _mean([found[name] for _, found in rounds if name in found]) for name in names}
    return range(rounds[0][0], rounds[-1][0] + 1), merged


def _mean(of: Sequence[Space]) -> Space:
    """Measure by measure, over the clients or rounds that have it."""
    columns = zip(*map(astuple, of), strict=True)
    known = ([value for value in column if not math.isnan(value)] for column in columns)
    return Space(*(fmean(values) if values else math.nan for values in known))
