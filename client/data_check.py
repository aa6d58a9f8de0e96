"""A look at the client's data before it trains: what the mod cannot read is told then, and not after the training."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from fedbasin.client.lora_names import model_names
from fedbasin.client.request_reader import Data, required
from fedbasin.proto.request import Request
from fedbasin.strategies.alignment.matchers import AUTO, Matcher
from fedbasin.strategies.tensors.batches import evaluating, forward, read_batches
from fedbasin.strategies.tensors.state import State, added_prefix


class UnreadableDataError(ValueError):
    """Batches that the model or the mod cannot take."""


class OtherModelError(ValueError):
    """A model that has not the tensors of the global model."""


def check_tensors(model: nn.Module, anchor: State) -> None:
    """Check that a model has the tensors of the state that travels, in its shapes.

    Raises:
        OtherModelError: it lacks one, or has it in another shape; names the tensor.
    """
    tensors = model.state_dict()
    try:
        names = model_names(model, anchor)
    except ValueError as error:
        wrapper = added_prefix(tensors, anchor)
        advice = (
            f"; make the model within, without {wrapper!r}, and wrap it in the app's own function" if wrapper else ""
        )
        raise OtherModelError(f"{error}{advice}") from error
    for name, own_name in names.items():
        # A client may have adapters of a smaller rank.
        if tensors[own_name].shape != anchor[name].shape and ".lora_" not in name:
            raise OtherModelError(
                f"{name!r} is {tuple(tensors[own_name].shape)} in the model that basin(model=...) makes, and "
                f"{tuple(anchor[name].shape)} in the global model; make the model with the same settings"
            )


def needs_data(request: Request) -> bool:
    """Return whether the reply to a request for training is measured on the client's data."""
    measured = request.statistic != "none" or request.path_points > 0 or request.layer_graph
    # A matcher that is left to the client takes data only where there are some.
    matches = request.aligns and request.matcher != AUTO and Matcher[request.matcher].reads_data
    return measured or matches


def check_data(make_model: Callable[[], nn.Module], data: Data | None, anchor: State) -> None:
    """Check that the model runs the state that travels, and run it on the first batch.

    Args:
        make_model: makes the model; its initial weights are used.
        data: gives the client's own batches, anew at every call.
        anchor: the state that the server has sent.

    Raises:
        MissingDataError: there is no data.
        OtherModelError: the model has not the tensors of the state.
        UnreadableDataError: the batch is in none of the known forms, the model does not take it, or there is no second
            pass over the data.
    """
    batches = required(data, "the recipe")()
    model = make_model()
    check_tensors(model, anchor)
    # A shuffling DataLoader draws from the global generator, and what the app draws must not depend on this look.
    with torch.random.fork_rng(), evaluating(model), torch.no_grad():
        if isinstance(batches, Iterator) and required(data, "the recipe")() is batches:
            raise UnreadableDataError(
                "the data is one iterator, which can be read once; pass a list, a DataLoader, or a function that makes "
                "a new iterator at every call"
            )
        try:
            batch = next(iter(read_batches(batches, model)))
        except Exception as error:
            raise UnreadableDataError(
                f"the data that the mod was given cannot be read: {type(error).__name__}: {error}"
            ) from error
        try:
            forward(model, batch)
        except Exception as error:
            raise UnreadableDataError(
                f"the first batch of the data that the mod was given does not go through the model: "
                f"{type(error).__name__}: {error}; yield (inputs, targets) with inputs that model(inputs) takes, or a "
                "dictionary"
            ) from error
