"""A merging rule with its parameters, as a federation applies it to the models of a round.

    rule = "ties density=0.3 lambda=0.8"

The anchor is the global model of the round, and weights are the clients' parts of all examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedbasin.strategies.fusion.rules.merging_rules import ARGUMENTS, RULES, Rule, Scalar

# Rules of any number of models in any order, by their weights alone.
FEDERATED_RULES = tuple(
    name
    for name, rule in RULES.items()
    if rule.most is None and not rule.statistic and not rule.scored and name != "ema"
)


@dataclass(frozen=True)
class FederatedRule:
    """A merging rule over the clients of a round.

    Attributes:
        name: name in the catalogue.
        parameters: values of its parameters, by name.
    """

    name: str
    parameters: tuple[tuple[str, Scalar], ...] = ()

    @property
    def least(self) -> int:
        """The smallest number of clients."""
        return self._rule.least

    def merge(
        self, anchor: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], seeds: Sequence[int]
    ) -> Tensor:
        """Return the tensor of the fused model, in the anchor's dtype.

        Args:
            anchor: tensor of the global model.
            tensors: tensors of the clients.
            weights: weight of each.
            seeds: seed of each, which a rule without random numbers does not read.
        """
        return self._rule.function(anchor if self._takes_anchor else None, tensors, weights, **self._arguments(seeds))

    @property
    def _rule(self) -> Rule:
        return RULES[self.name]

    @property
    def _takes_anchor(self) -> bool:
        return self._rule.anchor == "required"

    def _arguments(self, seeds: Sequence[int]) -> Mapping[str, Any]:
        given = dict(self.parameters)
        shared = {ARGUMENTS.get(n, n): given.get(n, default) for n, default in self._rule.shared.items()}
        listed = {n: [given.get(n, default)] * len(seeds) for n, default in self._rule.per_model.items()}
        return {**shared, **listed, **({"seeds": seeds} if self._rule.random else {})}


def federated_rule(text: str) -> FederatedRule:
    """Return the rule of a setting: a name, and parameters as `name=value`.

    Raises:
        ValueError: there is no such rule or parameter, or a value is of another type.
    """
    name, *words = text.split()
    if name not in FEDERATED_RULES:
        raise ValueError(f"rule = {text!r}: choose one of {', '.join(FEDERATED_RULES)}, or leave it empty for the mean")
    defaults = {**RULES[name].shared, **RULES[name].per_model}
    parameters: dict[str, Scalar] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in defaults:
            choices = ", ".join(defaults) or "none"
            raise ValueError(f"rule = {text!r}: {word!r} is no parameter of {name}; write NAME=VALUE of {choices}")
        if key in parameters:
            raise ValueError(f"rule = {text!r}: {key} has two values; give one")
        parameters[key] = _typed(text, key, value, defaults[key])
    return FederatedRule(name, tuple(parameters.items()))


def _typed(text: str, key: str, value: str, default: Scalar | None) -> Scalar:
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise ValueError(f"rule = {text!r}: {key} is {value!r}; it is true or false")
        return value == "true"
    try:
        return int(value) if isinstance(default, int) else float(value)
    except ValueError as error:
        raise ValueError(f"rule = {text!r}: {key} is {value!r}; give a number") from error
