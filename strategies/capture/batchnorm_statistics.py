"""Running statistics of BatchNorm layers, measured on a client's data while a model runs."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedbasin.proto.layer_graph import BatchNorm
from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read_batches
from fedbasin.strategies.tensors.state import State


class NormInputs:
    """Sums over the inputs of one BatchNorm layer, in double.

    Every position of every example counts, padding included: BatchNorm itself reads padding during training.
    """

    def __init__(self, channels: int) -> None:
        self._count = 0
        # The variance is the difference of two sums, which cancels most digits of float32.
        self._sums = torch.zeros(2, channels, dtype=torch.float64)

    def add(self, images: Tensor) -> None:
        """Add a batch `[batch, channels, ...]`."""
        channels = images.detach().double().transpose(0, 1).flatten(1)
        self._count += channels.shape[1]
        self._sums += torch.stack([channels.sum(1), channels.square().sum(1)]).cpu()

    def statistics(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance of the inputs.

        Args:
            mean: tensor whose dtype the result has, and the result where the layer read nothing.
            variance: tensor for the variance, in the same two roles.
        """
        if not self._count:
            return mean, variance
        input_mean, square_mean = self._sums / self._count
        # Rounding takes the variance of a constant below zero.
        input_variance = (square_mean - input_mean.square()).clamp(min=0)
        return input_mean.to(mean.dtype), input_variance.to(variance.dtype)


@contextmanager
def measuring(model: nn.Module, norms: Collection[BatchNorm]) -> Iterator[Mapping[BatchNorm, NormInputs]]:
    """Sum the inputs of BatchNorm layers while a context is open.

    Args:
        model: the model that will run; copies of it are not measured.
        norms: layers of the model.

    Yields:
        the sums of each layer, which grow while the model runs.

    Raises:
        ValueError: the model has no such BatchNorm layer.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if unknown := [norm.name for norm in norms if norm.name not in modules]:
        raise ValueError(
            f"{unknown[0]} is not a BatchNorm layer of this {type(model).__name__}; use the same model class as the "
            "server"
        )
    inputs = {norm: NormInputs(modules[norm.name].num_features) for norm in norms}
    with ExitStack() as hooks:
        for norm, sums in inputs.items():
            module = modules[norm.name]
            hook = partial(_add_input, module, sums)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield inputs


def _add_input(
    measured: nn.Module, sums: NormInputs, module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any]
) -> None:
    # A copy of the model has a copy of the hook.
    if module is measured:
        sums.add(args[0] if args else named["input"])


@contextmanager
def normalising_by_batch(model: nn.Module) -> Iterator[None]:
    """Let every BatchNorm normalise a batch by its own statistics while a context is open, and keep its running ones.

    The rest of the model is in evaluation mode. A mean of models has units of another variance than each of them, so
    running statistics that were averaged would distort what the layers behind them read.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    with evaluating(model):
        try:
            for norm in norms:
                norm.training, norm.track_running_stats = True, False
            yield
        finally:
            for norm, tracked in zip(norms, tracking, strict=True):
                norm.track_running_stats = tracked


def read_normalised(batches: Batches, model: nn.Module) -> Iterator[Batch]:
    """Yield batches that `normalising_by_batch` can run: where there is BatchNorm, those of two examples or more.

    Raises:
        ValueError: there are no such batches.
    """
    least = 2 if any(isinstance(module, _BatchNorm) for module in model.modules()) else 1
    is_empty = True
    for batch in read_batches(batches, model):
        if len(batch.targets) >= least:
            is_empty = False
            yield batch
    if is_empty:
        raise ValueError("every batch has one example, of which BatchNorm has no variance; give batches of two or more")


def measure_anew(model: nn.Module, state: State, norms: Collection[BatchNorm], batches: Batches) -> dict[str, Tensor]:
    """Return the running statistics that a model has on some data, with the other tensors of a state.

    Every BatchNorm normalises a batch by its own statistics meanwhile, as in training: the layers behind it would be
    measured on inputs that a wrong statistic has distorted (Jordan et al. 2023, arXiv 2211.08403).

    Args:
        model: module that runs the state; its tensors are replaced.
        state: tensors of the model.
        norms: the layers to measure.
        batches: the data, read once; batches of one example, which have no variance, are left out.
    """
    model.load_state_dict({**model.state_dict(), **state})
    with normalising_by_batch(model), torch.no_grad(), measuring(model, norms) as inputs:
        for batch in read_batches(batches, model):
            if len(batch.targets) > 1:
                forward(model, batch)
    return {
        name: tensor
        for norm, sums in inputs.items()
        for name, tensor in zip(
            norm.statistics, sums.statistics(*(state[name] for name in norm.statistics)), strict=True
        )
    }
