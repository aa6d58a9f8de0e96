"""Time that passes only where somebody waits: what a grid does about it then depends on no machine."""

import threading

from fedbasin.server.exchange import reply_pulls, streaming_grid
from tests.server import fake_grid
from tests.waiting import LONG

_Pull = reply_pulls.Pull


class Clock:
    """In place of the module `time`, for the grid and for the fake one below it."""

    def __init__(self, patch):
        self.now = 0.0
        self._pulls = []
        patch.setattr(streaming_grid, "time", self)
        patch.setattr(reply_pulls, "time", self)
        patch.setattr(fake_grid, "time", self)
        patch.setattr(reply_pulls, "Pull", self._pull)

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        """Time passes for who waits for it; a pull's thread stands still until it has passed."""
        thread = threading.current_thread()
        if isinstance(thread, Pull):
            thread.sleep_until(self.now + seconds)
        else:
            self.now += seconds

    def close(self):
        """Lets go of the transfers that are still under way."""
        for pull in self._pulls:
            pull.wake()
            threading.Thread.join(pull, LONG)

    def _pull(self, *arguments):
        self._pulls.append(Pull(self, *arguments))
        return self._pulls[-1]


class Pull(_Pull):
    """A pull whose transfer takes the clock's time, and all else of it none."""

    def __init__(self, clock, *arguments):
        self._clock = clock
        self._due = None
        self._resting, self._awake = threading.Event(), threading.Event()
        super().__init__(*arguments)

    def run(self):
        super().run()
        self._resting.set()

    def sleep_until(self, due):
        if due > self._clock.now:
            self._due = due
            self._resting.set()
            assert self._awake.wait(LONG)

    def wake(self):
        self._awake.set()

    def join(self, timeout=None):
        assert self._resting.wait(LONG)
        if self._due is not None:
            self._clock.now = min(self._due, self._clock.now + timeout)
            if self._clock.now < self._due:
                return
            self.wake()
        super().join(LONG)
