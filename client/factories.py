"""The forms in which an app gives its model and its data to the mod."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias, TypeVar

from flwr.app import Context
from torch import nn

from fedbasin.strategies.tensors.batches import Batches

Made = TypeVar("Made")
# A class or function without parameters, or a function of Flower's context.
Factory: TypeAlias = Callable[[], Made] | Callable[[Context], Made]


def model_factory(model: Factory[nn.Module]) -> Callable[[Context], nn.Module]:
    """Return a function that makes the app's model for a context.

    Args:
        model: the model's class, or a function that makes it.

    Raises:
        TypeError: `model` is a module, is not callable, or needs other parameters.
    """
    if isinstance(model, nn.Module):
        raise TypeError(
            f"model= is a {type(model).__name__}, one module for all messages; pass its class or a function that makes "
            f"it, as model=lambda context: {type(model).__name__}(...)"
        )
    if not callable(model):
        raise TypeError(
            f"model= is a {type(model).__name__}; pass the model's class or a function that makes the model"
        )
    make = _of_context(model, "model")

    def made(context: Context) -> nn.Module:
        module = make(context)
        if not isinstance(module, nn.Module):
            raise TypeError(f"model= has made a {type(module).__name__}; let it return the model, a torch.nn.Module")
        return module

    return made


def data_factory(data: Factory[Batches] | Batches, keyword: str = "data") -> Callable[[Context], Batches]:
    """Return a function that gives the client's batches for a context, anew at every call.

    Args:
        data: a function that makes the batches, or batches that can be read many times, as a `DataLoader` or a list.
        keyword: name of the argument, for messages.

    Raises:
        TypeError: `data` can be read only once, is neither callable nor iterable, or needs other parameters.
    """
    if callable(data):
        return _of_context(data, keyword)
    if isinstance(data, Iterator):
        raise TypeError(
            f"{keyword}= is a {type(data).__name__}, which can be read only once; pass a DataLoader, a list, or a "
            "function that makes the batches"
        )
    if not isinstance(data, Iterable):
        raise TypeError(
            f"{keyword}= is a {type(data).__name__}; pass a DataLoader, a list of batches, or a function that makes "
            "them"
        )
    batches: Batches = data
    return lambda _context: batches


def held_out_share(held_out: object) -> float | None:
    """Return the share of the data that is held out; None where batches are given.

    Raises:
        ValueError: the share is not at least 0 and below 1.
    """
    if isinstance(held_out, bool) or not isinstance(held_out, int | float):
        return None
    if not 0 <= held_out < 1:
        raise ValueError(
            f"held_out={held_out}: a share is at least 0 and below 1; pass 0 to compare models by the training data, "
            "or batches"
        )
    return float(held_out)


def _of_context(make: Callable[..., Made], keyword: str) -> Callable[[Context], Made]:
    """Return `make` as a function of the context; its signature decides whether it receives the context."""
    name = getattr(make, "__name__", type(make).__name__)
    remedy = f"pass {keyword}=lambda context: {name}(...)"
    # Read now and not at the first message, so that a mistake shows when the app is loaded.
    try:
        signature = inspect.signature(make)
    except ValueError as error:
        raise TypeError(f"{keyword}={name} has no signature to read; {remedy}") from error
    if "context" in signature.parameters and _accepts(signature, context=None):
        return lambda context: make(context=context)
    if _accepts(signature):
        return lambda _context: make()
    # A class with one parameter, as a width, would take the context for it.
    if not inspect.isclass(make) and _accepts(signature, None):
        return lambda context: make(context)
    raise TypeError(f"{keyword}={name} needs the arguments {signature}; {remedy}")


def _accepts(signature: inspect.Signature, *args: None, **named: None) -> bool:
    try:
        signature.bind(*args, **named)
    except TypeError:
        return False
    return True
