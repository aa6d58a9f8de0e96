"""Directions of the clients' updates, measured as they are added and finished with the round's model.

The movement of the global model is known only then: layers may be fitted after the fusion, a path may be probed, and
the server optimizer comes last.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fedbasin.proto.report import UpdateCosines
from fedbasin.strategies.diagnostics.update_cosines import UpdateCosineAccumulator, Vector
from fedbasin.strategies.tensors.state import State


class UpdateDirections:
    """The running measurement of one round.

    Attributes:
        seconds: time that the measurement has taken.
    """

    def __init__(self, anchor: State, previous: Vector | None = None) -> None:
        """Begin.

        Args:
            anchor: the global model that the clients were sent.
            previous: the movement of the round before, at the sampled entries; None where it is not known.
        """
        self.seconds = 0.0
        with self._timed():
            self._drift = UpdateCosineAccumulator(anchor, previous)

    def add(self, parameters: State) -> tuple[float | None, float | None]:
        """Add one client's model; return the norm of its update, and its cosine with the round before."""
        with self._timed():
            direction = self._drift.add(parameters)
        return (None, None) if direction is None else (direction.norm, direction.cosine)

    def finish(self, model: State) -> tuple[UpdateCosines, Vector] | None:
        """Compare the clients with the movement of the global model.

        Args:
            model: the global model that the round ends in.

        Returns:
            The cosines, and the movement at the sampled entries; None where no client was added.
        """
        drift = self._drift
        if not drift.clients:
            return None
        with self._timed():
            movement = drift.movement(model)
            measured = drift.finish(movement)
        cosines = UpdateCosines(
            clients=measured.clients,
            entries=drift.sample.entries,
            total_entries=drift.sample.of,
            norm=measured.norm,
            fused=measured.fused,
            previous=measured.previous,
            clients_mean=measured.pairs,
            seconds=self.seconds,
        )
        return cosines, movement

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
