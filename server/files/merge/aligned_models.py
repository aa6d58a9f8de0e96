"""The models of a merge in one frame: refused by their headers where they cannot be aligned, matched, and proven."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from fedbasin.proto.layer_graph import BatchNorm
from fedbasin.proto.report import AlignmentReport
from fedbasin.server.files.align_file import fold_stored, prove_function, refuse_not_finite, transformed
from fedbasin.server.files.data.given_data import read_data, read_task
from fedbasin.server.files.data.model_on_data import require_executable, run, runnable_state
from fedbasin.server.files.library.tensor_layout import ModuleState, StoredState
from fedbasin.server.files.merge.alignment import align_states
from fedbasin.server.files.merge.recipe import MergeRecipe, ModelAlignment
from fedbasin.server.files.reading import ModelError, StoredModel, few
from fedbasin.server.files.stored_symmetry import Source, SymmetricModel, in_stored_names, symmetric_model
from fedbasin.strategies.alignment.matchers import Matcher, MatchingData, prepare_match
from fedbasin.strategies.alignment.weight_matching import MatchResult, find_by_weights
from fedbasin.strategies.capture.batchnorm_statistics import measure_anew, read_normalised
from fedbasin.strategies.fusion.batchnorm import find_running_norms
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batches
from fedbasin.strategies.tensors.state import State

# Keys of a config that say where a model comes from, not what it is.
_PROVENANCE = {"_name_or_path", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True, eq=False)
class AlignableModels:
    """Models of one architecture, which are known to have a symmetry and what their matcher needs.

    Attributes:
        settings: the recipe's alignment.
        reference: the first model, whose symmetry is that of all.
        data: the batches that were given; None without.
        task: the task of learned matching; None takes the one that the first batch shows.
    """

    settings: ModelAlignment
    reference: SymmetricModel
    data: Batches | None
    task: Task | None

    @property
    def norms(self) -> tuple[BatchNorm, ...]:
        """The BatchNorm layers whose running statistics are measured on the data; none without data."""
        return () if self.data is None else find_running_norms(require_executable(self.reference).module)


@dataclass(frozen=True, eq=False)
class AlignedModels:
    """Models in one frame.

    Attributes:
        states: their tensors in the names of the files, transformed when they are read.
        reports: reports of the searches, in their order.
        change: largest relative change of an output by the alignment, in float64; None if nothing was proven.
    """

    states: Mapping[Path, State]
    reports: tuple[AlignmentReport, ...]
    change: float | None


def check_alignment(recipe: MergeRecipe, models: Mapping[Path, StoredModel]) -> AlignableModels | None:
    """Return the models that a recipe aligns, with the data that it names; None if it aligns none.

    Raises:
        ModelError: they have no symmetry, are of two architectures, or cannot be run on the data.
    """
    settings = recipe.align
    if settings is None:
        return None
    if len(models) < 2:
        raise ModelError(f"align: {settings.links} needs a second model; leave align out")
    source = Source(module=recipe.module, rotate_residual=settings.rotate_residual)
    first, *rest = (symmetric_model(model, source) for model in models.values())
    for model in rest:
        if _identity(model) != _identity(first):
            raise ModelError(_two_architectures(first.stored, model.stored))
    if settings.data is not None:
        _refuse_idle_data(settings, first)
    data = None if settings.data is None else read_data(settings.data, "--align-data")
    return AlignableModels(settings, first, data, None if recipe.task is None else read_task(recipe.task))


def align_models(
    models: AlignableModels, states: Mapping[Path, State], on_step: Callable[[str], None]
) -> AlignedModels:
    """Align models, and prove by execution that each keeps its function.

    Args:
        models: the models.
        states: their tensors, in the names of the files, in the order of the recipe.
        on_step: called with the number of each search, and when the proof begins.

    Raises:
        ModelError: a model has entries that are not finite or a norm that cannot be folded, the data do not fit, or the
            function of a model would change.
    """
    reference = models.reference
    folded = []
    for path, state in states.items():
        refuse_not_finite(state, path)
        folded.append(fold_stored(path, reference.symmetry, ModuleState(reference.layout, state)))
    numbers = itertools.count(1)

    def match(anchor: State, model: State, place: float) -> MatchResult:
        on_step(f"matching by {models.settings.matcher}, search {next(numbers)}")
        return _match(models, anchor, model, place)

    aligned = align_states(reference.symmetry, folded, models.settings.links, match)
    transforms = dict(zip(states, aligned.transforms, strict=True))
    change = None
    executable = reference.executable
    if models.settings.prove and executable is not None:
        on_step("proving that every model keeps its function")
        changes = (
            prove_function(transforms[path], reference, executable, state, path) for path, state in states.items()
        )
        change = max(changes)
    moved = {path: transformed(transforms[path], reference, state, path) for path, state in states.items()}
    return AlignedModels(moved, tuple(aligned.reports), change)


def measure_norms(models: AlignableModels, merged: State) -> State:
    """Return merged tensors with the running statistics that BatchNorm has on the data of the alignment.

    A mean of models has units of another variance than each of them (Jordan et al. 2023, REPAIR, arXiv 2211.08403).

    Raises:
        ModelError: the data do not fit the model.
    """
    reference, executable = models.reference, require_executable(models.reference)
    state = runnable_state(reference, ModuleState(reference.layout, merged))

    def measure() -> dict[str, Tensor]:
        batches = list(read_normalised(models.data or (), executable.module))
        return measure_anew(executable.module, state, models.norms, batches)

    measured = run(executable.module, models.settings.data or "", measure)
    return StoredState(executable.layout, merged, {**ModuleState(executable.layout, merged), **measured})


def _match(models: AlignableModels, anchor: State, model: State, place: float) -> MatchResult:
    symmetry, matcher = models.reference.symmetry, Matcher[models.settings.matcher]
    if matcher is Matcher.weights:
        # Without a copy of the models, which may be larger than the memory.
        return find_by_weights(symmetry, anchor, model)
    if models.data is None or not matcher.reads_data:
        result = prepare_match(matcher, symmetry, dict(anchor), dict(model))()
        return MatchResult(result.transform, result.report)
    module = require_executable(models.reference).module
    data = MatchingData(module, models.data, place, models.task)
    start, end = (runnable_state(models.reference, state) for state in (anchor, model))
    prepare = partial(prepare_match, matcher, symmetry, start, end, data=data)
    alignment = run(module, models.settings.data or "", lambda: prepare()())
    return MatchResult(alignment.transform, alignment.report)


def _refuse_idle_data(settings: ModelAlignment, model: SymmetricModel) -> None:
    """Refuse data on which nothing would be run, or on which the model cannot be run."""
    executable = require_executable(model)
    if not Matcher[settings.matcher].reads_data:
        if not find_running_norms(executable.module):
            raise ModelError(
                f"align: the matcher {settings.matcher} reads no data, and {executable.kind} has no BatchNorm to measure "
                "on them; leave the data out, or choose the matcher activations or learned"
            )
    elif model.by_hand:
        moved = {axis.tensor for space in model.symmetry.spaces for axis in space.axes}
        if renamed := sorted(name for name in moved if executable.layout.whole.get(name) != name):
            raise ModelError(
                f"{model.stored.path}: its symmetry names {few(renamed)}, which {executable.kind} has under other names, so "
                f"the matcher {settings.matcher} cannot run it; choose a matcher by weights"
            )


def _identity(model: SymmetricModel) -> Symmetry:
    return in_stored_names(model.symmetry, model.layout) or model.symmetry


def _two_architectures(first: StoredModel, model: StoredModel) -> str:
    keys = (first.config.keys() | model.config.keys()) - _PROVENANCE
    differ = sorted(key for key in keys if first.config.get(key) != model.config.get(key))
    # Equal configs may still differ in tensors, such as a head that one file leaves out.
    where = f"configs differ in {few(differ)}" if differ else "files hold different tensors"
    return f"{model.path} and {first.path} are of two architectures: their {where}; align only models of one"
