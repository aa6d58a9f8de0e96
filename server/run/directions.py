"""How the clients' updates of a round lie: looked at as they are folded, finished with the model that the round ends in.

What a round moves the global model by is known only then: layers may be fitted after the fusion, a path may be
walked, and the server's step comes last.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.strategies.diagnostics.update_cosines import Drift, Vector
from fedbasin.strategies.tensors.state import State


class Directions:
    """The running measurement of one round.

    Attributes:
        seconds: what it has taken.
    """

    def __init__(self, anchor: State, previous: Vector | None = None) -> None:
        """Begin.

        Args:
            anchor: the global model that the clients were sent.
            previous: what the round before moved it by, where that is known.
        """
        self.seconds = 0.0
        with self._working():
            self._drift = Drift(anchor, previous)

    def add(self, parameters: State, report: pb.ClientReport) -> None:
        """One client's model; its update's norm and cosine go into its report."""
        with self._working():
            direction = self._drift.add(parameters)
        if direction is None:
            return
        report.update_norm = direction.norm
        if direction.cosine is not None:
            report.update_cosine = direction.cosine

    def finish(self, model: State) -> tuple[pb.Drift, Vector] | None:
        """Compare the clients with what the round has moved the global model by.

        Args:
            model: the global model that the round ends in.

        Returns:
            what the round reports, and the movement at the entries that are looked at; None where no client's
            update was.
        """
        drift = self._drift
        if not drift.clients:
            return None
        with self._working():
            movement = drift.movement(model)
            found = drift.finish(movement)
        report = pb.Drift(
            clients=found.clients,
            entries=drift.sample.entries,
            of=drift.sample.of,
            norm=found.norm,
            fused=found.fused,
            previous=found.previous,
            clients_mean=found.pairs,
            seconds=self.seconds,
        )
        return report, movement

    @contextmanager
    def _working(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
