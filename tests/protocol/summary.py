"""Curves of several seeds as one row: accuracy by round, and how soon, and at what price, it is reached."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TypeAlias

from tests.protocol.results import Curves
from tests.protocol.setting import Point, Setting
from tests.protocol.spec import parse

MARKS = (0.60, 0.90, 0.95)


@dataclass(frozen=True)
class Row:
    """One rule's mean over seeds.

    Attributes:
        rule: with the settings that were used.
        seeds: which.
        points: means by round, round 0 first where it was measured.
        tried: how many settings of this rule were measured, this one included.
    """

    rule: str
    seeds: tuple[int, ...]
    points: tuple[Point, ...]
    tried: int = 1

    @property
    def last(self) -> int:
        """The number of the last round."""
        return self.points[-1].round

    @property
    def has_accuracy(self) -> bool:
        """Whether the task has right and wrong."""
        return not math.isnan(self.points[-1].accuracy)

    def score(self, rounds: int) -> float:
        """By what settings are compared: the mean accuracy over the first rounds, or the negative mean loss."""
        if not self.has_accuracy:
            return -self.mean_loss(rounds)
        return fmean(p.accuracy for p in self.points if 0 < p.round <= rounds)

    def mean_loss(self, rounds: int) -> float:
        """By what settings are compared in tables of losses: the mean loss over the first rounds; infinite for NaN."""
        mean = fmean(p.loss for p in self.points if 0 < p.round <= rounds)
        return math.inf if math.isnan(mean) else mean

    @property
    def best(self) -> float:
        """The highest accuracy of any round."""
        return max(point.accuracy for point in self.points)

    def at(self, server_round: int) -> Point | None:
        """The mean after one round, if it was measured."""
        return next((point for point in self.points if point.round == server_round), None)

    def first(self, mark: float) -> Point | None:
        """The first round whose mean accuracy is at least `mark`."""
        return next((point for point in self.points if point.accuracy >= mark), None)


# A setting without its rule and its seed: what can be compared.
Scene: TypeAlias = Setting


def scenes(curves: Curves) -> dict[Scene, list[Row]]:
    """A row for every rule and settings of it, by scene, over the seeds that all rules of the scene have.

    A curve that was interrupted at once is left out. Rules without any seed in common keep their own.
    """
    found: dict[Scene, dict[str, dict[int, dict[int, Point]]]] = defaultdict(lambda: defaultdict(dict))
    for setting, points in curves.items():
        if max(points) > 0:
            found[replace(setting, rule="", seed=0)][setting.rule][setting.seed] = points
    return {scene: _rows(rules) for scene, rules in found.items()}


def best_of_each(rows: Iterable[Row]) -> list[Row]:
    """The best settings of every rule, chosen by the same measure and said so; best rule last."""
    best = [_best(family) for family in _families(rows).values()]
    return sorted(best, key=lambda row: row.score(row.last))


def lowest_of_each(rows: Iterable[Row]) -> list[Row]:
    """The settings of every rule with the lowest mean loss; the lowest rule first."""
    lowest = [
        replace(min(family, key=lambda row: row.mean_loss(_common(family))), tried=len(family))
        for family in _families(rows).values()
    ]
    return sorted(lowest, key=lambda row: row.mean_loss(row.last))


def _families(rows: Iterable[Row]) -> dict[str, list[Row]]:
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[parse(row.rule).name].append(row)
    return families


def _common(family: list[Row]) -> int:
    return min(row.last for row in family)


def _best(family: list[Row]) -> Row:
    return replace(max(family, key=lambda row: row.score(_common(family))), tried=len(family))


def _rows(rules: dict[str, dict[int, dict[int, Point]]]) -> list[Row]:
    common = set.intersection(*(set(seeds) for seeds in rules.values()))
    return [_row(rule, {seed: seeds[seed] for seed in common or seeds}) for rule, seeds in rules.items()]


def _row(rule: str, seeds: dict[int, dict[int, Point]]) -> Row:
    """Means over seeds, of the rounds that all of them have."""
    common = sorted(set.intersection(*(set(points) for points in seeds.values())))
    points = tuple(_mean([seeds[seed][number] for seed in sorted(seeds)]) for number in common)
    return Row(rule, tuple(sorted(seeds)), points)


def _mean(points: Sequence[Point]) -> Point:
    return Point(
        points[0].round,
        fmean(point.accuracy for point in points),
        fmean(point.loss for point in points),
        round(fmean(point.bytes_up for point in points)),
        round(fmean(point.bytes_down for point in points)),
        fmean(point.client_seconds for point in points),
        fmean(point.server_seconds for point in points),
    )
