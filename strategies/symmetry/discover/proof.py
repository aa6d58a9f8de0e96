"""Proof by execution, on one copy of a model in float64 whose parameters are shaken.

Discovery tries many groups, so the copy, its outputs and its memory are kept between trials: a trial writes the
tensors that change into the copy, runs it, and writes the old tensors back.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.check import DOUBLE_TOLERANCE, random_transform
from fedbasin.strategies.symmetry.discover.follow import executing
from fedbasin.strategies.symmetry.discover.twin import aliases, as_in, double_twin, draw_noise
from fedbasin.strategies.symmetry.example_inputs import Example, positional_inputs, redraw
from fedbasin.strategies.symmetry.float64_execution import TrueDouble
from fedbasin.strategies.symmetry.outputs import answers
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.symmetry.translation import random as random_translation
from fedbasin.strategies.symmetry.translation import translate
from fedbasin.strategies.tensors.state import State

# Rounding of a parameter, relative to its size, that a proof must not notice.
_ROUNDING = 1e-15

# Largest error that counts as rounding where a model amplifies it, and in multiples of what rounded parameters change.
_LOOSEST, _AMPLIFIED = 1e-8, 20

# From this error on a symmetry is wrong however much a model amplifies rounding, which need not be measured.
_WRONG = 1e-3

# Draws of inputs, because a model may amplify rounding too much on some of them to decide.
_DRAWS = 4

# Entries beyond this are masks, not numbers of the model.
_MASKED = 1e30


@contextmanager
def proving(model: nn.Module, *example: Example | None) -> Iterator["Prover"]:
    """Give a prover on a shaken copy of a model.

    Raises:
        SymmetryError: the example does not fit the model, or the model cannot be copied.
    """
    inputs = positional_inputs(model, *example)
    # Of the model itself: tensors of a copy in another type no longer overlap.
    names = aliases(model)
    with double_twin(model) as twin:
        yield Prover(twin, tuple(None if tensor is None else as_in(twin, tensor) for tensor in inputs), names)


@dataclass(eq=False)
class Prover:
    """A model on which symmetries are tried.

    Attributes:
        model: a copy of the model in float64, in evaluation mode.
        inputs: arguments of its forward method.
        names: the names of each tensor of its state, by the first of them.
    """

    model: nn.Module
    inputs: tuple[Tensor | None, ...]
    names: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        tensors = self.model.state_dict(keep_vars=True)
        self._tensors: dict[str, Tensor] = {name: tensors[name].detach() for name in self.names}
        self._answers: dict[tuple[int, bool], list[Tensor]] = {}
        self._roundings: dict[tuple[int, bool], float] = {}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the copy by the first of its names."""
        return self._tensors[name]

    def keeps(self, symmetry: Symmetry, seeds: Sequence[int] = (0,), *, training: bool = False) -> bool:
        """Return whether random elements of a symmetry keep the function of the model, up to its rounding."""
        return all(self._keeps_at(symmetry, seed, training=training) for seed in seeds)

    def _keeps_at(self, symmetry: Symmetry, seed: int, *, training: bool) -> bool:
        for draw in range(_DRAWS):
            error = self.error(symmetry, seed, draw, training=training)
            if error < DOUBLE_TOLERANCE:
                return True
            # Deep convolutional models may amplify rounding beyond the tolerance; what is wrong changes far more.
            if not error < _WRONG or not error < _AMPLIFIED * self._rounding(draw, training=training):
                return False
            if error < _LOOSEST:
                return True
            # Inputs on which rounding alone changes this much decide nothing, so others are drawn.
        return False

    def keeps_enlarged(self, symmetry: Symmetry) -> bool:
        """Return whether a symmetry keeps the function with other elements on a batch twice as long too."""
        return self.keeps(symmetry) and (self.enlarged() or self).keeps(symmetry, (1,))

    def repeats(self, *, training: bool) -> bool:
        """Return whether runs are comparable.

        Two of them are equal unless the model draws numbers that torch does not know, and rounding of the parameters
        does not grow beyond the tolerance, as it may where a batch of two is normalised again and again.
        """
        try:
            equal = self.error(Symmetry(()), 0, training=training) == 0
            return equal and self._rounding(0, training=training) < DOUBLE_TOLERANCE
        except Exception:  # noqa: BLE001 - the model's own code may raise anything
            return False

    def _rounding(self, draw: int, *, training: bool) -> float:
        """Return the relative change of the outputs if the parameters are rounded."""
        if (draw, training) not in self._roundings:
            generator = torch.Generator().manual_seed(0)
            rounded = {
                self.names[name][-1]: torch.addcmul(tensor, tensor, draw_noise(tensor, generator), value=_ROUNDING)
                if tensor.is_floating_point()
                else tensor
                for name, tensor in self._tensors.items()
            }
            expected, actual = self._expected(draw, training=training), self._run_on(rounded, draw, training=training)
            self._roundings[draw, training] = _distance(expected, actual)
        return self._roundings[draw, training]

    def reached(self) -> set[str]:
        """Return the first names of the tensors that change an output, as far as gradients show it."""
        try:
            gradients = self.gradients(0)
        except Exception:  # noqa: BLE001 - the model's own code may raise anything, or have no gradients
            return set(self.names)
        return {name for name, gradient in gradients.items() if bool(gradient.any())}

    def gradients(self, seed: int) -> dict[str, Tensor]:
        """Return the gradients of a random function of the outputs, by the first names of the tensors that have any."""
        generator = torch.Generator().manual_seed(seed)
        inputs = redraw(self.inputs, generator)
        parameters = self.model.state_dict(keep_vars=True)
        learnt = {name: parameters[name] for name in self.names if parameters[name].requires_grad}
        with executing(self.model, training=False), TrueDouble(), torch.enable_grad():
            results = [tensor for tensor in answers(self.model(*inputs)) if tensor.requires_grad]
            total = torch.stack([_sensitive(tensor, generator) for tensor in results]).sum()
            gradients = torch.autograd.grad(total, list(learnt.values()), allow_unused=True)
        return {name: gradient for name, gradient in zip(learnt, gradients, strict=True) if gradient is not None}

    def enlarged(self) -> "Prover | None":
        """Return a prover on a batch twice as long, if all inputs have a batch of one length."""
        tensors = [tensor for tensor in self.inputs if tensor is not None]
        if not all(tensor.dim() and len(tensor) == len(tensors[0]) for tensor in tensors):
            return None
        doubled = tuple(None if tensor is None else torch.cat([tensor, tensor.flip(0)]) for tensor in self.inputs)
        prover = Prover(self.model, doubled, self.names)
        return prover if prover.runs() else None

    def runs(self) -> bool:
        """Return whether the model runs on the inputs."""
        try:
            self._expected(0, training=False)
        except Exception:  # noqa: BLE001 - the model's own code may raise anything
            return False
        return True

    def error(self, symmetry: Symmetry, seed: int, draw: int = 0, *, training: bool = False) -> float:
        """Return the relative change of the outputs on one draw of the inputs under one random element."""
        expected = self._expected(draw, training=training)
        generator = torch.Generator().manual_seed(seed + 1)
        state = {alias: tensor for name, tensor in self._tensors.items() for alias in self.names[name]}
        try:
            changed = random_transform(symmetry, generator).act(symmetry.fold(state))
            changed = translate(random_translation(symmetry.shifts, changed, generator), changed)
            return _distance(expected, self._run_on(changed, draw, training=training))
        except (RuntimeError, IndexError, ValueError):
            return float("inf")

    def _run_on(self, changed: State, draw: int, *, training: bool) -> list[Tensor]:
        """Run the model on other tensors, and give it its own again."""
        stored = self.model.state_dict(keep_vars=True)
        moved = [name for name, tensor in self._tensors.items() if changed[self.names[name][-1]] is not tensor]
        try:
            for name in moved:
                stored[name].data = changed[self.names[name][-1]]
            return self._run(draw, training=training)
        finally:
            # Asked for again, because a model may have put other buffers in the place of these.
            stored = self.model.state_dict(keep_vars=True)
            for name in moved:
                stored[name].data = self._tensors[name]

    def _expected(self, draw: int, *, training: bool) -> list[Tensor]:
        key = (draw, training)
        if key not in self._answers:
            self._answers[key] = self._run(draw, training=training)
        return self._answers[key]

    def _run(self, draw: int, *, training: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(draw)
        inputs = redraw(self.inputs, generator)
        with executing(self.model, training=training), _WithoutDropout():
            results = [tensor.clone() for tensor in answers(self.model(*inputs))]
        if not results:
            raise SymmetryError(
                f"{type(self.model).__name__} returned no floating tensor, so its function cannot be compared; wrap it "
                "so that it returns its logits"
            )
        return results


class _WithoutDropout(TrueDouble):
    """A mode in which dropout keeps every entry, so that two runs in training mode can be compared."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and draw ones in place of masks."""
        name = func._schema.name
        if name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        return out.fill_(1) if name == "aten::bernoulli_" else out


def _sensitive(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random number that depends on every entry of an output but masks."""
    phase = draw_noise(tensor, generator)
    return (torch.where(tensor.abs() < _MASKED, tensor, 0) + phase).cos().sum()


def _distance(expected: list[Tensor], actual: list[Tensor]) -> float:
    if len(expected) != len(actual) or any(a.shape != b.shape for a, b in zip(expected, actual, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        numbers = (a.abs() < _MASKED) | a.isnan()
        if not torch.equal(numbers, (b.abs() < _MASKED) | b.isnan()):
            return float("inf")
        if not numbers.any():
            continue
        scale = float(a[numbers].abs().max())
        change = float((a - b)[numbers].abs().max())
        ratio = change / scale if scale > 0 else change
        if not ratio <= worst:
            worst = ratio
    return worst
