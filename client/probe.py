"""Probing the basin: a model's loss on the client's data, at one state and along a path of states.

    L(t) = sum over examples of the cross entropy of the model (1 - t) anchor + t end

Source: linear mode connectivity, Frankle et al. 2020, arXiv 1912.05671. BatchNorm's running statistics are
interpolated like every other tensor and not measured again at each point, so a network that has them shows a
higher barrier than it would after recalibration (Jordan et al. 2023, arXiv 2211.08403).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedbasin.client.data import Batch, Batches, evaluating, forward, read
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.state import State, interpolate

IGNORED = -100  # the target that PyTorch's cross entropy leaves out


class Score(NamedTuple):
    """Sums over examples: cross entropy in nats, number classified correctly, number of examples."""

    loss: float
    correct: float
    examples: float


def evaluate(model: nn.Module, state: State, batches: Batches) -> Score:
    """How the model does on the client's data with the tensors of `state` in place of its own.

    The model runs in evaluation mode and is left as it was. In sequence labelling each token that counts is
    an example: one that the mask keeps and whose target is not -100.

    Raises:
        ValueError: There is no data, the state does not fit the model, or the targets do not fit the logits.
    """
    bound = _bind(model, state)
    with evaluating(model), torch.no_grad():
        sums = [_score(forward(model, batch, bound), batch) for batch in read(batches, model)]
    return Score(*torch.stack(sums).sum(0).tolist())


def path_losses(model: nn.Module, anchor: State, end: State, batches: Batches, points: int) -> Path:
    """Scores at `points` equally spaced points of the straight line from `anchor` to `end`.

    Tensors that are not floating, such as BatchNorm's counters, are those of `end`. The data is read once
    for each point.

    Raises:
        ValueError: Fewer than two points, or data that is not the same each time it is read; see also `evaluate`.
        TypeError: The batches can be read only once.
    """
    if points < 2:
        raise ValueError(f"a path of {points} points; ask for at least the two ends")
    if isinstance(batches, Iterator):
        raise TypeError(
            "the batches of a path are read once for each point; pass a list or a DataLoader, not an iterator"
        )
    first, last = _bind(model, anchor), _bind(model, end)
    grid = tuple(i / (points - 1) for i in range(points))
    scores = [evaluate(model, interpolate(first, last, t), batches) for t in grid]
    loss, correct, examples = zip(*scores, strict=True)
    if len(set(examples)) > 1:
        raise ValueError(
            f"the data held {examples} examples at the points of one path; "
            "pass batches that are the same each time they are read"
        )
    return Path(grid, loss, correct, examples[0])


def _score(logits: Tensor, batch: Batch) -> Float[Tensor, " 3"]:
    """Loss, correct and examples of one batch, in float64 and still on its device."""
    predictions, targets = _counted(logits, batch)
    losses = cross_entropy(predictions, targets, reduction="none").double()
    hits = (predictions.argmax(-1) == targets).double()
    return torch.stack([losses.sum(), hits.sum(), torch.ones_like(hits).sum()])


def _counted(
    logits: Tensor, batch: Batch
) -> tuple[Float[Tensor, "examples classes"], Int[Tensor, " examples"]]:
    """The predictions that count, and their targets."""
    targets, mask = batch.targets, batch.mask
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {list(logits.shape)} for targets {list(targets.shape)}; "
            "give class indices of the logits' shape without its last axis"
        )
    counted = targets != IGNORED
    if mask is not None and targets.ndim > 1:
        counted &= mask
    # Half precision would round the loss of one example by more than its share in a barrier.
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits[counted].to(wide), targets[counted]


def _bind(model: nn.Module, state: State) -> dict[str, Tensor]:
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
