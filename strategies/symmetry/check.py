"""Proof by execution: a symmetry's random elements must leave the model's function as it was.

    f(theta, x) == f(g . theta, x)        for random g and x, in float64 and in float32

Where the symmetry folds norms, g acts on the folded parameters, which must have the same function too. The
parameters are shaken first: units that are still equal, as the scales of a fresh normalisation layer are, would
hide an axis that was left behind.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.symmetry.translation import random as random_translation
from fedbasin.strategies.tensors.state import State

DOUBLE_TOLERANCE = 1e-10
SINGLE_TOLERANCE = 1e-4

_SHAKE = 0.3
_DRAWS = 20


@dataclass(frozen=True)
class Trial:
    """One random transform: the relative change of the outputs in both precisions."""

    double_error: float
    single_error: float

    @property
    def passed(self) -> bool:
        """Whether both errors are rounding; not a number is not."""
        return self.double_error < DOUBLE_TOLERANCE and self.single_error < SINGLE_TOLERANCE


@dataclass(frozen=True)
class CheckReport:
    """What the trials found.

    Attributes:
        trials: the errors, trial by trial.
        guilty: the spaces and shifts that change the function when they act alone; searched only after a failure.
    """

    trials: tuple[Trial, ...]
    guilty: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the function was left as it was in every trial."""
        return all(trial.passed for trial in self.trials)


def check(
    model: nn.Module, symmetry: Symmetry, *inputs: Tensor, trials: int = 3, seed: int = 0
) -> CheckReport:
    """Compare the model with randomly transformed copies of itself, in eval mode.

    The model is left untouched, and so is the global random state.

    Args:
        model: the model; its parameters give the scales, not the values.
        symmetry: what should leave its function unchanged.
        inputs: an example; floating inputs are drawn anew with the same shapes, others are kept.
        trials: how many random transforms.
        seed: for transforms, inputs and parameters.

    Raises:
        SymmetryError: an axis does not fit the model, or the model returns no floating tensor.
    """
    symmetry.check(_tensors_of(model))
    with torch.random.fork_rng(), in_mode(model, training=False), torch.no_grad():
        seeds = range(seed, seed + trials)
        found = tuple(_trial(model, symmetry, inputs, each) for each in seeds)
        suspects = () if all(trial.passed for trial in found) else _parts(symmetry)
        guilty = tuple(
            name
            for name, part in suspects
            if not all(_trial(model, part, inputs, each).passed for each in seeds)
        )
    return CheckReport(found, guilty)


def prove(model: nn.Module, symmetry: Symmetry, *inputs: Tensor) -> Symmetry:
    """The symmetry, if `check` finds that it leaves the model's function as it is.

    Args:
        model: see `check`.
        symmetry: traced, read from a config, or written by hand.
        inputs: an example.

    Raises:
        SymmetryError: naming the spaces and shifts that change the function.
    """
    report = check(model, symmetry, *inputs)
    if report.passed:
        return symmetry
    worst = max(trial.double_error for trial in report.trials)
    # Spaces may pass alone and fail together.
    guilty = "; ".join(report.guilty) or "all spaces together"
    raise SymmetryError(
        f"{type(model).__name__} becomes another function (off by {worst:.1e} in float64) under: {guilty}; "
        "leave these out, or write them as the architecture has them"
    )


def _parts(symmetry: Symmetry) -> Iterator[tuple[str, Symmetry]]:
    """Every space and every shift alone, by name."""
    for space in symmetry.spaces:
        yield space.name, replace(symmetry, spaces=(space,), shifts=())
    for shift in symmetry.shifts:
        yield str(shift), replace(symmetry, spaces=(), shifts=(shift,))


def _trial(model: nn.Module, symmetry: Symmetry, inputs: tuple[Tensor, ...], seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    state = _shaken(model, generator)
    drawn = tuple(_redrawn(tensor, generator) for tensor in inputs)
    transform = _moving(symmetry, generator)
    translation = random_translation(symmetry.shifts, state, generator)

    def move(original: State) -> State:
        return translation.act(transform.act(symmetry.fold(original)))

    return Trial(
        _error(model, move, state, drawn, torch.float64),
        _error(model, move, state, drawn, torch.float32),
    )


def _moving(symmetry: Symmetry, generator: torch.Generator) -> Transform:
    """A random transform; a draw that leaves a space in place would prove nothing about it."""
    elements = {}
    for space in symmetry.spaces:
        draws = (space.group.random(generator) for _ in range(_DRAWS))
        elements[space.name] = next((e for e in draws if not e.is_identity), space.group.identity())
    return Transform(symmetry, elements)


def _error(
    model: nn.Module,
    move: Callable[[State], State],
    state: State,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> float:
    original = {name: _cast(tensor, dtype) for name, tensor in state.items()}
    arguments = tuple(_cast(tensor, dtype) for tensor in inputs)
    before = _outputs(model, original, arguments)
    after = _outputs(model, move(original), arguments)
    scale = _largest(before)
    worst = _largest([a - b for a, b in zip(before, after, strict=True)])
    return worst / scale if scale > 0 else worst


def _largest(tensors: list[Tensor]) -> float:
    # torch's maximum is not a number if any entry is; Python's is not.
    return float(torch.stack([tensor.abs().max().cpu() for tensor in tensors]).max())


def _outputs(model: nn.Module, state: State, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    # A model that draws noise draws the same noise every time.
    torch.manual_seed(0)
    # Buffers may be written to in the forward pass; tied names are given one by one.
    copies = {name: tensor.clone() for name, tensor in state.items()}
    kind = type(model).__name__
    try:
        output = functional_call(model, copies, inputs, tie_weights=False)
    except RuntimeError as error:
        dtypes = {str(tensor.dtype) for tensor in inputs}
        raise SymmetryError(
            f"{kind} does not run on inputs of {', '.join(dtypes)} with parameters to match: {error}; "
            "let what it makes itself follow the dtype of its input"
        ) from error
    outputs = list(_tensors(output))
    if not outputs:
        raise SymmetryError(
            f"{kind} returned no floating tensor, so its function cannot be compared; "
            "wrap it so that it returns its logits"
        )
    return outputs


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names, those that are not saved included."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return dict([*parameters, *buffers])


def _shaken(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Generic values of the same size; tensors that share memory stay equal."""
    seen: dict[tuple[object, ...], Tensor] = {}
    result = {}
    for name, tensor in _tensors_of(model).items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if key not in seen:
            seen[key] = _shake(tensor, generator) if tensor.is_floating_point() else tensor
        result[name] = seen[key]
    return result


def _shake(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    if not isinstance(tensor, nn.Parameter):
        # A variance must stay positive.
        return torch.where(tensor == 0, _SHAKE * noise.abs(), tensor * torch.exp(_SHAKE * noise))
    scale = float(tensor.double().square().mean().sqrt())
    return tensor + _SHAKE * noise * (scale or 1.0)


def _redrawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation mode, and every module back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
