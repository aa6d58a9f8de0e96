"""How alignment went at every site of the model, round by round: means over the accepted clients."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean

from fedbasin.proto.fedbasin_pb2 import RoundReport, SiteReport
from fedbasin.server.observe.gauges import alignments


@dataclass(frozen=True)
class Site:
    """One site in one round.

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
    "moved": "Share of a site's units that changed place",
    "gain": "Rise of the matching objective",
    "certified": "Share of clients whose identity was proven optimal",
}


def sites(report: RoundReport) -> dict[str, Site]:
    """The sites of a round by name, in the model's order; empty where nothing was aligned."""
    found = defaultdict(list)
    for alignment in alignments(report):
        for site in alignment.sites:
            found[site.site].append(_read(site))
    return {name: _mean(rows) for name, rows in found.items()}


def _read(site: SiteReport) -> Site:
    return Site(
        site.moved,
        site.gain,
        site.certified,
        site.fixed_points if site.HasField("fixed_points") else math.nan,
        site.largest_angle if site.HasField("largest_angle") else math.nan,
        site.skew_before if site.HasField("skew_before") else math.nan,
        site.skew_after if site.HasField("skew_after") else math.nan,
    )


def binned(
    rounds: Sequence[tuple[int, Mapping[str, Site]]], most: int
) -> list[tuple[range, Mapping[str, Site]]]:
    """Neighbouring rounds drawn together until there are at most so many columns."""
    width = -(-len(rounds) // most) or 1
    return [_merged(rounds[start : start + width]) for start in range(0, len(rounds), width)]


def _merged(rounds: Sequence[tuple[int, Mapping[str, Site]]]) -> tuple[range, Mapping[str, Site]]:
    names = dict.fromkeys(name for _, found in rounds for name in found)
    merged = {name: _mean([found[name] for _, found in rounds if name in found]) for name in names}
    return range(rounds[0][0], rounds[-1][0] + 1), merged


def _mean(of: Sequence[Site]) -> Site:
    """Measure by measure, over the clients or rounds that have it."""
    columns = zip(*map(astuple, of), strict=True)
    known = ([value for value in column if not math.isnan(value)] for column in columns)
    return Site(*(fmean(values) if values else math.nan for values in known))
