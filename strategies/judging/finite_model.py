"""The check that a model is finite: one that is not is never broadcast and never saved."""

from torch import Tensor

from fedbasin.strategies.tensors.parallel import is_finite, one_core
from fedbasin.strategies.tensors.state import State, floating


class NonFiniteModelError(ArithmeticError):
    """A model with NaN or infinite entries that no single client's reply had."""


def check_finite(model: State, what: str, like: State) -> None:
    """Check that all floating tensors of a model are finite.

    Args:
        model: the model, or some tensors of it.
        what: its role, for the message.
        like: the model before; entries that are infinite in it, as in a mask of -inf, stay as they are.

    Raises:
        NonFiniteModelError: names the first tensor that is not.
    """
    with one_core():
        for name, tensor in floating(model).items():
            if not is_finite(tensor) and not _is_as_before(tensor, like.get(name)):
                raise NonFiniteModelError(
                    f"{what} has NaN or infinite entries in {name!r}, as where finite updates overflow; look for a client "
                    "whose update norm is out of line in the report, and lower the learning rate or leave that client out"
                )


def changed(model: State, before: State) -> dict[str, Tensor]:
    """Return the tensors of a model that are not those of the model before."""
    return {name: tensor for name, tensor in model.items() if tensor is not before.get(name)}


def _is_as_before(tensor: Tensor, before: Tensor | None) -> bool:
    if before is None:
        return False
    infinite = ~tensor.isfinite()
    return bool((tensor[infinite] == before[infinite]).all())
