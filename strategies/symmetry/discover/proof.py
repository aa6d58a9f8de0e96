"""Proof by execution, on one copy of a model in float64 whose parameters are shaken.

Discovery tries many groups, so the copy, its outputs and its memory are kept between trials: a trial writes the
tensors that change into the copy, runs it, and writes the old tensors back.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.check import DOUBLE_TOLERANCE, random_transform
from fedbasin.strategies.symmetry.discover.follow import decomposed
from fedbasin.strategies.symmetry.float64_execution import TrueDouble
from fedbasin.strategies.symmetry.outputs import answers
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.symmetry.translation import random as random_translation
from fedbasin.strategies.tensors.batches import in_mode
from fedbasin.strategies.tensors.state import State

# Noise on the parameters, as a fraction of the root mean square of a tensor.
_NOISE = 0.3

# Rounding of a parameter, relative to its size, that a proof must not notice.
_ROUNDING = 1e-15

# Largest error that counts as rounding where a model amplifies it, and in multiples of what rounded parameters change.
_LOOSEST, _AMPLIFIED = 1e-8, 20

# Numbers that are drawn for a large tensor: a prime, which no length of a row divides.
_DRAWN = 1_048_583

# Entries beyond this are masks, not numbers of the model.
_MASKED = 1e30


@contextmanager
def double_twin(model: nn.Module) -> Iterator[nn.Module]:
    """Give a model in float64 whose parameters are shaken, all of them to a size that has an effect.

    It is a copy, or the model itself if its forward method was replaced by a function: a copy would run on the tensors
    of the model. In that case the model has its own tensors again afterwards.

    Raises:
        SymmetryError: the model cannot be copied.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(isinstance(vars(module).get("forward"), FunctionType) for module in model.modules()):
        saved = [tensor.data for tensor in tensors]
        experts = _choose_experts(model, "batched_mm")
        try:
            for tensor in tensors:
                tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data.clone()
            _shake_all(model)
            yield model
        finally:
            for tensor, data in zip(tensors, saved, strict=True):
                tensor.data = data
            if experts is not None:
                _choose_experts(model, experts)
        return
    twin = _copy(model)
    _shake_all(twin)
    yield twin


def _copy(model: nn.Module) -> nn.Module:
    try:
        # Weights that a hook computes are no leaves, which deepcopy refuses; the hook computes them again.
        computed = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor))
        twin = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed if not t.is_leaf})
        # On the CPU, because some accelerators have no float64.
        twin = twin.cpu().double()
    except Exception as error:  # a model may hold anything
        raise SymmetryError(f"{type(model).__name__} cannot be copied: {error}") from error
    _choose_experts(twin, "batched_mm")
    return twin


def _choose_experts(model: nn.Module, name: str) -> str | None:
    """Choose how a model of the transformers library multiplies its experts, and return how it did.

    Grouped products exist for narrow types alone, and loops over experts visit those that the data choose.
    """
    implementation = None
    for module in model.modules():
        choose: Any = getattr(module, "set_experts_implementation", None)
        if choose is not None:
            implementation = implementation or getattr(module.config, "_experts_implementation", None)
            choose(name)
    return implementation


def _shake_all(twin: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point() and parameter.numel():
                _shake(parameter, generator)
        for buffer in twin.buffers():
            if buffer.is_floating_point() and buffer.numel() and not bool(buffer.isinf().any()):
                # A buffer may be a variance, which must stay positive.
                noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64).to(buffer.device)
                buffer.copy_(torch.where(buffer == 0, _NOISE * noise.abs(), buffer * torch.exp(_NOISE * noise)))


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Draw normal numbers, of which a large tensor has the same again and again: its rows still differ."""
    drawn = torch.randn(min(tensor.numel(), _DRAWN), generator=generator, dtype=torch.float64)
    return drawn.repeat(-(-tensor.numel() // _DRAWN))[: tensor.numel()].view(tensor.shape).to(tensor.device)


def _shake(parameter: Tensor, generator: torch.Generator) -> None:
    noise = _noise(parameter, generator)
    size = float(parameter.square().mean().sqrt())
    # Small scales, such as those of fresh branches, are lifted: what has no effect would hide what it multiplies.
    inputs = parameter[0].numel() if parameter.dim() > 1 else 1
    least = 1.0 if parameter.dim() <= 1 or inputs == 1 else inputs**-0.5
    if parameter.dim() <= 1:
        # Scales and biases below 0 would silence units, of which the outputs then tell nothing.
        noise = noise.abs()
    parameter.add_(noise * max(_NOISE * size, least if size < least / 3 else 0.0))


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
        self.trials = 0

    def keeps(self, symmetry: Symmetry, seeds: Sequence[int] = (0,), *, training: bool = False) -> bool:
        """Return whether random elements of a symmetry keep the function of the model, up to its rounding."""
        for seed in seeds:
            error = self.error(symmetry, seed, training=training)
            # Deep convolutional models may amplify rounding beyond the tolerance; what is wrong changes far more.
            if not error < DOUBLE_TOLERANCE and not (
                error < _LOOSEST and error < _AMPLIFIED * self._rounding(seed, training=training)
            ):
                return False
        return True

    def repeats(self, *, training: bool) -> bool:
        """Return whether runs are comparable.

        Two of them are equal unless the model draws numbers that torch does not know, and rounding of the parameters
        does not grow beyond the tolerance, as it may where a batch of two is normalised again and again.
        """
        try:
            equal = self.error(Symmetry(()), 1, training=training) == 0
            return equal and self._rounding(1, training=training) < DOUBLE_TOLERANCE
        except Exception:  # noqa: BLE001 - the model's own code may raise anything
            return False

    def _rounding(self, seed: int, *, training: bool) -> float:
        """Return the relative change of the outputs if the parameters are rounded."""
        if (seed, training) not in self._roundings:
            generator = torch.Generator().manual_seed(0)
            rounded = {
                alias: tensor * (1 + _ROUNDING * _noise(tensor, generator)) if tensor.is_floating_point() else tensor
                for name, tensor in self._tensors.items()
                for alias in self.names[name][-1:]
            }
            expected, actual = self._expected(seed, training=training), self._run_on(rounded, seed, training=training)
            self._roundings[seed, training] = _distance(expected, actual)
        return self._roundings[seed, training]

    def reached(self) -> set[str]:
        """Return the first names of the tensors that change an output, as far as gradients show it."""
        parameters = {
            name: tensor for name, tensor in self.model.state_dict(keep_vars=True).items() if name in self.names
        }
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(None if tensor is None else _redraw(tensor, generator) for tensor in self.inputs)
        try:
            with in_mode(self.model, training=False), decomposed(), TrueDouble(), torch.enable_grad():
                results = [tensor for tensor in answers(self.model(*inputs)) if tensor.requires_grad]
                total = torch.stack([_sensitive(tensor) for tensor in results]).sum()
                learnt = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
                gradients = torch.autograd.grad(total, list(learnt.values()), allow_unused=True)
        except Exception:  # noqa: BLE001 - the model's own code may raise anything, or have no gradients
            return set(parameters)
        return {
            name
            for name, gradient in zip(learnt, gradients, strict=True)
            if gradient is not None and bool(gradient.any())
        }

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
            self._expected(1, training=False)
        except Exception:  # noqa: BLE001 - the model's own code may raise anything
            return False
        return True

    def error(self, symmetry: Symmetry, seed: int, *, training: bool = False) -> float:
        """Return the relative change of the outputs under one random element."""
        self.trials += 1
        expected = self._expected(seed, training=training)
        generator = torch.Generator().manual_seed(seed + 1)
        state = {alias: tensor for name, tensor in self._tensors.items() for alias in self.names[name]}
        changed = random_transform(symmetry, generator).act(state)
        changed = random_translation(symmetry.shifts, changed, generator).act(changed)
        try:
            return _distance(expected, self._run_on(changed, seed, training=training))
        except (RuntimeError, IndexError, ValueError):
            return float("inf")

    def _run_on(self, changed: State, seed: int, *, training: bool) -> list[Tensor]:
        """Run the model on other tensors, and give it its own again."""
        stored = self.model.state_dict(keep_vars=True)
        moved = [name for name, tensor in self._tensors.items() if changed[self.names[name][-1]] is not tensor]
        try:
            for name in moved:
                stored[name].data = changed[self.names[name][-1]]
            return self._run(seed, training=training)
        finally:
            # Asked for again, because a model may have put other buffers in the place of these.
            stored = self.model.state_dict(keep_vars=True)
            for name in moved:
                stored[name].data = self._tensors[name]

    def _expected(self, seed: int, *, training: bool) -> list[Tensor]:
        key = (seed, training)
        if key not in self._answers:
            self._answers[key] = self._run(seed, training=training)
        return self._answers[key]

    def _run(self, seed: int, *, training: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inputs = tuple(None if tensor is None else _redraw(tensor, generator) for tensor in self.inputs)
        buffers = [buffer.clone() for buffer in self.model.buffers()] if training else []
        with in_mode(self.model, training=training), decomposed(), _WithoutDropout():
            results = [tensor.clone() for tensor in answers(self.model(*inputs))]
        for buffer, saved in zip(self.model.buffers(), buffers, strict=False):
            buffer.copy_(saved)
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


Trial = Callable[[Symmetry], bool]


def _sensitive(tensor: Tensor) -> Tensor:
    """Return a number that depends on every entry of an output but masks."""
    return torch.where(tensor.abs() < _MASKED, tensor, 0).cos().sum()


def _redraw(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)


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
