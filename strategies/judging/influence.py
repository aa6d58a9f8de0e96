"""Bounds on the influence of one client, from what the clients of a stage have in common.

A sum has no bound of its own: one client with a large norm, a large statistic or many claimed examples can take it over.
Where most clients are honest, the cohort's medians say what is ordinary:

    examples      at most a multiple of the median; the rest is cut off
    update norm   ||theta_k - anchor|| of the model and of each tensor; cut back above one multiple of the median (norm
                  clipping: Sun et al. 2019, arXiv 1911.07963), left out above a larger one; not judged where it is
                  small beside the model, as most clients hardly move one that fits their data, and the rest do; there
                  one that is not quite so small is cut back to that size
    statistics    mean diagonal per example of each layer, and norm of its cross-moment; cut back, or left out
    integers      largest change of an entry of a counter, an index or a zero point; cut back above a multiple of the
                  median, and so to no change where most clients make none

Honest clients differ by the size and the labels of their data; the multiples are wide enough for these. A client with
far more data than most makes a longer update, which agrees with the others': such a one is cut back and not left out.
Where clients compare the round's models it counts up to larger multiples, because they see what it does to their losses.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.precisions import common
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.tensors.state import MEASURED, State, floating

Key = TypeVar("Key")

# Fewer clients have no majority that could be told from a minority.
_FEWEST = 3

_MOST_EXAMPLES = 5.0
_MOST_CHANGE = 5.0
_LARGE_NORM, _LARGEST_NORM = 2.5, 6.0
_LARGEST_TENSOR = 10.0
# Factor on the multiples for clients that agree with the others. With sizes by Dirichlet(0.3), letters, 10 clients, the
# largest honest update is seven times as long as the median's.
_REACH = 2.4
# Share of the model's norm up to which an update is small. Honest clients of a model that fits most of them reached .02
# where the median was .0001, one of a rare class .07 where it was .004, and all .05 to .35 while most of them trained.
_SMALL = 0.05
# Multiples of the median above which statistics and cross-moments are cut back, or left out. Residuals differ much more
# than inputs, so a cross-moment is never left out. Statistics in which clients are alike, as the mean of a Fisher
# diagonal for each example, are cut back earlier: above the median by a tenth, or by six median deviations, which are
# four standard deviations of a normal distribution.
_LARGE_STATISTIC, _LARGEST_STATISTIC = 5.0, 50.0
_SPREAD, _DEVIATIONS = 0.1, 6.0


@dataclass(frozen=True, eq=False)
class Measure:
    """The sizes of one client's update.

    Attributes:
        examples: number of examples that the client claims.
        norms: Euclidean norm of the update of each tensor.
        statistics: mean diagonal of each layer's precision.
        moments: Euclidean norm of each layer's cross-moment.
        changes: largest change of an entry of each integer tensor.
    """

    examples: float
    norms: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[Block, float] = field(default_factory=dict)
    moments: Mapping[Block, float] = field(default_factory=dict)
    changes: Mapping[str, float] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """The Euclidean norm of the whole update; running statistics, which are no weights, do not count."""
        return math.hypot(*(norm for name, norm in self.norms.items() if not name.endswith(MEASURED)))

    @property
    def size(self) -> float:
        """A number by which updates are ordered where their sum is not finite: larger ones are suspected first."""
        return (
            max(math.hypot(*self.norms.values()), *self.statistics.values(), *self.moments.values(), 0.0)
            * self.examples
        )


@dataclass(frozen=True)
class Verdict:
    """The part of a client's update that is added to the sum.

    Attributes:
        examples: the weight of the client.
        update: factor on the difference from the anchor.
        weight: factor on the client's weight in every sum.
        statistics: factor on each layer's statistics; 1 where the layer is not listed.
        changes: largest change of an entry that is added, of each integer tensor that is cut back.
        notes: what was cut back, in words.
        refusal: why nothing is added; None where something is.
    """

    examples: float
    update: float = 1.0
    weight: float = 1.0
    statistics: Mapping[Block, float] = field(default_factory=dict)
    changes: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    refusal: Refusal | None = None

    def with_weight(self, weight: float) -> "Verdict":
        """Return the verdict on a client that counts less, as its update points against the others'; the same for 1."""
        if weight == 1:
            return self
        note = f"weight cut to {weight:.2g} of its own: its update points against those of the others"
        return replace(self, weight=weight, notes=(*self.notes, note))

    def apply(self, update: Update, anchor: State) -> Update:
        """Return what is added of an update."""
        if not self.notes:
            return update
        parameters = update.parameters
        if self.update < 1:
            parameters = {name: self._cut(name, tensor, anchor) for name, tensor in parameters.items()}
        limited = {name: _limit(parameters[name], anchor[name], most) for name, most in self.changes.items()}
        parameters = {**parameters, **limited}
        precisions = dict(update.precisions)
        for blocks in common(update.precisions):
            # Scaled once for all layers that share a matrix, so that they share the result.
            if any(block in self.statistics for block in blocks):
                factor = min(self.statistics.get(block, 1.0) for block in blocks)
                precisions |= dict.fromkeys(blocks, update.precisions[blocks[0]].scaled(factor))
        moments = {block: m * self.statistics.get(block, 1.0) for block, m in update.cross_moments.items()}
        update = replace(
            update, parameters=parameters, examples=self.examples, precisions=precisions, cross_moments=moments
        )
        return update.scaled(self.weight) if self.weight < 1 else update

    def _cut(self, name: str, tensor: Tensor, anchor: State) -> Tensor:
        if name.endswith(MEASURED) or not tensor.is_floating_point():
            return tensor
        return torch.where(tensor == anchor[name], tensor, torch.lerp(anchor[name], tensor, self.update))


def _limit(tensor: Tensor, anchor: Tensor, most: float) -> Tensor:
    """Return an integer tensor with no entry farther from the anchor's than `most`."""
    # In double: the difference of two integers of 64 bits may need more.
    change = tensor.double() - anchor.double()
    limits = torch.iinfo(tensor.dtype)
    # The largest integer of 64 bits is no double, and the next one is no integer of 64 bits.
    largest = min(limits.max, 2**63 - 1024)
    nearest = (anchor.double() + change.clamp(-most, most)).clamp(limits.min, largest).to(tensor.dtype)
    return torch.where(change.abs() <= most, tensor, nearest if most else anchor)


def measure(update: Update, distances: Mapping[str, float], anchor: State) -> Measure:
    """Return the sizes of an update that has passed the checks.

    Args:
        update: the update.
        distances: Euclidean distance of each of its tensors from the model that the client was sent.
        anchor: the model that the client was sent.
    """
    statistics: dict[Block, float] = {}
    for blocks in common(update.precisions):
        statistics |= dict.fromkeys(blocks, update.precisions[blocks[0]].isotropic(1.0).weight)
    moments = {block: float(torch.linalg.vector_norm(m)) for block, m in update.cross_moments.items()}
    changes = {
        name: float((tensor.double() - anchor[name].double()).abs().max())
        for name, tensor in update.parameters.items()
        if tensor.numel() and not (tensor.is_floating_point() or tensor.dtype == torch.bool)
    }
    return Measure(update.examples, distances, statistics, moments, changes)


def judge(
    measures: Mapping[int, Measure],
    anchor: State,
    *,
    shared_start: bool,
    agreeing: Container[int] = (),
    compared: bool = False,
) -> dict[int, Verdict]:
    """Judge the clients of a stage by what they have in common.

    Args:
        measures: the sizes of each client's update.
        anchor: the model that the clients were sent.
        shared_start: whether the clients have trained from one model, so that the norms of their updates compare.
        agreeing: the clients whose updates point where the others' do: they are cut back where others are left out.
        compared: whether clients compare the round's models, so that those which agree may also count more.
    """
    if len(measures) < _FEWEST:
        return {node: Verdict(measure.examples) for node, measure in measures.items()}
    cohort = _Cohort(measures.values(), anchor)
    return {
        node: _judge_client(
            measure,
            cohort,
            shared_start=shared_start,
            refused=_REACH if node in agreeing else 1.0,
            cut=_REACH if node in agreeing and compared else 1.0,
        )
        for node, measure in measures.items()
    }


def small_norm(model: State) -> float:
    """Return the norm up to which an update is small beside a model, so that its norm says nothing against it."""
    weights = (tensor for name, tensor in floating(model).items() if not name.endswith(MEASURED))
    # In float32: sums in float64 take twenty times as long. Beside a model whose squares overflow nothing counts as small.
    size = math.hypot(*(float(torch.linalg.vector_norm(t.float())) for t in weights))
    return _SMALL * size if math.isfinite(size) else 0.0


class _Cohort:
    """The medians of the clients of a stage."""

    def __init__(self, measures: Iterable[Measure], anchor: State) -> None:
        measures = list(measures)
        self._anchor = anchor
        self.examples = median(measure.examples for measure in measures)
        self.norm = median(measure.norm for measure in measures)
        sizes = {name: t.numel() for name, t in floating(anchor).items() if not name.endswith(MEASURED)}
        # A tensor that most clients leave as it is may still move as far as its share of the model's entries.
        shares = {name: self.norm * math.sqrt(size / sum(sizes.values())) for name, size in sizes.items()}
        usual = _medians(measure.norms for measure in measures)
        self.norms = {name: max(norm, shares.get(name, 0.0)) for name, norm in usual.items()}
        changes = _medians(measure.changes for measure in measures)
        self.changes = {name: _MOST_CHANGE * usual for name, usual in changes.items()}
        most = _MOST_EXAMPLES * self.examples
        self.statistics = _usual([_per_example(m, m.statistics, most) for m in measures])
        moments = _medians(_per_example(m, m.moments, most) for m in measures)
        self.moments = {block: (usual, _LARGE_STATISTIC) for block, usual in moments.items()}

    @cached_property
    def small(self) -> float:
        """The norm of an update that is small beside the model; read where an update is out of line alone."""
        return small_norm(self._anchor)


def _per_example(measure: Measure, values: Mapping[Block, float], most: float) -> dict[Block, float]:
    """Return values of a client for each example that counts, of which there are at most so many."""
    return {block: value / min(measure.examples, most) for block, value in values.items()}


def _medians(clients: Iterable[Mapping[Key, float]]) -> dict[Key, float]:
    values: dict[Key, list[float]] = {}
    for client in clients:
        for key, value in client.items():
            values.setdefault(key, []).append(value)
    return {key: median(entries) for key, entries in values.items()}


def _usual(clients: Sequence[Mapping[Block, float]]) -> dict[Block, tuple[float, float]]:
    """Return the median of each layer's values, and the multiple of it above which a value is cut back."""
    medians = _medians(clients)
    deviations = _medians({block: abs(v - medians[block]) for block, v in client.items()} for client in clients)
    return {block: (usual, _large(usual, deviations[block])) for block, usual in medians.items()}


def _large(usual: float, deviation: float) -> float:
    if not usual:
        return _LARGE_STATISTIC
    return min(_LARGE_STATISTIC, 1 + max(_SPREAD, _DEVIATIONS * deviation / usual))


def _judge_client(measure: Measure, cohort: _Cohort, *, shared_start: bool, refused: float, cut: float) -> Verdict:
    """Return the verdict on one client.

    Args:
        measure: the sizes of its update.
        cohort: what is ordinary.
        shared_start: whether norms compare.
        refused: factor on the norms above which its update is left out.
        cut: factor on the multiples above which its update and its examples are cut back.
    """
    notes: list[str] = []
    factor, most = 1.0, cut * _MOST_EXAMPLES
    examples = min(measure.examples, most * cohort.examples)
    try:
        if shared_start:
            factor = _update_factor(measure, cohort, refused, cut)
        statistics = _statistic_factors(measure, cohort, examples)
    except Refusal as refusal:
        return Verdict(measure.examples, refusal=refusal)
    if examples < measure.examples:
        notes.append(f"examples cut from {measure.examples:g} to {examples:g}, {most:g} times the median")
    if factor < 1:
        notes.append(f"update norm cut from {measure.norm:.3g} to {factor * measure.norm:.3g}")
    if statistics:
        names = ", ".join("+".join(block) for block in list(statistics)[:3])
        notes.append(f"statistics of {len(statistics)} layers cut back: {names}")
    changes = {name: cohort.changes[name] for name, n in measure.changes.items() if n > cohort.changes[name]}
    notes += [f"changes of {name} cut from {measure.changes[name]:g} to {most:g}" for name, most in changes.items()]
    return Verdict(examples, factor, statistics=statistics, changes=changes, notes=tuple(notes))


def _update_factor(measure: Measure, cohort: _Cohort, refused: float, cut: float) -> float:
    """Return the factor on a client's update; raises a Refusal for one that is far out of line."""
    norm, usual = measure.norm, cohort.norm
    far = [
        name
        for name, n in measure.norms.items()
        if cohort.norms[name] and not n <= refused * _LARGEST_TENSOR * cohort.norms[name]
    ]
    most = cut * _LARGE_NORM * usual
    if norm <= most and not far:
        return 1.0
    # Where a small update is longer than most, the model fits most clients: others have more to learn, and are cut back.
    settled = cohort.small > most
    if norm <= (_REACH if settled else 1.0) * cohort.small:
        # Running statistics are no weights, and have no part in the norm.
        far = [name for name in far if name.endswith(MEASURED)]
    elif not norm <= refused * _LARGEST_NORM * usual and usual:
        raise Refusal(Outcome.out_of_line, f"the norm of its update is {norm:.3g}, the median is {usual:.3g}")
    for name in far:
        what = f"the norm of its update of {name} is {measure.norms[name]:.3g}"
        raise Refusal(Outcome.out_of_line, f"{what}, the median is {cohort.norms[name]:.3g}")
    return 1.0 if norm <= cohort.small else min(1.0, max(most, cohort.small) / norm)


def _statistic_factors(measure: Measure, cohort: _Cohort, examples: float) -> dict[Block, float]:
    """Return the factors on a client's statistics; raises a Refusal for statistics that are far out of line."""
    for block, value in _per_example(measure, measure.statistics, examples).items():
        usual, _ = cohort.statistics[block]
        if usual and not value <= _LARGEST_STATISTIC * usual:
            what = f"the mean diagonal of the statistic of {'+'.join(block)} is {value:.3g} for each example"
            raise Refusal(Outcome.out_of_line, f"{what}, the median is {usual:.3g}")
    factors: dict[Block, float] = {}
    for values, medians in ((measure.statistics, cohort.statistics), (measure.moments, cohort.moments)):
        for block, value in _per_example(measure, values, examples).items():
            usual, large = medians[block]
            if usual and value > large * usual:
                factors[block] = min(factors.get(block, 1.0), large * usual / value)
    return factors
