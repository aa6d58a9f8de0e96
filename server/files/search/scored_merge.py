"""A merge with a score: of the result beside its models, of a greedy soup, or of searched coefficients."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedbasin.server.files.merge.merge_models import MergeReport, PreparedMerge, align_merge, with_recipe, write_merge
from fedbasin.server.files.reading import ModelError
from fedbasin.server.files.search.candidates import Candidates, greedy_soup, read_score
from fedbasin.server.files.search.coefficients import search


@dataclass(frozen=True)
class ScoreReport:
    """The scores of a merge.

    Attributes:
        models: score of each model alone.
        result: score of the result.
        chosen: models of a greedy soup, or coefficients of the best trial; empty for a plain merge.
        trials: number of candidates of a search.
    """

    models: dict[str, float]
    result: float
    chosen: dict[str, Any] = field(default_factory=dict)
    trials: int = 0


@dataclass(frozen=True)
class CoefficientSearch:
    """The settings of a search: number of candidates, and of the values of each gradient."""

    trials: int
    points: int


def write_scored_merge(
    merge: PreparedMerge, target: Path, shard: int, settings: CoefficientSearch | None, on_step: Callable[[str], None]
) -> tuple[MergeReport, ScoreReport]:
    """Align once, score candidates, and write the best.

    Args:
        merge: the merge, whose recipe names a score.
        target: folder or file of the result.
        shard: largest number of bytes in one file of a folder.
        settings: settings of a search; None takes the recipe's coefficients.
        on_step: called with what is done next.

    Raises:
        ModelError: the score fails, there is nothing to search, or a file cannot be read or written.
    """
    if merge.recipe.slices:
        raise ModelError("--score: compares whole models; leave slices out")
    score = merge.recipe.score or ""
    rate = read_score(score)
    merge = align_merge(merge, on_step)
    suffix = "" if merge.reference.is_folder else target.suffix
    candidates = Candidates(merge, rate, target.with_name(f".{target.stem}.{os.getpid()}.candidate{suffix}"), on_step)
    models = candidates.rate_models()
    recipe, chosen, trials = merge.recipe, {}, 0
    if recipe.rule.scored:
        recipe, _ = greedy_soup(candidates, models)
        chosen = {"models": [str(source.model) for source in recipe.models or ()]}
    elif settings is not None:
        log = target.with_name(f"{target.name}.search.jsonl")
        recipe, done = search(candidates, settings.trials, settings.points, log, score)
        trials = len(done)
        chosen = recipe.model_dump(mode="json", include={"models", "parameters"})
    on_step("writing the result")
    report = write_merge(with_recipe(merge, recipe), target, shard, lambda _: None, on_step)
    return report, ScoreReport(models, rate(target), chosen, trials)
