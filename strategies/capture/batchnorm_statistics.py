"""Running statistics of BatchNorm layers, measured on a client's data while a model runs."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedbasin.proto.layer_graph import BatchNorm


def find_norms(model: nn.Module) -> tuple[BatchNorm, ...]:
    """Return the BatchNorm layers with running statistics, a weight and a bias, in the order of the modules."""
    return tuple(
        BatchNorm(name, module.eps)
        for name, module in model.named_modules()
        if name and isinstance(module, _BatchNorm) and module.running_mean is not None and module.affine
    )


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
