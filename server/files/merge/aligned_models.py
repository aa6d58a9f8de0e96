"""The models of a merge in one frame: refused by their headers where they cannot be aligned, matched, and proven."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fedbasin.proto.layer_graph import BatchNorm
from fedbasin.proto.report import AlignmentReport
from fedbasin.server.files.align_file import fold_stored, prove_function, transform_stored
from fedbasin.server.files.data.model_on_data import require_executable, run, runnable_state
from fedbasin.server.files.data.stored_matching import StoredMatching, read_matching
from fedbasin.server.files.library.tensor_layout import ModuleState, StoredState, identity_layout
from fedbasin.server.files.merge.alignment import align_states
from fedbasin.server.files.merge.recipe import MergeRecipe, ModelAlignment
from fedbasin.server.files.reading import ModelError, StoredModel, few, refuse_not_finite
from fedbasin.server.files.stored_symmetry import Source, SymmetricModel, in_stored_names, symmetric_model
from fedbasin.strategies.alignment.weight_matching import MatchResult
from fedbasin.strategies.capture.batchnorm_statistics import measure_anew, read_normalised
from fedbasin.strategies.fusion.batchnorm import find_running_norms
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State

# Keys of a config that say where a model comes from, not what it is.
_PROVENANCE = {"_name_or_path", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True, eq=False)
class AlignableModels:
    """Models of one architecture, which are known to have a symmetry and what their matcher needs.

    Attributes:
        settings: the recipe's alignment.
        matching: their matcher, with the first model, whose symmetry is that of all.
    """

    settings: ModelAlignment
    matching: StoredMatching

    @property
    def norms(self) -> tuple[BatchNorm, ...]:
        """The BatchNorm layers whose running statistics are measured on the data; none without data."""
        matching = self.matching
        return () if matching.data is None else find_running_norms(require_executable(matching.model).module)


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


def check_alignment(
    recipe: MergeRecipe, models: Mapping[Path, StoredModel], *, by_token: bool
) -> AlignableModels | None:
    """Return the models that a recipe aligns, with the data that it names; None if it aligns none.

    Args:
        recipe: the recipe.
        models: its models.
        by_token: whether they have tables of other sizes, so that no module is all of theirs.

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
    first = _in_file_names(first) if by_token else first
    search = settings.steps, settings.smoothing
    matching = read_matching(settings.matcher, first, settings.data, recipe.task, "--align-data", *search)
    alignable = AlignableModels(settings, matching)
    if matching.data is not None and not (matching.matcher.reads_data or alignable.norms):
        raise ModelError(
            f"align: the matcher {settings.matcher} reads no data, and the models have no BatchNorm to measure on them; "
            "leave the data out, or choose the matcher activations or learned"
        )
    return alignable


def align_models(
    models: AlignableModels, matched: Mapping[Path, State], states: Mapping[Path, State], on_step: Callable[[str], None]
) -> AlignedModels:
    """Align models, and prove by execution that each keeps its function.

    Args:
        models: the models.
        matched: the tensors that are compared, in the names of the files, in the order of the recipe.
        states: the tensors that are transformed.
        on_step: called with the number of each search, and when the proof begins.

    Raises:
        ModelError: a model has entries that are not finite or a norm that cannot be folded, the data do not fit, or the
            function of a model would change.
    """
    reference = models.matching.model
    folded = []
    for path, state in matched.items():
        named = ModuleState(reference.layout, state)
        refuse_not_finite(named, path)
        folded.append(fold_stored(path, reference.symmetry, named))
    numbers = itertools.count(1)

    def match(anchor: State, model: State, place: float) -> MatchResult:
        on_step(f"matching by {models.settings.matcher}, search {next(numbers)}")
        return models.matching.match(reference.symmetry, anchor, model, place)

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
    moved = {path: transform_stored(transforms[path], reference, state, path) for path, state in states.items()}
    return AlignedModels(moved, tuple(aligned.reports), change)


def measure_norms(models: AlignableModels, merged: State) -> State:
    """Return merged tensors with the running statistics that BatchNorm has on the data of the alignment.

    A mean of models has units of another variance than each of them (Jordan et al. 2023, REPAIR, arXiv 2211.08403).

    Raises:
        ModelError: the data do not fit the model.
    """
    reference, data = models.matching.model, models.matching.data or ()
    executable = require_executable(reference)
    state = runnable_state(reference, ModuleState(reference.layout, merged))

    def measure() -> dict[str, Tensor]:
        batches = list(read_normalised(data, executable.module))
        return measure_anew(executable.module, state, models.norms, batches)

    measured = run(executable.module, models.matching.name, measure)
    return StoredState(executable.layout, merged, {**ModuleState(executable.layout, merged), **measured})


def _in_file_names(model: SymmetricModel) -> SymmetricModel:
    symmetry = in_stored_names(model.symmetry, model.layout)
    if symmetry is None:
        raise ModelError(
            f"{model.stored.path}: its tensors are stored in pieces, so it cannot be aligned and merged by token at once; "
            "give models of one vocabulary, or leave align out"
        )
    layout = identity_layout(model.stored.shapes())
    return replace(model, symmetry=symmetry, layout=layout, executable=None, by_hand=True)


def _identity(model: SymmetricModel) -> Symmetry:
    return in_stored_names(model.symmetry, model.layout) or model.symmetry


def _two_architectures(first: StoredModel, model: StoredModel) -> str:
    keys = (first.config.keys() | model.config.keys()) - _PROVENANCE
    differ = sorted(key for key in keys if first.config.get(key) != model.config.get(key))
    # Equal configs may still differ in tensors, such as a head that one file leaves out.
    where = f"configs differ in {few(differ)}" if differ else "files hold different tensors"
    return f"{model.path} and {first.path} are of two architectures: their {where}; align only models of one"
