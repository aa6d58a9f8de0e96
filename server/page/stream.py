"""Server-sent events: the rounds of a run so far and then each as it ends.

Each event carries its round's number as id, so that a browser that reconnects goes on after the last it has seen.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from fedbasin.server.observe.history import ClosedError, Entry, History

SILENCE_SECONDS = 15.0  # proxies close a connection that is silent for longer


async def stream_events(history: History, run_id: str, from_round: int) -> AsyncGenerator[str, None]:
    """Yield the events of one reader; `event: end` says that nothing more will come.

    Where no round ends for a while, or the run is lost, `event: state` says so.

    Raises:
        FullError: there are as many readers as there may be; nothing has been yielded yet.
    """
    with history.watching():
        yield ": connected\n\n"  # or the browser would wait for the headers as long as for a round
        try:
            async with (
                aclosing(history.watch(run_id, from_round)) as entries,
                aclosing(_with_silence(entries)) as entries_or_silence,
            ):
                if history.state(run_id) == "lost":
                    yield _state_event("lost")
                async for entry in entries_or_silence:
                    run_id = entry.run.run_id if entry else run_id
                    yield _event(entry) if entry else _state_event(history.state(run_id))
        except ClosedError:
            return  # the observer stops: the reader's browser tries again
        yield "event: end\ndata: {}\n\n"


async def _with_silence(entries: AsyncIterator[Entry]) -> AsyncGenerator[Entry | None, None]:
    """Yield the entries, and None whenever none came for a while."""
    # `wait` and not `wait_for`: a timeout must not cancel the pending read, which would end the watch.
    pending = asyncio.ensure_future(anext(entries, None))
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=SILENCE_SECONDS)
            if done and pending.result() is None:
                return
            yield pending.result() if done else None
            if done:
                pending = asyncio.ensure_future(anext(entries, None))
    finally:
        pending.cancel()
        await asyncio.wait({pending})


def _state_event(state: str) -> str:
    return f"event: state\ndata: {state}\n\n"


def _event(entry: Entry) -> str:
    return f"id: {entry.round}\nevent: round\ndata: {entry.brief}\n\n"
