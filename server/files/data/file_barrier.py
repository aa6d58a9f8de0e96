"""The loss barrier between two stored models, as they are and after the second is aligned to the first."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from torch import Tensor

from fedbasin.proto.report import AlignmentReport
from fedbasin.server.files.align_file import fold_stored
from fedbasin.server.files.data.given_data import read_data, read_task
from fedbasin.server.files.data.model_on_data import require_executable, run, runnable_state
from fedbasin.server.files.data.stored_matching import StoredMatching
from fedbasin.server.files.reading import ModelError, StoredModel, few, refuse_not_finite
from fedbasin.server.files.shared_tensors import SharedTensors, shared_tensors
from fedbasin.server.files.stored_symmetry import SymmetricModel
from fedbasin.server.report.charts.text import number
from fedbasin.strategies.alignment.transformed_state import TransformedState
from fedbasin.strategies.diagnostics.barrier import Barriers, Path, barriers
from fedbasin.strategies.diagnostics.ensemble import Ensemble
from fedbasin.strategies.diagnostics.evaluation import predict
from fedbasin.strategies.diagnostics.loss_path import path_losses


@dataclass(frozen=True)
class EnsembleScore:
    """Mean loss and accuracy of the mean of both models' probabilities: a ceiling for what a merge could reach."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class FileBarrier:
    """The paths between two models.

    Attributes:
        anchor: path of the model at t = 0.
        model: path of the model at t = 1.
        before: the straight line to the model as it is.
        after: the straight line to the aligned model.
        alignment: how far the alignment moved it.
        ensemble: the ensemble of both models; None where the task has no classes.
    """

    anchor: str
    model: str
    before: Path
    after: Path
    alignment: AlignmentReport
    ensemble: EnsembleScore | None

    @property
    def barriers(self) -> tuple[Barriers, Barriers]:
        """All barriers of both paths."""
        return barriers(self.before), barriers(self.after)

    def to_json(self) -> dict[str, Any]:
        """Return the means at each point and the barriers, for programs."""
        record: dict[str, Any] = {
            "anchor": self.anchor,
            "model": self.model,
            "examples": self.before.examples,
            "t": self.before.points,
            "distance_before": self.alignment.distance_before,
            "distance_after": self.alignment.distance_after,
        }
        for name, path, values in zip(("before", "after"), (self.before, self.after), self.barriers, strict=True):
            record[name] = {"loss": path.mean_loss, "accuracy": path.accuracy, "barriers": asdict(values)}
        record["ensemble"] = None if self.ensemble is None else asdict(self.ensemble)
        return record


def measure_barrier(
    anchor: StoredModel,
    model: SymmetricModel,
    data: str,
    points: int,
    task: str | None,
    matching: StoredMatching,
    on_step: Callable[[str], None],
) -> FileBarrier:
    """Evaluate the lines from an anchor to a model, before and after aligning it.

    Args:
        anchor: the model at t = 0.
        model: the model at t = 1, with its whole symmetry.
        data: function that returns the batches, `package.module:function`.
        points: number of points of each line, at least 2.
        task: name of the task; None takes the one that the first batch shows.
        matching: the matcher by which it is aligned.
        on_step: called with what is computed when it begins.

    Raises:
        ModelError: the models differ in their tensors, cannot be executed or aligned, or the data do not fit them.
    """
    kind = None if task is None else read_task(task)
    executable = require_executable(model)
    batches = read_data(data, executable.module)
    shared = shared_tensors(anchor, model, model.symmetry)
    for state, stored in ((shared.anchor, anchor), (model.state, model.stored)):
        refuse_not_finite(state, stored.path)
    _require_all(anchor, model, shared)
    start = fold_stored(anchor.path, shared.symmetry, shared.anchor)
    end = fold_stored(model.stored.path, shared.symmetry, shared.model)
    on_step(f"matching by {matching.matcher.name}")
    match = matching.match(shared.symmetry, start, end)
    aligned = TransformedState(shared.symmetry, end, dict(match.transform.elements))

    def path(name: str, *ends: Any) -> Path:
        on_step(f"evaluating the line to the model {name}")
        module, (a, b) = executable.module, (runnable_state(model, state) for state in ends)
        return run(module, data, lambda: path_losses(module, a, b, batches, points, kind))

    before, after = path("as it is", shared.anchor, shared.model), path("aligned", start, aligned)
    on_step("evaluating the ensemble")
    states = [runnable_state(model, state) for state in (shared.anchor, shared.model)]
    module = executable.module
    ensemble = run(module, data, lambda: _ensemble([predict(module, state, batches, kind) for state in states]))
    return FileBarrier(str(anchor.path), str(model.stored.path), before, after, match.report, ensemble)


def render_barrier(result: FileBarrier) -> Group:
    """Return both paths as a table, with the barriers below it."""
    curves: dict[str, Sequence[float]] = {"loss": result.before.mean_loss, "loss, aligned": result.after.mean_loss}
    if result.before.accuracy:
        curves |= {"accuracy": result.before.accuracy, "accuracy, aligned": result.after.accuracy}
    table = Table(Column("t"), *(Column(name, justify="right") for name in curves), box=None, pad_edge=False)
    for t, *values in zip(result.before.points, *curves.values(), strict=True):
        table.add_row(number(t), *map(number, values))
    before, after = result.barriers
    lines = [f"barrier {number(before.linear)} → {number(after.linear)} on {result.before.examples:,.0f} examples"]
    if before.accuracy is not None and after.accuracy is not None:
        lines.append(f"fall of the accuracy {number(before.accuracy)} → {number(after.accuracy)}")
    if result.ensemble is not None:
        score = result.ensemble
        lines.append(f"ensemble of both: loss {number(score.loss)}, accuracy {number(score.accuracy)}")
    distances = f"{result.alignment.distance_before:.6g} → {result.alignment.distance_after:.6g}"
    return Group(table, "", *lines, f"distance {distances}")


def _ensemble(predictions: Sequence[tuple[Tensor, Tensor] | None]) -> EnsembleScore | None:
    """Return the score of the mean of some models' probabilities on the same targets; None without probabilities."""
    parts = [part for part in predictions if part is not None]
    if not parts:
        return None
    ensemble, targets = reduce(add, (Ensemble.of(probabilities) for probabilities, _ in parts)), parts[0][1]
    return EnsembleScore(ensemble.loss(targets), ensemble.accuracy(targets))


def _require_all(anchor: StoredModel, model: SymmetricModel, shared: SharedTensors) -> None:
    """Refuse models of which a part is not shared, where no line between them runs."""
    differ = shared.apart or tuple(name for name in shared.model if shared.model[name].shape != model.state[name].shape)
    if differ:
        raise ModelError(
            f"{anchor.path} and {model.stored.path} do not share {few(differ)}, so there is no line between them; "
            "give models with the same head and vocabulary"
        )
