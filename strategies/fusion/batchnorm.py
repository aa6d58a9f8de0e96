"""BatchNorm in a federation: running statistics are pooled as moments, not averaged as weights.

    mean = sum_k n_k mean_k / n        var = sum_k n_k (var_k + (mean_k - mean)^2) / n

The pooled variance contains the spread of the clients' means. It is summed about the mean so far and not about zero
(Chan, Golub and LeVeque 1983), because `mean^2` can be so much larger than the variance that no digit of it is left. A
refitted model computes other activations than the models it was averaged from, so its statistics are measured again over
all clients. Weight and bias of the norm absorb the difference: the model computes the same function in evaluation, and
nearly the same one in training.

    weight' = weight sqrt((var' + eps) / (var + eps))    bias' = bias + weight (mean' - mean) / sqrt(var + eps)

Source: BatchNorm, Ioffe and Szegedy 2015, arXiv 1502.03167; statistics of merged models, Jordan et al. 2023 (REPAIR),
arXiv 2211.08403.
"""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedbasin.proto.layer_graph import BatchNorm
from fedbasin.strategies.tensors.state import State


def find_norms(model: nn.Module) -> tuple[BatchNorm, ...]:
    """Return the BatchNorm layers with running statistics and a weight and bias to train, in the order of the modules.

    One whose weight is frozen belongs to a frozen network, as a pretrained backbone, and keeps its statistics.
    """
    norms = ((norm, model.get_submodule(norm.name)) for norm in find_running_norms(model))
    return tuple(norm for norm, module in norms if module.affine and module.weight.requires_grad)


def find_running_norms(model: nn.Module) -> tuple[BatchNorm, ...]:
    """Return the BatchNorm layers with running statistics, also those without a weight, in the order of the modules."""
    return tuple(
        BatchNorm(name, module.eps)
        for name, module in model.named_modules()
        if name and isinstance(module, _BatchNorm) and module.running_mean is not None
    )


def with_spread(means: Mapping[str, Tensor], examples: float, sums: State, summed_examples: float) -> dict[str, Tensor]:
    """Return the variances that some clients add to a sum: their own, and the spread of their mean about the sum's.

    Args:
        means: the clients' means and variances, by name.
        examples: number of their examples.
        sums: sums over earlier clients, weighted by examples.
        summed_examples: number of the earlier clients' examples.
    """
    share = summed_examples / (summed_examples + examples)
    spread = {}
    for name, mean in zip(means, _means(means), strict=True):
        if mean:
            earlier = sums[mean] / summed_examples if summed_examples else means[mean].double()
            spread[name] = means[name].double() + share * (means[mean].double() - earlier).square()
    return spread


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
