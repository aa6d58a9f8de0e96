"""A recipe as a list of stages: each round's plan, which asks for one stage after the other.

A plan is a generator. It yields what is to be asked next, is sent the answer, and returns the fused model. It
knows no message, no clock and no client: whoever drives it asks, waits and folds.
"""

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from fedbasin.strategies.fit import Fit
from fedbasin.strategies.fusion.update import Block, Order
from fedbasin.strategies.recipe import Recipe, Target
from fedbasin.strategies.stages import Fitting, Stage
from fedbasin.strategies.state import State

# Of a head to labels: its targets are no estimate that more rounds would improve.
_HEAD_STRENGTH = 1e-3

Grouping = Literal["layer", "block"]


class UnknownOrderError(ValueError):
    """The clients' models did not say what a plan needs to know of their layers."""


@dataclass(frozen=True, eq=False)
class Next:
    """What to ask.

    Attributes:
        make: the stage, fresh for every attempt.
        carries: the tensors that its messages bring; None for the global model of the round.
        nodes: whom; None for those that the round has sampled.
    """

    make: Callable[[], Stage]
    carries: State | None = None
    nodes: Sequence[int] | None = None


class Answer(Protocol):
    """What a stage ended in."""

    @property
    def model(self) -> dict[str, Tensor]:
        """Its value."""
        ...

    @property
    def nodes(self) -> list[int]:
        """The accepted clients."""
        ...

    @property
    def order(self) -> Order | None:
        """Of the layers, where the stage asked for it."""
        ...


Plan: TypeAlias = Generator[Next, Answer, dict[str, Tensor]]


def round_plan(recipe: Recipe, fuse: Callable[[], Stage], grouping: Grouping = "layer") -> Plan:
    """The stages of one round: train and fuse, and fit layers afterwards where the recipe does.

    Args:
        recipe: which.
        fuse: makes the first stage; it asks for the order of the layers if the recipe fits any, and that
            clients keep their models.
        grouping: whether layers are fitted one after the other, or a block of them at a time.

    Raises:
        UnknownOrderError: nothing of the model can be fitted.
    """
    answer = yield Next(fuse)
    model = new = answer.model
    for last, fitting in _fittings(recipe, answer.order, grouping):
        make = partial(Fit, model, fitting, _strength(recipe, fitting), recipe.share, keep=not last)
        answer = yield Next(make, new, answer.nodes)
        model = answer.model
        new = {name: model[name] for block in fitting.blocks for name in block}
    return model


def _fittings(
    recipe: Recipe, order: Order | None, grouping: Grouping
) -> Iterable[tuple[bool, Fitting]]:
    """The layers to fit, stage by stage, each with whether it is the last."""
    if not recipe.fits:
        return []
    if order is None or not order.levels or (recipe.head and order.head is None):
        raise UnknownOrderError(
            f"recipe {recipe.name!r} fits {'a last linear layer' if recipe.head else 'linear layers'}, and the "
            "clients' model has none; choose the recipe fedavg, or regmean"
        )
    asked: list[tuple[tuple[Block, ...], Target]] = []
    if recipe.fit is not None:
        body = [block for level in order.levels for block in level]
        left_out = {order.head} if recipe.head else set()
        levels = [tuple(b for b in level if b not in left_out) for level in order.levels]
        groups = levels if grouping == "layer" else _by_block(body, left_out)
        asked = [(group, recipe.fit) for group in groups if group]
    if recipe.head and order.head is not None:
        asked.append(((order.head,), Target.labels))
    return [
        (index == len(asked) - 1, Fitting(blocks, target, index))
        for index, (blocks, target) in enumerate(asked)
    ]


def _by_block(body: Sequence[Block], left_out: set[Block | None]) -> list[tuple[Block, ...]]:
    """Layers whose names agree up to their last number, as those of one block of a transformer do."""
    kept = [block for block in body if block not in left_out]
    return [tuple(group) for _, group in groupby(kept, key=lambda block: _prefix(block[0]))]


def _prefix(name: str) -> str:
    numbered = re.match(r"(.*\.)?\d+\.", name)
    return numbered.group() if numbered else name


def _strength(recipe: Recipe, fitting: Fitting) -> float:
    if fitting.target is Target.labels or recipe.ridge is None:
        return _HEAD_STRENGTH
    return recipe.ridge.strength
