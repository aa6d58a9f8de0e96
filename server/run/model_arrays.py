"""The names of a model's tensors and of the arrays that travel, which NumPy apps call 0, 1, 2."""

from collections.abc import Mapping

from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedbasin.proto import plain
from fedbasin.server.run.settings import SettingsError
from fedbasin.strategies.tensors.state import State


def array_names(model: nn.Module | None, arrays: ArrayRecord) -> dict[str, str]:
    """Return, by the model's names, the names of arrays that are called otherwise.

    Arrays that are not named as the model's tensors are its tensors in the order of the state dict, as
    `[value.numpy() for value in model.state_dict().values()]` makes them.

    Args:
        model: the app's model; None where the names of the arrays are all that is known.
        arrays: the initial arrays.

    Raises:
        SettingsError: the arrays are not the model's.
    """
    if not arrays:
        raise SettingsError("the initial arrays are empty; pass ArrayRecord(model.state_dict()) to start")
    if model is None:
        return {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    array_shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if shapes == array_shapes:
        return {}
    if not shapes.keys() & array_shapes.keys() and list(shapes.values()) == list(array_shapes.values()):
        return dict(zip(shapes, array_shapes, strict=True))
    remedy = "pass the arrays of this model to start, or this app's model to FedBasin"
    if all("lora_" in name for name in array_shapes.keys() - shapes.keys()) and len(array_shapes) < len(shapes):
        remedy = (
            "where adapters alone travel, pass FedBasin(model=as_module(state)) with the same state of adapters; "
            "as_module is in fedbasin.strategies.fusion.lora.lora_factors"
        )
    raise SettingsError(
        f"the initial arrays are not those of model={type(model).__name__}: {_difference(shapes, array_shapes)}; {remedy}"
    )


def state_of(arrays: ArrayRecord, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return arrays as a state under the model's names; the tensors are views of the arrays' bytes."""
    model_names = {array: name for name, array in names.items()}
    return {model_names.get(name, name): tensor for name, tensor in plain.read_arrays(arrays).items()}


def arrays_of(state: State, names: Mapping[str, str]) -> ArrayRecord:
    """Return a state as ordinary arrays under the app's names."""
    return plain.write_arrays({names.get(name, name): tensor for name, tensor in state.items()})


def _difference(shapes: Mapping[str, tuple[int, ...]], array_shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the first difference between a model's tensors and some arrays."""
    for name in shapes:
        if name not in array_shapes:
            return f"the arrays lack {name!r} and have {', '.join(map(repr, list(array_shapes)[:3]))}"
        if shapes[name] != array_shapes[name]:
            return f"{name!r} is {array_shapes[name]} in the arrays and {shapes[name]} in the model"
    extra = next(name for name in array_shapes if name not in shapes)
    return f"the model lacks {extra!r}"
