"""Examples, batch by batch, and how a model is run on them: a client's own, or a server's probe set.

A batch is what a `DataLoader` yields: `(inputs, targets)`, or `(inputs, targets, mask)` where sequences are
padded. Inputs are a tensor, passed as `model(inputs)`, or a mapping, passed as `model(**inputs)`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbasin.strategies.tensors.state import State

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
Batches: TypeAlias = Iterable["Batch | Sequence[Any]"]


@dataclass(frozen=True)
class Batch:
    """Examples along the first axis.

    `mask` is boolean, `[batch, tokens]`, and true where a token counts, false where it is padding. It only
    says what to leave out of sums: a model that needs it too finds it among its inputs.
    """

    inputs: Inputs
    targets: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor | Mapping):
            raise TypeError(
                f"inputs of a batch are a {type(self.inputs).__name__}; "
                "yield a tensor or a mapping of tensors"
            )
        if not isinstance(self.targets, Tensor):
            raise TypeError(
                f"targets of a batch are a {type(self.targets).__name__}; yield a tensor of class indices"
            )
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.ndim != 2):
            raise ValueError(
                f"mask of a batch is {self.mask.dtype} {list(self.mask.shape)}; "
                "yield torch.bool of shape [batch, tokens], true where a token counts"
            )

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed."""
        inputs = self.inputs
        changed = (
            change(inputs)
            if isinstance(inputs, Tensor)
            else {name: change(tensor) for name, tensor in inputs.items()}
        )
        mask = None if self.mask is None else change(self.mask)
        return Batch(changed, change(self.targets), mask)


def read(batches: Batches, model: nn.Module) -> Iterator[Batch]:
    """Each batch, on the device where `model` lives.

    Raises:
        ValueError: There was not a single example.
    """
    place = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    examples = 0
    for item in batches:
        batch = item if isinstance(item, Batch) else _batch(item)
        examples += len(batch.targets)
        yield batch.map(lambda tensor: tensor.to(place))
    if not examples:
        raise ValueError(
            "the data held no examples; pass at least one non-empty batch, and a fresh iterable "
            "(such as a DataLoader or a list) rather than an iterator that was already used"
        )


def _batch(item: Sequence[Any]) -> Batch:
    if not isinstance(item, Sequence) or len(item) not in (2, 3):
        size = f" of {len(item)}" if isinstance(item, Sequence) else ""
        raise TypeError(
            f"a batch is a {type(item).__name__}{size}; "
            "yield (inputs, targets) or (inputs, targets, mask)"
        )
    return Batch(*item)


def forward(model: nn.Module, batch: Batch, state: State | None = None) -> Tensor:
    """The logits of a batch, `[..., classes]`, under the model's own tensors or those of `state`.

    Raises:
        TypeError: The model returned neither logits nor an object with an attribute `logits`.
    """
    values, inputs = dict(state or {}), batch.inputs
    if isinstance(inputs, Tensor):
        output = functional_call(model, values, (inputs,))
    else:
        output = functional_call(model, values, (), dict(inputs))
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned a {type(output).__name__}; "
            "return the logits, or an object with an attribute `logits`"
        )
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each one in the mode that it had."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
