"""Means of what clients measured, folded one client at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class WeightedMeans:
    """Means of clients' metrics, weighted by their examples, folded one client at a time."""

    weight: float = 0.0
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, float], weight: float) -> None:
        """Add one client, in place."""
        self.weight += weight
        for name, value in metrics.items():
            total, seen = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (total + weight * value, seen + weight)

    def means(self) -> dict[str, float]:
        """Each metric's mean over the clients that sent it."""
        return {name: total / seen for name, (total, seen) in self.sums.items() if seen}
