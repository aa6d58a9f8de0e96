"""A server's own probe set: how far apart some accepted clients' models lie, and the new global model from them.

The models of a few clients of a round are kept on disk until the round's model is there, two are read at a time, and
nothing of them stays. Which clients those are does not depend on who was quick: the ones with the lowest draws.
"""

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from pathlib import Path as File

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.server.run.settings import SettingsError
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.diagnostics.ensemble import Ensemble
from fedbasin.strategies.diagnostics.evaluation import evaluate, predict
from fedbasin.strategies.diagnostics.model_pairs import from_fused, pairwise
from fedbasin.strategies.diagnostics.probe_sampling import draw
from fedbasin.strategies.round.stages import Align
from fedbasin.strategies.tensors.batches import Batches
from fedbasin.strategies.tensors.state import State, floating

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")


@dataclass(frozen=True, eq=False)
class Probe:
    """What a server evaluates models on.

    Attributes:
        model: gives the architecture; it is left as it was.
        batches: `(inputs, targets)` or with a padding mask, as a client's data; read once for every model.

    Raises:
        TypeError: the batches can be read only once.
    """

    model: nn.Module
    batches: Batches

    def __post_init__(self) -> None:
        if isinstance(self.batches, Iterator):
            raise TypeError("a probe set is read once for every model; pass a list or a DataLoader")


@dataclass(eq=False)
class Spool(Mapping[str, dict[str, Tensor]]):
    """Models of at most so many clients, on disk, by node id; read anew each time.

    Attributes:
        folder: where a folder for them is made, which goes with this object.
        rest: what clients do not send, such as counters.
        most: how many are kept.
        server_round: decides, with the node ids, whose.
        written_bytes: so far.
        seconds: so far.
    """

    folder: File
    rest: State
    most: int
    server_round: int
    written_bytes: int = 0
    seconds: float = 0.0
    _kept: dict[int, File] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = tempfile.TemporaryDirectory(prefix="probe-", dir=self.folder)

    def keep(self, node: int, parameters: State) -> None:
        """Write a client's model, if its draw is among the lowest so far; another one may have to go."""
        began = time.perf_counter()
        last = max(self._kept, key=self._draw, default=node)
        if len(self._kept) < self.most or node in self._kept or self._draw(node) < self._draw(last):
            path = File(self._made.name) / f"{node}.safetensors"
            save_file({n: t.contiguous() for n, t in floating(parameters).items()}, path)
            self.written_bytes += path.stat().st_size
            self._kept[node] = path
            if len(self._kept) > self.most:
                self._kept.pop(last).unlink()
        self.seconds += time.perf_counter() - began

    def retain(self, nodes: list[int]) -> None:
        """Forget all but these: one that was accepted in an attempt that failed may not be in the next."""
        for node in self._kept.keys() - set(nodes):
            self._kept.pop(node).unlink()

    def close(self) -> None:
        """Remove what was kept."""
        self._made.cleanup()

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        return {**self.rest, **load_file(self._kept[int(name)])}

    def __iter__(self) -> Iterator[str]:
        return map(str, sorted(self._kept))

    def __len__(self) -> int:
        return len(self._kept)

    def _draw(self, node: int) -> int:
        return draw(node, self.server_round)


def measure(
    probe: Probe, fused: State, clients: Mapping[str, State], points: int
) -> pb.ServerProbe:
    """All paths between clients and from the fused model to each, and what keeping all of them would give.

    Args:
        probe: what to evaluate on.
        fused: the new global model.
        clients: aligned models by node id; at most two are read at a time.
        points: of every path.

    Raises:
        ValueError: a model's loss is not finite, or the data is not the same each time.
    """
    score = partial(evaluate, probe.model, batches=probe.batches)
    report = pb.ServerProbe(nodes=map(int, clients))
    for pair in pairwise(clients, score, points):
        report.pairs.add(a=int(pair.a), b=int(pair.b), path=_sums(pair.path))
    for name, path in from_fused(fused, clients, score, points):
        report.fused.add(b=int(name), path=_sums(path))
    if clients:
        predictions = [predict(probe.model, clients[name], probe.batches) for name in clients]
        together = reduce(add, (Ensemble.of(probabilities) for probabilities, _ in predictions))
        targets = predictions[0][1]
        report.ensemble_loss = together.loss(targets)
        report.ensemble_accuracy = together.accuracy(targets)
    return report


@dataclass(eq=False)
class Probing:
    """A run's probe set, if the app gave one, and what is kept for it in the round that is going on.

    Attributes:
        probe: None where the app gave none; nothing is kept then.
        most: clients whose models are kept.
        points: of every path.
        folder: of the run.
    """

    probe: Probe | None
    most: int
    points: int
    folder: File
    _spool: Spool | None = None

    def check(self, model: State, align: Align) -> None:
        """Refuse what could only fail later.

        Raises:
            SettingsError: the server aligns, after the models are kept.
            ValueError: the model or the data is not what the run's model fits.
        """
        if self.probe is None:
            return
        if align == "server":
            raise SettingsError(
                "a probe set with fedbasin.align = 'server': clients' models are kept as they are sent, and these "
                "are not aligned yet; set fedbasin.align = 'client', or pass no Hooks.probe"
            )
        evaluate(self.probe.model, model, self.probe.batches)

    def begin(self, model: State, server_round: int) -> None:
        """A new round, from this model."""
        if self.probe is not None:
            self._spool = Spool(self.folder, model, self.most, server_round)

    def keep(self, node: int, parameters: State) -> None:
        """An accepted client's model."""
        if self._spool is not None:
            self._spool.keep(node, parameters)

    def finish(self, model: State, accepted: list[int]) -> pb.ServerProbe | None:
        """What the round's models say, once there is a new one; None without a probe set."""
        spool = self._spool
        if spool is None or self.probe is None:
            return None
        began = time.perf_counter()
        spool.retain(accepted)
        try:
            report = measure(self.probe, model, spool, self.points)
        except (
            ValueError
        ) as error:  # a loss that is not finite: the model stands, its numbers do not
            _LOG.warning("probe set, round %d: %s", spool.server_round, error)
            report = pb.ServerProbe()
        self.stop()
        report.accepted = len(accepted)
        report.spooled_bytes = spool.written_bytes
        report.seconds = spool.seconds + time.perf_counter() - began
        return report

    def stop(self) -> None:
        """Remove what is kept."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None


def _sums(path: Path) -> pb.PathSums:
    return pb.PathSums(
        points=path.points,
        loss_after=path.loss,
        correct_after=path.correct,
        examples=path.examples,
        clients=1,
    )
