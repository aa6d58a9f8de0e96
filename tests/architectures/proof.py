"""Proof of a discovered symmetry that shares nothing with the project's own `check`.

The parameters are shaken until nothing hides: scales that begin at 1e-6, norms that begin at 1, biases that begin at 0.
Then the real model is executed in float64, with its own tensors and with the tensors that a random element of the
symmetry makes of them.
"""

import copy
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedbasin.strategies.symmetry.coverage import kind_of
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.symmetry.transform import random

# Rounding stays below 1e-11 on every architecture; a tensor that is left behind changes more than 1e-4.
BROKEN = 1e-8

Inputs = Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What discovery gave for one model.

    Attributes:
        model: name of the model.
        coverage: share of the parameters that an element can move, 0 to 1.
        kinds: the same share for each kind of group.
        error: largest relative change of an output under random elements; NaN if nothing was executed.
        seconds: time of the discovery.
        reason: why something does not move, or why the model was refused.
        rounding: largest relative change of an output where parameters are rounded; measured where the error is large.
    """

    model: str
    coverage: float
    kinds: dict[str, float]
    error: float
    seconds: float
    reason: str = ""
    rounding: float = 0

    @property
    def is_broken(self) -> bool:
        """True if an element changed the function, or discovery ended without a clear refusal."""
        return (not self.error < max(BROKEN, self.rounding) and self.coverage > 0) or self.reason.startswith("raised")

    def row(self) -> str:
        """The verdict as a row of a Markdown table."""
        kinds = ", ".join(f"{kind} {share:.2f}" for kind, share in self.kinds.items())
        state = "BROKEN" if self.is_broken else "kept"
        cells = (self.model, f"{self.coverage:.3f}", kinds, f"{self.error:.0e}", state, f"{self.seconds:.1f}")
        return "| " + " | ".join((*cells, self.reason[:160].replace("|", "/"))) + " |"


def examine(
    name: str, module: nn.Module, example: Inputs, others: Sequence[Inputs], answers: Callable[[Any], Any]
) -> Verdict:
    """Discover the symmetry of a model and execute the model under random elements of it.

    Args:
        name: name of the model.
        module: the model, in evaluation mode.
        example: what discovery sees.
        others: further inputs, of other shapes perhaps; those on which the model does not run are left out.
        answers: takes the result of the model apart into the tensors that must not change.
    """
    start = time.perf_counter()
    arguments = (example,) if isinstance(example, Mapping) else example
    try:
        with warnings.catch_warnings(action="ignore"):
            discovery = discover(module, *arguments)
    except SymmetryError as error:
        return Verdict(name, 0, {}, float("nan"), time.perf_counter() - start, f"refused: {error}")
    except Exception as error:  # noqa: BLE001 - one fault must not hide the verdicts on other models
        reason = f"raised {type(error).__name__}: {error}"
        return Verdict(name, 0, {}, float("nan"), time.perf_counter() - start, reason)
    seconds = time.perf_counter() - start
    unread = unread_parameters(module, example, answers)
    fraction, kinds = measure_coverage(module, discovery.symmetry, unread)
    error = largest_change(module, discovery.symmetry, [example, *others], answers)
    reasons = [*map(str, discovery.stops[:2]), *([f"{len(unread)} parameters are not read"] if unread else [])]
    rounding = 0.0 if error < BROKEN else rounding_change(module, example, answers)
    return Verdict(name, fraction, kinds, error, seconds, "; ".join(reasons), rounding)


def unread_parameters(module: nn.Module, example: Inputs, answers: Callable[[Any], Any]) -> set[str]:
    """Return the names of parameters on which no answer depends: those to which no gradient comes."""
    twin = copy.deepcopy(module).double().eval()
    sum(tensor.sum() for tensor in _execute(twin, example, answers, gradients=True) if tensor.requires_grad).backward()
    read = {id(parameter) for parameter in twin.parameters() if parameter.grad is not None}
    return {name for name, tensor in twin.named_parameters(remove_duplicate=False) if id(tensor) not in read}


def measure_coverage(
    module: nn.Module, symmetry: Symmetry, unread: Collection[str] = ()
) -> tuple[float, dict[str, float]]:
    """Return the share of the parameters that a symmetry moves, and the share for each kind of group.

    Args:
        module: the model.
        symmetry: its symmetry.
        unread: names of parameters that do not count, because the model does not read them.
    """
    masks: dict[int, Tensor] = {}
    by_kind: dict[str, dict[int, Tensor]] = {}
    parameters = {n: p for n, p in module.named_parameters(remove_duplicate=False) if n not in unread}
    for space in symmetry.spaces:
        for axis in space.axes:
            if (parameter := parameters.get(axis.tensor)) is None:
                continue
            for group in (masks, by_kind.setdefault(kind_of(space.group), {})):
                mask = group.setdefault(id(parameter), torch.zeros(parameter.shape, dtype=torch.bool))
                axis.view(mask).fill_(True)
    total = max(sum({id(parameter): parameter.numel() for parameter in parameters.values()}.values()), 1)

    def share(group: dict[int, Tensor]) -> float:
        return sum(int(mask.sum()) for mask in group.values()) / total

    return share(masks), {kind: share(group) for kind, group in by_kind.items()}


def largest_change(
    module: nn.Module, symmetry: Symmetry, inputs: Sequence[Inputs], answers: Callable[[Any], Any], seeds: int = 2
) -> float:
    """Return the largest relative change of an output under random elements; NaN if outputs are not finite."""
    shaken = copy.deepcopy(module).double().eval()
    shake(shaken)
    worst = 0.0
    runs = [(example, before) for example in inputs if (before := _try(shaken, example, answers)) is not None]
    state = dict(shaken.named_parameters(remove_duplicate=False)) | dict(shaken.named_buffers(remove_duplicate=False))
    state = {name: tensor.detach() for name, tensor in state.items()}
    for seed in range(seeds):
        moved = random(symmetry, torch.Generator().manual_seed(seed)).act(symmetry.fold(state))
        # Training mode clears what some modules compute once in evaluation mode, such as the biases of LeViT's attention.
        transformed = copy.deepcopy(shaken).train().eval()
        _replace(transformed, moved)
        for example, before in runs:
            worst = max(worst, _change(before, _execute(transformed, example, answers)), key=lambda x: (x != x, x))
    return worst if runs else float("nan")


def rounding_change(module: nn.Module, example: Inputs, answers: Callable[[Any], Any]) -> float:
    """Return the relative change of the outputs under noise of 1e-15 on the parameters, which deep models amplify."""
    shaken = copy.deepcopy(module).double().eval()
    shake(shaken)
    before, generator = _execute(shaken, example, answers), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in filter(torch.is_floating_point, shaken.parameters()):
            parameter.mul_(1 + 1e-15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return _change(before, _execute(shaken, example, answers))


def shake(module: nn.Module, seed: int = 7) -> None:
    """Replace all parameters by random ones of order one, and move what a normalisation keeps."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            size = float(parameter.square().mean().sqrt())
            if parameter.dim() > 1 and size < 0.5:
                parameter.copy_(noise(parameter) * max(parameter[0].numel(), 1) ** -0.5)
            elif size < 0.05:
                parameter.copy_(0.5 + 0.3 * noise(parameter))
            else:
                parameter.add_(0.3 * size * noise(parameter))
        for name, buffer in module.named_buffers():
            if "running_mean" in name:
                buffer.add_(0.3 * noise(buffer))
            if "running_var" in name:
                buffer.mul_(torch.exp(0.3 * noise(buffer)))


def _replace(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.copy_(state[name])
    # A name that shares its tensor with another must have been moved in the same way.
    for name, tensor in module.named_parameters(remove_duplicate=False):
        assert torch.allclose(tensor, state[name], atol=1e-12), f"{name} is tied and was moved in two ways"


def _try(module: nn.Module, example: Inputs, answers: Callable[[Any], Any]) -> list[Tensor] | None:
    try:
        return _execute(module, example, answers)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def _execute(
    module: nn.Module, example: Inputs, answers: Callable[[Any], Any], *, gradients: bool = False
) -> list[Tensor]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            torch.set_grad_enabled(gradients),
            torch.random.fork_rng(),
            _Exact(),
            warnings.catch_warnings(action="ignore"),
        ):
            torch.manual_seed(0)
            if isinstance(example, Mapping):
                output = module(**{name: _double(x) for name, x in example.items()})
            else:
                output = module(*[_double(x) for x in example])
    finally:
        torch.set_default_dtype(default)
    return [tensor.double() for tensor in _tensors(answers(output))]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [torch.view_as_real(value) if value.is_complex() else value] if not _is_discrete(value) else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _is_discrete(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    assert len(before) == len(after) > 0
    return max(
        (float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(before, after, strict=True)),
        key=lambda x: (x != x, x),
    )


class _Exact(TorchFunctionMode):
    """Casts to double where a model casts to single precision, which would hide errors below 1e-7."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.to:
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def table(verdicts: Sequence[Verdict]) -> str:
    """Return a Markdown table of verdicts."""
    header = "| model | coverage | by kind | change | function | seconds | what does not move |"
    return "\n".join((header, "|---|---|---|---|---|---|---|", *(verdict.row() for verdict in verdicts)))


def as_record(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as a record for a JSON line."""
    return {**asdict(verdict), "broken": verdict.is_broken}
