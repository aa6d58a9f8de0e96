"""Means of the clients' metrics, weighted by the clients' weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

Value: TypeAlias = float | Sequence[float]


def weighted_means(clients: Iterable[tuple[Mapping[str, Value], float]]) -> dict[str, float | list[float]]:
    """Return the mean of each metric over the clients that sent a finite value of it.

    Lists are averaged entry by entry. A value that is not finite is left out, because one client's overflow would be
    everybody's; so is a list of another length than that of the first client with the metric.

    Args:
        clients: for each client its metrics and its weight.
    """
    sums: dict[str, tuple[list[float], float]] = {}
    scalars: set[str] = set()
    for metrics, weight in clients:
        for name, value in metrics.items():
            entries = [value] if isinstance(value, int | float) else list(value)
            total, seen = sums.get(name, ([0.0] * len(entries), 0.0))
            if len(entries) != len(total) or not all(map(math.isfinite, entries)):
                continue
            if isinstance(value, int | float):
                scalars.add(name)
            added = [a + weight * b for a, b in zip(total, entries, strict=True)]
            sums[name] = added, seen + weight
    means = {name: [total / seen for total in totals] for name, (totals, seen) in sums.items() if seen}
    return {name: mean[0] if name in scalars else mean for name, mean in means.items()}
