"""The path of a layer's output through invertible operations, and the way back.

A residual branch ends in `x + f(x)`, a convolution in a normalisation. Later layers read that sum or that normalised
image, not the output of the layer itself. So a layer is fitted to the value at the end of the path, taken back through
the operations of the model that is fitted:

    y + skip        ->  y = value - skip
    s y + t         ->  y = (value - t) / s        a normalisation in evaluation mode
    transpose, view ->  the inverse
    dropout         ->  the value itself: dropout is off
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Inverse: TypeAlias = Callable[[Tensor], Tensor]

# Functions are listed one by one: an unlisted one ends the path, which is always right, only shorter.
_SUMS = {torch.add, Tensor.add, Tensor.add_}
_SAME = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, Tensor.contiguous, Tensor.clone}
_TRANSPOSED = {torch.transpose, Tensor.transpose, Tensor.swapaxes}
_RESHAPED = {
    torch.flatten,
    torch.reshape,
    torch.unflatten,
    Tensor.flatten,
    Tensor.reshape,
    Tensor.squeeze,
    Tensor.unflatten,
    Tensor.unsqueeze,
    Tensor.view,
}

# A normalisation that multiplies a channel by less than this has erased it: dividing would amplify rounding.
_FAINT = 1e-6


@dataclass(eq=False)
class InvertiblePath:
    """The invertible operations that one layer's output has passed through.

    Attributes:
        value: the output after the operations so far.
        inverses: inverse of each operation.
        lead: path of the same call in another model; its value replaces this one's where both paths end.
    """

    value: Tensor
    inverses: list[Inverse] = field(default_factory=list)
    lead: "InvertiblePath | None" = None

    def invert(self, value: Tensor) -> Tensor:
        """Return the layer's output that would give `value` at the end of the path."""
        for inverse in reversed(self.inverses):
            value = inverse(value)
        return value

    def replacement(self) -> Tensor | None:
        """Return the lead's value if the lead is as long as this path by now, otherwise None."""
        if self.lead is None or len(self.inverses) != len(self.lead.inverses):
            return None
        return self.lead.value


class InvertiblePaths(TorchFunctionMode):
    """A mode that follows outputs through invertible operations, each to the first operation that is not invertible."""

    def __init__(self) -> None:
        super().__init__()
        # Holds the tensors too: an address is unique only while its tensor lives.
        self._ends: defaultdict[int, list[tuple[Tensor, InvertiblePath]]] = defaultdict(list)

    def follow(self, output: Tensor, lead: InvertiblePath | None = None) -> InvertiblePath:
        """Start a path at a layer's output.

        Args:
            output: output of the layer; it is overwritten where the lead ends here.
            lead: finished path of the same call in another model. The operation that reads the end of the new path
                receives the end of the lead.
        """
        with torch._C.DisableTorchFunction():
            path = InvertiblePath(output.clone(), lead=lead)
            _overwrite(output, path)
        self._ends[id(output)].append((output, path))
        return path

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        inputs = [(tensor, self._ends.get(id(tensor), [])) for tensor in _tensors(args, named)]
        # Inverses are built before the call, which may write over its inputs.
        steps = [(_inverse(func, tensor, args, named), ends) for tensor, ends in inputs if ends]
        output = func(*args, **named)
        if steps and any(isinstance(part, Tensor) for part in _flatten(output)):
            for tensor, _ in inputs:
                self._ends.pop(id(tensor), None)
            self._advance(steps, output)
        return output

    def _advance(self, steps: list[tuple[Inverse | None, list[Any]]], output: Any) -> None:
        for inverse, ends in steps:
            if inverse is not None:
                value = output.clone()
                for _, path in ends:
                    path.value = value
                    path.inverses.append(inverse)
                    self._ends[id(output)].append((output, path))
                    _overwrite(output, path)


def _overwrite(output: Tensor, path: InvertiblePath) -> None:
    """Write the lead's value over an output where the lead ends."""
    value = path.replacement()
    if value is not None:
        output.copy_(value)


def _tensors(args: tuple[Any, ...], named: Mapping[str, Any]) -> list[Tensor]:
    unique = {id(part): part for part in _flatten([*args, *named.values()])}
    return [part for part in unique.values() if isinstance(part, Tensor)]


def _flatten(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flatten(value)
    else:
        yield values


def _inverse(
    func: Callable[..., Any], tensor: Tensor, args: tuple[Any, ...], named: Mapping[str, Any]
) -> Inverse | None:
    """Return the inverse of one operation for one of its inputs, or None where it is not invertible."""
    if func in _SUMS and not named and len(args) == 2:
        return _inverse_of_sum(tensor, *args)
    if not args or args[0] is not tensor:
        return None
    if func in _SAME:
        return lambda value: value
    if func in _TRANSPOSED:
        axes = args[1:]
        return lambda value: func(value, *axes, **named)
    if func in _RESHAPED:
        shape = tensor.shape
        return lambda value: value.reshape(shape)
    if func is F.batch_norm:
        return _inverse_of_normalisation(*args, **named)
    return None


def _inverse_of_sum(tensor: Tensor, left: Any, right: Any) -> Inverse | None:
    addend = right if left is tensor else left
    if addend is tensor:
        return None
    if not isinstance(addend, Tensor):
        return lambda value: value - addend
    # A sum that enlarges the output has no single inverse.
    if torch.broadcast_shapes(addend.shape, tensor.shape) != tensor.shape:
        return None
    # The model may write over the other summand later.
    skip = addend.clone()
    return lambda value: value - skip


def _inverse_of_normalisation(
    images: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Inverse | None:
    del momentum
    # In training mode the statistics are those of the batch, which change with the value.
    if training or mean is None or variance is None:
        return None
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (images.dim() - 2))
    scale, shift, original = scale.reshape(shape), shift.reshape(shape), images.clone()

    def invert(value: Tensor) -> Tensor:
        faint = scale.abs() < _FAINT
        return torch.where(faint, original, (value - shift) / scale.masked_fill(faint, 1.0))

    return invert
