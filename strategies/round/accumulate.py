"""The accumulator that a stage adds its replies to: a sum, or the updates themselves for a robust or merging rule."""

from collections.abc import Callable
from typing import TypeAlias

from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.rules.robust.robust_accumulator import RobustAccumulator
from fedbasin.strategies.fusion.rules.rule_accumulator import RuleAccumulator
from fedbasin.strategies.tensors.state import State

# Makes an accumulator without clients for the tensors of a state.
Accumulate: TypeAlias = Callable[[State], Accumulator | RobustAccumulator | RuleAccumulator]
