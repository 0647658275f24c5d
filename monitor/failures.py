"""From what went wrong to what the API answers: a status and a sentence, always `ErrorReport` as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from swarm.errors import ModelNotServed, RoutingError, SwarmError, UsageError

from .guard import SECURITY_HEADERS
from .hiding import hide_addresses
from .limits import TooOften
from .monitor import Monitor
from .report import ErrorReport

_MEANINGS: Mapping[int, str] = {
    403: "A page of another site asked.",
    404: "The swarm has no such thing.",
    408: "The request came too slowly.",
    409: "The swarm cannot do this now: blocks are missing.",
    413: "The request is too long.",
    415: "The request is not JSON.",
    421: "The Host header names another machine.",
    422: "The request is wrong: the sentence says what to change.",
    429: "Too often, or another one is under way.",
    503: "Not now: servers failed, or there is no room. The sentence says which.",
}

_NOT_JSON = "the request is not JSON"

#: Of requests that name something wrong or cannot be served, the first that fits.
_STATUSES: tuple[tuple[type[SwarmError], int], ...] = (
    (UsageError, 422),
    (ModelNotServed, 404),
    (RoutingError, 409),
    (SwarmError, 503),
)


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of a route that may answer so."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReport, "description": _MEANINGS[status]} for status in statuses
    }
    if 429 in found:
        found[429]["headers"] = {
            "Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 1}}
        }
    return found


def add_failure_handlers(app: FastAPI, monitor: Monitor) -> None:
    """Have every error answered as JSON; addresses are hidden unless the monitor may show them."""

    async def of_the_swarm(_: Request, error: Exception) -> JSONResponse:
        status = next(status for kind, status in _STATUSES if isinstance(error, kind))
        text = " ".join(str(error).split()) or type(error).__name__
        return _failure(status, text if monitor.config.show_addresses else hide_addresses(text))

    async def too_often(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, TooOften)
        return _failure(429, str(error), {"Retry-After": str(max(1, math.ceil(error.retry_after)))})

    async def not_valid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _failure(422, "; ".join(map(_in_words, error.errors()[:5])))

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        detail = str(error.detail)
        if detail == HTTPStatus.NOT_FOUND.phrase:
            detail = "there is nothing at this address: /api/v1/openapi.json lists what there is"
        elif detail == HTTPStatus.METHOD_NOT_ALLOWED.phrase:
            detail = f"{request.method} does not work here"
        elif error.status_code == HTTPStatus.BAD_REQUEST:  # of a body that is no text
            return _failure(422, _NOT_JSON)
        return _failure(error.status_code, detail, error.headers)

    async def bug(_: Request, __: Exception) -> JSONResponse:
        # this answer passes no middleware; the web server writes the error to the log
        return _failure(500, "the monitor has a bug: its log says more", SECURITY_HEADERS)

    app.add_exception_handler(SwarmError, of_the_swarm)
    app.add_exception_handler(TooOften, too_often)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, bug)


def _failure(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers=headers)


def _in_words(problem: Mapping[str, Any]) -> str:
    """Where, and what is wrong, without what was given."""
    where = ".".join(str(part) for part in problem["loc"] if part not in ("body", "path", "query"))
    if problem["type"] == "json_invalid":
        return _NOT_JSON
    what = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{where[:100] or 'the request'}: {what}"
