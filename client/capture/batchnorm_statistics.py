"""What BatchNorms read while a model runs: the running statistics of the model that it is now, on a client's data."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedbasin.proto.layer_graph import BatchNorm


def find_norms(model: nn.Module) -> tuple[BatchNorm, ...]:
    """The BatchNorms with running statistics, a gain and a shift, in the order of the modules."""
    return tuple(
        BatchNorm(name, module.eps)
        for name, module in model.named_modules()
        if name
        and isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.affine
    )


class Moments:
    """Sums over what one BatchNorm reads: positions of all examples, padding too, as in training."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._sums = torch.zeros(2, channels, dtype=torch.float64)

    def see(self, images: Tensor) -> None:
        """Add a batch `[batch, channels, ...]`."""
        channels = images.detach().double().transpose(0, 1).flatten(1)
        self._count += channels.shape[1]
        self._sums += torch.stack([channels.sum(1), channels.square().sum(1)]).cpu()

    def statistics(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, of the given ones' dtype; those themselves where nothing was read."""
        if not self._count:
            return mean, variance
        first, second = self._sums / self._count
        # Rounding takes the variance of a constant below zero.
        central = (second - first.square()).clamp(min=0)
        return first.to(mean.dtype), central.to(variance.dtype)


@contextmanager
def measuring(
    model: nn.Module, norms: Collection[BatchNorm]
) -> Iterator[Mapping[BatchNorm, Moments]]:
    """Watch what BatchNorms read.

    Args:
        model: to be run; copies of it are not watched.
        norms: of the model.

    Yields:
        what each has read, which grows while the model runs.

    Raises:
        ValueError: the model has no such BatchNorm.
    """
    known = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if strange := [norm.name for norm in norms if norm.name not in known]:
        raise ValueError(
            f"{strange[0]} is no BatchNorm of this {type(model).__name__}; use the same model class as the server"
        )
    seen = {norm: Moments(known[norm.name].num_features) for norm in norms}
    with ExitStack() as watched:
        for norm, moments in seen.items():
            module = known[norm.name]
            see = partial(_see, module, moments)
            watched.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        yield seen


def _see(
    watched: nn.Module,
    moments: Moments,
    module: nn.Module,
    args: tuple[Tensor, ...],
    named: dict[str, Any],
) -> None:
    # A copy of the model has a copy of the hook.
    if module is watched:
        moments.see(args[0] if args else named["input"])
