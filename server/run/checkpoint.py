"""A run's folder: the global model after every round, and its reports.

    runs/<run>/global.safetensors    the last finished round's model; round and settings in its metadata
    runs/<run>/optimizer-<round>.safetensors  the state of the server optimizer, where it has any
    runs/<run>/rounds.jsonl          one round report a line

The model file is replaced in one step, so a run that is cut off anywhere leaves the round before whole.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedbasin.proto.report import ReportError, RoundReport

MODEL = "global.safetensors"
REPORTS = "rounds.jsonl"


class CheckpointError(ValueError):
    """A folder that a run cannot go on from."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run between two rounds.

    Attributes:
        server_round: the last finished one.
        model: the global model after it.
        settings: what decides the result, as text; a run can only go on with the same.
        optimizer_state: the state of the server optimizer.
        handed_over: the run goes on with the recipe that takes over from the one in the settings.
    """

    server_round: int
    model: dict[str, Tensor]
    settings: str
    optimizer_state: dict[str, Tensor] = field(default_factory=dict)
    handed_over: bool = False


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in place of the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.optimizer_state:
        _write(checkpoint.optimizer_state, _memory(folder, checkpoint.server_round), {})
    metadata = {
        "round": str(checkpoint.server_round),
        "settings": checkpoint.settings,
        "handed-over": str(checkpoint.handed_over),
    }
    _write(_unshared(checkpoint.model), folder / MODEL, metadata)
    # The one before goes last: until the model is there, it is what a run would go on from.
    _memory(folder, checkpoint.server_round - 1).unlink(missing_ok=True)


def load(folder: Path) -> Checkpoint:
    """Read the last checkpoint of a run.

    Raises:
        CheckpointError: there is none, or it does not parse.
    """
    path = folder / MODEL
    if not path.is_file():
        raise CheckpointError(f"{path} is not there; resume takes the folder of a run with a finished round")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        done = int(metadata["round"])
        memory = _memory(folder, done)
        remembered = load_file(memory) if memory.is_file() else {}
        handed_over = metadata.get("handed-over") == str(True)
        return Checkpoint(done, model, metadata["settings"], remembered, handed_over)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of fedbasin: {error}") from error


def _memory(folder: Path, server_round: int) -> Path:
    return folder / f"optimizer-{server_round}.safetensors"


def _write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """In place of the file before, in one step."""
    part = path.with_name(f"{path.name}.part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def append_report(folder: Path, report: RoundReport) -> None:
    """Add a round's report as one line, after a line that was cut off if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / REPORTS).open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        whole = file.read() in (b"", b"\n")
        file.write(b"" if whole else b"\n")
        file.write(report.to_json().encode() + b"\n")


def read_reports(folder: Path) -> list[RoundReport]:
    """The reports of a run, one for each round; of a round that was repeated, the last.

    A line that was cut off is left out.
    """
    path = folder / REPORTS
    reports: dict[int, RoundReport] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            report = RoundReport.from_json(line)
        except ReportError:
            continue
        reports[report.round] = report
    return [reports[number] for number in sorted(reports)]


def _unshared(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors written out in full: safetensors refuses memory that two names share."""
    result, end = {}, 0
    for name, tensor in sorted(model.items(), key=lambda item: item[1].data_ptr()):
        result[name] = tensor.clone() if tensor.data_ptr() < end else tensor
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return result
