"""A run's folder: the global models after the last rounds, and the reports of all rounds.

    runs/<run>/global.safetensors             the last finished round's model; round, settings and checksums in its metadata
    runs/<run>/global-<round>.safetensors     the models of the rounds before
    runs/<run>/optimizer-<round>.safetensors  the state of the server optimizer, models that are not served and that the next
                                              round needs, and the head's remembered sums, where there are any
    runs/<run>/rounds.jsonl                   one round report a line

The model file is replaced in one step, so a run that is cut off anywhere leaves the round before whole. A file that a
disk has damaged does not have its checksum, and the run goes on after the round before.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedbasin.proto import packing
from fedbasin.proto.report import ReportError, RoundReport

MODEL = "global.safetensors"
REPORTS = "rounds.jsonl"

# Names of tensors of models and sums in the file beside the served model's.
_TRAINED, _AVERAGE, _BEFORE, _MEMORY = "trained/", "average/", "before/", "memory/"


# What reading a damaged file may raise; nested too deeply, JSON ends in a RecursionError.
_DAMAGES = (SafetensorError, OSError, ValueError, RecursionError)
_ROUND_DIGITS = 9


class CheckpointError(ValueError):
    """A folder that a run cannot go on from."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run between two rounds.

    Attributes:
        server_round: the last finished one.
        model: the model that is served after it.
        settings: what decides the result, as text; a run can only go on with the same.
        optimizer_state: the state of the server optimizer.
        trained: the model that the next round trains on; empty where it is the served one.
        average: the mean from which training can go on as ever; empty where it is one of these.
        before: the model that the round began with, where the next one may go on in its direction; empty elsewhere.
        memory: the head's sums of earlier rounds, by client.
        passed_over: damaged files of later rounds that were found on the way to this one, and what is wrong with them.
    """

    server_round: int
    model: dict[str, Tensor]
    settings: str
    optimizer_state: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()


def save(folder: Path, checkpoint: Checkpoint, most: int = 3) -> None:
    """Write a checkpoint, and keep those before it.

    Args:
        folder: the run's folder.
        checkpoint: the state after a round.
        most: number of checkpoints that are kept, this one included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    memory = {
        **checkpoint.optimizer_state,
        **{f"{_TRAINED}{name}": tensor for name, tensor in _unshared(checkpoint.trained).items()},
        **{f"{_AVERAGE}{name}": tensor for name, tensor in _unshared(checkpoint.average).items()},
        **{f"{_BEFORE}{name}": tensor for name, tensor in _unshared(checkpoint.before).items()},
        **{f"{_MEMORY}{name}": tensor for name, tensor in checkpoint.memory.items()},
    }
    if memory:
        _write(memory, _memory(folder, checkpoint.server_round), {})
    metadata = {
        "round": str(checkpoint.server_round),
        "settings": checkpoint.settings,
        "sha256": packing.digest(checkpoint.model).hex(),
        "optimizer-sha256": packing.digest(memory).hex(),
    }
    _keep_earlier(folder, checkpoint.server_round - 1, most)
    _write(_unshared(checkpoint.model), folder / MODEL, metadata)
    # Those before go last: until the model is there, they are what a run would go on from.
    for path in (_earlier, _memory):
        path(folder, checkpoint.server_round - most).unlink(missing_ok=True)


def load(folder: Path) -> Checkpoint:
    """Read the last checkpoint of a run that is whole.

    Raises:
        CheckpointError: there is none, or none of them is whole.
    """
    damaged: list[str] = []
    for path in _checkpoints(folder):
        try:
            return replace(_load(folder, path), passed_over=tuple(damaged))
        except _DAMAGES as error:
            damaged.append(f"{path} is no checkpoint of fedbasin: {error}")
    if not damaged:
        raise CheckpointError(f"{folder / MODEL} is not there; resume takes the folder of a run with a finished round")
    raise CheckpointError(f"{'; '.join(damaged)}; put back a copy of one, or set resume = 'new' to start anew")


def serve(folder: Path, server_round: int) -> dict[str, Tensor]:
    """Make an earlier round's model the one of the folder, and return it.

    Args:
        folder: the run's folder.
        server_round: number of the round, whose checkpoint is kept.

    Raises:
        CheckpointError: its checkpoint is damaged.
    """
    path = _earlier(folder, server_round)
    try:
        model = _load(folder, path).model
    except _DAMAGES as error:
        raise CheckpointError(f"{path}, the model of the best round, cannot be read: {error}") from error
    part = folder / f"{MODEL}.part"
    shutil.copyfile(path, part)
    part.replace(folder / MODEL)
    return model


def _load(folder: Path, path: Path) -> Checkpoint:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    done = _round_of(metadata)
    memory = _memory(folder, done)
    remembered = load_file(memory) if memory.is_file() else {}
    for what, tensors, key in (("the model", model, "sha256"), (memory.name, remembered, "optimizer-sha256")):
        if packing.digest(tensors).hex() != metadata[key]:
            raise ValueError(f"{what} does not have the checksum with which it was written")
    prefixes = (_TRAINED, _AVERAGE, _BEFORE, _MEMORY)
    trained, average, before, sums = (_taken(remembered, prefix) for prefix in prefixes)
    return Checkpoint(done, model, metadata["settings"], remembered, trained, average, before, sums)


def _round_of(metadata: Mapping[str, str]) -> int:
    """Return the round of a checkpoint's metadata; raises a ValueError where they are not those that are written."""
    if missing := [key for key in ("round", "settings", "sha256", "optimizer-sha256") if key not in metadata]:
        raise ValueError(f"its metadata lack {', '.join(missing)}")
    settings = json.loads(metadata["settings"])
    if type(settings) is not dict:
        raise ValueError("its settings are no JSON object")
    text = metadata["round"]
    if not (text.isascii() and text.isdecimal() and 0 < len(text) <= _ROUND_DIGITS and int(text)):
        raise ValueError(f"its round is {text[:_ROUND_DIGITS]!r}")
    return int(text)


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take out the tensors whose names have a prefix, and return them without it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def _checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the model files that are there, the last round's first."""
    if (folder / MODEL).is_file():
        yield folder / MODEL
    rounds = (path.stem.removeprefix("global-") for path in folder.glob("global-*.safetensors"))
    yield from (_earlier(folder, number) for number in sorted(map(int, filter(str.isdecimal, rounds)), reverse=True))


def _keep_earlier(folder: Path, server_round: int, most: int) -> None:
    """Keep the model file of the round before under another name."""
    try:
        with safe_open(folder / MODEL, "pt") as file:
            written = (file.metadata() or {}).get("round")
    except (SafetensorError, OSError):
        return
    # A damaged file of a later round, which the run had to pass over, is not the round before.
    if most == 1 or written != str(server_round):
        return
    earlier = _earlier(folder, server_round)
    earlier.unlink(missing_ok=True)
    try:
        os.link(folder / MODEL, earlier)
    except OSError:
        # Not every file system has links.
        shutil.copyfile(folder / MODEL, earlier)


def _earlier(folder: Path, server_round: int) -> Path:
    return folder / f"global-{server_round}.safetensors"


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
    """Return the reports of a run, one for each round; of a round that was repeated, the last.

    A line that was cut off is left out.
    """
    return read_lines(folder)[0]


def read_lines(folder: Path) -> tuple[list[RoundReport], list[str]]:
    """Return the reports of a run as `read_reports` does, and what is wrong with each line that is none."""
    path = folder / REPORTS
    reports: dict[int, RoundReport] = {}
    unread: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            report = RoundReport.from_json(line)
        except ReportError as error:
            unread += [f"line {number}: {str(error)[:200]}"] if line.strip() else []
            continue
        reports[report.round] = report
    return [reports[number] for number in sorted(reports)], unread


def _unshared(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors written out in full: safetensors refuses memory that two names share."""
    result, end = {}, 0
    for name, tensor in sorted(model.items(), key=lambda item: item[1].data_ptr()):
        result[name] = tensor.clone() if tensor.data_ptr() < end else tensor
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return result
