"""Merges of stored models by statistics that each collects on data, after they were aligned."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from fedbasin.server.files.data.given_data import read_data, read_task
from fedbasin.server.files.data.model_on_data import require_parameters, run
from fedbasin.server.files.library.executable_model import ExecutableModel
from fedbasin.server.files.library.tensor_layout import ModuleState, StoredState
from fedbasin.server.files.merge.plan import PlannedTensor
from fedbasin.server.files.merge.recipe import MergeRecipe
from fedbasin.server.files.reading import ModelError, StoredModel
from fedbasin.server.files.stored_symmetry import Source, executable_of
from fedbasin.strategies.statistics.merged_by_statistics import (
    Contribution,
    collect_fisher,
    collect_grams,
    merge_at_once,
    merge_in_order,
)
from fedbasin.strategies.tensors.parallel import is_finite
from fedbasin.strategies.tensors.state import State


def merge_by_statistics(
    recipe: MergeRecipe,
    plan: Sequence[PlannedTensor],
    reference: StoredModel,
    states: Mapping[Path, State],
    on_step: Callable[[str], None],
) -> State:
    """Return the merged tensors in the names of the files.

    Args:
        recipe: a recipe whose rule needs statistics.
        plan: the tensors of the result.
        reference: the model whose config says which module runs them.
        states: the aligned tensors of all models.
        on_step: called with the path of each model when its data are read.

    Raises:
        ModelError: the module is not known, or the data do not fit it.
    """
    executable = executable_of(reference, Source(module=recipe.module))
    require_parameters(reference, executable)
    weights, arguments = _constant(plan)
    models = []
    for source, weight in zip(recipe.parts[0].sources, weights, strict=True):
        on_step(f"reading the data of {source.model}")
        data = read_data(recipe.data_of(source) or "", "--statistics")
        models.append(Contribution(_module_state(executable, source.model, states[source.model]), data, weight))
    task = None if recipe.task is None else read_task(recipe.task)
    on_step("collecting statistics")
    module, ridge = executable.module, arguments["ridge"]
    if recipe.rule.statistic == "features":
        merge = partial(merge_in_order, module, models, arguments["shrink"], ridge)
    elif recipe.rule.statistic == "gram":
        merge = partial(merge_at_once, module, models, partial(collect_grams, shrink=arguments["shrink"]), ridge)
    else:
        collect = partial(collect_fisher, task=task, scaled=bool(arguments["normalize"]))
        merge = partial(merge_at_once, module, models, collect, ridge)
    fused = run(module, recipe.statistics or "of a model", merge)
    return StoredState(executable.layout, states[recipe.parts[0].sources[0].model], fused)


def _module_state(executable: ExecutableModel, path: Path, state: State) -> dict[str, Tensor]:
    named = ModuleState(executable.layout, state)
    result = {name: named[name].float() for name in named}
    for name, tensor in result.items():
        if not is_finite(tensor):
            raise ModelError(f"{path}: {name!r} has entries that are infinite or not a number; leave this model out")
    return result


def _constant(plan: Sequence[PlannedTensor]) -> tuple[Sequence[float], Mapping[str, float]]:
    """Return the weights and arguments of a rule, which are the same for all tensors."""
    merged = [tensor for tensor in plan if tensor.rule is not None]
    first = merged[0]
    for tensor in merged:
        if (tensor.weights, tensor.arguments) != (first.weights, first.arguments):
            raise ModelError(
                f"parameters: {tensor.name!r} and {first.name!r} have other values; a merge by statistics solves for "
                "whole layers, so give one value of each parameter"
            )
    if min(first.weights) < 0 or not sum(first.weights) or first.arguments["ridge"] < 0:
        raise ModelError("weight, ridge: are factors of statistics; give no negative number, and a weight above zero")
    return first.weights, first.arguments
