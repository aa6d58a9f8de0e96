"""What a run asks in each round, whom, and what that may take: its settings, with the model's symmetry and layers."""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from fedbasin.proto.layer_graph import Block
from fedbasin.server.run.settings import Settings
from fedbasin.server.run.stage_loop import Budget
from fedbasin.strategies.alignment.matchers import Matcher
from fedbasin.strategies.fusion.compression.stage_budget import fit_encodings, fuse_encodings
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.recipes import Recipe
from fedbasin.strategies.round.pairwise import linked_plan
from fedbasin.strategies.round.round import Next, Plan, round_plan
from fedbasin.strategies.round.stages import Ask, Bootstrap, Stage, Start, fusing
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True, eq=False)
class Agenda:
    """The stages of a run's rounds.

    Attributes:
        settings: of the run.
        symmetry: of the model; None where nothing is aligned by one.
        blocks: those that every client must know something about.
        layers: those whose inputs clients may speak of.
        score: of a model, lower is better; for `bootstrap = "best"`.
    """

    settings: Settings
    symmetry: Symmetry | None
    blocks: Collection[Block]
    layers: Sequence[Layer] = ()
    score: Callable[[State], float] | None = None

    @property
    def budget(self) -> Budget:
        """Of every stage."""
        settings = self.settings
        return Budget(
            settings.round_timeout_seconds,
            settings.quorum,
            settings.attempts,
            settings.max_update_bytes,
            settings.grace_seconds,
            settings.probe_share,
        )

    def sampled(self, online: list[int], number: int, share: float) -> list[int]:
        """Whom a round asks: the same nodes for the same round, also after a resume."""
        size = max(1, round(share * len(online)))
        return sorted(random.Random(f"{self.settings.seed}/{number}").sample(online, size))  # noqa: S311 - no secret

    def bootstraps(self, number: int) -> bool:
        """Whether a round begins with a search for an anchor."""
        aligns = self.settings.align != "off" and not self._is_paired(number)
        return aligns and self._is_own(number)

    def bootstrap(self, template: State) -> Stage:
        """That search."""
        return Bootstrap(template, self.settings.bootstrap, self.symmetry, self.score)

    def plan(self, number: int, model: State, recipe: Recipe) -> Plan:
        """The stages of a round that begins with a global model."""
        fuse = partial(self._fuse, number, model, recipe)
        settings = self.settings
        if self._is_paired(number):
            link = self._ask(number, keep=True)
            return linked_plan(Next(fuse), model, settings.merge, link)
        encode = partial(fit_encodings, self.layers, settings.statistics_budget_bytes)
        return round_plan(model, recipe, fuse, settings.fit, encode=encode)

    def _fuse(self, number: int, model: State, recipe: Recipe) -> Stage:
        settings, paired = self.settings, self._is_paired(number)
        # For fits, for links, and for the path that goes with an evaluation.
        keep = recipe.fits or paired or settings.fused_points > 0
        ask = replace(
            self._ask(number, keep=keep),
            layer_graph=recipe.fits,
            encodings=fuse_encodings(recipe, self.layers, settings.statistics_budget_bytes),
            frozen=recipe.frozen(number),
        )
        dtype = torch.float64 if settings.sum == "reproducible" else torch.float32
        # Pairs are aligned to each other, later.
        align = "off" if paired else settings.align
        return fusing(model, recipe, ask, align, self.blocks, dtype)

    def _ask(self, number: int, *, keep: bool) -> Ask:
        """What links and fusions have in common."""
        return Ask(
            start=Start.own if self._is_own(number) else Start.shared,
            symmetry=self.symmetry,
            matcher=Matcher[self.settings.matcher],
            path_points=self.settings.barrier_points,
            keep=keep,
        )

    def _is_own(self, number: int) -> bool:
        return number == 1 and self.settings.start == "own"

    def _is_paired(self, number: int) -> bool:
        return self._is_own(number) and self.settings.merge != "star"
