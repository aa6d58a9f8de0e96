"""Loss barriers: measure how far a path between two models rises above the chord of its ends.

With `L(t)` the loss of `(1 - t) anchor + t client`:

    barrier = max_t [ L(t) - ((1 - t) L(0) + t L(1)) ]

Source: Frankle et al. 2020, arXiv 1912.05671; in this form Entezari et al. 2022, arXiv 2110.06296. This is the barrier
wherever the project uses the word alone; the other numbers here are named after what they measure. Losses travel as
sums over examples, so that the curves of many clients add up to the curve of their pooled data.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # the observer draws barriers and needs no torch for it
    from fedbasin.strategies.tensors.state import State

Curve: TypeAlias = Sequence[float]

# Sums over some examples: loss in nats, number classified correctly, number of examples.
Sums: TypeAlias = tuple[float, float, float]
Evaluate: TypeAlias = Callable[["State"], Sums]


@dataclass(frozen=True)
class Path:
    """Sums over examples at points of the straight line from anchor (t = 0) to client (t = 1).

    Law: a commutative monoid under addition with `Path.zero`; the sum of two paths is the path over both data sets.

    Attributes:
        points: values of t, increasing from 0 to 1.
        loss: sum of the loss at each point, nats where the task has classes.
        correct: number of examples that are right at each point; empty where the task has no right and wrong.
        examples: number of examples.

    Raises:
        ValueError: the curves do not fit the points, or hold values that no data set can give.
    """

    points: tuple[float, ...]
    loss: tuple[float, ...]
    correct: tuple[float, ...]
    examples: float

    def __post_init__(self) -> None:
        _check("loss", self.points, self.loss)
        if self.correct:
            _check("correct", self.points, self.correct)
        if not 0 <= self.examples < math.inf:
            raise ValueError(f"a path over {self.examples} examples; count the examples evaluated")
        if not all(0 <= correct <= self.examples for correct in self.correct):
            raise ValueError(
                f"a path has {self.correct} correct of {self.examples} examples; send counts, not fractions"
            )

    @classmethod
    def zero(cls, points: Curve) -> "Path":
        """Return the path over no data."""
        nothing = (0.0,) * len(points)
        return cls(tuple(points), nothing, nothing, 0.0)

    @classmethod
    def of(cls, points: Curve, sums: Sequence[Sums]) -> "Path":
        """Build the path with the given sums at its points.

        Raises:
            ValueError: the points were not evaluated on the same number of examples.
        """
        loss, correct, examples = zip(*sums, strict=True)
        # Exact, because these are counts; data that is sampled anew for every point shows here.
        if len(set(examples)) > 1:
            raise ValueError(
                f"the data held {examples} examples at the points of one path; evaluate every point on the same data"
            )
        return cls(tuple(points), loss, () if math.isnan(correct[0]) else correct, examples[0])

    def __add__(self, other: "Path") -> "Path":
        if self.points != other.points:
            raise ValueError(
                f"paths evaluated at {self.points} and at {other.points} cannot be added; "
                "ask every client for the same number of points"
            )
        return Path(
            self.points, _add(self.loss, other.loss), _add(self.correct, other.correct), self.examples + other.examples
        )

    @property
    def mean_loss(self) -> tuple[float, ...]:
        """Loss per example at each point, nats."""
        return self._mean(self.loss)

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Fraction that is right at each point; empty where the task has no right and wrong."""
        return self._mean(self.correct)

    def _mean(self, sums: Curve) -> tuple[float, ...]:
        if not self.examples:
            raise ValueError("a path over no examples has no mean; evaluate it on some data first")
        return tuple(value / self.examples for value in sums)


@dataclass(frozen=True)
class Barriers:
    """All barriers of one path, per example.

    Attributes:
        linear: `linear_barrier` of the mean loss, nats.
        above_mean: `mean_barrier` of the mean loss, nats.
        midpoint: `midpoint_gap` of the mean loss, nats; None where the middle was not evaluated.
        area: `area` of the mean loss, nats.
        accuracy: `accuracy_barrier`, a fraction; None where the task has no right and wrong.
        midpoint_accuracy: `midpoint_gap` of the accuracy, the gain of the mean model on the mean of both accuracies;
            None where the middle was not evaluated, or nothing is right or wrong.
    """

    linear: float
    above_mean: float
    midpoint: float | None
    area: float
    accuracy: float | None
    midpoint_accuracy: float | None


def barriers(path: Path) -> Barriers:
    """Compute all barriers of a path, per example."""
    points, losses, accuracy = path.points, path.mean_loss, path.accuracy
    return Barriers(
        linear=linear_barrier(points, losses),
        above_mean=mean_barrier(points, losses),
        midpoint=_middle(points, losses),
        area=area(points, losses),
        accuracy=accuracy_barrier(points, accuracy) if accuracy else None,
        midpoint_accuracy=_middle(points, accuracy) if accuracy else None,
    )


def grid(points: int) -> tuple[float, ...]:
    """Return equally spaced points from 0 to 1.

    Raises:
        ValueError: there are fewer than two.
    """
    if points < 2:
        raise ValueError(f"a path of {points} points; ask for at least the two ends")
    return tuple(i / (points - 1) for i in range(points))


def along(at: "Callable[[float], State]", evaluate: Evaluate, points: int) -> Path:
    """Evaluate a curve of states at equally spaced points; the curve need not be straight.

    Raises:
        ValueError: there are fewer than two points, or the data is not the same each time.
    """
    steps = grid(points)
    return Path.of(steps, [evaluate(at(t)) for t in steps])


def linear_barrier(points: Curve, losses: Curve) -> float:
    """Return the largest rise of the loss above the chord.

    Law: never negative, zero where no point lies above the chord, unchanged by adding any `a + b t` and by walking the
    path backwards.
    """
    return max(_above_chord(points, losses))


def mean_barrier(points: Curve, losses: Curve) -> float:
    """Return `max_t L(t) - (L(0) + L(1)) / 2`, the barrier of Git Re-Basin (Ainsworth et al. 2023, arXiv 2209.04836).

    Laws: `linear_barrier` where the ends are equal; at least half the difference of the ends, however straight
    the loss between them.
    """
    _check("curve", points, losses)
    return max(losses) - (losses[0] + losses[-1]) / 2


def accuracy_barrier(points: Curve, accuracies: Curve) -> float:
    """Return the largest fall of the accuracy below the chord; never negative."""
    return max(-rise for rise in _above_chord(points, accuracies)) + 0.0  # no negative zero


def midpoint_gap(points: Curve, losses: Curve) -> float:
    """Return `L(1/2) - (L(0) + L(1)) / 2`, negative where the mean model beats the mean of both losses.

    Raises:
        ValueError: the middle is not among the points.
    """
    middle = _middle(points, losses)
    if middle is None:
        raise ValueError(f"no point at t = 0.5 among {tuple(points)}; evaluate an odd number of equally spaced points")
    return middle


def area(points: Curve, losses: Curve) -> float:
    """Return the signed area between curve and chord, by the trapezoid rule."""
    rises = list(zip(points, _above_chord(points, losses), strict=True))
    return sum((t - s) * (low + high) / 2 for (s, low), (t, high) in pairwise(rises))


def _middle(points: Curve, values: Curve) -> float | None:
    rises = zip(points, _above_chord(points, values), strict=True)
    return next((rise for t, rise in rises if math.isclose(t, 0.5)), None)


def _above_chord(points: Curve, values: Curve) -> tuple[float, ...]:
    _check("curve", points, values)
    start, end = values[0], values[-1]
    return tuple(v - ((1 - t) * start + t * end) for t, v in zip(points, values, strict=True))


def _add(a: Curve, b: Curve) -> tuple[float, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _check(name: str, points: Curve, values: Curve) -> None:
    """Raise ValueError where no barrier can be computed from a curve."""
    # Exact, because every path comes from `grid`, whose ends are exact.
    if len(points) < 2 or (points[0], points[-1]) != (0, 1):
        raise ValueError(f"points {tuple(points)} of a path; start at t = 0 and end at t = 1")
    if not all(s < t for s, t in pairwise(points)):
        raise ValueError(f"points {tuple(points)} of a path do not increase; sort them")
    if len(values) != len(points):
        raise ValueError(f"{name} has {len(values)} values for {len(points)} points; send one each")
    for t, value in zip(points, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value} at t = {t}; check the model there for overflow")
