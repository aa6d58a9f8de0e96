"""The catalogue of merging rules: their functions, the inputs they take and the parameters they have.

Names of rules and parameters are those of mergekit where it has them, so that its configurations mean the same here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Literal, TypeAlias

from torch import Tensor

from fedbasin.strategies.fusion.rules.arcee_fusion import arcee_fusion
from fedbasin.strategies.fusion.rules.linear import linear
from fedbasin.strategies.fusion.rules.model_stock import model_stock
from fedbasin.strategies.fusion.rules.moving_average import moving_average
from fedbasin.strategies.fusion.rules.nearswap import nearswap
from fedbasin.strategies.fusion.rules.passthrough import passthrough
from fedbasin.strategies.fusion.rules.precision_mean import precision_mean
from fedbasin.strategies.fusion.rules.spectral.input_subspaces import input_subspaces
from fedbasin.strategies.fusion.rules.spectral.isotropic import isotropic
from fedbasin.strategies.fusion.rules.spectral.task_singular_vectors import task_singular_vectors
from fedbasin.strategies.fusion.rules.spherical.slerp import nuslerp, slerp
from fedbasin.strategies.fusion.rules.spherical.spherical_means import karcher, multislerp
from fedbasin.strategies.fusion.rules.task_vectors.breadcrumbs import breadcrumbs
from fedbasin.strategies.fusion.rules.task_vectors.dare import dare
from fedbasin.strategies.fusion.rules.task_vectors.della import della
from fedbasin.strategies.fusion.rules.task_vectors.ram import ram
from fedbasin.strategies.fusion.rules.task_vectors.sce import sce
from fedbasin.strategies.fusion.rules.task_vectors.task_arithmetic import task_arithmetic
from fedbasin.strategies.fusion.rules.task_vectors.ties import ties

Scalar: TypeAlias = bool | int | float
Defaults: TypeAlias = Mapping[str, Scalar | None]

# Parameters whose names are words of Python, or say less than the argument's name.
ARGUMENTS = MappingProxyType(
    {"lambda": "scale", "normalize_weights": "normalize", "nuslerp_flatten": "flatten", "nuslerp_row_wise": "row_wise"}
)


# The smallest and largest value of parameters; a percentage in place of a fraction would be taken for all.
BOUNDS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("density", "epsilon", "gamma", "select_topk", "decay", "shrink"), (0.0, 1.0)),
    "max_iter": (1, math.inf),
    "tol": (0.0, math.inf),
}


@dataclass(frozen=True)
class Rule:
    """A merging rule, and what a merge must give it.

    Attributes:
        name: name in recipes and commands.
        function: `(anchor, tensors, weights, **parameters) -> tensor`.
        anchor: whether there must be an anchor; "none" takes an anchor among the models as one of them.
        least: smallest number of models beside the anchor.
        most: largest number of them; None is any.
        shared: parameters of a tensor with their defaults; None has no default.
        per_model: parameters of a tensor in each model, with their defaults.
        weighted: True if the rule reads weights.
        random: True if it draws random numbers, and takes a seed for each model.
        statistic: what each model must have collected on data: Fisher information, Gram matrices, or Gram matrices of
            what the merged layers before compute; empty for a rule of the weights alone.
        scored: True if its models are chosen by their scores.
        ignored: names that mergekit has for its own arithmetic and memory, and that change no result here. Its files
            give the width of masks to every rule.
    """

    name: str
    function: Callable[..., Tensor]
    anchor: Literal["none", "optional", "required"] = "required"
    least: int = 1
    most: int | None = None
    shared: Defaults = field(default_factory=dict)
    per_model: Defaults = field(default_factory=dict)
    weighted: bool = True
    random: bool = False
    statistic: Literal["", "fisher", "gram", "features"] = ""
    scored: bool = False
    ignored: frozenset[str] = frozenset({"int8_mask"})

    @property
    def parameters(self) -> set[str]:
        """The names of all parameters, with `weight` where the rule reads it."""
        return {*self.shared, *self.per_model, *self.ignored} | ({"weight"} if self.weighted else set())


def _task_vectors(
    name: str, function: Callable[..., Tensor], *, normalize: bool, shared: Defaults | None = None, **rest: object
) -> Rule:
    defaults = {"normalize": normalize, "lambda": 1.0, **(shared or {})}
    return Rule(name, function, shared=defaults, **rest)  # type: ignore[arg-type]


def _pruned(name: str, function: Callable[..., Tensor], *, normalize: bool, **per_model: float) -> Rule:
    return _task_vectors(name, function, normalize=normalize, per_model={"density": 1.0, **per_model})


def _dropping(name: str, function: Callable[..., Tensor], *, normalize: bool, **per_model: float) -> Rule:
    return _task_vectors(
        name,
        function,
        normalize=normalize,
        shared={"rescale": True},
        per_model={"density": 1.0, **per_model},
        random=True,
    )


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("linear", linear, "none", shared={"normalize": True}),
        Rule("greedy_soup", partial(linear, normalize=True), "none", weighted=False, scored=True),
        Rule("ema", moving_average, "none", shared={"decay": 0.5}),
        Rule("passthrough", passthrough, "none", most=1, per_model={"scale": 1.0}, weighted=False),
        _task_vectors("task_arithmetic", task_arithmetic, normalize=False),
        _pruned("ties", ties, normalize=True),
        _dropping("dare_linear", partial(dare, consensus=False), normalize=False),
        _dropping("dare_ties", partial(dare, consensus=True), normalize=False),
        _dropping("della_linear", partial(della, consensus=False), normalize=False, epsilon=0.15),
        _dropping("della", partial(della, consensus=True), normalize=True, epsilon=0.15),
        _pruned("breadcrumbs", partial(breadcrumbs, consensus=False), normalize=False, gamma=0.01),
        _pruned("breadcrumbs_ties", partial(breadcrumbs, consensus=True), normalize=False, gamma=0.01),
        Rule("sce", sce, shared={"select_topk": 1.0}, weighted=False),
        Rule("ram", partial(ram, r=0.0, alpha=0.0), shared={"epsilon": 1e-5}, weighted=False),
        Rule("ramplus_tl", ram, shared={"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}, weighted=False),
        Rule("model_stock", model_stock, least=2, shared={"filter_wise": False}, weighted=False),
        Rule("slerp", slerp, most=1, shared={"t": None}, weighted=False),
        Rule("nuslerp", nuslerp, "optional", 2, 2, shared={"nuslerp_flatten": True, "nuslerp_row_wise": False}),
        Rule(
            "multislerp",
            multislerp,
            "optional",
            shared={"normalize_weights": True},
            ignored=frozenset({"int8_mask", "eps"}),
        ),
        Rule("karcher", karcher, "none", shared={"max_iter": 10, "tol": 1e-5}),
        Rule("nearswap", nearswap, most=1, shared={"t": None}, weighted=False),
        Rule("arcee_fusion", arcee_fusion, most=1, weighted=False),
        Rule("iso_c", isotropic, shared={"lambda": 1.0}),
        Rule("tsv_m", task_singular_vectors, shared={"lambda": 1.0}),
        Rule("wudi", input_subspaces, shared={"lambda": 1.0}),
        Rule("fisher", precision_mean, "none", shared={"ridge": 1e-3, "normalize": True}, statistic="fisher"),
        Rule("regmean", precision_mean, "none", shared={"ridge": 1e-3, "shrink": 1.0}, statistic="gram"),
        Rule("regmean++", precision_mean, "none", shared={"ridge": 1e-3, "shrink": 1.0}, statistic="features"),
    )
}
