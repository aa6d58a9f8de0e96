"""Evaluation of a model on some data with the tensors of a state in place of its own.

    L = sum over examples of the cross entropy        p(y | x) of every example

The model gives the architecture: it runs in evaluation mode and is left as it was.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read_batches
from fedbasin.strategies.tensors.state import State

IGNORED = -100  # the target that PyTorch's cross entropy leaves out


class Score(NamedTuple):
    """Sums over examples: cross entropy in nats, number classified correctly, number of examples."""

    loss: float
    correct: float
    examples: float


def evaluate(model: nn.Module, state: State, batches: Batches) -> Score:
    """Evaluate the model on some data with the tensors of `state` in place of its own.

    The model runs in evaluation mode and is left as it was. In sequence labelling every token is an example if the mask
    keeps it and its target is not -100.

    Raises:
        ValueError: there is no data, the state does not fit the model, or the targets do not fit the logits.
    """
    bound = bind(model, state)
    with evaluating(model), torch.no_grad():
        sums = [_score_batch(forward(model, batch, bound), batch) for batch in read_batches(batches, model)]
    # Added on the device and transferred once: reading every batch's loss would wait for the device each time.
    return Score(*torch.stack(sums).sum(0).tolist())


def predict(
    model: nn.Module, state: State, batches: Batches
) -> tuple[Float[Tensor, "examples classes"], Int[Tensor, " examples"]]:
    """Return the class probabilities and the targets of all examples that `evaluate` counts.

    Raises:
        ValueError: there is no data, the state does not fit the model, or the targets do not fit the logits.
    """
    bound = bind(model, state)
    with evaluating(model), torch.no_grad():
        parts = [select_labelled(forward(model, batch, bound), batch) for batch in read_batches(batches, model)]
    logits, targets = zip(*parts, strict=True)
    return torch.cat(logits).softmax(-1), torch.cat(targets)


def _score_batch(logits: Tensor, batch: Batch) -> Float[Tensor, " 3"]:
    """Return loss, correct and examples of one batch, in float64 and on the batch's device."""
    predictions, targets = select_labelled(logits, batch)
    losses = cross_entropy(predictions, targets, reduction="none").double()
    hits = (predictions.argmax(-1) == targets).double()
    return torch.stack([losses.sum(), hits.sum(), torch.ones_like(hits).sum()])


def select_labelled(logits: Tensor, batch: Batch) -> tuple[Float[Tensor, "examples classes"], Int[Tensor, " examples"]]:
    """Select the logits that have a target, and their targets.

    Raises:
        ValueError: the targets do not fit the logits.
    """
    targets, mask = batch.targets, batch.mask
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {list(logits.shape)} for targets {list(targets.shape)}; "
            "give class indices of the logits' shape without its last axis"
        )
    selection = targets != IGNORED
    # With one target for a whole sequence the mask speaks of the inputs.
    if mask is not None and targets.ndim > 1:
        selection &= mask
    # In half precision the rounding of one example's loss is larger than a barrier's resolution.
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits[selection].to(wide), targets[selection]


def bind(model: nn.Module, state: State) -> dict[str, Tensor]:
    """Check a state against a model, and return each tied tensor once, under the model's first name for it.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    tensors = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    if unknown := sorted(state.keys() - tensors.keys()):
        raise ValueError(f"the model has no tensor {unknown[0]!r}; pass a state of this model")
    first_names: dict[int, str] = {}
    bound: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # `functional_call` refuses two values for one tied tensor.
        target = first_names.setdefault(id(tensor), name)
        if name not in state:
            continue
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"tensor {name!r} is {list(tensor.shape)} in the model and {list(state[name].shape)} in the state; "
                "pass a state of this model"
            )
        bound[target] = state[name]
    if missing := sorted(set(first_names.values()) - bound.keys()):
        raise ValueError(f"the state has no tensor {missing[0]!r}; pass all tensors of the model")
    return bound
