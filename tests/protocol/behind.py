"""Where the default recipe is behind: rounds in which a strategy of Flower's is better, in accuracy or in loss."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tests.protocol.flower import STRATEGIES
from tests.protocol.setting import Point
from tests.protocol.spec import Spec, parse
from tests.protocol.summary import Row, Scene
from tests.protocol.tables import heading

# fedbasin's own names of what Flower has too: a run of these recipes is that strategy.
_PEERS = (*STRATEGIES, "fedavg", "fedavgm")
# What a rule may set and still be the default: it says who is asked, and not what is done.
_SAMPLING = {"fraction_train"}
_ROUNDS = (1, 2, 5, 10, 15, 20, 60)
_POINTS, _PART = 0.01, 0.02


def cells(scenes: Mapping[Scene, Iterable[Row]], name: str = "auto") -> str:
    """A table of the rounds in which a recipe is more than a point below, or its loss more than 2 % above.

    The best strategy is chosen anew for each round, with whichever of its settings is best there.
    """
    lines = ["| setting | round | " + f"`{name}`" + " | best of Flower's |", "|---|--:|---|---|"]
    compared = 0
    for scene, all_rows in scenes.items():
        rows = list(all_rows)
        for row in (row for row in rows if _is_default(parse(row.rule), name)):
            pairs = list(_pairs(row, [peer for peer in rows if parse(peer.rule).name in _PEERS]))
            compared += len(pairs) * (2 if row.has_accuracy else 1)
            lines += [f"| {heading(scene)} | {text} |" for pair in pairs for text in _behind(*pair)]
    behind = len(lines) - 2
    return "\n".join([f"{behind} of {compared} cells.", "", *lines]) if behind else f"None of {compared} cells."


def _is_default(rule: Spec, name: str) -> bool:
    return rule.name == name and dict(rule.settings).keys() <= _SAMPLING


def _pairs(row: Row, peers: Sequence[Row]) -> Iterator[tuple[Point, list[tuple[str, Point]]]]:
    for number in _ROUNDS:
        point = row.at(number)
        measured = [(peer.rule, at) for peer in peers if (at := peer.at(number)) is not None]
        if point is not None and measured:
            yield point, measured


def _behind(point: Point, peers: list[tuple[str, Point]]) -> Iterator[str]:
    rule, best = max(peers, key=lambda peer: peer[1].accuracy)
    if point.accuracy < best.accuracy - _POINTS:  # never where both are NaN
        yield f"{point.round} | accuracy {point.accuracy:.3f} | {best.accuracy:.3f}, `{rule}`"
    rule, best = min(peers, key=lambda peer: math.inf if math.isnan(peer[1].loss) else peer[1].loss)
    if not point.loss <= (1 + _PART) * best.loss:
        yield f"{point.round} | loss {point.loss:.3f} | {best.loss:.3f}, `{rule}`"
