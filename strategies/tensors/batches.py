"""Batches of examples, and the forward pass of a model on them.

A batch is what a `DataLoader` yields: `(inputs, targets)`, or `(inputs, targets, mask)` for padded sequences. Inputs
are a tensor, passed as `model(inputs)`, or a mapping, passed as `model(**inputs)`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbasin.strategies.tensors.state import State

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
Batches: TypeAlias = Iterable["Batch | Sequence[Any] | Mapping[str, Any]"]

# Keys of the inputs and of the targets in batches that are dictionaries.
_INPUT_KEYS = {"img", "image", "x", "input", "inputs", "pixel_values", "features"}
_TARGET_KEYS = {"label", "labels", "y", "target", "targets"}


@dataclass(frozen=True)
class Batch:
    """A batch of examples along the first axis.

    Attributes:
        inputs: tensor, or tensors by the model's argument names.
        targets: targets of the task, such as class indices, labels of 0 and 1, or numbers.
        mask: boolean `[batch, tokens]`, true for tokens that count in sums and false for padding. It is not passed to
            the model, which finds its own mask among the inputs if it needs one.
    """

    inputs: Inputs
    targets: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor | Mapping):
            raise TypeError(
                f"inputs of a batch are a {type(self.inputs).__name__}; yield a tensor or a mapping of tensors"
            )
        if not isinstance(self.targets, Tensor):
            raise TypeError(f"targets of a batch are a {type(self.targets).__name__}; yield a tensor")
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.ndim != 2):
            raise ValueError(
                f"mask of a batch is {self.mask.dtype} {list(self.mask.shape)}; "
                "yield torch.bool of shape [batch, tokens], true where a token counts"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name of its own, in the order in which `map` takes them."""
        inputs = {"inputs": self.inputs} if isinstance(self.inputs, Tensor) else self.inputs
        mask = {} if self.mask is None else {"its mask": self.mask}
        return {**{f"of {name}": tensor for name, tensor in inputs.items()}, **mask, "targets": self.targets}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with a function applied to every tensor."""
        inputs = self.inputs
        changed = (
            change(inputs) if isinstance(inputs, Tensor) else {name: change(tensor) for name, tensor in inputs.items()}
        )
        mask = None if self.mask is None else change(self.mask)
        return Batch(changed, change(self.targets), mask)


def read_batches(batches: Batches, model: nn.Module) -> Iterator[Batch]:
    """Yield each batch that has examples, on the device of the model.

    Raises:
        TypeError: the data gives single examples.
        ValueError: no batch has any.
    """
    # A model without parameters and buffers runs where its inputs are, which is taken to be the CPU.
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    examples = 0
    for item in batches:
        batch = item if isinstance(item, Batch) else _batch(item)
        if not batch.targets.ndim:
            raise TypeError("targets have no axis, as of single examples; pass a DataLoader and not the data set")
        # Models and losses differ in what they make of no examples, as a loader that filters may yield.
        if len(batch.targets):
            examples += len(batch.targets)
            yield batch.map(lambda tensor: tensor.to(device))
    if not examples:
        raise ValueError(
            "the data held no examples; pass at least one non-empty batch, and a fresh iterable "
            "(such as a DataLoader or a list) rather than an iterator that was already used"
        )


def _batch(item: Sequence[Any] | Mapping[str, Any]) -> Batch:
    if isinstance(item, Mapping):
        return _from_mapping(item)
    if not isinstance(item, Sequence) or len(item) not in (2, 3):
        size = f" of {len(item)}" if isinstance(item, Sequence) else ""
        raise TypeError(
            f"a batch is a {type(item).__name__}{size}; "
            "yield (inputs, targets), (inputs, targets, mask) or a dictionary"
        )
    return Batch(*item)


def _from_mapping(item: Mapping[str, Any]) -> Batch:
    """Read a dictionary: images and labels as in Flower's quickstart, or tokens as tokenizers batch them."""
    targets = [key for key in item if key in _TARGET_KEYS]
    inputs = [key for key in item if key in _INPUT_KEYS]
    if len(targets) == 1 and "input_ids" in item:
        mask = item.get("attention_mask")
        tokens = {key: tensor for key, tensor in item.items() if key not in targets}
        return Batch(tokens, item[targets[0]], None if mask is None else mask.bool())
    if len(targets) == 1 and len(inputs) == 1:
        return Batch(item[inputs[0]], item[targets[0]])
    raise TypeError(
        f"a batch is a dictionary with the keys {', '.join(map(repr, item))}, among which there are {len(inputs)} inputs "
        f"(of {', '.join(sorted(_INPUT_KEYS))}) and {len(targets)} targets (of {', '.join(sorted(_TARGET_KEYS))}); yield "
        "one of each, or (inputs, targets)"
    )


def without_targets(batches: Batches, model: nn.Module) -> list[Batch]:
    """Return the inputs of batches that may have targets or not, on the device of the model.

    What has no targets gets zeros in their place. An item is a tensor, a sequence whose first part are the inputs, or a
    dictionary: with the keys of a batch, or of the model's arguments.

    Raises:
        TypeError: an item is of another kind.
    """
    return list(read_batches(map(_unlabelled, batches), model))


def _unlabelled(item: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    if isinstance(item, Sequence) and len(item) in (2, 3):
        return _batch(item)
    inputs = item[0] if isinstance(item, Sequence) and len(item) == 1 else item
    mask = None
    if isinstance(inputs, Mapping):
        mask = inputs.get("attention_mask")
        inputs = {key: tensor for key, tensor in inputs.items() if key not in _TARGET_KEYS}
        if len(inputs) == 1 and inputs.keys() <= _INPUT_KEYS:
            (inputs,) = inputs.values()
    if not isinstance(inputs, Tensor | Mapping) or not len(inputs):
        raise TypeError(f"a batch is a {type(item).__name__}; yield a tensor of inputs, or a dictionary of them")
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
    return Batch(inputs, torch.zeros(len(first)), None if mask is None else mask.bool())


def forward(model: nn.Module, batch: Batch, state: State | None = None) -> Tensor:
    """Return the outputs of a model on a batch; of several outputs the first, because the others are auxiliary.

    Args:
        model: model to run.
        batch: examples.
        state: tensors to use in place of the model's; None uses the model's.

    Raises:
        TypeError: the model returned neither a tensor nor one among several outputs.
    """
    inputs = batch.inputs
    # A model in bfloat16, which NumPy lacks, travels in float32 and runs in its own format.
    tensors = dict(chain(model.named_parameters(), model.named_buffers())) if state else {}
    values = {name: t.to(tensors[name].dtype) if name in tensors else t for name, t in (state or {}).items()}
    with _uncompiled():
        # functional_call leaves the model's own tensors untouched, also if the forward pass raises.
        if isinstance(inputs, Tensor):
            output = functional_call(model, values, (inputs,))
        else:
            output = functional_call(model, values, (), dict(inputs))
    primary = _first_output(output)
    if not isinstance(primary, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned a {type(output).__name__}; return a tensor, an object with an attribute "
            "`logits`, a tuple with the tensor first, or a mapping with the tensor as `logits` or `out`"
        )
    return primary


def _uncompiled() -> AbstractContextManager[object]:
    """Run modules that `torch.compile` has compiled as they were written; hooks and states would compile them anew."""
    # Whoever has compiled a module has imported it already; the import takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _first_output(output: Any) -> Any:
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping):
        return output.get("logits", output.get("out"))
    return output[0] if isinstance(output, tuple | list) and output else output


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Set every module to evaluation mode, and restore each module's mode afterwards."""
    return in_mode(model, training=False)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set every module to training or evaluation mode, and restore each module's mode afterwards."""
    # Per module, because apps train with some modules in evaluation mode, as a frozen BatchNorm.
    modes = {module: module.training for module in model.modules()}
    # Training mode first and last: it clears what modules keep in evaluation mode, such as the biases of LeViT's
    # attention, which belong to the state that was run before.
    model.train()
    model.train(training)
    try:
        yield
    finally:
        model.train()
        for module, mode in modes.items():
            module.training = mode
