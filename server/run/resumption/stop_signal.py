"""SIGTERM as the end of a run that is continued later: the round is abandoned, and the process ends with status 0."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedError(SystemExit):
    """A stop signal; the rounds that were finished before are in the run's folder."""

    def __init__(self, signum: int) -> None:
        super().__init__(0)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


@contextmanager
def stop_signal() -> Iterator[None]:
    """Let SIGTERM raise `StoppedError` for as long as the block lasts.

    Flower's own handler, which does the same and tells the SuperLink, stays where there is one, as does an app's.
    """
    is_main = threading.current_thread() is threading.main_thread()  # only it may set handlers
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler's signature
    raise StoppedError(signum)
