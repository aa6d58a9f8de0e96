"""Calls of the app's own functions, whose failure ends a run only after the round is saved.

A round's training is worth more than a metric: where `evaluate_fn` raises, or returns what is no record of metrics, the
model is saved first, and the error is raised then.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from flwr.app import MetricRecord

from fedbasin.server.run.settings import SettingsError

T = TypeVar("T")


@dataclass
class AppFunctions:
    """The app's functions of one run.

    Attributes:
        round: number of the round.
        failure: the first failure; None where there was none.
    """

    round: int = 0
    failure: Exception | None = None

    def metrics(self, name: str, function: Callable[..., object], *arguments: Any) -> MetricRecord:
        """Return a record of metrics that a function makes; an empty one where it fails or returns None."""
        return self._result(name, function, arguments, MetricRecord, MetricRecord())

    def numbers(self, name: str, function: Callable[..., object], *arguments: Any) -> Mapping[str, float]:
        """Return metrics by their names that a function makes; none where it fails or returns None."""
        values: Mapping[str, float] = self._result(name, function, arguments, Mapping, {})  # type: ignore[type-abstract]
        if all(isinstance(value, int | float) for value in values.values()):
            return values
        self._refuse(f"{name} returned {dict(values)!r:.200} in round {self.round}; return numbers by name")
        return {}

    def raise_failure(self) -> None:
        """Raise the first failure, once the round is saved."""
        if self.failure is not None:
            raise self.failure

    def _result(
        self, name: str, function: Callable[..., object], arguments: tuple[Any, ...], kind: type[T], empty: T
    ) -> T:
        try:
            result = function(*arguments)
        except Exception as error:  # noqa: BLE001 - any error of the app's, raised once the round is saved
            error.add_note(f"raised by {name} in round {self.round}")
            self.failure = self.failure or error
            return empty
        if result is None or isinstance(result, kind):
            return empty if result is None else result
        shown = f"{name} returned a {type(result).__name__} in round {self.round}"
        self._refuse(f"{shown}; return a {kind.__name__} or None")
        return empty

    def _refuse(self, problem: str) -> None:
        self.failure = self.failure or SettingsError(problem)
