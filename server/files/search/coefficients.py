"""The search for coefficients by layer: weights of the models, or `t`, as gradients from the first layer to the last.

COBYQA fits a quadratic model to the scores in a region that it moves and shrinks, and needs no gradients: Ragonneau 2022,
PhD thesis, The Hong Kong Polytechnic University. It draws no random numbers, so an interrupted search goes on from its
log: the scores there are given again in their order.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbasin.server.files.merge.recipe import MergeRecipe
from fedbasin.server.files.reading import ModelError
from fedbasin.server.files.search.candidates import Candidates

# Start of `t`, which lies between 0 and 1.
_MIDDLE = 0.5

# First radius of the region, as a part of the bounds' width.
_RADIUS = 0.125


@dataclass(frozen=True)
class ScoredCandidate:
    """Coefficients and their score."""

    coefficients: tuple[float, ...]
    score: float


class _TrialsDoneError(Exception):
    """Raised from the objective when all trials are done."""


def search(
    candidates: Candidates, trials: int, points: int, log: Path, score: str
) -> tuple[MergeRecipe, list[ScoredCandidate]]:
    """Return the recipe with the best coefficients, and all trials; the first is the recipe as it was given.

    Args:
        candidates: the candidates.
        trials: number of candidates, with those of an earlier search in the log.
        points: number of values of each gradient.
        log: file to which each trial is added, and from which a search of the same recipe goes on.
        score: name of the score.

    Raises:
        ModelError: the rule has nothing to search, or the log belongs to another search.
    """
    from scipy.optimize import minimize

    recipe = candidates.merge.recipe
    starts = [start for start in _starts(recipe) for _ in range(points)]
    known = _read_log(log, _digest(recipe, points, score))
    done: list[ScoredCandidate] = []

    def objective(values: Any) -> float:
        coefficients = tuple(float(value) for value in values)
        if len(done) == trials:
            raise _TrialsDoneError
        done.append(_next_trial(candidates, coefficients, points, len(done), known, log))
        return -done[-1].score

    bounds = [(0.0, 2 * start if recipe.rule.weighted else 1.0) for start in starts]
    radius = _RADIUS * min(high for _, high in bounds)
    options: Any = {"initial_tr_radius": radius, "maxfev": 10**6}
    with suppress(_TrialsDoneError):
        minimize(objective, starts, method="COBYQA", bounds=bounds, options=options)
    best = max(done, key=lambda trial: trial.score)
    return with_coefficients(recipe, best.coefficients, points), done


def with_start(recipe: MergeRecipe) -> MergeRecipe:
    """Return a recipe with a first value of `t`, if its rule has one and the recipe does not."""
    if recipe.rule.shared.get("t", 0.0) is not None or "t" in recipe.parameters:
        return recipe
    return recipe.model_copy(update={"parameters": {**recipe.parameters, "t": _MIDDLE}})


def with_coefficients(recipe: MergeRecipe, coefficients: Sequence[float], points: int) -> MergeRecipe:
    """Return a recipe with gradients of `points` values: of each model's weight, or of `t`."""
    gradients = [list(coefficients[start : start + points]) for start in range(0, len(coefficients), points)]
    if not recipe.rule.weighted:
        return recipe.model_copy(update={"parameters": {**recipe.parameters, "t": gradients[0]}})
    models = tuple(
        source.model_copy(update={"parameters": {**source.parameters, "weight": gradient}})
        for source, gradient in zip(recipe.models or (), gradients, strict=True)
    )
    return recipe.model_copy(update={"models": models})


def _starts(recipe: MergeRecipe) -> list[float]:
    """Return the first value of each gradient.

    Raises:
        ModelError: the rule has no coefficients, or the recipe's own are no numbers.
    """
    if recipe.models is None or recipe.rule.statistic or (not recipe.rule.weighted and "t" not in recipe.rule.shared):
        raise ModelError(f"--search: {recipe.merge_method} of these models has no weight or t to search by layer")
    if not recipe.rule.weighted:
        return [_start("t", recipe.parameters.get("t", _MIDDLE))]
    shared = recipe.parameters.get("weight", 1.0)
    return [_start("weight", source.parameters.get("weight", shared)) for source in recipe.models]


def _start(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelError(f"--search: {name} is {value!r}, from which no search starts; give one number above zero")
    return float(value)


def _next_trial(
    candidates: Candidates,
    coefficients: tuple[float, ...],
    points: int,
    number: int,
    known: list[ScoredCandidate],
    log: Path,
) -> ScoredCandidate:
    if number < len(known):
        if known[number].coefficients != coefficients:
            raise ModelError(f"{log}: trial {number + 1} has other coefficients; it is of another version: remove it")
        return known[number]
    recipe = with_coefficients(candidates.merge.recipe, coefficients, points)
    trial = ScoredCandidate(coefficients, candidates.rate(recipe, f"candidate {number + 1}"))
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"coefficients": coefficients, "score": trial.score}) + "\n")
    return trial


def _digest(recipe: MergeRecipe, points: int, score: str) -> str:
    content = json.dumps([recipe.model_dump(mode="json"), points, score], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _read_log(log: Path, digest: str) -> list[ScoredCandidate]:
    """Return the trials in a log, which is begun where there is none; a line that was cut off is dropped.

    Raises:
        ModelError: the log is of another search.
    """
    if not log.exists():
        log.write_text(json.dumps({"search": digest}) + "\n", encoding="utf-8")
        return []
    text = log.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    try:
        head, *lines = map(json.loads, whole.splitlines())
        trials = [ScoredCandidate(tuple(line["coefficients"]), line["score"]) for line in lines]
        is_same = head["search"] == digest
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{log}: is no log of a search ({error!r}); remove it, or give another --output") from error
    if not is_same:
        raise ModelError(f"{log}: is of another recipe or score; remove it, or give another --output")
    if whole != text:
        log.write_text(whole, encoding="utf-8")
    return trials
