"""The way from a last layer to the output of its model, through operations that treat every feature alike.

    output = T(W x + b) = W T(x) + b T(1)        T linear, acting on places only: a mean, a scale, a view, a transpose

So the layer is the head of its model, and `[T(x); T(1)]` are the rows that determine it. A log-softmax at the end
changes no class's probability, so the layer's output stands for the model's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedbasin.strategies.capture.layer_calls import LayerCall

# By name, because most are both a function and a method. An unlisted one ends the way, which is always right.
_LINEAR = {
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "alpha_dropout",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "clone",
    "contiguous",
    "double",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "float",
    "interpolate",
    "mean",
    "movedim",
    "permute",
    "select",
    "sum",
    "swapaxes",
    "to",
    "transpose",
    "__getitem__",
}
_SCALED = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "div", "div_", "divide", "true_divide", "__truediv__"}
_RESHAPED = {"flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view", "view_as"}

Step: TypeAlias = Callable[["Features"], "Features | None"]


class Features(NamedTuple):
    """Values in the shape of an output, with other features on one of its axes.

    Attributes:
        values: the values.
        axis: axis of the features.
        shape: shape of the output; one axis shorter where the output's only feature has no axis of its own.
        is_normalised: whether a log-softmax has been passed.
    """

    values: Tensor
    axis: int
    shape: torch.Size
    is_normalised: bool = False

    @property
    def is_squeezed(self) -> bool:
        """True if the output's only feature has no axis of its own."""
        return len(self.shape) < self.values.ndim

    def after(self, values: Tensor, output: Tensor) -> "Features | None":
        """Return the features after an operation that has made `values` of these and `output` of the layer's output."""
        shape = _with_axis(output.shape, self.axis) if self.is_squeezed else output.shape
        if len(shape) != values.ndim:
            return None
        axes = [axis for axis, (a, b) in enumerate(zip(values.shape, shape, strict=True)) if a != b]
        count = self.values.shape[self.axis]
        if len(axes) != 1 or values.shape[axes[0]] != count or (self.is_squeezed and axes[0] != self.axis):
            return None
        return self._replace(values=values, axis=axes[0], shape=output.shape)

    def reshaped(self, output: Tensor) -> "Features | None":
        """Return the features in another shape of the same output."""
        if self.is_squeezed:
            return None
        shape, count = output.shape, self.values.shape[self.axis]
        leading, width = math.prod(self.shape[: self.axis]), self.shape[self.axis]
        for axis, size in enumerate(shape):
            if size == width and math.prod(shape[:axis]) == leading:
                values = self.values.reshape(*shape[:axis], count, *shape[axis + 1 :])
                return self._replace(values=values, axis=axis, shape=shape)
        # A single feature may have no axis of its own.
        places = [place for place in range(len(shape) + 1) if width == 1 and math.prod(shape[:place]) == leading]
        if not places:
            return None
        values = self.values.reshape(_with_axis(shape, places[0], count))
        return self._replace(values=values, axis=places[0], shape=shape)


@dataclass(frozen=True, eq=False)
class HeadPath:
    """The operations between a layer's call and the output of the model.

    Attributes:
        call: call of the layer.
        steps: the operations.
    """

    call: LayerCall
    steps: tuple[Step, ...] = ()

    def features(self) -> Features | None:
        """Return `[T(x); T(1)]` in the shape of the model's output; None if the layer is not the head.

        Where the layer has no bias, the ones are left out.
        """
        start = _inputs(self.call)
        count = start.values.shape[start.axis]
        # Other features than the output has, so that shapes tell which axis is theirs.
        if count == self.call.layer.outputs:
            start = start._replace(values=_append(start.values, start.axis, 0.0))
        end: Features | None = start
        for step in self.steps:
            end = step(end) if end else None
        return end and end._replace(values=end.values.narrow(end.axis, 0, count))


class HeadPaths(TorchFunctionMode):
    """A mode that follows the outputs of layers to the output of their model."""

    def __init__(self) -> None:
        super().__init__()
        # Holds the tensors too: an address is unique only while its tensor lives.
        self._ends: dict[int, tuple[Tensor, HeadPath]] = {}

    def follow(self, call: LayerCall) -> None:
        """Begin a path at a layer's call."""
        if call.layer.groups == 1 and (call.kernel is None or call.inputs.ndim == 4):
            # A copy, because later operations may write over the inputs.
            copy = replace(call, inputs=call.inputs.detach().clone())
            self._ends[id(call.output)] = call.output, HeadPath(copy)

    def path(self, output: Tensor) -> HeadPath | None:
        """Return the path that ends at a tensor, the output of the model; None where there is none."""
        return self._ends.get(id(output), (None, None))[1]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        values = (*args, *named.values())
        ends = [(place, value) for place, value in enumerate(values) if id(value) in self._ends]
        output = func(*args, **named)
        if not ends:
            return output
        place, tensor = ends[0]
        path = self._ends[id(tensor)][1]
        is_plain = len(ends) == 1 and place < len(args) and isinstance(output, Tensor)
        step = _step(func, args, named, place, output, path.call.layer.outputs) if is_plain else None
        if output is tensor or func is Tensor.__setitem__:
            del self._ends[id(tensor)]
        if step is not None:
            self._ends[id(output)] = output, replace(path, steps=(*path.steps, step))
        return output


def _inputs(call: LayerCall) -> Features:
    """Return what a layer's weight multiplies, and ones where it has a bias, in the shape of the layer's output."""
    output = call.output
    if call.kernel is None:
        values, axis = call.inputs, call.inputs.ndim - 1
    else:
        values, axis = call.patches(), output.ndim - 3
    if len(call.layer.block) > 1:
        values = _append(values, axis, 1.0)
    return Features(values, axis, output.shape)


def _append(values: Tensor, axis: int, value: float) -> Tensor:
    return torch.cat([values, torch.full_like(values.narrow(axis, 0, 1), value)], axis)


def _with_axis(shape: torch.Size, axis: int, size: int = 1) -> torch.Size:
    return torch.Size((*shape[:axis], size, *shape[axis:]))


def _step(
    func: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any], place: int, output: Tensor, width: int
) -> Step | None:
    """Return the step for an operation on a layer's output; None if it may treat features differently.

    Args:
        func: the operation.
        args: its arguments.
        named: its arguments by name.
        place: place of the layer's output among the arguments.
        output: output of the operation.
        width: number of features.
    """
    name = getattr(func, "__name__", "")
    if name == "log_softmax":
        dim = named.get("dim", args[1] if len(args) > 1 else None)
        return lambda found: _normalised(found, dim)
    if name in _RESHAPED or (_is_slice(name, args) and output.numel() == args[place].numel()):
        return lambda found: found.reshaped(output)
    is_scale = name in _SCALED and all(_is_scale(a, width) for i, a in enumerate(args) if i != place)
    if not (is_scale or name in _LINEAR) or ("div" in name and place):
        return None

    def apply(found: Features) -> Features | None:
        if found.is_normalised and name in ("mean", "sum", *_SCALED):
            return None
        # Written over by operations in place.
        changed = (*args[:place], found.values.clone(), *args[place + 1 :])
        try:
            return found.after(func(*changed, **named), output)
        except RuntimeError:
            return None

    return apply


def _normalised(found: Features, dim: Any) -> Features | None:
    is_features = isinstance(dim, int) and dim % len(found.shape) == found.axis and not found.is_squeezed
    return found._replace(is_normalised=True) if is_features else None


def _is_slice(name: str, args: tuple[Any, ...]) -> bool:
    """Return True for an index that keeps the order of what it takes."""
    if name == "select":
        return True
    index = args[1] if len(args) > 1 and isinstance(args[1], tuple) else args[1:]
    return name == "__getitem__" and all(part is None or isinstance(part, int | slice | EllipsisType) for part in index)


def _is_scale(factor: Any, width: int) -> bool:
    """Return True for a number, and for a tensor that no parameter has a part in and that is one for all features.

    A factor for each feature has another shape than the features of the layer's inputs, so that the step fails.
    """
    if not isinstance(factor, Tensor):
        return isinstance(factor, int | float)
    return factor.numel() == 1 or (not factor.requires_grad and width > 1)
