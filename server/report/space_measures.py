"""The alignment of every space of the model, round by round: means over the accepted clients."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean

from fedbasin.proto.report import RoundReport, SpaceReport
from fedbasin.server.observe.metrics.gauges import accepted_alignments


@dataclass(frozen=True)
class SpaceMeasures:
    """The alignment of one space in one round.

    Attributes:
        moved: fraction of the units that changed place, or of the rotation's norm.
        gain: rise of the matching objective.
        certified: fraction of the clients for which the identity was proven optimal.
        fixed_points: fraction of the units that stayed in their place.
        largest_angle: largest angle of the rotations, radians; NaN where units only change places.
        skew_before: skew ratio of the agreement with the anchor, 0 (symmetric) to 2; NaN where nothing rotates.
        skew_after: skew ratio after alignment.
    """

    moved: float
    gain: float
    certified: float
    fixed_points: float = math.nan
    largest_angle: float = math.nan
    skew_before: float = math.nan
    skew_after: float = math.nan


MEASURES = {
    "moved": "Share of a space's units that changed place",
    "gain": "Rise of the matching objective",
    "certified": "Share of clients whose identity was proven optimal",
}

_FIELDS = tuple(field.name for field in fields(SpaceMeasures))


def measure_spaces(report: RoundReport) -> dict[str, SpaceMeasures]:
    """Return the measures of a round by space, in the model's order; empty where nothing was aligned."""
    by_space: dict[str, list[SpaceReport]] = defaultdict(list)
    for alignment in accepted_alignments(report):
        for space in alignment.spaces:
            by_space[space.space].append(space)
    return {name: _mean(spaces) for name, spaces in by_space.items()}


def bin_rounds(
    rounds: Sequence[tuple[int, Mapping[str, SpaceMeasures]]], most: int
) -> list[tuple[range, Mapping[str, SpaceMeasures]]]:
    """Average neighbouring rounds until at most `most` columns are left; return their spans and means."""
    width = -(-len(rounds) // most) or 1
    return [_merge(rounds[start : start + width]) for start in range(0, len(rounds), width)]


def _merge(rounds: Sequence[tuple[int, Mapping[str, SpaceMeasures]]]) -> tuple[range, Mapping[str, SpaceMeasures]]:
    names = dict.fromkeys(name for _, spaces in rounds for name in spaces)
    means = {name: _mean([spaces[name] for _, spaces in rounds if name in spaces]) for name in names}
    return range(rounds[0][0], rounds[-1][0] + 1), means


def _mean(rows: Sequence[SpaceReport | SpaceMeasures]) -> SpaceMeasures:
    """Return the mean of each measure over the clients or rounds that have it."""
    means = []
    for name in _FIELDS:
        column = (getattr(row, name) for row in rows)
        # A client that cannot rotate a space says nothing about its angle; a zero would lower the mean.
        values = [value for value in column if value is not None and not math.isnan(value)]
        means.append(fmean(values) if values else math.nan)
    return SpaceMeasures(*means)
