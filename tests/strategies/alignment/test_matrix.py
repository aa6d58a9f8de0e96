"""Every family and kind of layer with every matcher, order of merging and statistic: a sample by default, all if slow.

A merge in pairs has no statistics, which the settings say by name; the mean of others is an anchor of files alone.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fedbasin.proto.layer_graph import Block
from fedbasin.server.files.merge.alignment import align_states
from fedbasin.strategies.alignment.activation_matching import match_activations
from fedbasin.strategies.alignment.graph_matching import match_graph
from fedbasin.strategies.alignment.learned_matching import Search, match_learned
from fedbasin.strategies.alignment.matchers import Matcher
from fedbasin.strategies.alignment.pairwise_merging import LINKS, MergedModel
from fedbasin.strategies.alignment.sinkhorn import match_sinkhorn
from fedbasin.strategies.alignment.weight_matching import Alignment, MatchResult, find_by_weights, match_weights
from fedbasin.strategies.capture.batchnorm_statistics import normalising_by_batch
from fedbasin.strategies.capture.feature_correlations import correlations
from fedbasin.strategies.diagnostics.evaluation import bind
from fedbasin.strategies.fusion.accumulator import Ridge, fuse
from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Precision
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.fusion.weighting import Statistic
from fedbasin.strategies.statistics.fisher import diagonal_fisher
from fedbasin.strategies.statistics.gram import grams
from fedbasin.strategies.statistics.kronecker_factors import kronecker_factors
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tasks.guess import guess_task
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batch, forward
from fedbasin.strategies.tensors.state import State, distance, floating, interpolate
from tests.double_precision import Doubled
from tests.strategies.alignment.matched_models import COMPARING, EXAMPLES_BY_NAME, NAMES, Example

CLIENTS = 3
STEPS = 3
Cell = tuple[str, str, str]


class Federation:
    """A model's symmetry, and clients that started apart and trained for a few steps."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.model = example.model()
        self.data = [example.batches(seed) for seed in range(CLIENTS)]
        self.task = guess_task(self.model, self.data[0])
        self.symmetry = _discover(example, self.model)
        self.states = [_train(example.model(1 + seed), data, self.task) for seed, data in enumerate(self.data)]


@cache
def federation(name: str) -> Federation:
    return Federation(EXAMPLES_BY_NAME[name])


def _discover(example: Example, model: nn.Module) -> Symmetry:
    return discover(model, example.inputs(2, torch.Generator().manual_seed(0))).symmetry


def _train(model: nn.Module, data: list[tuple[object, Tensor]], task: Task) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(model.train().parameters(), 0.01)
    for _, item in zip(range(STEPS), data * STEPS, strict=False):
        optimizer.zero_grad()
        batch = Batch(*item)
        task.losses(forward(model, batch), batch).mean().backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def outputs(model: nn.Module, state: State, batch: Batch) -> Tensor:
    with Doubled(), torch.no_grad():
        return forward(model, batch, bind(model, state))


def by_weights(case: Federation, node: int, anchor: State, moving: State) -> Alignment:
    return match_weights(case.symmetry, anchor, moving)


def by_sinkhorn(case: Federation, node: int, anchor: State, moving: State) -> Alignment:
    return match_sinkhorn(case.symmetry, anchor, moving)


def by_graph(case: Federation, node: int, anchor: State, moving: State) -> Alignment:
    return match_graph(case.symmetry, anchor, moving)


def by_activations(case: Federation, node: int, anchor: State, moving: State) -> Alignment:
    features = correlations(case.symmetry, case.model, anchor, moving, case.data[node])
    return match_activations(case.symmetry, anchor, moving, features)


def by_loss(case: Federation, node: int, anchor: State, moving: State) -> Alignment:
    search = Search(STEPS, smoothing=0.0)
    aligned = match_learned(case.symmetry, case.model, anchor, moving, case.data[node], search=search)
    before = by_weights(case, node, anchor, moving)
    folded = case.symmetry.fold(anchor)
    # Loss, and not distance, is what this matcher lowers.
    assert _middle(case, node, folded, aligned.state) <= _middle(case, node, folded, before.state) + 1e-6
    return aligned


def _middle(case: Federation, node: int, anchor: State, client: State) -> float:
    batches = [Batch(*item) for item in case.data[node]]
    middle = interpolate(anchor, client, 0.5)
    case.model.eval()
    # As the search does: running statistics of a merged model are measured after it.
    with torch.no_grad(), normalising_by_batch(case.model):
        losses = [case.task.losses(forward(case.model, batch, bind(case.model, middle)), batch) for batch in batches]
    return float(torch.cat(losses).mean())


MATCH: Mapping[str, Callable[[Federation, int, State, State], Alignment]] = {
    Matcher.weights.name: by_weights,
    Matcher.sinkhorn.name: by_sinkhorn,
    Matcher.graph.name: by_graph,
    Matcher.activations.name: by_activations,
    Matcher.learned.name: by_loss,
}


def align(case: Federation, matcher: str, node: int, anchor: State, moving: State) -> Alignment:
    """Align a model as a client would, and check what every matcher keeps."""
    aligned = MATCH[matcher](case, node, anchor, moving)
    batch = Batch(*case.data[node][0])
    before, after = (outputs(case.model, state, batch) for state in (moving, aligned.state))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * float(before.abs().max()))
    if matcher != Matcher.learned.name:
        assert aligned.report.distance_after <= aligned.report.distance_before * (1 + 1e-9)
    assert [space.space for space in aligned.report.spaces] == [space.name for space in case.symmetry.spaces]
    return aligned


@cache
def aligned_to_first(name: str, matcher: str) -> list[State]:
    """Return all models in the frame of the first."""
    case = federation(name)
    first, *rest = case.states
    return [case.symmetry.fold(first), *(align(case, matcher, n, first, s).state for n, s in enumerate(rest, 1))]


def precisions(case: Federation, node: int, state: State, statistic: Statistic) -> Mapping[Block, Precision]:
    """Collect a statistic on a client's aligned model."""
    model, draw = case.model, torch.Generator().manual_seed(node)
    model.load_state_dict(state)
    batches = case.data[node]
    match statistic:
        case Statistic.none:
            return {}
        case Statistic.fisher:
            fisher = diagonal_fisher(model, batches, draw, case.task)
            return {(name,): Diagonal(values.double()) for name, values in fisher.items()}
        case Statistic.gram:
            return {block: Gram(gram) for block, gram in grams(model, batches).items()}
        case Statistic.kronecker:
            factors = kronecker_factors(model, batches, draw, case.task)
            return {b: Kronecker(f.inputs[None], f.outputs[None]) for b, f in factors.items()}


def merged_in_links(case: Federation, matcher: str, order: str) -> State:
    links = LINKS[order](range(CLIENTS))
    answer = None
    while True:
        try:
            link = links.send(answer)
        except StopIteration as end:
            return end.value.model
        state = case.states[link.node]
        moving = {**state, **link.moving.model} if link.moving else state
        if link.anchor is None:
            answer = MergedModel(floating(case.symmetry.fold(moving)), 1.0, (link.node,))
            continue
        aligned = align(case, matcher, link.node, {**state, **link.anchor.model}, moving)
        examples = link.moving.examples if link.moving else 1.0
        answer = MergedModel(floating(aligned.state), examples, (link.node,))


def merged_in_universe(case: Federation) -> State:
    folded = [case.symmetry.fold(state) for state in case.states]

    def match(anchor: State, moving: State, share: float) -> MatchResult:
        del share  # of the models that move, which matchers by loss take
        return find_by_weights(case.symmetry, anchor, moving)

    found = align_states(case.symmetry, folded, "universe", match)
    aligned = [transform.act(state) for transform, state in zip(found.transforms, folded, strict=True)]
    assert all(report.distance_after <= report.distance_before * (1 + 1e-9) for report in found.reports)
    batch = Batch(*case.data[0][0])
    merged: State = {}
    for number, (before, after) in enumerate(zip(folded, aligned, strict=True), 1):
        expected, actual = (outputs(case.model, dict(state), batch) for state in (before, after))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        merged = interpolate(merged, floating(dict(after)), 1 / number) if merged else floating(dict(after))
    return merged


def cells(columns: Iterable[tuple[str, str]], sample: Collection[Cell]) -> Iterator[object]:
    for cell in ((name, *column) for name in NAMES for column in columns):
        yield pytest.param(*cell, id="-".join(cell), marks=[] if cell in sample else pytest.mark.slow)


# Files are merged by weights alone; a star is that of the statistics.
ORDERS = [*itertools.product(MATCH, LINKS), (Matcher.weights.name, "universe")]
STATISTICS = list(itertools.product(MATCH, [statistic.name for statistic in Statistic]))


@pytest.mark.parametrize(
    ("name", "matcher", "order"),
    list(
        cells(ORDERS, [("gated", "weights", "universe"), ("experts", "sinkhorn", "chain"), ("tied", "learned", "tree")])
    ),
)
@pytest.mark.filterwarnings("ignore")
def test_a_matcher_keeps_functions_and_brings_models_closer(name: str, matcher: str, order: str) -> None:
    case = federation(name)
    merged = merged_in_universe(case) if order == "universe" else merged_in_links(case, matcher, order)
    assert all(tensor.isfinite().all() for tensor in merged.values())
    assert distance(merged, case.states[0]) > 0


@pytest.mark.parametrize(
    ("name", "matcher", "statistic"),
    list(
        cells(
            STATISTICS,
            [
                *(("gpt2", "learned", "gram"), ("attention", "learned", "none"), ("llama", "activations", "fisher")),
                *(("depthwise", "weights", "kronecker"), ("lstm", "sinkhorn", "fisher")),
            ],
        )
    ),
)
@pytest.mark.filterwarnings("ignore")
def test_aligned_models_are_fused_by_every_statistic(name: str, matcher: str, statistic: str) -> None:
    case = federation(name)
    states = aligned_to_first(name, matcher)
    if statistic == Statistic.fisher.name and name in COMPARING:
        with pytest.raises(ValueError, match="no example has a likelihood of its own"):
            precisions(case, 0, states[0], Statistic.fisher)
        return
    each = [precisions(case, node, state, Statistic[statistic]) for node, state in enumerate(states)]
    updates = [Update(state, 1.0, values) for state, values in zip(states, each, strict=True)]
    fused = fuse(states[0], updates, Ridge())
    assert all(tensor.isfinite().all() for tensor in floating(fused).values())
    # Equal updates give that update, whatever weighs them.
    same = fuse(states[0], [updates[1]] * 2, Ridge())
    batch = Batch(*case.data[0][0])
    before, after = (outputs(case.model, state, batch) for state in (states[1], same))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * float(before.abs().max()))
