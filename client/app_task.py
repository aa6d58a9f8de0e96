"""The task of an app: given to the mod, or guessed from the client's first batch, and known before training."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Context
from torch import nn

from fedbasin.client.request_reader import Data
from fedbasin.proto.request import Request
from fedbasin.strategies.alignment.matchers import Matcher
from fedbasin.strategies.fusion.weighting import Statistic
from fedbasin.strategies.tasks.guess import first_outputs, task_of_batch
from fedbasin.strategies.tasks.model_task import Task

# A child of Flower's logger, so that its handlers carry the lines.
_LOG = logging.getLogger("flwr.fedbasin")

_FISHER = (Statistic.fisher.name, Statistic.kronecker.name)


@dataclass(eq=False)
class AppTask:
    """The task of an app, checked once on a batch of outputs and targets.

    Attributes:
        given: the task that the app has given; None where it is guessed.
        known: the task once it is checked.
    """

    given: Task | None
    known: Task | None = None

    def resolve(
        self, request: Request, make_model: Callable[[Context], nn.Module], context: Context, data: Data | None
    ) -> Task | None:
        """Return the task for a request; None where the request does not need one, or there is no data.

        Args:
            request: the request.
            make_model: makes the app's model.
            context: context of the app.
            data: gives the client's own batches, anew at every call.

        Raises:
            TaskError: the task is not plain, its targets do not fit the model's outputs, or the request needs a
                likelihood that is not known.
        """
        if data is None or not _needs_task(request):
            return None
        if self.known is None or request.statistic in _FISHER:
            outputs, batch = first_outputs(make_model(context), data())
            task = self.known or self.given or task_of_batch(outputs, batch)
            # A batch that does not fit, or a likelihood that is not known, shall not show after training.
            if request.statistic in _FISHER:
                task.label_scores(outputs, batch)
            task.score(outputs.detach(), batch)
            if self.known is None:
                origin = "as given" if self.given else f"by outputs {list(outputs.shape)} and their targets"
                _LOG.info("task: %s, %s; the loss is in %s", task.name, origin, task.likelihood.unit)
            self.known = task
        return self.known


def _needs_task(request: Request) -> bool:
    learns = request.aligns and request.matcher == Matcher.learned.name
    fits = request.layer_graph or request.refit is not None
    return bool(request.path_points) or request.statistic in _FISHER or learns or fits
