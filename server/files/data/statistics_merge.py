"""Merges of stored models by statistics: collected on data after alignment, or before and read from files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from fedbasin.proto.layer_graph import Block
from fedbasin.server.files.data.given_data import read_data, read_task
from fedbasin.server.files.data.model_on_data import module_state, require_parameters, run
from fedbasin.server.files.data.stored_statistics import StoredStatistics, digest_of, is_statistics, open_statistics
from fedbasin.server.files.library.tensor_layout import StoredState
from fedbasin.server.files.merge.plan import PlannedTensor
from fedbasin.server.files.merge.recipe import MergeRecipe
from fedbasin.server.files.reading import ModelError, StoredModel
from fedbasin.server.files.stored_symmetry import Source, executable_of
from fedbasin.strategies.fusion.precisions import Gram, Precision
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.statistics.gram_accumulators import shrink_off_diagonal
from fedbasin.strategies.statistics.merged_by_statistics import (
    Collect,
    Contribution,
    collect_fisher,
    collect_grams,
    collect_updates,
    fisher_precisions,
    merge_in_order,
    merge_updates,
)
from fedbasin.strategies.tensors.batches import Batches
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
    module, ridge = executable.module, arguments["ridge"]
    models = []
    for source, weight in zip(recipe.parts[0].sources, weights, strict=True):
        on_step(f"reading the data of {source.model}")
        name = recipe.data_of(source) or ""
        is_file = is_statistics(name)
        data = _open_of(source.model, states, name) if is_file else read_data(name, module, "--statistics")
        models.append(_Model(module_state(executable, source.model, states[source.model]), data, weight))
    task = None if recipe.task is None else read_task(recipe.task)
    on_step("collecting statistics")

    def merge() -> State:
        if recipe.rule.statistic == "features":
            parts = [
                Contribution(m.state, m.data, m.weight) for m in models if not isinstance(m.data, StoredStatistics)
            ]
            return merge_in_order(module, parts, arguments["shrink"], ridge)
        if recipe.rule.statistic == "gram":
            collect: Collect = partial(collect_grams, shrink=arguments["shrink"])
        else:
            collect = partial(collect_fisher, task=task, scaled=bool(arguments["normalize"]))
        return merge_updates(models[0].state, _updates(module, models, collect, arguments), ridge)

    names = dict.fromkeys(f"{recipe.data_of(source)}" for source in recipe.parts[0].sources)
    fused = run(module, f"--statistics {', '.join(names)}", merge)
    return StoredState(executable.layout, states[recipe.parts[0].sources[0].model], fused)


def check_statistics(recipe: MergeRecipe) -> None:
    """Refuse files of statistics that are none, or of another kind than the rule needs; only headers are read.

    Raises:
        ModelError: names the file.
    """
    for name in filter(is_statistics, filter(None, map(recipe.data_of, recipe.parts[0].sources))):
        stored = open_statistics(Path(name))
        if stored.kind != recipe.rule.statistic:
            raise ModelError(
                f"{name}: holds {stored.kind}, and {recipe.merge_method} needs {recipe.rule.statistic}; collect it by "
                f"fedbasin statistics --kind {recipe.rule.statistic}"
            )


@dataclass(frozen=True, eq=False)
class _Model:
    """A model in the module's names, with its data or the statistics that were collected before."""

    state: dict[str, Tensor]
    data: Batches | StoredStatistics
    weight: float


def _updates(
    module: nn.Module, models: Sequence[_Model], collect: Collect, arguments: Mapping[str, float]
) -> Iterator[Update]:
    for model in models:
        if isinstance(model.data, StoredStatistics):
            yield Update(model.state, 1.0, _precisions(model.data, arguments)).scaled(model.weight)
        else:
            yield from collect_updates(module, [Contribution(model.state, model.data, model.weight)], collect)


def _precisions(stored: StoredStatistics, arguments: Mapping[str, float]) -> dict[Block, Precision]:
    if stored.kind == "gram":
        return {
            block: Gram(shrink_off_diagonal(matrix, arguments["shrink"])) for block, matrix in stored.read().items()
        }
    return fisher_precisions(
        {block[0]: values for block, values in stored.read().items()}, bool(arguments["normalize"])
    )


def _open_of(model: Path, states: Mapping[Path, State], name: str) -> StoredStatistics:
    """Return the statistics of a file, which must be those of the model.

    Raises:
        ModelError: they are of another model.
    """
    stored = open_statistics(Path(name))
    if stored.digest != digest_of(states[model]):
        raise ModelError(
            f"{name}: was collected on another model than {model}; collect it on this one, or swap the files"
        )
    return stored


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
