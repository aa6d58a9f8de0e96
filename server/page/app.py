"""The HTTP application of an observer.

    /                            the page
    /spaces?run=                 the heat maps of a run, a part of the page that a script fetches
    /api/runs                    the runs
    /api/runs/{id}/rounds?from=  rounds in brief
    /api/runs/{id}/events?from=  rounds in brief as server-sent events, past and to come
    /api/events                  events of the newest run, or of the first to come
    /metrics                     for Prometheus

Starlette and uvicorn, which Flower brings, serve it on the loop that holds the history: a watcher is a coroutine
and not a thread, and the history needs no lock.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fedbasin.server.observe.history import History
from fedbasin.server.page.headers import SecurityHeaders
from fedbasin.server.page.runs import RunReader
from fedbasin.server.page.stream import stream_events
from fedbasin.server.page.view import Choice, render_page
from fedbasin.server.report.alignment_section import draw_spaces
from fedbasin.server.report.document import read_style
from fedbasin.server.report.reported_run import ReportedRun
from fedbasin.server.report.summary import summary_to_json

_STATIC = Path(__file__).parent / "static"


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
    compression = Middleware(GZipMiddleware, compresslevel=5)
    # The security headers are outermost, so that refusals carry them too.
    return Starlette(routes=routes, middleware=[Middleware(SecurityHeaders), *guards, compression])


class _Handlers:
    """The handlers of the routes, over one history."""

    def __init__(self, history: History, registry: CollectorRegistry) -> None:
        self._history = history
        self._runs = RunReader(history)
        self._registry = registry

    async def page(self, request: Request) -> Response:
        choice = Choice.from_query(request.query_params)
        summaries = self._history.runs()
        runs = [await self._read_run(choice.run)] if summaries else []
        if runs and choice.compared not in ("", runs[0].name):
            runs.append(await self._read_run(choice.compared))
        # On a thread: drawing takes tens of milliseconds, in which no push would be taken.
        return HTMLResponse(await run_in_threadpool(render_page, summaries, runs, choice))

    async def spaces(self, request: Request) -> Response:
        run = await self._read_run(request.query_params.get("run", ""))
        return HTMLResponse(await run_in_threadpool(draw_spaces, run))

    async def metrics(self, request: Request) -> Response:
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), media_type=media_type)

    async def runs(self, request: Request) -> Response:
        del request
        return JSONResponse([asdict(run) for run in self._history.runs()])

    async def rounds(self, request: Request) -> Response:
        run, from_round = await self._read_run(request.path_params["run_id"]), _from_round(request)
        rounds = [summary_to_json(r) for r in run.rounds if r.number >= from_round]
        return JSONResponse(rounds)

    async def events(self, request: Request) -> Response:
        run_id = request.path_params.get("run_id", "")
        if run_id:
            await self._read_run(run_id)  # or the stream would wait for one that never comes
        # A browser that reconnects sends the id of its last event; that goes before what the address says.
        seen = request.headers.get("last-event-id", "")
        from_round = int(seen) + 1 if seen.isdecimal() else _from_round(request)
        stream = stream_events(self._history, run_id, from_round)
        return StreamingResponse(stream, media_type="text/event-stream")

    async def _read_run(self, run_id: str) -> ReportedRun:
        try:
            return await self._runs.read_run(run_id)
        except KeyError:
            raise HTTPException(404, f"no run '{run_id}' here; /api/runs lists them") from None


async def _style(request: Request) -> Response:
    del request
    return Response(read_style(), media_type="text/css")


def _from_round(request: Request) -> int:
    text = request.query_params.get("from", "0")
    if not text.isdecimal():
        raise HTTPException(400, f"from is '{text}', which is not a number; give the number of a round")
    return int(text)
