"""BatchNorm in a federation: running statistics are moments, which add up, and not weights, which average.

    mean = sum_k n_k mean_k / n        var = sum_k n_k (var_k + mean_k^2) / n - mean^2

So what the clients' means differ by is part of the variance. A model that was fitted has other activations than those
it was averaged from; its statistics are measured anew, over all clients, and gain and shift take up the difference, so that
the model stays the function that was fitted, and is the same one in training.

    gain' = gain sqrt((var' + eps) / (var + eps))        shift' = shift + gain (mean' - mean) / sqrt(var + eps)

Source: BatchNorm, Ioffe and Szegedy 2015, arXiv 1502.03167; statistics of merged models, Jordan et al. 2023 (REPAIR),
arXiv 2211.08403.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from fedbasin.proto.layer_graph import BatchNorm
from fedbasin.strategies.tensors.state import State


def second_moments(state: State) -> dict[str, Tensor]:
    """The state with `var + mean^2`, in double, in the place of each running variance."""
    return {
        name: state[name].double() + state[mean].double().square() if mean else tensor
        for (name, tensor), mean in zip(state.items(), _means(state), strict=True)
    }


def variances(moments: State, examples: float) -> Iterator[tuple[str, Tensor]]:
    """The variances that sums of means and second moments over so many examples stand for, in the sums' dtype."""
    for name, mean in zip(moments, _means(moments), strict=True):
        if mean:
            # At least the mean of the variances; only rounding takes it below.
            central = moments[name] / examples - (moments[mean] / examples).square()
            yield name, central.clamp(min=0)


def restated(model: State, measured: State, norms: Iterable[BatchNorm]) -> dict[str, Tensor]:
    """The same function with other running statistics.

    Args:
        model: to restate.
        measured: the statistics, under their names in the model.
        norms: of the model.
    """
    restated = {**model, **measured}
    for norm in norms:
        (mean, variance), (weight, bias) = norm.measured, norm.learned
        before = (model[variance].double() + norm.eps).sqrt()
        after = (restated[variance].double() + norm.eps).sqrt()
        gain = model[weight].double() / before
        shift = model[bias].double() + gain * (restated[mean].double() - model[mean].double())
        restated[weight] = (gain * after).to(model[weight].dtype)
        restated[bias] = shift.to(model[bias].dtype)
    return restated


def _means(state: State) -> Iterator[str]:
    """For each tensor that is a running variance, the name of the running mean beside it; empty for others."""
    for name in state:
        stem, found, _ = name.rpartition("running_var")
        mean = f"{stem}running_mean"
        yield mean if found and name.endswith("running_var") and mean in state else ""
