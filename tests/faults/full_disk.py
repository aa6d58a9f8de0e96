"""A run on a disk of its own that becomes full, and goes on after it has been made larger; prints what happened.

Started by test_disk.py in a mount namespace of its own, where it may mount.
"""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, RecordDict

from fedbasin.server.run.resumption import checkpoint
from fedbasin.server.run.resumption.checkpoint import CheckpointError
from fedbasin.server.strategy import FedBasin
from tests.faults.seeded_grid import SeededGrid

ROUNDS = 6


def start(folder: Path, robust: str, resume: Path | None = None) -> dict[str, torch.Tensor]:
    strategy = FedBasin(
        context=Context(1, 1, {}, RecordDict(), {}),
        robust=robust,
        align="off",
        fraction_evaluate=0.0,
        min_train_nodes=5,
        folder=folder,
        resume=str(resume or ""),
        server_optimizer="momentum",
    )
    return strategy.start(SeededGrid(5), ArrayRecord({"weight": torch.zeros(100, 100)}), ROUNDS).state_dict


def fill(folder: Path, keep: int) -> Path:
    """Fill the disk up to some bytes."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            file.truncate(max(0, file.tell() - keep))
    return ballast


def main(disk: Path, robust: str, keep: int) -> None:
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    undisturbed = start(disk.with_name("undisturbed"), robust)
    ballast = fill(disk, keep)
    error = None
    try:
        start(disk, robust)
    except Exception as problem:  # noqa: BLE001 - whatever ends the run is what the test judges
        error = f"{type(problem).__name__}: {problem}"
    ballast.unlink()
    saved = last_checkpoint(disk)
    model = start(disk, robust, saved)
    equal = all(torch.equal(undisturbed[name], tensor) for name, tensor in model.items())
    print(json.dumps({"error": error, "resumed": saved is not None, "equal": equal}))


def last_checkpoint(disk: Path) -> Path | None:
    """Return the folder of a run that can be resumed; None where the disk was full before the first checkpoint."""
    for path in disk.rglob("rounds.jsonl"):
        with suppress(CheckpointError):
            checkpoint.load(path.parent)
            return path.parent
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
