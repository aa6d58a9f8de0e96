"""Follow the features of a model through the operators that one forward pass executes.

A dispatch mode sees every ATen operator with its tensors, after torch has decomposed what it can: attention into
products and a softmax, recurrent layers into their gates, `einsum` into batched products. Each value gets the units
along each of its axes. An operator without a rule, such as a norm, is followed through the operators of which torch
composes it; what has neither is fixed, which is always correct.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table

from fedbasin.strategies.symmetry.discover.signs import Signs
from fedbasin.strategies.symmetry.discover.uniter import Uniter
from fedbasin.strategies.symmetry.discover.units import Axis, Units, fixed, fresh, leaves
from fedbasin.strategies.symmetry.float64_execution import TrueDouble
from fedbasin.strategies.symmetry.symmetry import SymmetryError
from fedbasin.strategies.tensors.state import MEASURED

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)

# What fixes the units that a model returns.
OUTPUT = "output"

# Operators that create tensors of equal entries.
_ZEROS = ("empty", "empty_like", "empty_strided", "new_empty", "new_zeros", "zeros", "zeros_like")
_CREATIONS = (*_ZEROS, "full", "full_like", "new_full", "new_ones", "ones", "ones_like")

# Buffers that are measured while a model trains, and therefore move with the units that they describe.
STATISTICS = (*MEASURED, "._u", "._v", "weight_u", "weight_v")

# Operators whose result on equal entries depends on the places of the entries.
_ORDERED = ("argsort", "cumprod", "cumsum", "nonzero", "sort", "topk", "tril", "triu", "constant_pad_nd")

# Operators whose result leaves the tensors.
_DECISIONS = ("_local_scalar_dense", "equal", "is_nonzero")

# Operators by which dropout draws and applies its mask.
_DROPOUT = {"bernoulli_", "div_", "empty_like", "mul", "native_dropout"}

# Operators after which squares are squares, or sums of squares.
_KEEPS_SQUARES = {
    *("_to_copy", "_unsafe_view", "alias", "clone", "detach", "expand", "mean", "mul_scalar", "permute", "slice"),
    *("sum", "t", "transpose", "unsqueeze", "view"),
}


@dataclass(eq=False)
class Value:
    """Knowledge of a tensor that depends on parameters.

    Attributes:
        axes: the units along each axis.
        charge: number of the value in the equations of signs.
        uniform: "zero" or "equal" if all entries are the same, "noise" if they are drawn at random.
        indexes: the units that the entries number, if they are indices.
        square: True if the entries are squares, which may be summed over rotated units.
        unused: units that are fixed as soon as an operator reads the value, with the reason.
    """

    axes: list[list[Units]]
    charge: int
    uniform: Literal["", "zero", "equal", "noise"] = ""
    indexes: Units | None = None
    square: bool = False
    unused: list[tuple[list[Units], tuple[str, str]]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Call:
    """One execution of an operator.

    Attributes:
        name: name of the operator without overload and without the underscore of operators in place.
        args: its positional arguments.
        kwargs: its named arguments.
        out: its result.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def arg(self, place: int, default: Any = None) -> Any:
        """Return a positional argument."""
        return self.args[place] if place < len(self.args) else default

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, or of the first of several."""
        out = self.out if isinstance(self.out, Tensor) else self.out[0]
        return tuple(out.shape)


@dataclass(eq=False)
class Record:
    """Knowledge of a model after it was followed.

    Attributes:
        signs: the equations between signs.
        parameters: values of the tensors that the model read, by the first of their names.
        unread: names of the tensors that it did not read.
        batched: numbers of values that are multiplied matrix by matrix, or read entry by entry.
        decides: True if the model chose operations by numbers that depend on parameters.
        operators: names of the operators that ran in training mode, by True, and in evaluation, by False.
    """

    signs: Signs = field(default_factory=Signs)
    parameters: dict[str, Value] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    batched: set[int] = field(default_factory=set)
    decides: bool = False
    operators: dict[bool, set[str]] = field(default_factory=dict)

    @property
    def trains_apart(self) -> bool:
        """True if training runs other operators than evaluation, besides dropout."""
        training = self.operators.get(True, set())
        return "native_batch_norm" in training or bool(training - self.operators[False] - _DROPOUT)


class Walk(TrueDouble):
    """The dispatch mode that follows a model while it runs."""

    def __init__(self, model: nn.Module, record: Record, names: dict[int, str], rules: "Mapping[str, Rule]") -> None:
        super().__init__()
        self.record = record
        self.signs = record.signs
        self.names = names
        self.rules = rules
        self.operation = ""
        self.operators: set[str] = set()
        self.uniter = Uniter(self.fix)
        self.driven: set[int] = set()
        self.literals: set[int] = set()
        self._values: dict[int, Value] = {}
        self._keep: list[Tensor] = []
        self._tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and follow its features."""
        name = func._schema.name.removeprefix("aten::")
        self.operation = name
        self.operators.add(name)
        kwargs = kwargs or {}
        has_rule = name.removesuffix("_") in self.rules or name in _CREATIONS
        if not has_rule and any(self.value(tensor) is not None for tensor in tensors_in((args, kwargs))):
            composed = self._composed(func, args, kwargs)
            if composed is not NotImplemented and name.endswith("_"):
                return composed
            if composed is not NotImplemented:
                return self._noted_as(composed, super().__torch_dispatch__(func, types, args, kwargs))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        call = Call(name.removesuffix("_"), args, kwargs, out)
        if call.name in _CREATIONS:
            self._create(call)
            return out
        if call.name == "lift_fresh":
            self.literals.add(id(out))
            self._keep.append(out)
        tensors = list(tensors_in((args, call.kwargs)))
        if any(id(tensor) in self.driven for tensor in tensors):
            self.drive(tensors_in((out,)))
        operands = [value for tensor in tensors if (value := self.value(tensor)) is not None]
        for value in operands:
            for axis, reason in value.unused:
                self.fix(axis, reason)
        if not operands and call.name in _DECISIONS:
            self._follow(call)
        if all(value.uniform for value in operands):
            self._follow_constants(call, tensors, operands, in_place=func._schema.is_mutable)
            return out
        if call.name not in _KEEPS_SQUARES:
            self._bend_squares(operands)
        self._annotate(call, self._follow(call), in_place=func._schema.is_mutable)
        return out

    def _composed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operators of which torch composes an operator, and follow these; NotImplemented if there are none."""
        try:
            with self:
                return decomposition_table.get(func, func.decompose)(*args, **kwargs)
        except SymmetryError:
            raise
        except Exception:  # noqa: BLE001 - a composition may not know an overload, or not be made for such a tensor
            return NotImplemented

    def _noted_as(self, composed: Any, out: Any) -> Any:
        """Note of an operator's own results, whose memory may be laid out differently, what its composition shows."""
        for tensor, twin in zip(tensors_in((out,)), tensors_in((composed,)), strict=False):
            if (value := self.value(twin)) is not None:
                self.note(tensor, value)
            if id(twin) in self.driven:
                self.drive([tensor])
        return out

    # Values

    def value(self, tensor: object) -> Value | None:
        """Return what is known of a tensor, or None if it is a constant or an input."""
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) in self._values:
            return self._values[id(tensor)]
        name = self.names.get(id(tensor))
        if name is None or tensor is not self._tensors.get(id(tensor)):
            return None
        self.record.unread.discard(name)
        value = self.record.parameters.get(name)
        if value is None:
            if not (isinstance(tensor, nn.Parameter) or name.endswith(STATISTICS)) or not tensor.is_floating_point():
                return None
            layer = name.rpartition(".")[0] or name
            value = Value([fresh(n, layer) for n in tensor.shape], self.signs.new())
            self.record.parameters[name] = value
        return value

    def knowledge(self, tensor: Tensor) -> Value:
        """Return what is known of a tensor, of which nothing varies if it is a constant."""
        return self.value(tensor) or self.new(self.axes(tensor))

    def axes(self, tensor: Tensor) -> list[list[Units]]:
        """Return the units along each axis of a tensor; those of constants and inputs keep their places."""
        value = self.value(tensor)
        if value is not None:
            return value.axes
        # Along an axis that is expanded a constant is the same for all units.
        return [fresh(n) if step == 0 else fixed(n) for n, step in zip(tensor.shape, tensor.stride(), strict=True)]

    def charge(self, tensor: Tensor) -> int:
        """Return the number of a value in the equations of signs; constants have a number of their own."""
        value = self.value(tensor)
        return self.signs.new() if value is None else value.charge

    def new(self, axes: list[list[Units]], charge: int | None = None, **known: Any) -> Value:
        """Return a new value."""
        return Value(axes, self.signs.new() if charge is None else charge, **known)

    def unsigned(self, axes: list[list[Units]], **known: Any) -> Value:
        """Return a new value that keeps its sign."""
        value = self.new(axes, **known)
        self.even(axes, value.charge)
        return value

    def drive(self, tensors: Iterable[Tensor | None]) -> None:
        """Note that tensors depend on numbers among the inputs, by which a model must not decide."""
        for tensor in tensors:
            if tensor is not None and (tensor.is_floating_point() or tensor.dtype == torch.bool):
                self.driven.add(id(tensor))
                self._keep.append(tensor)

    def _create(self, call: Call) -> None:
        kind: Any = "zero" if call.name in _ZEROS else "equal"
        like = self.value(call.args[0]) if call.args else None
        axes = [fresh(n) for n in call.shape] if like is None or not call.name.endswith("_like") else like.axes
        self.note(call.out, self.new(axes, uniform=kind))

    def _follow(self, call: Call) -> Any:
        try:
            return self.rules.get(call.name, stop)(self, call)
        except SymmetryError:
            raise
        except Exception:  # noqa: BLE001 - an overload that a rule does not know has other arguments
            return stop(self, call)

    def _follow_constants(self, call: Call, tensors: list[Tensor], operands: list[Value], *, in_place: bool) -> None:
        """Follow an operator on tensors of equal entries and on constants."""
        if operands and len(operands) == len(tensors) and call.name in self.rules and call.name not in _ORDERED:
            result = self._follow(call)
            kinds = {value.uniform for value in operands}
            kind: Any = "noise" if "noise" in kinds else "zero" if kinds == {"zero"} else "equal"
            for value in result if isinstance(result, list) else [result]:
                if value is not None and not value.uniform:
                    value.uniform = kind if call.name in _KEEPS_SQUARES else "noise" if kind == "noise" else "equal"
            self._annotate(call, result, in_place=False)
        elif operands and in_place:
            self._forget(call.args[0])

    def _forget(self, tensor: Tensor) -> None:
        """Note that a tensor of equal entries, and all that share its memory, became constants."""
        storage = tensor.untyped_storage().data_ptr()
        for alias in self._keep:
            if alias.untyped_storage().data_ptr() == storage:
                self._values.pop(id(alias), None)

    def _annotate(self, call: Call, result: Any, *, in_place: bool) -> None:
        outs = list(tensors_in((call.out,)))
        results = list(result) if isinstance(result, list | tuple) else [result] * (len(outs) > 0)
        for out, value in zip(outs, results, strict=False):
            if value is None:
                continue
            earlier = self._values.get(id(out))
            if in_place and earlier is not None and earlier is not value:
                self._write(out, earlier, value)
            self.note(out, value)
        for out in outs[len(results) :]:
            self.note(out, self.new([fixed(n) for n in out.shape]))

    def _write(self, tensor: Tensor, before: Value, after: Value) -> None:
        """Note that a tensor changes in place, and with it all tensors that share its memory."""
        for old, new in zip(before.axes, after.axes, strict=True):
            self.uniter.unite(old, new)
        self.signs.add(after.axes, before.charge, after.charge)
        storage = tensor.untyped_storage().data_ptr()
        for alias in self._keep:
            if alias.untyped_storage().data_ptr() == storage and id(alias) in self._values:
                self._values[id(alias)].uniform = ""

    def note(self, tensor: Tensor, value: Value) -> None:
        """Note what is known of a tensor."""
        self._values[id(tensor)] = value
        # Kept alive, so that no later tensor has the same identity.
        self._keep.append(tensor)

    def is_literal(self, tensor: Tensor) -> bool:
        """Return whether the model's source gives the numbers of a tensor."""
        return id(tensor) in self.literals

    def is_stored(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter or a buffer of the model."""
        return self._tensors.get(id(tensor)) is tensor

    # Constraints

    def fix(self, axis: Axis, reason: tuple[str, str] | None = None) -> None:
        """Keep units in their places, by the operation that is being followed unless another reason is given."""
        for leaf in list(leaves(axis)):
            if not leaf.fixed:
                leaf.fixed = True
                leaf.reason = (self.operation, source_line()) if reason is None else reason

    def bend(self, axes: Iterable[Axis]) -> None:
        """Note that entries along the axes are scaled or curved one by one."""
        for axis in axes:
            for leaf in leaves(axis):
                leaf.bent = True

    def average(self, axes: Iterable[Axis]) -> None:
        """Note that the mean along the axes is taken."""
        for axis in axes:
            for leaf in leaves(axis):
                leaf.averaged = True

    def even(self, axes: Iterable[Axis], charge: int) -> None:
        """Require that a value keeps its sign."""
        self.signs.add(axes, charge)

    def source(self) -> str:
        """Return the line of the model that runs the present operator."""
        return source_line()

    def _bend_squares(self, operands: Sequence[Value]) -> None:
        for value in operands:
            if value.square:
                self.bend(value.axes)


Rule = Callable[[Walk, Call], Any]


def of_value(rule: Callable[[Walk, Call, Value], Any]) -> Rule:
    """Return the rule of an operator whose result is a constant where its first argument is one."""

    def follow(walk: Walk, call: Call) -> Any:
        value = walk.value(call.args[0])
        return None if value is None else rule(walk, call, value)

    return follow


def stop(walk: Walk, call: Call) -> list[Value]:
    """Fix all that an operation without a rule reads."""
    for tensor in tensors_in((call.args, call.kwargs)):
        value = walk.value(tensor)
        if value is not None:
            for axis in value.axes:
                walk.fix(axis)
            if value.indexes is not None:
                walk.fix([value.indexes])
    return [walk.new([fixed(n) for n in out.shape]) for out in tensors_in((call.out,))]


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments and in lists of them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from tensors_in(argument)
        elif isinstance(argument, dict):
            yield from tensors_in(argument.values())


def source_line() -> str:
    """Return file and line of the innermost call that is neither torch's nor this package's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE, "<")) and "/site-packages/transformers/utils/" not in file:
            return f"{Path(file).name}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return ""
