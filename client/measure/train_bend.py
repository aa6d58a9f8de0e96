"""Bending a path between two models until its loss is low, on the client's data.

    minimise over the bend   E_t [ L(curve(t)) ],   t uniform in [0, 1]

Source: Garipov et al. 2018, arXiv 1802.10026. The model runs in evaluation mode throughout: no dropout, and
BatchNorm's running statistics are those of the curve, not measured again at each point, so a network that has them
shows a higher loss than it would after recalibration.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from fedbasin.strategies.diagnostics.barrier import Path, along
from fedbasin.strategies.diagnostics.bent_paths import Bent, Kind, straight
from fedbasin.strategies.diagnostics.evaluation import bind, counted, evaluate
from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read
from fedbasin.strategies.tensors.state import State


def train_bend(
    model: nn.Module,
    start: State,
    end: State,
    batches: Batches,
    kind: Kind = "bezier",
    *,
    steps: int = 200,
    lr: float = 0.01,
    seed: int = 0,
    optimizer: Callable[..., Optimizer] = Adam,
) -> Bent:
    """The curve from `start` to `end` whose bend has learnt to avoid high loss; the ends stay.

    Each step takes the next batch and draws one point of the curve. The same seed on the same batches gives the
    same bend. Parameters are trained; buffers keep the mean of the ends. Nothing is changed: not the model, its
    mode or its gradients, not the ends, not the global random state.

    Args:
        model: gives the architecture; its own weights do not matter.
        start: the state at t = 0.
        end: the state at t = 1.
        batches: the client's data, read again from its beginning as often as the steps need.
        kind: of the curve.
        steps: number of them; 0 gives the straight line.
        lr: the optimiser's learning rate.
        seed: of the points that are drawn.
        optimizer: called with the parameters and `lr`; Adam or SGD, for example.

    Raises:
        ValueError: There is no data, a state does not fit the model, or the loss is not finite.
        TypeError: The batches can be read only once.
    """
    if isinstance(batches, Iterator):
        raise TypeError("a bend reads its batches many times; pass a list or a DataLoader")
    curve = straight(bind(model, start), bind(model, end), kind)
    learnt = _parameters(model, curve.bend)
    curve = replace(curve, bend={**curve.bend, **learnt})
    descent = optimizer(list(learnt.values()), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model), torch.enable_grad():
        data = _forever(batches, model)
        for _ in range(steps):
            t = float(torch.rand((), generator=generator))
            loss = _loss(model, curve.at(t), next(data), t)
            gradients = torch.autograd.grad(loss, list(learnt.values()), allow_unused=True)
            for tensor, gradient in zip(learnt.values(), gradients, strict=True):
                tensor.grad = gradient
            descent.step()
    return replace(curve, bend={name: tensor.detach() for name, tensor in curve.bend.items()})


def curve_losses(model: nn.Module, curve: Bent, batches: Batches, points: int) -> Path:
    """Scores at equally spaced points of a curve; the data is read once for each.

    Raises:
        ValueError: Fewer than two points, or data that is not the same each time; see also `probe.evaluate`.
        TypeError: The batches can be read only once.
    """
    if isinstance(batches, Iterator):
        raise TypeError("a curve reads its batches at each point; pass a list or a DataLoader")
    return along(curve.at, partial(_evaluate, model, batches), points)


def _evaluate(model: nn.Module, batches: Batches, state: State) -> tuple[float, float, float]:
    return evaluate(model, state, batches)


def _parameters(model: nn.Module, bend: State) -> dict[str, Tensor]:
    names = {name for name, _ in model.named_parameters()}
    return {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in bend.items()
        if name in names and tensor.is_floating_point()
    }


def _forever(batches: Batches, model: nn.Module) -> Iterator[Batch]:
    while True:
        yield from read(batches, model)


def _loss(model: nn.Module, state: State, batch: Batch, t: float) -> Tensor:
    predictions, targets = counted(forward(model, batch, state), batch)
    if not len(targets):
        return predictions.sum()
    loss = cross_entropy(predictions, targets)
    if not loss.isfinite():
        raise ValueError(f"the loss is {loss.item()} at t = {t}; bend with a smaller learning rate")
    return loss
