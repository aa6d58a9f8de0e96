"""Run a copy of a model once in each mode and follow its features."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedbasin.strategies.symmetry.discover.operators import elementwise, indexing, products, rearrangement
from fedbasin.strategies.symmetry.discover.walk import OUTPUT, Record, Walk
from fedbasin.strategies.symmetry.float64_execution import double_by_default
from fedbasin.strategies.symmetry.outputs import answers
from fedbasin.strategies.symmetry.symmetry import SymmetryError
from fedbasin.strategies.tensors.batches import in_mode

_RULES = {**elementwise.RULES, **rearrangement.RULES, **products.RULES, **indexing.RULES}


def follow(model: nn.Module, inputs: tuple[Tensor | None, ...], names: Mapping[int, str]) -> Record:
    """Follow a model in evaluation and in training mode.

    Args:
        model: a copy of the model in float64.
        inputs: arguments of its forward method.
        names: the first name of every tensor of its state, by the identity of the tensor.

    Raises:
        SymmetryError: the model does not run on the inputs, or decides by data.
    """
    record = Record(unread=set(names.values()))
    _run(model, inputs, names, record, training=False)
    try:
        _run(model, inputs, names, record, training=True)
    except SymmetryError:
        # A batch of one, for example, has no statistics to train by; what evaluation needs is known.
        record.operators.pop(True, None)
    return record


def _run(
    model: nn.Module, inputs: tuple[Tensor | None, ...], names: Mapping[int, str], record: Record, *, training: bool
) -> None:
    walk = Walk(model, record, dict(names), _RULES)
    walk.drive(tensor for tensor in inputs if tensor is not None and tensor.is_floating_point())
    with executing(model, training=training), walk:
        try:
            output = model(*inputs)
        except SymmetryError:
            raise
        except Exception as error:  # the model's own code may raise anything
            shapes = ", ".join(str(None if tensor is None else tuple(tensor.shape)) for tensor in inputs)
            raise SymmetryError(
                f"{type(model).__name__} does not run on example inputs of shape {shapes} in float64: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error
    record.operators[training] = walk.operators
    walk.operation = ""
    for answer in answers(output):
        value = walk.value(answer)
        if value is not None:
            for axis in [*value.axes, *(axis for axis, _ in value.unused)]:
                walk.fix(axis, (OUTPUT, ""))
            if value.square:
                walk.bend(value.axes)
            walk.even(value.axes, value.charge)


@contextmanager
def executing(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run a model in a mode, with attention by products, without gradients, and with double tensors.

    Running statistics that training changes are given back: with those of a single batch a deep model may amplify
    rounding until no proof can tell it from an error.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    saved = [buffer.clone() for buffer in model.buffers()] if training else []
    with (
        in_mode(model, training=training),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        double_by_default(),
    ):
        torch.manual_seed(0)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for buffer, values in zip(model.buffers(), saved, strict=False):
                buffer.copy_(values)
