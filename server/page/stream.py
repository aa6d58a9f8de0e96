"""Server-sent events: the rounds of a run so far and then each as it ends.

Each event carries its round's number as id, so that a browser that reconnects goes on after the last it has seen.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from fedbasin.proto.fedbasin_pb2 import RoundReport
from fedbasin.server.observe.history import ClosedError, History
from fedbasin.server.report.summary import as_json, summarise

SILENCE_SECONDS = 15.0  # proxies give up a connection that says nothing for longer


async def events(history: History, run_id: str, from_round: int) -> AsyncGenerator[str, None]:
    """The stream of one reader; `event: end` says that nothing more will come."""
    yield ": connected\n\n"  # or the browser would wait for the answer's head as long as for a round
    try:
        async with (
            aclosing(history.watch(run_id, from_round)) as reports,
            aclosing(_with_silence(reports)) as heard,
        ):
            async for report in heard:
                yield _event(report) if report else ": still here\n\n"
    except ClosedError:
        return  # the observer stops: the reader's browser tries again
    yield "event: end\ndata: {}\n\n"


async def _with_silence(
    reports: AsyncIterator[RoundReport],
) -> AsyncGenerator[RoundReport | None, None]:
    """The same reports, and None whenever nothing came for a while."""
    coming = asyncio.ensure_future(anext(reports, None))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=SILENCE_SECONDS)
            if done and coming.result() is None:
                return
            yield coming.result() if done else None
            if done:
                coming = asyncio.ensure_future(anext(reports, None))
    finally:
        coming.cancel()
        await asyncio.wait({coming})


def _event(report: RoundReport) -> str:
    data = json.dumps(as_json(summarise(report)), allow_nan=False)
    return f"id: {report.round}\nevent: round\ndata: {data}\n\n"
