"""Candidates of a merge, scored by a function of the user: it takes the path of a model and returns a number.

    def score(path: Path) -> float          the higher, the better

A candidate is written beside the output, scored and removed; the models are aligned once for all candidates.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbasin.server.files.library.user_function import import_function
from fedbasin.server.files.merge.merge_models import PreparedMerge, with_recipe, write_merge
from fedbasin.server.files.merge.recipe import MergeRecipe, MergeSource
from fedbasin.server.files.reading import ModelError

Score = Callable[[Path], float]


def read_score(name: str) -> Score:
    """Return the user's function, whose results are checked.

    Raises:
        ModelError: there is no such function; when it is called, it fails or returns no finite number.
    """
    function = import_function(name, "--score")

    def score(path: Path) -> float:
        try:
            value = float(function(path))
        except (Exception, SystemExit) as error:  # the user's own code may raise anything, or be a script
            raise ModelError(f"--score {name}: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise ModelError(f"--score {name}: returned {value}; return a finite number, the higher the better")
        return value

    return score


@dataclass(frozen=True, eq=False)
class Candidates:
    """Candidates of one merge.

    Attributes:
        merge: the merge, whose models are aligned.
        score: the user's function.
        place: path at which candidates are written, which does not exist in between.
        on_score: called with a sentence before each candidate.
    """

    merge: PreparedMerge
    score: Score
    place: Path
    on_score: Callable[[str], None]

    def rate(self, recipe: MergeRecipe, name: str) -> float:
        """Return the score of a recipe of the merge's models."""
        self.on_score(f"scoring {name}")
        try:
            write_merge(with_recipe(self.merge, recipe), self.place, 2**62, lambda _: None, lambda _: None)
            return self.score(self.place)
        finally:
            if self.place.is_dir():
                shutil.rmtree(self.place)
            else:
                self.place.unlink(missing_ok=True)

    def rate_models(self) -> dict[str, float]:
        """Return the score of each model alone, in the order of the recipe."""
        return {
            str(source.model): self.rate(soup_recipe(self.merge.recipe, [source]), str(source.model))
            for source in self.merge.recipe.parts[0].sources
        }


def soup_recipe(recipe: MergeRecipe, sources: Sequence[MergeSource]) -> MergeRecipe:
    """Return the recipe of the mean of some models."""
    plain = tuple(MergeSource(model=source.model) for source in sources)
    left_out = dict.fromkeys(("base_model", "statistics", "task", "module", "score", "distill"))
    return recipe.model_copy(update={**left_out, "merge_method": "linear", "models": plain, "parameters": {}})


def greedy_soup(candidates: Candidates, scores: dict[str, float]) -> tuple[MergeRecipe, float]:
    """Return the mean of the models that raise the score, added from the best on, and its score.

    Law: never below the best model. Source: Wortsman et al. 2022, arXiv 2203.05482, recipe 1.

    Args:
        candidates: the candidates.
        scores: the score of each model alone.
    """
    recipe = candidates.merge.recipe
    best, *rest = sorted(recipe.parts[0].sources, key=lambda source: -scores[str(source.model)])
    soup, highest = [best], scores[str(best.model)]
    for source in rest:
        value = candidates.rate(soup_recipe(recipe, [*soup, source]), f"the soup with {source.model}")
        if value >= highest:
            soup, highest = [*soup, source], value
    return soup_recipe(recipe, soup), highest
