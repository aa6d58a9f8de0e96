"""The result of a run."""

from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedbasin.proto.report import RoundReport


@dataclass(repr=False)
class RunResult(Result):
    """Flower's result of a run, with the reports and the folder. `arrays` is the served model.

    Attributes:
        reports: the reports of all rounds, those before a resume included.
        folder: folder of the run, with its checkpoint and reports.
        state_dict: the served model's tensors, under the model's names.
        served_round: number of the round that the served model is of; 0 where no round has run.
        trained_arrays: the model that a further round would train on; `arrays` itself where they are one.
    """

    reports: list[RoundReport] = field(default_factory=list)
    folder: Path = Path()
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    served_round: int = 0
    trained_arrays: ArrayRecord = field(default_factory=ArrayRecord)
