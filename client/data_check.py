"""A look at the client's data before it trains: what the mod cannot read is told then, and not after the training."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from fedbasin.client.request_reader import Data, required
from fedbasin.proto.request import Request
from fedbasin.strategies.alignment.matchers import Matcher
from fedbasin.strategies.tensors.batches import evaluating, forward, read_batches


class UnreadableDataError(ValueError):
    """Batches that the model or the mod cannot take."""


def needs_data(request: Request) -> bool:
    """Return whether the reply to a request for training is measured on the client's data."""
    measured = request.statistic != "none" or request.path_points > 0 or request.layer_graph
    return measured or (request.aligns and Matcher[request.matcher].reads_data)


def check_data(make_model: Callable[[], nn.Module], data: Data | None) -> None:
    """Run the model on the first batch.

    Args:
        make_model: makes the model; its initial weights are used.
        data: gives the client's own batches, anew at every call.

    Raises:
        MissingDataError: there is no data.
        UnreadableDataError: the batch is in none of the known forms, the model does not take it, or there is no second
            pass over the data.
    """
    batches = required(data, "the recipe")()
    model = make_model()
    # A shuffling DataLoader draws from the global generator, and what the app draws must not depend on this look.
    with torch.random.fork_rng(), evaluating(model), torch.no_grad():
        if isinstance(batches, Iterator) and required(data, "the recipe")() is batches:
            raise UnreadableDataError(
                "the data is one iterator, which can be read once; pass a list, a DataLoader, or a function that makes "
                "a new iterator at every call"
            )
        try:
            forward(model, next(iter(read_batches(batches, model))))
        except Exception as error:
            raise UnreadableDataError(
                f"the first batch of the data that the mod was given does not go through the model: "
                f"{type(error).__name__}: {error}; yield (inputs, targets) with inputs that model(inputs) takes, or a "
                "dictionary"
            ) from error
