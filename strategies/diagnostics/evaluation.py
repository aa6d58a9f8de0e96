"""How a model does on some data with the tensors of a state in place of its own.

    L = sum over examples of the cross entropy        p(y | x) of every example

The model lends its architecture: it runs in evaluation mode and is left as it was.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read
from fedbasin.strategies.tensors.state import State

IGNORED = -100  # the target that PyTorch's cross entropy leaves out


class Score(NamedTuple):
    """Sums over examples: cross entropy in nats, number classified correctly, number of examples."""

    loss: float
    correct: float
    examples: float


def evaluate(model: nn.Module, state: State, batches: Batches) -> Score:
    """How the model does on some data with the tensors of `state` in place of its own.

    The model runs in evaluation mode and is left as it was. In sequence labelling each token that counts is
    an example: one that the mask keeps and whose target is not -100.

    Raises:
        ValueError: There is no data, the state does not fit the model, or the targets do not fit the logits.
    """
    bound = bind(model, state)
    with evaluating(model), torch.no_grad():
        sums = [_score(forward(model, batch, bound), batch) for batch in read(batches, model)]
    return Score(*torch.stack(sums).sum(0).tolist())


def predict(
    model: nn.Module, state: State, batches: Batches
) -> tuple[Float[Tensor, "examples classes"], Int[Tensor, " examples"]]:
    """The probabilities of every example that `evaluate` counts, and its target.

    Raises:
        ValueError: as `evaluate`.
    """
    bound = bind(model, state)
    with evaluating(model), torch.no_grad():
        parts = [counted(forward(model, batch, bound), batch) for batch in read(batches, model)]
    logits, targets = zip(*parts, strict=True)
    return torch.cat(logits).softmax(-1), torch.cat(targets)


def _score(logits: Tensor, batch: Batch) -> Float[Tensor, " 3"]:
    """Loss, correct and examples of one batch, in float64 and still on its device."""
    predictions, targets = counted(logits, batch)
    losses = cross_entropy(predictions, targets, reduction="none").double()
    hits = (predictions.argmax(-1) == targets).double()
    return torch.stack([losses.sum(), hits.sum(), torch.ones_like(hits).sum()])


def counted(
    logits: Tensor, batch: Batch
) -> tuple[Float[Tensor, "examples classes"], Int[Tensor, " examples"]]:
    """The predictions that count, and their targets.

    Raises:
        ValueError: the targets do not fit the logits.
    """
    targets, mask = batch.targets, batch.mask
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {list(logits.shape)} for targets {list(targets.shape)}; "
            "give class indices of the logits' shape without its last axis"
        )
    kept = targets != IGNORED
    if mask is not None and targets.ndim > 1:
        kept &= mask
    # Half precision would round the loss of one example by more than its share in a barrier.
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits[kept].to(wide), targets[kept]


def bind(model: nn.Module, state: State) -> dict[str, Tensor]:
    """The tensors of `state`, tied ones once, under the first name that the model has for each.

    Raises:
        ValueError: A tensor is missing, unknown or of another shape.
    """
    own = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    if unknown := sorted(state.keys() - own.keys()):
        raise ValueError(f"the model has no tensor {unknown[0]!r}; pass a state of this model")
    first: dict[int, str] = {}
    bound: dict[str, Tensor] = {}
    for name, tensor in own.items():
        target = first.setdefault(id(tensor), name)
        if name in state:
            bound[target] = _fitting(name, state[name], tensor)
    if missing := sorted(set(first.values()) - bound.keys()):
        raise ValueError(f"the state has no tensor {missing[0]!r}; pass all tensors of the model")
    return bound


def _fitting(name: str, given: Tensor, own: Tensor) -> Tensor:
    if given.shape != own.shape:
        raise ValueError(
            f"tensor {name!r} is {list(own.shape)} in the model and {list(given.shape)} in the state; "
            "pass a state of this model"
        )
    return given
