"""BatchNorm in a federation: running statistics are pooled as moments, not averaged as weights.

    mean = sum_k n_k mean_k / n        var = sum_k n_k (var_k + mean_k^2) / n - mean^2

The pooled variance contains the spread of the clients' means. A refitted model computes other activations than the
models it was averaged from, so its statistics are measured again over all clients. Weight and bias of the norm absorb
the difference: the model computes the same function in evaluation, and nearly the same one in training.

    weight' = weight sqrt((var' + eps) / (var + eps))    bias' = bias + weight (mean' - mean) / sqrt(var + eps)

Source: BatchNorm, Ioffe and Szegedy 2015, arXiv 1502.03167; statistics of merged models, Jordan et al. 2023 (REPAIR),
arXiv 2211.08403.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from fedbasin.proto.layer_graph import BatchNorm
from fedbasin.strategies.tensors.state import State


def second_moments(state: State) -> dict[str, Tensor]:
    """Return the state with each running variance replaced by the second moment `var + mean^2`, in double."""
    return {
        name: state[name].double() + state[mean].double().square() if mean else tensor
        for (name, tensor), mean in zip(state.items(), _means(state), strict=True)
    }


def variances(moments: State, examples: float) -> Iterator[tuple[str, Tensor]]:
    """Yield the pooled running variances, by name, in the sums' dtype.

    Args:
        moments: sums over clients of means and second moments, weighted by examples.
        examples: total number of examples.
    """
    for name, mean in zip(moments, _means(moments), strict=True):
        if mean:
            # The pooled variance is at least the mean of the variances; only rounding makes it negative.
            central = moments[name] / examples - (moments[mean] / examples).square()
            yield name, central.clamp(min=0)


def replace_statistics(model: State, measured: State, norms: Iterable[BatchNorm]) -> dict[str, Tensor]:
    """Return the model with new running statistics and the same function in evaluation mode.

    Args:
        model: state of the model.
        measured: new statistics, under their names in the model.
        norms: BatchNorms whose weight and bias absorb the difference.
    """
    new = {**model, **measured}
    for norm in norms:
        (mean, variance), (weight, bias) = norm.statistics, norm.parameters
        slope = model[weight].double() / (model[variance].double() + norm.eps).sqrt()
        shift = model[bias].double() + slope * (new[mean].double() - model[mean].double())
        new[weight] = (slope * (new[variance].double() + norm.eps).sqrt()).to(model[weight].dtype)
        new[bias] = shift.to(model[bias].dtype)
    return new


def _means(state: State) -> Iterator[str]:
    """Yield for each running variance the name of the running mean beside it, and "" for every other tensor."""
    for name in state:
        mean = name.removesuffix("running_var") + "running_mean"
        yield mean if name.endswith("running_var") and mean in state else ""
