"""A task: what a model's outputs and the targets of a batch mean, and which loss the one has for the other.

    classification       logits [batch, classes]                class indices [batch]
    tokens               logits [batch, tokens, classes]        class indices [batch, tokens]
    pixels               logits [batch, classes, ...]           class indices [batch, ...]
    language-modelling   logits [batch, tokens, vocabulary]     the input tokens; each output predicts the next token
    multi-label          logits of any shape                    0 or 1 for each logit
    regression           numbers of any shape                   a number for each

Losses are means over the outputs of one place, as torch's `mse_loss` and `binary_cross_entropy_with_logits` take them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from fedbasin.strategies.tasks.likelihoods import (
    IGNORED,
    Bernoulli,
    Categorical,
    Gaussian,
    HeadTarget,
    Likelihood,
    Places,
    TaskError,
    UserLikelihood,
    widen,
)
from fedbasin.strategies.tensors.batches import Batch

# Gradients that Fisher information may cost for each example, for which a training step takes one.
EXACT_SCORES = 3


@dataclass(frozen=True)
class Task:
    """A task by its likelihood.

    Attributes:
        name: name of the task.
        likelihood: distribution of targets given outputs.
        predicts_next: whether the targets are the inputs, of which each output predicts the next one.
        exact_scores: largest number of gradients of each example up to which Fisher information is exact; above it,
            targets are drawn, which costs one gradient and is right on average.
    """

    name: str
    likelihood: Likelihood
    predicts_next: bool = False
    exact_scores: int = EXACT_SCORES

    @classmethod
    def of_loss(
        cls, loss: Callable[[Tensor, Tensor], Tensor], draw: Callable[[Tensor], Tensor] | None = None
    ) -> "Task":
        """Return the task of a user's own loss. It has no closed-form head.

        Args:
            loss: function of outputs and targets that returns the negative log-likelihood of each example, `[batch]`.
            draw: function of outputs that draws targets from the likelihood, for Fisher information.
        """
        return cls("own loss", UserLikelihood(loss, draw))

    @property
    def head(self) -> HeadTarget | None:
        """The target to which a last layer can be fitted in closed form; None where there is none."""
        return self.likelihood.head

    def places(self, outputs: Tensor, batch: Batch) -> Places:
        """Return a batch by places.

        Raises:
            TaskError: the targets do not fit the outputs.
        """
        return self.likelihood.places(outputs, *self._targets(batch))

    def losses(self, outputs: Tensor, batch: Batch, smoothing: float = 0.0) -> Float[Tensor, " rows"]:
        """Return the loss of every place that counts.

        Args:
            outputs: outputs of the model.
            batch: the batch.
            smoothing: part of every label that is spread over all of them.

        Raises:
            TaskError: the targets do not fit the outputs.
        """
        return self.likelihood.losses(*self._counted(outputs, batch), smoothing)

    def score(self, outputs: Tensor, batch: Batch) -> Float[Tensor, " 3"]:
        """Return the sums of loss and correct, and the number of places, in double; correct is NaN where it has none.

        Raises:
            TaskError: the targets do not fit the outputs.
        """
        counted = self._counted(outputs, batch)
        losses, hits = self.likelihood.losses(*counted).double(), self.likelihood.hits(*counted)
        correct = torch.full_like(losses, torch.nan).sum() if hits is None else hits.double().sum()
        return torch.stack([losses.sum(), correct, torch.ones_like(losses).sum()])

    def probabilities(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Return the probabilities of the classes of every place that counts, and its class.

        A label counts as a place with two classes. None where the task has neither.

        Raises:
            TaskError: the targets do not fit the outputs.
        """
        return self.likelihood.probabilities(*self._counted(outputs, batch))

    def label_scores(
        self, outputs: Tensor, batch: Batch, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch scores numbers"]:
        """Return vectors whose outer products sum to the Fisher information of each example's outputs.

        The numbers are those of `arrange`. Targets are the model's own and never the data's: these would give the
        empirical Fisher information, which is not Fisher information (Kunstner, Balles and Hennig 2019, arXiv
        1905.12558). Draws at two places are independent, so their products vanish on average.

        Args:
            outputs: outputs of the model.
            batch: the batch, whose targets and mask say which places count.
            generator: generator that draws targets, on the CPU.

        Raises:
            TaskError: the targets do not fit the outputs, or the likelihood is not known.
        """
        places = self.places(outputs, batch)
        likelihood, count = self.likelihood, places.counted.shape[1]
        if count * likelihood.count_scores(places.outputs) > self.exact_scores:
            scores = likelihood.drawn_scores(places.outputs, generator)
            counted = places.counted.view(*places.counted.shape, *(1 for _ in scores.shape[2:]))
            return (scores * counted).flatten(1).unsqueeze(1)
        scores = likelihood.exact_scores(places.outputs) * places.counted[..., None, None]
        # The scores of a place are zero at all others.
        alone = torch.einsum("bpsf,pq->bpsqf", scores, torch.eye(count).to(scores))
        return alone.flatten(3).flatten(1, 2)

    def arrange(self, outputs: Tensor) -> Tensor:
        """Return the outputs as one row in the order of `label_scores`, in float32 or longer."""
        return widen(self.likelihood.arrange(outputs)).flatten()

    def goals(self, outputs: Tensor, batch: Batch, axis: int) -> tuple[Float[Tensor, "rows features"], Tensor]:
        """Return the values to which a head is fitted, and which rows count.

        Args:
            outputs: outputs of the model.
            batch: the batch.
            axis: axis of the outputs on which the head writes its features.

        Raises:
            TaskError: the targets do not fit the outputs, or the head is not one of this task.
        """
        targets, mask = self._targets(batch)
        values, counted = self.likelihood.goals(outputs, targets, mask, axis)
        return values.flatten(0, -2), counted.flatten()

    def _counted(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        places = self.places(outputs, batch)
        return widen(places.outputs)[places.counted], places.targets[places.counted]

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        targets, mask = batch.targets, batch.mask
        if not self.predicts_next:
            return targets, mask
        # The last output predicts what is not there.
        shifted = pad(targets[:, 1:], (0, 1), value=IGNORED)
        return shifted, None if mask is None else pad(mask[:, 1:], (0, 1), value=False)


TASKS = {
    task.name: task
    for task in (
        Task("classification", Categorical()),
        Task("multi-label", Bernoulli()),
        Task("regression", Gaussian()),
        Task("tokens", Categorical()),
        Task("pixels", Categorical(axis=1)),
        Task("language-modelling", Categorical(), predicts_next=True),
    )
}


def task_of(task: Task | str) -> Task:
    """Return a task by its name, or as it is.

    Raises:
        TaskError: there is no task of this name.
    """
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise TaskError(f"task = {task!r}: choose one of {', '.join(TASKS)}, or pass Task.of_loss(...)")
    return TASKS[task]
