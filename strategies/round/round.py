"""A recipe as a list of stages: each round's plan, which asks for one stage after the other.

A plan is a generator. It yields what is to be asked next, is sent the answer, and returns the fused model. It
knows no message, no clock and no client: whoever drives it asks, waits and folds.
"""

import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block, LayerGraph
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import Evidence
from fedbasin.strategies.recipes import Recipe, Target
from fedbasin.strategies.round.refit import Fit, Head, Probe
from fedbasin.strategies.round.stages import Along, Fitting, Stage
from fedbasin.strategies.tensors.state import State, interpolate

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
        may_fail: the plan goes on where too few answered; it is sent an answer without nodes.
    """

    make: Callable[[], Stage]
    carries: State | None = None
    nodes: Sequence[int] | None = None
    may_fail: bool = False


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
    def examples(self) -> float:
        """Of the accepted clients."""
        ...

    @property
    def layer_graph(self) -> LayerGraph | None:
        """Of the layers, where the stage asked for it."""
        ...

    @property
    def curve(self) -> Path | None:
        """The clients' sums along a path, where the stage asked for it."""
        ...


@dataclass(frozen=True, eq=False)
class Planned:
    """What a plan ended in.

    Attributes:
        model: the round's model.
        gain: the share of the fused model's loss that fitting took away, where clients probed it.
    """

    model: dict[str, Tensor]
    gain: float | None = None


Plan: TypeAlias = Generator[Next, Answer, Planned]
# How clients send what they say of the layers that a round fits.
Encode: TypeAlias = Callable[[Sequence[Block]], Mapping[Block, Encoding]]


def round_plan(
    begun: State,
    recipe: Recipe,
    fuse: Callable[[], Stage],
    grouping: Grouping = "layer",
    *,
    encode: Encode | None = None,
) -> Plan:
    """The stages of one round: train and fuse, and fit layers afterwards where the recipe does.

    Args:
        begun: the global model that the round begins with.
        recipe: which.
        fuse: makes the first stage; it asks for the layer graph if the recipe fits any, and that
            clients keep their models.
        grouping: whether layers are fitted one after the other, or a block of them at a time.
        encode: chooses how clients send their sums; exactly, if None.

    Raises:
        UnknownOrderError: nothing of the model can be fitted.
    """
    answer = yield Next(fuse)
    fused = model = new = answer.model
    fittings = _fittings(recipe, answer.layer_graph, grouping)
    blocks = [block for fitting in fittings for block in fitting.blocks]
    encodings = encode(blocks) if encode and blocks else None
    for fitting in fittings:
        stage = partial(_fit, recipe, model, fitting, encodings)
        answer = yield Next(stage, new, answer.nodes)
        new = {name: t for name, t in answer.model.items() if t is not model[name]}
        model = answer.model
    if not (recipe.probe and fittings):
        return Planned(model)
    probe = partial(Probe, model, len(fittings), points=recipe.probe)
    answer = yield Next(partial(probe, along=Along()), new, answer.nodes)
    to_fitted = answer.curve
    share = best_point(to_fitted)
    if not recipe.reach:
        return Planned(interpolate(fused, model, share), gained(to_fitted, to_fitted, share))
    along = Along(share, recipe.reach)
    answer = yield Next(partial(probe, along=along), {}, answer.nodes)
    start, end = along.ends(begun, fused, model)
    at = best_ahead(answer.curve, 1 / recipe.reach)
    return Planned(interpolate(start, end, at), gained(to_fitted, answer.curve, at))


def gained(before: Path | None, after: Path | None, at: float) -> float:
    """The share of the mean loss at the beginning of one path that is gone at a point of another.

    Nobody's word is no gain.
    """
    if not (before and after and before.examples and after.examples):
        return 0.0
    begun = before.mean_loss[0]
    return 1 - after.mean_loss[after.points.index(at)] / begun if begun > 0 else 0.0


def best_point(path: Path | None) -> float:
    """Where on the path the clients' loss is lowest, of the points that they looked at.

    Nothing is read into what lies between them: away from the fitted model the loss need not be convex. Nobody's
    word leaves the path's beginning.
    """
    if not (path and path.examples):
        return 0.0
    return min(zip(path.loss, path.points, strict=True))[1]


def best_ahead(path: Path | None, otherwise: float) -> float:
    """The same without the path's beginning: a round that stayed there would only be followed by another.

    Args:
        path: from where the round began.
        otherwise: the point, if nobody said anything.
    """
    if not (path and path.examples):
        return otherwise
    return min(zip(path.loss[1:], path.points[1:], strict=True))[1]


def _fittings(recipe: Recipe, layer_graph: LayerGraph | None, grouping: Grouping) -> list[Fitting]:
    """The layers to fit, stage by stage."""
    if not recipe.fits:
        return []
    if layer_graph is None or not layer_graph.levels or (recipe.head and layer_graph.head is None):
        raise UnknownOrderError(
            f"recipe {recipe.name!r} fits {'a last linear layer' if recipe.head else 'linear layers'}, and the "
            "clients' model has none; choose the recipe fedavg, or regmean"
        )
    asked: list[tuple[tuple[Block, ...], Target]] = []
    if recipe.fit is not None:
        left_out = {layer_graph.head} if recipe.head else set()
        fitted = (tuple(b for b in level if b not in left_out) for level in layer_graph.levels)
        levels = [level for level in fitted if level]
        groups = levels if grouping == "layer" else _by_block(levels)
        asked = [(group, recipe.fit) for group in groups]
    if recipe.head and layer_graph.head is not None:
        asked.append(((layer_graph.head,), Target.labels))
    fittings = [Fitting(blocks, target, index) for index, (blocks, target) in enumerate(asked)]
    # What the layers below compute is settled when the last one is fitted.
    return [*fittings[:-1], replace(fittings[-1], norms=layer_graph.norms)]


def _by_block(levels: Sequence[tuple[Block, ...]]) -> list[tuple[Block, ...]]:
    """Levels in stages: one from the second level of each block but the last on, and one for each level outside.

    Only the first level of a stage reads what fused layers compute; those behind it read what the client's own model
    does. Attention is what fusing weights disturbs most, so the level behind it is to be the first. What the last
    block leaves over, the head behind it mends.
    """
    modules = _modules([level[0][0] for level in levels])
    runs = [list(run) for _, run in groupby(range(len(levels)), modules.__getitem__)]
    blocks = [run for run in runs if len(run) > 1]
    starts = {run[1] for run in blocks[:-1]} | {run[0] for run in runs if len(run) == 1}
    stages: list[tuple[Block, ...]] = [()]
    for index, level in enumerate(levels):
        stages = [*stages, level] if index in starts else [*stages[:-1], stages[-1] + level]
    return [stage for stage in stages if stage]


def _modules(names: Sequence[str]) -> list[str]:
    """For each level its innermost numbered module that has more levels, as a block of a transformer; else its name."""
    numbered = [[name[: match.end()] for match in re.finditer(r"\d+\.", name)] for name in names]
    counts = Counter(prefix for prefixes in numbered for prefix in prefixes)
    return [
        next((prefix for prefix in reversed(prefixes) if counts[prefix] > 1), name)
        for name, prefixes in zip(names, numbered, strict=True)
    ]


def _fit(
    recipe: Recipe, model: State, fitting: Fitting, encodings: Mapping[Block, Encoding] | None
) -> Stage:
    if fitting.target is Target.labels:
        return Head(model, fitting, recipe.head or Evidence(), encodings=encodings)
    strength = (recipe.ridge or Ridge()).strength
    return Fit(model, fitting, strength, recipe.share, encodings=encodings)
