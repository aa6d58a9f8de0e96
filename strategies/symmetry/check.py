"""Proof by execution: random elements of a symmetry must not change the function of the model.

    f(theta, x) == f(g . theta, x)        for random g and x, in float64 and in float32

If the symmetry folds norms, g acts on the folded parameters, whose function must be the same too. Random noise is added
to the parameters first: equal units, such as the scales of a fresh normalisation layer, would hide a missing axis.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbasin.strategies.symmetry.example_inputs import Example, positional_inputs, redraw
from fedbasin.strategies.symmetry.float64_execution import true_double
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.groups.groups import Group
from fedbasin.strategies.symmetry.outputs import answers
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.symmetry.translation import random as random_translation
from fedbasin.strategies.symmetry.translation import translate
from fedbasin.strategies.tensors.batches import evaluating
from fedbasin.strategies.tensors.state import State

Arguments: TypeAlias = tuple[Tensor | None, ...]

# Far above rounding (at most 2e-14 and 5e-6 on all families), far below the effect of any axis that is missing.
DOUBLE_TOLERANCE = 1e-10
SINGLE_TOLERANCE = 1e-4

# Noise on the parameters, as a fraction of the root mean square of a tensor.
_NOISE = 0.3

# Draws until an element is not the identity; a group whose elements are all the identity gives up after these.
_DRAWS = 20


@dataclass(frozen=True)
class CheckTrial:
    """The relative change of the outputs under one random transform, in both precisions."""

    double_error: float
    single_error: float

    @property
    def passed(self) -> bool:
        """True if both errors are rounding; False for NaN."""
        return self.double_error < DOUBLE_TOLERANCE and self.single_error < SINGLE_TOLERANCE


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        trials: errors of each random transform.
        guilty: names of the spaces and shifts that change the function when they act alone; empty unless a trial
            failed.
    """

    trials: tuple[CheckTrial, ...]
    guilty: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True if no trial changed the function."""
        return all(trial.passed for trial in self.trials)


def check(model: nn.Module, symmetry: Symmetry, *inputs: Example | None, trials: int = 3, seed: int = 0) -> CheckReport:
    """Compare the model with randomly transformed copies of itself, in eval mode.

    Neither the model nor the global random state is changed.

    Args:
        model: the model; random parameters of the same scale take the place of its own.
        symmetry: the symmetry that is checked.
        inputs: example arguments, or one mapping of them by name; floating inputs are replaced by random ones of the
            same shape, others are kept.
        trials: number of random transforms.
        seed: seed of transforms, inputs and parameters.

    Raises:
        SymmetryError: an axis or an input does not fit the model, or the model returns no floating tensor.
    """
    # Shapes first: an axis that does not fit would fail far from its cause.
    symmetry.check(_tensors_of(model))
    with torch.random.fork_rng(), evaluating(model), torch.no_grad():
        seeds = range(seed, seed + trials)
        arguments = positional_inputs(model, *inputs)
        results = tuple(_trial(model, symmetry, arguments, s) for s in seeds)
        suspects = () if all(trial.passed for trial in results) else _parts(symmetry)
        guilty = tuple(
            name for name, part in suspects if not all(_trial(model, part, arguments, s).passed for s in seeds)
        )
    return CheckReport(results, guilty)


def prove(model: nn.Module, symmetry: Symmetry, *inputs: Example | None) -> Symmetry:
    """Return the symmetry unchanged if `check` passes, and refuse it otherwise.

    Args:
        model: the model, as in `check`.
        symmetry: a symmetry that was traced, derived from a config, or written by hand.
        inputs: example arguments of the model, as in `check`.

    Raises:
        SymmetryError: the function changes; the message names the guilty spaces and shifts.
    """
    report = check(model, symmetry, *inputs)
    if report.passed:
        return symmetry
    worst = max(trial.double_error for trial in report.trials)
    # Each space may pass alone while all fail together.
    guilty = "; ".join(report.guilty) or "all spaces together"
    raise SymmetryError(
        f"{type(model).__name__} becomes another function (off by {worst:.1e} in float64) under: {guilty}; "
        "leave these out, or correct their axes"
    )


def _parts(symmetry: Symmetry) -> Iterator[tuple[str, Symmetry]]:
    """Yield every space and every shift as a symmetry of its own, with its name."""
    # Folds stay in every part, because a space may need them.
    for space in symmetry.spaces:
        yield space.name, replace(symmetry, spaces=(space,), shifts=())
    for shift in symmetry.shifts:
        yield str(shift), replace(symmetry, spaces=(), shifts=(shift,))


def _trial(model: nn.Module, symmetry: Symmetry, inputs: Arguments, seed: int) -> CheckTrial:
    generator = torch.Generator().manual_seed(seed)
    state = _perturb(model, generator)
    random_inputs = redraw(inputs, generator)
    transform = random_transform(symmetry, generator)
    translation = random_translation(symmetry.shifts, state, generator)

    def move(original: State) -> State:
        return translate(translation, transform.act(symmetry.fold(original)))

    # float64 tells rounding from a wrong symmetry; float32 tells whether the maps are well-conditioned enough to train.
    return CheckTrial(
        _error(model, move, state, random_inputs, torch.float64),
        _error(model, move, state, random_inputs, torch.float32),
    )


def random_transform(symmetry: Symmetry, generator: torch.Generator) -> Transform:
    """Draw a transform without identity elements, which would prove nothing about their spaces."""
    elements = {}
    for space in symmetry.spaces:
        draws = (space.group.random(generator) for _ in range(_DRAWS))
        elements[space.name] = next((e for e in draws if _moves(space.group, e)), space.group.identity())
    return Transform(symmetry, elements)


def _moves(group: Group, element: Element) -> bool:
    """Return whether an element changes something, and the order of the blocks if the group may."""
    reorders = group.permutes_blocks and group.count > 1
    return not element.is_in_place if reorders else not element.is_identity


def _error(
    model: nn.Module, move: Callable[[State], State], state: State, inputs: Arguments, dtype: torch.dtype
) -> float:
    # Published models compute parts in float32, which would hide every smaller error.
    with true_double() if dtype == torch.float64 else nullcontext():
        return _relative_change(model, move, state, inputs, dtype)


def _relative_change(
    model: nn.Module, move: Callable[[State], State], state: State, inputs: Arguments, dtype: torch.dtype
) -> float:
    original = {name: _cast(tensor, dtype) for name, tensor in state.items()}
    arguments = tuple(None if tensor is None else _cast(tensor, dtype) for tensor in inputs)
    expected = _outputs(model, original, arguments)
    actual = _outputs(model, move(original), arguments)
    scale = _largest(expected)
    worst = _largest([a - b for a, b in zip(expected, actual, strict=True)])
    # An output of zeros has no relative error.
    return worst / scale if scale > 0 else worst


def _largest(tensors: list[Tensor]) -> float:
    # The maximum is torch's, which is NaN if any entry is; Python's would drop a NaN.
    return float(torch.stack([tensor.abs().max().cpu() for tensor in tensors]).max())


def _outputs(model: nn.Module, state: State, inputs: Arguments) -> list[Tensor]:
    # A model that draws noise then draws the same noise every time.
    torch.manual_seed(0)
    # Copies, because a forward pass may write to buffers. Names are not tied, because each may be transformed alone.
    copies = {name: tensor.clone() for name, tensor in state.items()}
    kind = type(model).__name__
    try:
        output = functional_call(model, copies, inputs, tie_weights=False)
    except Exception as error:  # the model's own code may raise anything
        dtypes = {str(tensor.dtype) for tensor in inputs if tensor is not None}
        raise SymmetryError(
            f"{kind} does not run on inputs of {', '.join(dtypes)} with parameters to match: {error}; "
            "pass an example as its forward method takes it, and make tensors that it creates follow the dtype of its "
            "input"
        ) from error
    outputs = answers(output)
    if not outputs:
        raise SymmetryError(
            f"{kind} returned no floating tensor, so its function cannot be compared; "
            "wrap it so that it returns its logits"
        )
    return outputs


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under all their names, including buffers that are not saved."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return dict([*parameters, *buffers])


def _perturb(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the tensors of a model with noise added; tensors that share memory stay equal."""
    perturbed: dict[tuple[object, ...], Tensor] = {}
    result = {}
    for name, tensor in _tensors_of(model).items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if key not in perturbed:
            perturbed[key] = _add_noise(tensor, generator) if tensor.is_floating_point() else tensor
        result[name] = perturbed[key]
    return result


def _add_noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    if not isinstance(tensor, nn.Parameter):
        # A buffer may be a variance, which must stay positive.
        return torch.where(tensor == 0, _NOISE * noise.abs(), tensor * torch.exp(_NOISE * noise))
    scale = float(tensor.double().square().mean().sqrt())
    return tensor + _NOISE * noise * (scale or 1.0)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
