"""The server's own inputs without labels, on which a round's model is distilled from the clients' models."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fedbasin.server.run.settings import Settings, SettingsError
from fedbasin.strategies.fusion.distillation.distil import Distillation
from fedbasin.strategies.fusion.distillation.distilled_accumulator import Lesson, part_batches
from fedbasin.strategies.recipes import Recipe
from fedbasin.strategies.tasks.model_task import Task, task_of
from fedbasin.strategies.tensors.batches import Batches, forward, without_targets
from fedbasin.strategies.tensors.state import State

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")


@dataclass(frozen=True, eq=False)
class DistillationSet:
    """Inputs without labels of the server's own, on which each round's model learns the outputs of the clients' ensemble.

    Lin et al. 2020 (FedDF), arXiv 2006.07242. A fifth of the inputs is held out; where no pass comes closer to the
    ensemble on them, the round's model is what it would be without distillation.

    Attributes:
        model: gives the architecture; its tensors are replaced.
        batches: inputs, as tensors, dictionaries or batches of a client's data, whose targets are not read; the same in
            the same order whenever a run begins or goes on.
        task: the task or its name, as for `basin`, which says what outputs mean.
        passes: number of passes over the inputs in each round.
        rate: learning rate of Adam.

    Raises:
        TypeError: the batches can be read only once.
        ValueError: there is no task of this name, or a number is not positive.
    """

    model: nn.Module
    batches: Batches
    task: Task | str = "classification"
    passes: int = 5
    rate: float = 1e-3

    def __post_init__(self) -> None:
        task_of(self.task)
        if isinstance(self.batches, Iterator):
            raise TypeError("a distillation set is read whenever a run begins; pass a list or a DataLoader")
        if self.passes < 1 or not 0 < self.rate < float("inf"):
            raise ValueError(f"passes = {self.passes}, rate = {self.rate}: choose positive numbers")

    def lesson(self, settings: Settings, recipe: Recipe, state: State) -> Lesson:
        """Return the inputs and numbers of a run's distillation.

        Args:
            settings: the settings of the run.
            recipe: its recipe.
            state: the initial model.

        Raises:
            SettingsError: clients' models have no ensemble that could be distilled, or the set does not fit the model.
        """
        if reason := _obstacle(settings, recipe):
            raise SettingsError(f"distillation with {reason}, or pass no distillation set")
        own = self.model.state_dict()
        if lacking := [name for name, tensor in state.items() if name not in own or own[name].shape != tensor.shape]:
            raise SettingsError(
                f"the distillation set's model has no tensor {lacking[0]!r} of shape {list(state[lacking[0]].shape)}; "
                "give DistillationSet the model that the clients train"
            )
        batches, held_out = part_batches(without_targets(self.batches, self.model))
        if not batches or not held_out:
            raise SettingsError("the distillation set has no batch of at least five inputs; make its batches larger")
        forward(self.model, batches[0])
        return Lesson(self.model, batches, held_out, task_of(self.task), self.passes, self.rate)


def log_distillation(result: Distillation) -> None:
    """Log what a distillation has changed."""
    verdict = "is kept" if result.after < result.before else "is not, the fused model stays"
    _LOG.info(
        "distillation: divergence from the clients' ensemble %.4g, %.4g before, on inputs held out; it %s",
        result.after,
        result.before,
        verdict,
    )


def _obstacle(settings: Settings, recipe: Recipe) -> str:
    """Return the setting with which models cannot be distilled, with the remedy; empty where there is none."""
    if recipe.lora is not None:
        return f"recipe = {recipe.name!r}: adapters alone compute no outputs; choose a recipe for whole models"
    if recipe.robust is not None:
        return f"robust = {recipe.robust.name!r}: a hostile client's outputs would be part of the ensemble; set robust = ''"
    if recipe.rule is not None:
        return f"rule = {settings.rule!r}: a merging rule takes the place of the mean; leave it out"
    if settings.merge != "star":
        return f"merge = {settings.merge!r}: models are merged in pairs; set merge = 'star'"
    return ""
