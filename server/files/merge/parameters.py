"""Values of a rule's parameters at one tensor: by model and slice, by a filter on its name, by a gradient over layers.

    weight: 0.5          weight: [0, 1]          weight: [{filter: mlp, value: [0, 1]}, {value: 0.3}]

A gradient is interpolated linearly from the first layer to the last; tensors outside the layers have its first value.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedbasin.server.files.merge.recipe import Parameters
from fedbasin.server.files.reading import ModelError
from fedbasin.strategies.fusion.rules.merging_rules import ARGUMENTS, BOUNDS, Rule, Scalar


@dataclass(frozen=True)
class TensorPosition:
    """A tensor of a merge.

    Attributes:
        name: its name in the result.
        depth: position of its layer, 0 for the first to 1 for the last.
    """

    name: str
    depth: float


def rule_arguments(
    rule: Rule, place: TensorPosition, shared: Sequence[Parameters], by_model: Sequence[tuple[str, Parameters]]
) -> tuple[list[float], dict[str, Any]]:
    """Return the weights of the models and the keyword arguments of the rule at one tensor.

    Args:
        rule: the rule.
        place: the tensor.
        shared: parameters of the slice and of the recipe; the first that has a value counts.
        by_model: for each model its own name of the tensor and its parameters, which count before the shared ones.

    Raises:
        ModelError: a parameter has no value, or one of another type.
    """
    arguments: dict[str, Any] = {}
    for name, default in rule.shared.items():
        arguments[ARGUMENTS.get(name, name)] = _value(name, default, place, shared)

    def listed(name: str, default: Scalar | None) -> list[Any]:
        return [
            _value(name, default, TensorPosition(own_name, place.depth), (own_parameters, *shared))
            for own_name, own_parameters in by_model
        ]

    arguments |= {name: listed(name, default) for name, default in rule.per_model.items()}
    return listed("weight", 1.0) if rule.weighted else [1.0] * len(by_model), arguments


def _value(name: str, default: Scalar | None, place: TensorPosition, scopes: Iterable[Parameters]) -> Scalar:
    for scope in scopes:
        if name in scope and (value := _evaluate(scope[name], place, name)) is not None:
            return _typed(name, value, default)
    if default is None:
        raise ModelError(f"parameters: {name} has no value for {place.name!r}; give one without a filter")
    return default


def _evaluate(setting: Any, place: TensorPosition, name: str) -> Any:
    """Return the value of a setting at a tensor; None if no filter fits."""
    conditions = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(conditions, list):
        return conditions
    if not conditions:
        raise ModelError(f"parameters: {name} is an empty list; give at least one value")
    if all(isinstance(condition, Mapping) for condition in conditions):
        return _evaluate_filters(conditions, place, name)
    values = [_number(name, value) for value in conditions]
    position = place.depth * (len(values) - 1)
    lower = min(int(position), len(values) - 1)
    upper = min(lower + 1, len(values) - 1)
    return values[lower] + (position - lower) * (values[upper] - values[lower])


def _evaluate_filters(conditions: Sequence[Mapping[str, Any]], place: TensorPosition, name: str) -> Any:
    for condition in conditions:
        if unknown := sorted(map(str, condition.keys() - {"filter", "value"})):
            raise ModelError(f"parameters: {name} has the key {unknown[0]!r}; a filter has filter and value")
        if "value" not in condition:
            raise ModelError(f"parameters: {name} has a filter without a value; give one")
        if not isinstance(condition.get("filter"), str | None):
            raise ModelError(
                f"parameters: {name} has the filter {condition['filter']!r}; a filter is one text, so write an entry for "
                "each"
            )
    for condition in conditions:
        pattern = condition.get("filter")
        if pattern in (None, "*") or pattern in place.name:
            return _evaluate(condition["value"], place, name)
    return None


def _typed(name: str, value: Any, default: Scalar | None) -> Scalar:
    if isinstance(default, bool):
        # Files of mergekit, whose parameters are numbers, also have 1 and 0.
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ModelError(f"parameters: {name} is {value!r}; it must be true or false")
        return bool(value)
    number = _number(name, value)
    least, most = BOUNDS.get(name, (-math.inf, math.inf))
    if not least <= number <= most:
        words = f"it is a fraction, from {least:g} to {most:g}" if most == 1 else f"it must be at least {least:g}"
        raise ModelError(f"parameters: {name} is {value!r}; {words}")
    if not isinstance(default, int):
        return number
    if not number.is_integer():
        raise ModelError(f"parameters: {name} is {value!r}; it must be a whole number")
    return int(number)


def _number(name: str, value: Any) -> float:
    # YAML reads 1e-5 as a word, because it has no point.
    if not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ModelError(f"parameters: {name} is {value!r}; it must be a number")
