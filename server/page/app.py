"""The HTTP application of an observer.

    /                            the page
    /spaces?run=                 the heat maps of a run, a part of the page that a script fetches
    /api/runs                    the runs
    /api/runs/{id}/rounds?from=  rounds in brief
    /api/runs/{id}/events?from=  rounds in brief as server-sent events, past and to come
    /api/events                  events of the newest run, or of the first to come
    /metrics                     for Prometheus

Starlette and uvicorn, which Flower brings, serve it on the loop that holds the history: a watcher is a coroutine
and not a thread, and the history needs no lock. Whatever is drawn, encoded or compressed is so on a thread.
"""

import gzip
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from anyio import CapacityLimiter, to_thread
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fedbasin.server.observe.history import FullError, History
from fedbasin.server.page.headers import SecurityHeaders
from fedbasin.server.page.runs import RunReader
from fedbasin.server.page.stream import stream_events
from fedbasin.server.page.view import RoundError, ShownRun, read_round, render_page
from fedbasin.server.report.alignment_section import draw_spaces
from fedbasin.server.report.document import read_style
from fedbasin.server.report.reported_run import ReportedRun

_STATIC = Path(__file__).parent / "static"
_STYLE = read_style()


def application(history: History, registry: CollectorRegistry, guards: Sequence[Middleware] = ()) -> Starlette:
    """Return the application over a history and its metrics.

    Args:
        history: reports of the runs, read on the loop that serves.
        registry: metrics behind /metrics.
        guards: middleware that checks a request first.
    """
    handlers = _Handlers(history, registry)
    routes = [
        Route("/", handlers.page),
        Route("/spaces", handlers.spaces),
        Route("/metrics", handlers.metrics),
        Route("/api/runs", handlers.runs),
        Route("/api/runs/{run_id:path}/rounds", handlers.rounds),
        Route("/api/runs/{run_id:path}/events", handlers.events),
        Route("/api/events", handlers.events),
        Route("/static/style.css", _style),  # the report's own, shared
        Mount("/static", StaticFiles(directory=_STATIC)),
    ]
    # The security headers are outermost, so that refusals carry them too.
    return Starlette(
        routes=routes,
        middleware=[Middleware(SecurityHeaders), *guards],
        exception_handlers={RoundError: _refuse_round, FullError: _refuse_reader},
    )


class _Handlers:
    """The handlers of the routes, over one history."""

    def __init__(self, history: History, registry: CollectorRegistry) -> None:
        self._history = history
        self._runs = RunReader(history)
        self._registry = registry
        # Two threads in all: more would share one interpreter, and each page and scrape would take longer.
        self._drawing, self._scraping = CapacityLimiter(1), CapacityLimiter(1)

    async def page(self, request: Request) -> Response:
        choice = ShownRun.from_query(request.query_params)
        summaries = self._history.runs()
        has_reports = any(summary.has_reported for summary in summaries)
        runs = [await self._read_run(choice.run)] if has_reports else []
        if runs and choice.compared not in ("", runs[0].name):
            runs.append(await self._read_run(choice.compared))
        return await self._draw(request, lambda: render_page(summaries, runs, choice))

    async def spaces(self, request: Request) -> Response:
        run = await self._read_run(request.query_params.get("run", ""))
        return await self._draw(request, lambda: draw_spaces(run))

    async def metrics(self, request: Request) -> Response:
        try:
            encode, media_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError) as error:
            raise HTTPException(400, f"the header Accept cannot be read: {error}") from error
        return await _respond(request, lambda: encode(self._registry), media_type, self._scraping)

    async def runs(self, request: Request) -> Response:
        del request
        return JSONResponse([asdict(run) for run in self._history.runs()])

    async def rounds(self, request: Request) -> Response:
        from_round = read_round(request.query_params.get("from", "0"), "from")
        run = request.path_params["run_id"]
        try:
            entries = sorted(self._history.entries(run, from_round), key=lambda entry: entry.round)
        except KeyError:
            raise _unknown(run) from None
        briefs = f"[{','.join(entry.brief for entry in entries)}]"
        return await _respond(request, briefs.encode, "application/json", self._drawing)

    async def events(self, request: Request) -> Response:
        run = request.path_params.get("run_id", "")
        if run and not any(run == summary.run_id for summary in self._history.runs()):
            raise _unknown(run)  # or the stream would wait for one that never comes
        # A browser that reconnects sends the id of its last event; that goes before what the address says.
        seen = request.headers.get("last-event-id")
        query = read_round(request.query_params.get("from", "0"), "from")
        from_round = query if seen is None else read_round(seen, "last-event-id") + 1
        events = stream_events(self._history, run, from_round)
        # The first before the response begins, whose status could not say any more that there are too many readers.
        return StreamingResponse(_chain(await anext(events), events), media_type="text/event-stream")

    async def _draw(self, request: Request, render: Callable[[], str]) -> Response:
        return await _respond(request, lambda: render().encode(), "text/html", self._drawing)

    async def _read_run(self, run_id: str) -> ReportedRun:
        try:
            return await self._runs.read_run(run_id)
        except KeyError:
            raise _unknown(run_id) from None


async def _respond(
    request: Request, render: Callable[[], bytes], media_type: str, threads: CapacityLimiter
) -> Response:
    """Return what a function makes on a thread, compressed where the reader takes that."""
    compressed = "gzip" in request.headers.get("accept-encoding", "")

    def body() -> bytes:
        return gzip.compress(render(), compresslevel=5) if compressed else render()

    headers = {"vary": "accept-encoding"} | ({"content-encoding": "gzip"} if compressed else {})
    return Response(await to_thread.run_sync(body, limiter=threads), headers=headers, media_type=media_type)


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in rest:
        yield event


def _unknown(run_id: str) -> HTTPException:
    return HTTPException(404, f"no run '{run_id}' here; /api/runs lists them")


async def _refuse_round(request: Request, error: Exception) -> Response:
    del request
    return Response(f"{error}\n", 400, media_type="text/plain")


async def _refuse_reader(request: Request, error: Exception) -> Response:
    del request
    return Response(f"{error}\n", 503, {"retry-after": "10"}, media_type="text/plain")


async def _style(request: Request) -> Response:
    del request
    return Response(_STYLE, media_type="text/css")
