"""The guard of the global model: a model that is not finite is never broadcast and never saved."""

from fedbasin.strategies.tensors.parallel import is_finite
from fedbasin.strategies.tensors.state import State, floating


class NonFiniteModelError(ArithmeticError):
    """A model with NaN or infinite entries that no single client's reply had."""


def check_finite(model: State, what: str) -> None:
    """Check that all floating tensors of a model are finite.

    Args:
        model: the model.
        what: its role, for the message.

    Raises:
        NonFiniteModelError: names the first tensor that is not.
    """
    for name, tensor in floating(model).items():
        if not is_finite(tensor):
            raise NonFiniteModelError(
                f"{what} has NaN or infinite entries in {name!r}, as where finite updates overflow; look for a client "
                "whose update norm is out of line in the report, and lower the learning rate or leave that client out"
            )
