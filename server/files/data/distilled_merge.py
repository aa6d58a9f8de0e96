"""A merged model that is trained further on the outputs of the models that it was merged from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedbasin.server.files.data.given_data import read_data, read_task
from fedbasin.server.files.data.model_on_data import module_state, require_parameters, run
from fedbasin.server.files.library.tensor_layout import StoredState
from fedbasin.server.files.merge.recipe import Distil, MergeRecipe
from fedbasin.server.files.reading import StoredModel
from fedbasin.server.files.stored_symmetry import Source, executable_of
from fedbasin.strategies.fusion.distillation.distil import Distillation, distil
from fedbasin.strategies.tasks.model_task import TASKS
from fedbasin.strategies.tensors.batches import without_targets
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True)
class DistillationReport:
    """The mean divergence of the merged model from the ensemble of its models, before and after distillation."""

    before: float
    after: float


def distil_merge(
    recipe: MergeRecipe,
    settings: Distil,
    reference: StoredModel,
    states: Mapping[Path, State],
    merged: State,
    on_step: Callable[[str], None],
) -> tuple[State, DistillationReport]:
    """Return the distilled tensors in the names of the files, and what distillation changed.

    Args:
        recipe: the recipe, whose models are the teachers.
        settings: its distillation.
        reference: the model whose config says which module runs them.
        states: the aligned tensors of all models.
        merged: the merged tensors.
        on_step: called with what is done next.

    Raises:
        ModelError: the module is not known, the data do not fit it, or a model is not finite.
    """
    executable = executable_of(reference, Source(module=recipe.module))
    require_parameters(reference, executable)
    task = TASKS["classification"] if recipe.task is None else read_task(recipe.task)
    on_step("reading the data of the distillation")
    data = read_data(settings.data, executable.module, "--distill")
    teachers = [module_state(executable, source.model, states[source.model]) for source in recipe.parts[0].sources]
    student = module_state(executable, Path("the merged model"), merged)
    on_step("distilling")

    def compute() -> Distillation:
        batches = without_targets(data, executable.module)
        return distil(executable.module, student, teachers, batches, task, settings.passes, settings.rate)

    result = run(executable.module, settings.data, compute)
    state = StoredState(executable.layout, merged, result.state)
    return state, DistillationReport(result.before, result.after)
