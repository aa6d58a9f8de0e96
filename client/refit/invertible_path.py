"""How far a product's output gets through steps that can be undone, and how to get back.

A residual branch ends in `x + f(x)`, a convolution in a normalisation. What later layers read is that sum or
that normalised image, not the product itself; so a product is fitted to what it becomes there, taken back
through the steps of the model that is fitted:

    y + skip        ->  y = value - skip
    s y + t         ->  y = (value - t) / s        a normalisation in evaluation mode
    transpose, view ->  the inverse
    dropout         ->  nothing: it is off
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Undo: TypeAlias = Callable[[Tensor], Tensor]

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

# A channel that a normalisation multiplies with less says nothing of what it was.
_FAINT = 1e-6


@dataclass(eq=False)
class Reach:
    """Where one product's output has got to.

    Attributes:
        value: the output after the steps so far.
        undo: of each step.
        lead: the same of another model, whose value takes the place of this one's where both have ended.
    """

    value: Tensor
    undo: list[Undo] = field(default_factory=list)
    lead: "Reach | None" = None

    def back(self, value: Tensor) -> Tensor:
        """What the product would have to give for `value` to be reached."""
        for undo in reversed(self.undo):
            value = undo(value)
        return value

    def led(self) -> Tensor | None:
        """What takes the place of the value here, if anything does."""
        ended = self.lead is not None and len(self.undo) == len(self.lead.undo)
        return self.lead.value if self.lead and ended else None


class Reaches(TorchFunctionMode):
    """While active, follows outputs through what can be undone, each to its first reader that can not."""

    def __init__(self) -> None:
        super().__init__()
        # The tensors are held, so that no other can get their address.
        self._ends: defaultdict[int, list[tuple[Tensor, Reach]]] = defaultdict(list)

    def follow(self, output: Tensor, lead: Reach | None = None) -> Reach:
        """Begin with a product's output.

        Args:
            output: what the product gave; it is written over where the lead ends here.
            lead: where the same product of another model has got to. Whatever reads the end of this reach is
                given the end of that one.
        """
        with torch._C.DisableTorchFunction():
            reach = Reach(output.clone(), lead=lead)
            _take_lead(reach, output)
        self._ends[id(output)].append((output, reach))
        return reach

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        read = [(tensor, self._ends.get(id(tensor), [])) for tensor in _tensors(args, named)]
        steps = [(_undo(func, tensor, args, named), ends) for tensor, ends in read if ends]
        output = func(*args, **named)
        if steps and any(isinstance(part, Tensor) for part in _flat(output)):
            for tensor, _ in read:
                self._ends.pop(id(tensor), None)
            self._advance(steps, output)
        return output

    def _advance(self, steps: list[tuple[Undo | None, list[Any]]], output: Any) -> None:
        for undo, ends in steps:
            if undo is not None:
                value = output.clone()
                for _, reach in ends:
                    reach.value = value
                    reach.undo.append(undo)
                    self._ends[id(output)].append((output, reach))
                    _take_lead(reach, output)


def _take_lead(reach: Reach, output: Tensor) -> None:
    value = reach.led()
    if value is not None:
        output.copy_(value)


def _tensors(args: tuple[Any, ...], named: Mapping[str, Any]) -> list[Tensor]:
    unique = {id(part): part for part in _flat([*args, *named.values()])}
    return [part for part in unique.values() if isinstance(part, Tensor)]


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    else:
        yield values


def _undo(
    func: Callable[..., Any], tensor: Tensor, args: tuple[Any, ...], named: Mapping[str, Any]
) -> Undo | None:
    """How to get back over one step, or None where there is no way."""
    if func in _SUMS and not named and len(args) == 2:
        return _undo_sum(tensor, *args)
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
        return _undo_normalisation(*args, **named)
    return None


def _undo_sum(tensor: Tensor, left: Any, right: Any) -> Undo | None:
    other = right if left is tensor else left
    if other is tensor:
        return None
    if not isinstance(other, Tensor):
        return lambda value: value - other
    if torch.broadcast_shapes(other.shape, tensor.shape) != tensor.shape:
        return None
    skip = other.clone()
    return lambda value: value - skip


def _undo_normalisation(
    images: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Undo | None:
    del momentum
    if training or mean is None or variance is None:
        return None
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (images.dim() - 2))
    scale, shift, before = scale.reshape(shape), shift.reshape(shape), images.clone()

    def undo(value: Tensor) -> Tensor:
        faint = scale.abs() < _FAINT
        return torch.where(faint, before, (value - shift) / scale.masked_fill(faint, 1.0))

    return undo
