"""How alignment went at every site of the model, round by round: means over the accepted clients."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedbasin.proto.fedbasin_pb2 import RoundReport
from fedbasin.server.gauges import alignments


@dataclass(frozen=True)
class Site:
    """One site in one round.

    Attributes:
        moved: share of the units that changed place, or of the rotation's norm.
        gain: rise of the matching objective.
        certified: share of the clients for which the identity was proven optimal.
    """

    moved: float
    gain: float
    certified: float


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
            found[site.site].append((site.moved, site.gain, site.certified))
    return {
        name: Site(*(fmean(column) for column in zip(*rows, strict=True)))
        for name, rows in found.items()
    }


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
    return Site(
        fmean(site.moved for site in of),
        fmean(site.gain for site in of),
        fmean(site.certified for site in of),
    )
