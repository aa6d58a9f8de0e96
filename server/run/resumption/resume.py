"""Whether a run can go on after a checkpoint, and which of its reports are lost."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedbasin.proto.report import Incident, IncidentKind, RoundReport
from fedbasin.server.run.resumption.checkpoint import REPORTS, Checkpoint
from fedbasin.server.run.resumption.run_folder import RunRecord
from fedbasin.server.run.settings import Settings, SettingsError
from fedbasin.strategies.tensors.state import State


def check_resumable(folder: Path, saved: Checkpoint, settings: Settings, model: State, rounds: int) -> None:
    """Check that a run can go on after a checkpoint.

    Args:
        folder: the run's folder.
        saved: its last checkpoint.
        settings: the settings of the run.
        model: the initial model.
        rounds: number of rounds that the run is to have in all.

    Raises:
        SettingsError: the checkpoint has other settings, another model, or more rounds.
    """
    past, now = (RunRecord("", 0, json.loads(text)) for text in (saved.settings, settings.decisive))
    if difference := past.difference(now):
        raise SettingsError(f"{folder} was made with other settings: {difference}; use the same settings")
    if _shapes(model) != _shapes(saved.model):
        raise SettingsError(f"{folder} holds another model; resume with the model class that made it")
    if rounds < saved.server_round:
        raise SettingsError(
            f"num_rounds = {rounds}, and {folder} has {saved.server_round} finished rounds; give as many or more, or set "
            "resume = 'new' to start anew"
        )


def damaged_reports(folder: Path, reports: Iterable[RoundReport], done: int) -> Iterator[Incident]:
    """Yield an incident where finished rounds have no whole report.

    Args:
        folder: the run's folder.
        reports: the reports that could be read.
        done: number of the last finished round.
    """
    missing = sorted(set(range(1, done + 1)) - {report.round for report in reports})
    if missing:
        rounds = f"{', '.join(map(str, missing[:3]))}{' and more' if len(missing) > 3 else ''}"
        detail = f"{folder / REPORTS} has no whole report of round {rounds}; the run goes on without what it says"
        yield Incident(IncidentKind.damaged_checkpoint.name, detail)


def _shapes(model: State) -> dict[str, object]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.items()}
