"""What decides a curve, and one point of it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tests.protocol.training import Training

# To be raised when the same setting means something else from now on: other data, another split, other training.
VERSION = 1


@dataclass(frozen=True)
class Setting:
    """One curve: a rule on a task, from one seed. How many rounds it goes is no part of it.

    Attributes:
        task, split, model, rule: specs, as their text.
        seed: of the split, the first model and the order of examples.
        clients: among whom the examples are shared out.
        training: what each of them does in a round.
    """

    task: str
    split: str
    model: str
    rule: str
    seed: int = 0
    clients: int = 10
    training: Training = field(default_factory=Training)

    @property
    def digest(self) -> str:
        """Of everything that decides the numbers."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Point:
    """The global model after a round; bytes and seconds are sums over clients and rounds so far.

    Attributes:
        round: 0 is the model before the first.
        accuracy, loss: on the test examples.
        bytes_up, bytes_down: of every record in every message, headers included.
        client_seconds: of processor time: training, statistics, packing.
        server_seconds: of processor time: packing, checking, folding, solving, checkpoints.
    """

    round: int
    accuracy: float
    loss: float
    bytes_up: int = 0
    bytes_down: int = 0
    client_seconds: float = 0.0
    server_seconds: float = 0.0


def as_row(setting: Setting, point: Point) -> dict[str, Any]:
    """A line of the results."""
    named = asdict(setting)
    training = named.pop("training")
    return {"digest": setting.digest, **named, **training, **asdict(point)}


def from_row(row: Mapping[str, Any]) -> tuple[Setting, Point]:
    """What a line of the results says.

    Raises:
        ValueError: it was not written by this version of the protocol.
    """
    try:
        training = Training(**_own(Training, row))
        setting = Setting(**{**_own(Setting, row), "training": training})
        point = Point(**_own(Point, row))
    except TypeError as error:
        raise ValueError(str(error)) from error
    if row.get("digest") != setting.digest:
        raise ValueError(f"its digest is {row.get('digest')}, and its settings give {setting.digest}")
    return setting, point


def _own(kind: type, row: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: row[field.name] for field in fields(kind) if field.name in row}
