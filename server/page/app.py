"""The HTTP application of an observer.

    /                            the page
    /spaces?run=                  the heat maps of a run, a part of the page that is fetched when it is there
    /api/runs                    the runs
    /api/runs/{id}/rounds?from=  rounds in brief
    /api/runs/{id}/events?from=  the same as server-sent events, past and to come
    /api/events                  of the newest run, or of the first to come
    /metrics                     for Prometheus

Starlette and uvicorn, which Flower brings, serve it on the loop that holds the history: a watcher is a coroutine
and not a thread, and the history needs no lock.
"""

from collections.abc import Sequence
from pathlib import Path

from google.protobuf.json_format import MessageToDict
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
from fedbasin.server.page.runs import Runs
from fedbasin.server.page.stream import events
from fedbasin.server.page.view import Choice, page
from fedbasin.server.report.alignment_section import alignment
from fedbasin.server.report.document import style
from fedbasin.server.report.reported_run import Run
from fedbasin.server.report.summary import as_json

_STATIC = Path(__file__).parent / "static"


def application(
    history: History, registry: CollectorRegistry, guards: Sequence[Middleware] = ()
) -> Starlette:
    """The application over a history and its metrics.

    Args:
        history: read on the loop that serves.
        registry: behind /metrics.
        guards: what looks at a request first.
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
    zipped = Middleware(GZipMiddleware, compresslevel=5)
    return Starlette(routes=routes, middleware=[Middleware(SecurityHeaders), *guards, zipped])


class _Handlers:
    """The pages over one history."""

    def __init__(self, history: History, registry: CollectorRegistry) -> None:
        self._history = history
        self._runs = Runs(history)
        self._registry = registry

    async def page(self, request: Request) -> Response:
        choice = Choice.read(request.query_params)
        summaries = self._history.runs()
        runs = [await self._run(choice.run)] if summaries else []
        if runs and choice.other not in ("", runs[0].name):
            runs.append(await self._run(choice.other))
        return HTMLResponse(await run_in_threadpool(page, summaries, runs, choice))

    async def spaces(self, request: Request) -> Response:
        run = await self._run(request.query_params.get("run", ""))
        return HTMLResponse(await run_in_threadpool(alignment, run))

    async def metrics(self, request: Request) -> Response:
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), media_type=media_type)

    async def runs(self, request: Request) -> Response:
        del request
        return JSONResponse(
            [
                MessageToDict(
                    one, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
                )
                for one in self._history.runs()
            ]
        )

    async def rounds(self, request: Request) -> Response:
        run, first = await self._run(request.path_params["run_id"]), _from(request)
        return JSONResponse([as_json(one) for one in run.rounds if one.number >= first])

    async def events(self, request: Request) -> Response:
        run_id = request.path_params.get("run_id", "")
        if run_id:
            await self._run(run_id)  # or the stream would wait for one that never comes
        seen = request.headers.get("last-event-id", "")
        first = int(seen) + 1 if seen.isdecimal() else _from(request)
        stream = events(self._history, run_id, first)
        return StreamingResponse(stream, media_type="text/event-stream")

    async def _run(self, run_id: str) -> Run:
        try:
            return await self._runs.get(run_id)
        except KeyError:
            raise HTTPException(404, f"no run '{run_id}' here; /api/runs lists them") from None


async def _style(request: Request) -> Response:
    del request
    return Response(style(), media_type="text/css")


def _from(request: Request) -> int:
    text = request.query_params.get("from", "0")
    if not text.isdecimal():
        raise HTTPException(400, f"from is '{text}'; give the number of a round")
    return int(text)
