"""The server's own probe set: distances of some accepted clients' models, and of the new global model from them.

The models of a few clients of a round are kept on disk until the round's model is there, two are read at a time, and
nothing of them stays. The choice of clients does not depend on their speed: the ones with the lowest draws are kept.
"""

import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from pathlib import Path as File

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedbasin.proto.report import PathSums, ProbedPath, ServerProbe
from fedbasin.server.run.settings import SettingsError
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.diagnostics.ensemble import Ensemble
from fedbasin.strategies.diagnostics.evaluation import evaluate, predict
from fedbasin.strategies.diagnostics.model_pairs import from_fused, pairwise
from fedbasin.strategies.diagnostics.probe_sampling import draw
from fedbasin.strategies.round.fuse import Align
from fedbasin.strategies.tasks.model_task import Task, task_of
from fedbasin.strategies.tensors.batches import Batches
from fedbasin.strategies.tensors.state import State, floating

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """Data of the server's own on which models are compared.

    Attributes:
        model: gives the architecture; it is left as it was.
        batches: `(inputs, targets)` or with a padding mask, as a client's data; read once for every model.
        task: the task or its name, as for `basin`; None takes the one that the first batch shows.

    Raises:
        TypeError: the batches can be read only once.
        ValueError: there is no task of this name.
    """

    model: nn.Module
    batches: Batches
    task: Task | str | None = None

    def __post_init__(self) -> None:
        if self.task is not None:
            task_of(self.task)
        if isinstance(self.batches, Iterator):
            raise TypeError("a probe set is read once for every model; pass a list or a DataLoader")


@dataclass(eq=False)
class ModelSpool(Mapping[str, dict[str, Tensor]]):
    """Models of a few clients on disk, by node id; read anew each time.

    Attributes:
        folder: folder in which one for the models is made, which goes with this object.
        rest: tensors that clients do not send.
        limit: largest number of models.
        server_round: decides, with the node ids, which clients are kept.
        written_bytes: bytes written so far.
        seconds: time taken so far.
    """

    folder: File
    rest: State
    limit: int
    server_round: int
    written_bytes: int = 0
    seconds: float = 0.0
    _paths: dict[int, File] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(prefix="probe-", dir=self.folder)

    def keep(self, node: int, parameters: State) -> None:
        """Write a client's model, if its draw is among the lowest so far; a higher one then goes."""
        began = time.perf_counter()
        last = max(self._paths, key=self._draw, default=node)
        is_low = self._draw(node) < self._draw(last)
        if len(self._paths) < self.limit or node in self._paths or is_low:
            path = File(self._temporary.name) / f"{node}.safetensors"
            save_file({n: t.contiguous() for n, t in floating(parameters).items()}, path)
            self.written_bytes += path.stat().st_size
            self._paths[node] = path
            if len(self._paths) > self.limit:
                self._paths.pop(last).unlink()
        self.seconds += time.perf_counter() - began

    def retain(self, nodes: list[int]) -> None:
        """Forget all but some clients: one accepted in an attempt that failed may not be part of the next."""
        for node in self._paths.keys() - set(nodes):
            self._paths.pop(node).unlink()

    def close(self) -> None:
        """Remove the models."""
        self._temporary.cleanup()

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        return {**self.rest, **load_file(self._paths[int(name)])}

    def __iter__(self) -> Iterator[str]:
        return map(str, sorted(self._paths))

    def __len__(self) -> int:
        return len(self._paths)

    def _draw(self, node: int) -> int:
        return draw(node, self.server_round)


def measure_probe(probe_set: ProbeSet, fused: State, clients: Mapping[str, State], points: int) -> ServerProbe:
    """Measure the paths between clients and from the fused model to each, and the ensemble of the clients.

    Args:
        probe_set: the data.
        fused: the new global model.
        clients: aligned models by node id; at most two are read at a time.
        points: number of points of every path.

    Raises:
        ValueError: a model's loss is not finite, or the data is not the same each time.
    """
    model, batches, task = probe_set.model, probe_set.batches, probe_set.task
    score = partial(evaluate, model, batches=batches, task=task)
    probe = ServerProbe(
        nodes=tuple(map(int, clients)),
        pairs=tuple(
            ProbedPath(int(pair.a), int(pair.b), _sums(pair.path)) for pair in pairwise(clients, score, points)
        ),
        fused=tuple(ProbedPath(0, int(name), _sums(path)) for name, path in from_fused(fused, clients, score, points)),
    )
    if not clients:
        return probe
    predictions = [part for name in clients if (part := predict(model, clients[name], batches, task)) is not None]
    if not predictions:
        return replace(probe, ensemble_loss=math.nan, ensemble_accuracy=math.nan)
    ensemble = reduce(add, (Ensemble.of(probabilities) for probabilities, _ in predictions))
    targets = predictions[0][1]
    return replace(probe, ensemble_loss=ensemble.loss(targets), ensemble_accuracy=ensemble.accuracy(targets))


@dataclass(eq=False)
class ProbeRun:
    """The probe set of a run, if the app gave one, and the models that are kept for it in the current round.

    Attributes:
        probe_set: None where the app gave none; nothing is kept then.
        limit: largest number of clients whose models are kept.
        points: number of points of every path.
        folder: folder of the run.
    """

    probe_set: ProbeSet | None
    limit: int
    points: int
    folder: File
    _spool: ModelSpool | None = None

    def check(self, model: State, align: Align) -> None:
        """Refuse what could only fail later.

        Raises:
            SettingsError: the server aligns, after the models are kept.
            ValueError: the probe set's model or data does not fit the run's model.
        """
        if self.probe_set is None:
            return
        if align == "server":
            raise SettingsError(
                "a probe set with align = 'server': clients' models are kept as they are sent, and these are not aligned "
                "yet; set align = 'client', or pass no probe_set"
            )
        evaluate(self.probe_set.model, model, self.probe_set.batches, self.probe_set.task)

    def begin(self, model: State, server_round: int) -> None:
        """Begin a round from a global model."""
        if self.probe_set is not None:
            self._spool = ModelSpool(self.folder, model, self.limit, server_round)

    def keep(self, node: int, parameters: State) -> None:
        """Keep an accepted client's model, if it is among those that are measured."""
        if self._spool is not None:
            self._spool.keep(node, parameters)

    def finish(self, model: State, accepted: list[int]) -> ServerProbe | None:
        """Return the measurements of a round, once there is a new model; None without a probe set."""
        spool = self._spool
        if spool is None or self.probe_set is None:
            return None
        began = time.perf_counter()
        spool.retain(accepted)
        try:
            probe = measure_probe(self.probe_set, model, spool, self.points)
        except ValueError as error:
            # A loss that is not finite: the model stands, its numbers do not.
            _LOG.warning("probe set, round %d: %s", spool.server_round, error)
            probe = ServerProbe()
        self.stop()
        return replace(
            probe,
            accepted=len(accepted),
            spooled_bytes=spool.written_bytes,
            seconds=spool.seconds + time.perf_counter() - began,
        )

    def stop(self) -> None:
        """Remove the models that are kept."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None


def _sums(path: Path) -> PathSums:
    return PathSums(
        points=path.points, loss_after=path.loss, correct_after=path.correct, examples=path.examples, clients=1
    )
