"""Means of what clients measured, folded one client at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class WeightedMeans:
    """Means of clients' metrics, weighted by their examples, folded one client at a time.

    A metric that is not finite is left out: one client's overflow would be everybody's.
    """

    weight: float = 0.0
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, float], weight: float) -> None:
        """Add one client, in place."""
        self.weight += weight
        for name, value in metrics.items():
            if not math.isfinite(value):
                continue
            total, seen = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (total + weight * value, seen + weight)

    def means(self) -> dict[str, float]:
        """Each metric's mean over the clients that sent a finite value of it."""
        return {name: total / seen for name, (total, seen) in self.sums.items() if seen}
