"""A merge from recipe to files: models are opened, refused or planned by their headers, aligned, merged and written."""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedbasin.proto.report import AlignmentReport
from fedbasin.server.files.adapters.adapter_folder import (
    StoredAdapter,
    is_adapter,
    open_adapter,
    other_base,
    split_model,
)
from fedbasin.server.files.adapters.applied_adapter import AppliedAdapter
from fedbasin.server.files.data.distilled_merge import DistillationReport, distil_merge
from fedbasin.server.files.data.statistics_merge import check_statistics, merge_by_statistics
from fedbasin.server.files.merge.aligned_models import (
    AlignableModels,
    AlignedModels,
    align_models,
    check_alignment,
    measure_norms,
)
from fedbasin.server.files.merge.layout import PlannedFile, TensorWriter, plan_files, write_index
from fedbasin.server.files.merge.merging import check_copies, merge_tensor, merge_tensors
from fedbasin.server.files.merge.model_configs import config_differences, refuse_other_heads
from fedbasin.server.files.merge.plan import PlannedTensor, TensorOrigin, plan_merge
from fedbasin.server.files.merge.recipe import MergeRecipe
from fedbasin.server.files.merge.result_config import text_config, write_config
from fedbasin.server.files.merge.stored_names import RenamedState, common_names
from fedbasin.server.files.merge.unused_settings import unused_settings
from fedbasin.server.files.merge.vocabularies import TokenPlan, is_table, order_tables, plan_tokens, write_tokenizer
from fedbasin.server.files.reading import ModelError, StoredModel, open_model
from fedbasin.server.files.writing import FolderFiles, copy_other_files, list_files, replacing
from fedbasin.strategies.fusion.rules.merging_rules import RULES
from fedbasin.strategies.tensors.state import State

# In place of a path, the model that was merged by statistics or distilled.
_MERGED = Path()


@dataclass(frozen=True)
class MergeReport:
    """The report of a merge.

    Attributes:
        rule: name of the rule.
        models: paths of the models, the base model first.
        output: path of the result.
        tensors: number of its tensors.
        parameters: number of their entries.
        bytes: their size.
        seconds: time of reading, merging and writing.
        vocabulary: number of rows of its tables, if they were merged by token.
        alignments: reports of the searches, in their order.
        change: largest relative change of an output by the alignment, in float64; None if nothing was proven.
        reference: path of the model whose folder gives the files that are not merged.
        files: what became of the files in this folder.
        dropped: names of tensors that only some models have and none needs, which the result does not have.
        config: keys in which configurations differ from the result's.
        unused: settings of the recipe that changed nothing.
        bases: for each BASE+ADAPTER the base that the adapter's configuration names, if that is another.
        distillation: what distillation changed, if the recipe has one.
    """

    rule: str
    models: tuple[str, ...]
    output: str
    tensors: int
    parameters: int
    bytes: int
    seconds: float
    vocabulary: int | None
    alignments: tuple[AlignmentReport, ...]
    change: float | None
    reference: str
    files: FolderFiles
    dropped: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    bases: Mapping[str, str] = field(default_factory=dict)
    distillation: DistillationReport | None = None


@dataclass(frozen=True, eq=False)
class PreparedMerge:
    """A merge that is known to be possible.

    Attributes:
        recipe: the recipe.
        models: the opened models, the base model or the first one first.
        whole: their tensors.
        states: the same, by token where a vocabulary was chosen.
        tokens: the vocabulary of the result, if it is not that of all models.
        shapes: names, shapes and dtypes of their tensors.
        plan: the tensors of the result.
        alignable: the models with what their alignment needs; None if the recipe aligns none.
        tables: names of the tables that have a row for each token, where a vocabulary was chosen.
        dropped: names of tensors that only some models have and none needs.
        bases: for each BASE+ADAPTER the base that the adapter's configuration names, if that is another.
        alignment: the aligned models, once they are.
    """

    recipe: MergeRecipe
    models: Mapping[Path, StoredModel]
    whole: Mapping[Path, State]
    states: Mapping[Path, State]
    tokens: TokenPlan | None
    shapes: Mapping[Path, State]
    plan: Sequence[PlannedTensor]
    alignable: AlignableModels | None = None
    tables: frozenset[str] = frozenset()
    dropped: tuple[str, ...] = ()
    bases: Mapping[str, str] = field(default_factory=dict)
    alignment: AlignedModels | None = None

    @property
    def reference(self) -> StoredModel:
        """The model whose config and other files the result has."""
        model = next(iter(self.models.values()))
        return model if self.tokens is None else self.models[self.tokens.model]

    @property
    def nbytes(self) -> int:
        """The size of the result's tensors."""
        return sum(tensor.nbytes for tensor in self.plan)


def prepare_merge(recipe: MergeRecipe) -> PreparedMerge:
    """Open the models and plan the merge, from headers, configs and tokenizers alone.

    Raises:
        ModelError: names what makes the merge impossible, and the remedy.
    """
    models, adapters = _open(recipe.paths())
    check_statistics(recipe)
    refuse_other_heads(models)
    whole: dict[Path, State] = {**models, **{path: AppliedAdapter(models[path], adapters[path]) for path in adapters}}
    shapes: dict[Path, State] = {path: model.shapes() for path, model in models.items()}
    bases = {str(path): name for path, own in adapters.items() if (name := other_base(own, models[path].path))}
    dropped: tuple[str, ...] = ()
    # What runs models, or belongs to one as it is stored, has their names.
    if not (recipe.align or recipe.rule.statistic or recipe.distill):
        common = common_names(models)
        dropped = common.dropped
        whole = {path: RenamedState(state, common.names[path]) for path, state in whole.items()}
        shapes = {path: RenamedState(state, common.names[path]) for path, state in shapes.items()}
    sizes = {path: size for path, model in models.items() if (size := _vocabulary_size(model, shapes[path]))}
    tokens = plan_tokens(list(models), recipe.vocabulary, sizes)
    runs = recipe.rule.statistic or recipe.distill or (recipe.align and recipe.align.data)
    if tokens is not None and runs:
        what = recipe.rule.name if recipe.rule.statistic else "distill" if recipe.distill else "align with data"
        raise ModelError(f"tokenizer: {what} runs the models, which must have the same tokens and tables")
    alignable = check_alignment(recipe, models, by_token=tokens is not None)
    if tokens is None:
        plan = plan_merge(recipe, shapes)
        return PreparedMerge(recipe, models, whole, whole, None, shapes, plan, alignable, dropped=dropped, bases=bases)
    tables = frozenset(
        name for path, state in shapes.items() for name in state if is_table(name, state[name].shape, sizes[path])
    )
    by_token = order_tables(whole, tokens, tables)
    planned = {path: _token_shapes(shapes[path], tables, tokens) for path in models}
    plan = plan_merge(recipe, planned)
    return PreparedMerge(recipe, models, whole, by_token, tokens, planned, plan, alignable, tables, dropped, bases)


def write_merge(
    merge: PreparedMerge, target: Path, shard: int, on_write: Callable[[int], None], on_match: Callable[[str], None]
) -> MergeReport:
    """Align, merge and write; the target appears when it is complete.

    Args:
        merge: the merge.
        target: folder, or file where the first model is one; what is there is replaced.
        shard: largest number of bytes in one file of a folder.
        on_write: called with the size in bytes of each tensor that was written.
        on_match: called with the number of each search, and what else is computed, when it begins.

    Raises:
        ModelError: a tensor cannot be read or merged, or the target cannot be written.
    """
    start = time.perf_counter()
    check_copies(merge.plan, merge.states)
    merge = align_merge(merge, on_match)
    plan, states, distillation = _compute_whole(merge, on_match)
    files = plan_files(merge.plan, _metadata(merge), shard if merge.reference.is_folder else None)
    try:
        with replacing(target) as part:
            if merge.reference.is_folder:
                copy_other_files(merge.reference, part)
                write_config(merge, part)
                write_index(files, merge.nbytes, part)
                if merge.tokens is not None:
                    write_tokenizer(merge.tokens, part)
            paths = [part / file.name for file in files] if merge.reference.is_folder else [part]
            with TensorWriter(files, paths) as writer:
                merge_tensors(_in_order(plan, files), states, writer, on_write)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}; nothing was left behind") from error
    return MergeReport(
        merge.recipe.merge_method,
        tuple(map(str, merge.models)),
        str(target),
        len(merge.plan),
        sum(_numel(tensor) for tensor in merge.plan),
        merge.nbytes,
        time.perf_counter() - start,
        None if merge.tokens is None else merge.tokens.size,
        () if merge.alignment is None else merge.alignment.reports,
        None if merge.alignment is None else merge.alignment.change,
        str(merge.reference.path),
        list_files(merge.reference, [m for m in merge.models.values() if m is not merge.reference], target),
        merge.dropped,
        config_differences(merge.reference, merge.models.values()),
        unused_settings(merge.recipe, merge.plan),
        merge.bases,
        distillation,
    )


def _compute_whole(
    merge: PreparedMerge, on_step: Callable[[str], None]
) -> tuple[Sequence[PlannedTensor], Mapping[Path, State], DistillationReport | None]:
    """Compute what needs whole models, by statistics or distillation; other tensors are merged when they are written."""
    plan, states = merge.plan, merge.states
    if merge.recipe.rule.statistic:
        states = {_MERGED: merge_by_statistics(merge.recipe, plan, merge.reference, states, on_step)}
        plan = [_copied(tensor) for tensor in plan]
    # A model alone, which a score compares, keeps its own statistics.
    if merge.alignable is not None and merge.alignable.norms and len(merge.recipe.paths()) > 1:
        on_step("measuring the running statistics of BatchNorm")
        states = {_MERGED: measure_norms(merge.alignable, _merge_all(plan, states))}
        plan = [_copied(tensor) for tensor in plan]
    settings = merge.recipe.distill
    if settings is None:
        return plan, states, None
    merged = _merge_all(plan, states)
    state, report = distil_merge(merge.recipe, settings, merge.reference, merge.states, merged, on_step)
    return [_copied(tensor) for tensor in merge.plan], {_MERGED: state}, report


def _merge_all(plan: Sequence[PlannedTensor], states: Mapping[Path, State]) -> State:
    return {tensor.name: merge_tensor(tensor, states) for tensor in plan}


def refuse_full_disk(merge: PreparedMerge, target: Path) -> None:
    """Refuse a target on a disk without room for it, before anything is computed.

    Raises:
        ModelError: says how many bytes are free.
    """
    free = shutil.disk_usage(target.parent).free
    if free < merge.nbytes:
        raise ModelError(f"{target}: needs {merge.nbytes} bytes, but {free} are free there; make room")


def _open(paths: Iterable[Path]) -> tuple[dict[Path, StoredModel], dict[Path, StoredAdapter]]:
    """Open models; a path BASE+ADAPTER is a base model and the adapter that is applied to it."""
    models, adapters = {}, {}
    for path in paths:
        base, *adapter = split_model(path)
        if is_adapter(path):
            raise ModelError(f"{path}: is an adapter; write BASE+ADAPTER, or merge adapters alone")
        models[path] = open_model(base)
        if adapter:
            adapters[path] = open_adapter(adapter[0])
    return models, adapters


def _copied(tensor: PlannedTensor) -> PlannedTensor:
    """Return the plan of a tensor that has been merged by statistics or distilled, to be written in its dtype."""
    rule = None if tensor.rule is None else RULES["passthrough"]
    source = (TensorOrigin(_MERGED, tensor.name),)
    return replace(tensor, rule=rule, anchor=None, sources=source, weights=(1.0,), arguments={"scale": (1.0,)})


def _numel(tensor: PlannedTensor) -> int:
    return tensor.nbytes // tensor.dtype.itemsize


def _vocabulary_size(model: StoredModel, shapes: State) -> int | None:
    size = text_config(model.config).get("vocab_size")
    has_table = isinstance(size, int) and any(is_table(name, shapes[name].shape, size) for name in shapes)
    return size if has_table else None


def _token_shapes(shapes: State, tables: frozenset[str], tokens: TokenPlan) -> State:
    return {
        name: tensor.new_empty((tokens.size, *tensor.shape[1:])) if name in tables else tensor
        for name, tensor in shapes.items()
    }


def align_merge(merge: PreparedMerge, on_step: Callable[[str], None]) -> PreparedMerge:
    """Return a merge whose models are aligned, if its recipe aligns them, which a second call leaves as it is.

    Args:
        merge: the merge.
        on_step: called with the number of each search when it begins.

    Raises:
        ModelError: a model has entries that are not finite, or a norm that cannot be folded, or the data do not fit.
    """
    if merge.alignable is None or merge.alignment is not None:
        return merge
    if merge.tokens is None:
        aligned = align_models(merge.alignable, merge.whole, merge.whole, on_step)
        return replace(merge, states=aligned.states, alignment=aligned)
    # A row that one model borrows from another says nothing of their units, and is borrowed from the aligned one.
    matched = order_tables(merge.whole, merge.tokens.shared(), merge.tables)
    aligned = align_models(merge.alignable, matched, merge.whole, on_step)
    return replace(merge, states=order_tables(aligned.states, merge.tokens, merge.tables), alignment=aligned)


def with_recipe(merge: PreparedMerge, recipe: MergeRecipe) -> PreparedMerge:
    """Return a merge of some of the same models by another recipe, without opening or aligning them again.

    Raises:
        ModelError: the recipe does not fit the models.
    """
    return replace(merge, recipe=recipe, plan=plan_merge(recipe, merge.shapes))


def _metadata(merge: PreparedMerge) -> Mapping[str, str]:
    # A notation names the layers of the model that it was written for.
    return merge.reference.metadata if merge.recipe.models else {}


def _in_order(plan: Sequence[PlannedTensor], files: Sequence[PlannedFile]) -> list[PlannedTensor]:
    """Return the tensors in the order of their places, so that files are written from the front."""
    tensors = {tensor.name: tensor for tensor in plan}
    return [tensors[name] for file in files for name in file.places]
