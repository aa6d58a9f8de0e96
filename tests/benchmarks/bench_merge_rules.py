"""Accuracy of merged digit classifiers by rule: fine-tuned from one start on parts of the classes, and unrelated."""

import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.fusion.rules.merging_rules import ARGUMENTS, RULES, Rule
from fedbasin.strategies.statistics.merged_by_statistics import (
    Contribution,
    collect_fisher,
    collect_grams,
    collect_updates,
    merge_in_order,
    merge_updates,
)
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.tensors.state import State
from tests.benchmarks.bench_rebasin import split
from tests.benchmarks.figures import Figure, Goal, Say

SEEDS = 3
ALL = tuple(range(10))
PARTS = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
# Chosen before measuring: the papers' usual values; a density of .3, an even mix, and the whole sum of task vectors.
SETTINGS: dict[str, dict[str, float]] = {
    name: {"density": 0.3} for name in ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties")
} | {name: {"density": 0.3, "epsilon": 0.1} for name in ("della", "della_linear")}
PAIRWISE = {"slerp", "nuslerp", "nearswap", "arcee_fusion", "passthrough"}

HOW = f"""Digit classifiers 64-256-256-10. Parts: from one start, trained for 3 epochs on all classes, three models are trained
on for 5 epochs, one on each of the classes {", ".join(map(str, PARTS))}. Runs: three models trained on for 5 epochs on all
classes, in other orders. Unrelated: three models trained for 15 epochs from independent initialisations, merged as they are
and after a star of alignment by weights; the first is the anchor of rules with one. Unrelated parts: the same, each trained on one of
the parts. Test accuracy of the merged model, means of {SEEDS} seeds, with the rules' defaults but for a density of .3. Rules with statistics collect them on what each model was trained on.
Rules of two models, and of a score, are left out."""


def measure(say: Say) -> Figure:
    scores: dict[str, dict[str, list[float]]] = {}
    singles: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        say(f"merge-rules: seed {seed + 1} of {SEEDS}")
        for setting, (anchor, models) in cases(seed).items():
            singles.setdefault(setting, []).append(statistics.fmean(map(accuracy, models)))
            for name, rule in RULES.items():
                if name not in PAIRWISE and not rule.scored:
                    merged = merge_states(rule, anchor, models, PARTS if "parts" in setting else (ALL,) * len(models))
                    scores.setdefault(name, {}).setdefault(setting, []).append(accuracy(merged))
    settings = list(singles)
    rows = [("mean of the models alone", *(f"{statistics.fmean(singles[s]):.3f}" for s in settings))]
    rows += [(name, *(f"{statistics.fmean(found[s]):.3f}" for s in settings)) for name, found in scores.items()]
    return Figure("Merging rules by accuracy", HOW, ("", *settings), rows, [_goal(scores)])


def _goal(scores: dict[str, dict[str, list[float]]]) -> Goal:
    plain, aligned = (statistics.fmean(scores["linear"][s]) for s in ("unrelated", "unrelated, aligned"))
    return Goal(
        "linear of unrelated models: better after alignment", f"{aligned:.3f} against {plain:.3f}", aligned > plain
    )


def merge_states(rule: Rule, anchor: State, models: list[State], classes: Sequence[tuple[int, ...]]) -> State:
    """Merge models; rules with statistics read what each was trained on."""
    if not rule.statistic:
        return {key: merge(rule, anchor[key], [model[key] for model in models]) for key in anchor}
    data = [batches(part) for part in classes]
    parts = [Contribution(model, rows, 1.0) for model, rows in zip(models, data, strict=True)]
    if rule.statistic == "features":
        return merge_in_order(network(), parts, 1.0, 1e-3)
    collect = partial(collect_fisher, task=None, scaled=True)
    if rule.statistic == "gram":
        collect = partial(collect_grams, shrink=1.0)
    return merge_updates(models[0], collect_updates(network(), parts, collect), 1e-3)


def batches(classes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    inputs, targets, count = split()
    chosen = torch.tensor([index for index in range(count) if int(targets[index]) in classes])
    return [(inputs[rows], targets[rows]) for rows in chosen.split(256)]


def merge(rule: Rule, anchor: Tensor, tensors: list[Tensor]) -> Tensor:
    given = SETTINGS.get(rule.name, {})
    arguments: dict[str, object] = {ARGUMENTS.get(key, key): value for key, value in rule.shared.items()}
    arguments |= {key: [given.get(key, value)] * len(tensors) for key, value in rule.per_model.items()}
    if rule.random:
        arguments["seeds"] = list(range(len(tensors)))
    origin = None if rule.anchor != "required" else anchor
    return rule.function(origin, tensors, [1.0] * len(tensors), **arguments)


def cases(seed: int) -> dict[str, tuple[State, list[State]]]:
    """Return the anchor and the models of each setting."""
    start = trained(None, seed, 3)
    parts = [trained(start, 100 * seed + number, 5, classes) for number, classes in enumerate(PARTS)]
    runs = [trained(start, 100 * seed + 10 + number, 5) for number in range(3)]
    unrelated = [trained(None, 100 * seed + 20 + number, 15) for number in range(3)]
    alone = [trained(None, 100 * seed + 30 + number, 15, classes) for number, classes in enumerate(PARTS)]
    return {
        "parts": (start, parts),
        "runs": (start, runs),
        "unrelated": (unrelated[0], unrelated),
        "unrelated, aligned": (unrelated[0], star(unrelated)),
        "unrelated parts": (alone[0], alone),
        "unrelated parts, aligned": (alone[0], star(alone)),
    }


def star(models: Sequence[State]) -> list[State]:
    """Return the models in the frame of the first, aligned by weights."""
    symmetry = discover(network(), torch.zeros(2, 64)).symmetry
    first, *rest = models
    return [first, *(match_weights(symmetry, first, model).state for model in rest)]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def trained(start: State | None, seed: int, epochs: int, classes: tuple[int, ...] = ALL) -> State:
    inputs, targets, count = split()
    chosen = torch.tensor([index for index in range(count) if int(targets[index]) in classes])
    torch.manual_seed(seed)
    model = network()
    if start is not None:
        model.load_state_dict(start)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in chosen[torch.randperm(len(chosen))].split(64):
            optimiser.zero_grad()
            cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimiser.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def accuracy(state: State) -> float:
    inputs, targets, count = split()
    model = network()
    model.load_state_dict(state)
    with torch.no_grad():
        return float((model(inputs[count:]).argmax(dim=1) == targets[count:]).double().mean())
