"""Settings over processes: each runs one at a time on one thread, and every point comes back as it is measured."""

import logging
import multiprocessing
import queue
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TypeAlias

import torch

from tests.protocol import rules
from tests.protocol.setting import Point, Setting

Finding: TypeAlias = tuple[Setting, Point]

_GLANCE_SECONDS = 0.2
_points: "Queue[Finding]"


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        settings: one curve each.
        rounds: how far.
        cache_folder: of tasks that take seconds to draw.
    """

    settings: list[Setting]
    rounds: int
    cache_folder: Path


def alone(work: Work) -> Iterator[Finding]:
    """One after the other in this process."""
    _one_thread()
    for setting in work.settings:
        points: list[Point] = []
        rounds = rules.rounds_of(setting.rule, work.rounds)
        rules.run(setting, rounds, work.cache_folder, points.append)
        yield from ((setting, point) for point in points)


def in_parallel(work: Work, jobs: int) -> Iterator[Finding]:
    """In `jobs` processes of this program's own, which end with it, also on Ctrl-C.

    Raises:
        BrokenProcessPool: a process died.
    """
    # Fresh processes: a fork would copy PyTorch's threads half-way.
    context = multiprocessing.get_context("spawn")
    points: Queue[Finding] = context.Queue()
    pool = ProcessPoolExecutor(jobs, context, _begin, (points,))
    try:
        futures = [pool.submit(_run, setting, work) for setting in work.settings]
        yield from _as_they_come(futures, points)
        pool.shutdown()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()


def _as_they_come(futures: Iterable[Future[None]], points: "Queue[Finding]") -> Iterator[Finding]:
    waiting: set[Future[None]] = set(futures)
    while waiting:
        done, waiting = wait(waiting, _GLANCE_SECONDS, FIRST_EXCEPTION)
        for future in done:
            future.result()
        yield from _drained(points)
    yield from _drained(points)


def _drained(points: "Queue[Finding]") -> Iterator[Finding]:
    while True:
        try:
            yield points.get(timeout=_GLANCE_SECONDS / 2)
        except queue.Empty:
            return


def _begin(points: "Queue[Finding]") -> None:
    global _points
    _points = points
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    _one_thread()


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)


def _run(setting: Setting, work: Work) -> None:
    rounds = rules.rounds_of(setting.rule, work.rounds)
    rules.run(setting, rounds, work.cache_folder, lambda point: _points.put((setting, point)))
