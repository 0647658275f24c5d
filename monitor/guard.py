"""What every request passes before anything else looks at it, and what every answer tells the browser."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: A trace request that names 256 servers has 34 KB at most.
MAX_BODY = 65_536
#: Seconds for the body of a request to arrive.
BODY_TIMEOUT = 10.0

SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Middleware: refuses strange hosts, and bodies that are too long or too slow. Puts SECURITY_HEADERS on answers,
    but for those that say otherwise.

    hosts: see `WebSettings.hosts`.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None):
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        if self._hosts is not None and host_of(headers.get("host", "")) not in self._hosts:
            refusal = _refusal(
                421, "this monitor does not answer under that host name: open it by the address it printed"
            )
            await refusal(scope, receive, send_with_headers)
        elif scope["method"] == "POST":
            await self._post(scope, headers, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    async def _post(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(_read_body(headers, receive), BODY_TIMEOUT)
        except TimeoutError:
            await _refusal(408, f"the request did not arrive within {BODY_TIMEOUT:.0f} s")(scope, receive, send)
            return
        except _TooLong:
            await _refusal(413, f"the request is longer than {MAX_BODY} bytes")(scope, receive, send)
            return
        if body is None:  # the caller is gone
            return
        given: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_again() -> Message:
            nonlocal given
            message, given = given, None
            return message or await receive()

        await self._app(scope, receive_again, send)


def host_of(header: str) -> str:
    """The name in a Host header, lower case, without port and brackets; "" if it is none."""
    if header.startswith("["):
        name, bracket, port = header[1:].partition("]")
        return name.lower() if bracket and (not port or _is_port(port)) else ""
    name, colon, _ = header.partition(":")
    return name.lower() if not colon or _is_port(header[len(name) :]) else ""


def _is_port(text: str) -> bool:
    return text.startswith(":") and text[1:].isdecimal()


class _TooLong(Exception):
    pass


async def _read_body(headers: Headers, receive: Receive) -> bytes | None:
    """None: the caller is gone."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        raise _TooLong
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise _TooLong
        if not message.get("more_body", False):
            return bytes(body)


def _refusal(status: int, detail: str) -> JSONResponse:
    # what is left of the request stays unread, so the connection cannot be used again
    return JSONResponse({"detail": detail}, status, {"Connection": "close"})
