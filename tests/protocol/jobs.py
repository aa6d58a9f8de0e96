"""Settings over processes: each runs one at a time on one thread, and every point comes back as it is measured."""

import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
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
    """One after the other in this process, which is left as it was."""
    logger, threads = logging.getLogger("flwr"), torch.get_num_threads()
    level = logger.level
    _one_thread()
    try:
        yield from _one_by_one(work)
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)


def _one_by_one(work: Work) -> Iterator[Finding]:
    for setting in work.settings:
        points: list[Point] = []
        rounds = rules.rounds_of(setting.rule, work.rounds)
        rules.run(setting, rounds, work.cache_folder, points.append)
        yield from ((setting, point) for point in points)


def in_parallel(work: Work, jobs: int) -> Iterator[Finding]:
    """In `jobs` processes of this program's own, which end with it, also on Ctrl-C.

    Raises:
        BrokenProcessPool: a process died.
        Exception: what the first setting that failed had raised; the others end unfinished.
    """
    # Fresh processes: a fork would copy PyTorch's threads half-way.
    context = multiprocessing.get_context("spawn")
    points: Queue[Finding] = context.Queue()
    pool = ProcessPoolExecutor(jobs, context, _begin, (points,))
    try:
        with _interrupts_ignored():
            futures = [pool.submit(_run, setting, work) for setting in work.settings]
        yield from _as_they_come(futures, points)
        pool.shutdown()
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        # The pool's own thread waits for them; two that wait for one process get in each other's way.
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started meanwhile inherit it: on Ctrl-C the parent ends them, and they say nothing."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _as_they_come(futures: Iterable[Future[int]], points: "Queue[Finding]") -> Iterator[Finding]:
    """Every point of every setting that was finished, then the first failure, if there was one."""
    waiting, owed, failure = set(futures), 0, None
    while owed > 0 or (waiting and failure is None):
        done, waiting = wait(waiting, _GLANCE_SECONDS, FIRST_EXCEPTION)
        for future in done:
            failure = failure or future.exception()
            # The pipe of the points may be slower than that of the results.
            owed += 0 if future.exception() else future.result()
        for finding in _drained(points):
            owed -= 1
            yield finding
    if failure is not None:
        raise failure


def _drained(points: "Queue[Finding]") -> Iterator[Finding]:
    while True:
        try:
            yield points.get(timeout=_GLANCE_SECONDS / 2)
        except queue.Empty:
            return


def _begin(points: "Queue[Finding]") -> None:
    global _points
    _points = points
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _one_thread()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its children."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)


def _run(setting: Setting, work: Work) -> int:
    """Run one setting; returns how many points it has put."""
    count = 0

    def put(point: Point) -> None:
        nonlocal count
        count += 1
        _points.put((setting, point))

    rules.run(setting, rules.rounds_of(setting.rule, work.rounds), work.cache_folder, put)
    return count
