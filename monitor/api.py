"""The monitor's web side: its JSON API with an OpenAPI description, metrics, events and the page."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

import swarm
from swarm.data_structures import PeerName

from .documents import Document
from .events import EventStreams
from .failures import add_failure_handlers, failures
from .guard import Guard
from .hiding import hide_addresses
from .limits import Turnstile
from .metrics import Metrics
from .monitor import Monitor
from .page_files import PAGE_FOLDER, read_page
from .report import ModelOverview, ReachabilityReport, ServerReport, SwarmReport, TraceReport, TraceRequest
from .state import StateDocument
from .web_settings import WebSettings

OPENAPI_PATH = "/api/v1/openapi.json"
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_DESCRIPTION = """What a peer sees of a swarm of Petswarm. Errors are JSON with a sentence in `detail`.

Names and texts come from strangers: escape them wherever you show them."""


def make_app(monitor: Monitor, settings: WebSettings, page_folder: Path = PAGE_FOLDER) -> FastAPI:
    """The web side of a monitor, for one asyncio loop: the monitor's own. Raises FileNotFoundError without the page."""
    app = FastAPI(
        title="Petswarm monitor",
        description=_DESCRIPTION,
        version=swarm.__version__,
        openapi_url=OPENAPI_PATH,
        docs_url=None,  # its assets come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses=failures(421),
        generate_unique_id_function=_operation_id,
    )
    add_failure_handlers(app, monitor)
    app.include_router(_swarm_routes(monitor))
    app.include_router(_probing_routes(monitor, settings))
    app.include_router(_watching_routes(monitor, settings))
    for path, document in read_page(page_folder).items():
        app.router.routes.append(_page_route(path, document))
    app.add_middleware(Guard, hosts=settings.hosts)
    return app


def _swarm_routes(monitor: Monitor) -> APIRouter:
    """What there is."""
    router = APIRouter(prefix="/api/v1", tags=["swarm"])
    state = StateDocument(monitor)

    @router.get("/state", response_model=SwarmReport, responses=_CACHED)
    async def get_state(request: Request) -> Response:
        """The whole swarm. Its tag changes with every revision, so ask with If-None-Match."""
        return (await state.latest()).answer(request.headers)

    @router.get("/models")
    async def get_models() -> list[ModelOverview]:
        """All models, without their servers."""
        report = await asyncio.to_thread(monitor.report)
        fields = ModelOverview.model_fields
        return [ModelOverview(**{name: getattr(model, name) for name in fields}) for model in report.models]

    @router.get("/servers/{peer_id}", responses=failures(404, 422))
    async def get_server(peer_id: PeerName) -> dict[str, ServerReport]:
        """What one server serves, by fingerprint of the model."""
        report = await asyncio.to_thread(monitor.report)
        found = {
            model.fingerprint: server
            for model in report.models
            for server in model.servers
            if server.peer_id == peer_id
        }
        if not found:
            raise HTTPException(404, f"no server of this swarm has the peer id {peer_id}")
        return found

    return router


def _probing_routes(monitor: Monitor, settings: WebSettings) -> APIRouter:
    """What costs servers time, so not everybody may have it done at any time."""
    router = APIRouter(prefix="/api/v1", tags=["probes"], dependencies=[Depends(_refuse_other_sites)])
    traces = Turnstile(settings.traces, settings.traces_each)
    checks = Turnstile(settings.reachability, settings.reachability_each)

    @router.post(
        "/trace",
        dependencies=[Depends(_refuse_forms)],
        responses=failures(403, 404, 408, 409, 413, 415, 422, 429, 503),
    )
    async def trace(request: Request, wanted: TraceRequest) -> TraceReport:
        """Send a test request through the swarm and tell where the time went."""
        with traces.admit(_caller(request)):
            return await monitor.trace(wanted)

    @router.get("/is_reachable/{peer_id}", responses=failures(403, 422, 429, 503))
    async def is_reachable(request: Request, peer_id: PeerName) -> ReachabilityReport:
        """Try to reach a peer from here, and tell at which step that fails and why."""
        with checks.admit(_caller(request)):
            report = await monitor.is_reachable(peer_id)
        if monitor.config.show_addresses:
            return report
        return report.model_copy(update={"reason": hide_addresses(report.reason)})

    return router


def _watching_routes(monitor: Monitor, settings: WebSettings) -> APIRouter:
    """What pages and collectors of figures stay on."""
    router = APIRouter(tags=["watching"])
    streams = EventStreams(monitor, settings.max_streams, settings.heartbeat)
    metrics = Metrics(monitor.latencies)

    @router.get("/api/v1/events", response_class=Response, responses=_EVENTS | failures(503))
    async def get_events() -> Response:
        """Server-sent events: `revision`, with the number of the latest, whenever there is another."""
        return streams.answer()

    @router.get("/metrics", response_class=Response, responses=_FIGURES)
    async def get_metrics() -> Response:
        """Figures in Prometheus' text format."""
        report = await asyncio.to_thread(monitor.report)
        return Response(metrics.render(report), headers={"Content-Type": _METRICS_TYPE, "Cache-Control": "no-store"})

    return router


def _page_route(path: str, document: Document) -> Route:
    async def get_file(request: Request) -> Response:
        return document.answer(request.headers)

    return Route(path, get_file)


_CACHED: dict[int | str, dict[str, object]] = {304: {"description": "The caller has it."}}
_EVENTS: dict[int | str, dict[str, object]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Until one side ends it."}
}
_FIGURES: dict[int | str, dict[str, object]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "The figures."}
}


def _refuse_other_sites(request: Request) -> None:
    """Browsers say whose page asks. One of another site, or of another port here, shall not spend servers' time."""
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise HTTPException(403, "a page of another site asked for this: open the monitor's own page")


def _refuse_forms(request: Request) -> None:
    """A page of any site can send a form here, but no JSON. Also where the browser does not say whose page it is."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send the request as application/json")


def _caller(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def _operation_id(route: APIRoute) -> str:
    return route.name
