"""Server-sent events: tells pages that there is something new to fetch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, StreamingResponse

from .monitor import Monitor

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

#: Milliseconds until a browser connects again.
_RETRY = 2000
#: Seconds after which a place may be free.
_FULL_RETRY_AFTER = 30


class EventStreams:
    """Hands out streams of revisions, of which at most `most` run at a time.

    heartbeat: seconds after which a quiet one shows that it lives: only then does a connection that broke silently come
    to light, on either side.
    """

    def __init__(self, monitor: Monitor, most: int, heartbeat: float):
        self.most = most
        self.open = 0
        self._monitor = monitor
        self._heartbeat = heartbeat

    def answer(self) -> StreamingResponse:
        """A stream, or 503 if there are too many."""
        return _EventStream(self, self._revisions())

    async def _revisions(self) -> AsyncIterator[bytes]:
        """The one now and whenever it changes, until the monitor closes."""
        yield f"retry: {_RETRY}\n\n".encode()
        sent = -1
        while not self._monitor.closed:
            revision = await self._monitor.changed(sent, self._heartbeat)
            if revision != sent:
                yield f"event: revision\ndata: {revision}\n\n".encode()
                sent = revision
            elif not self._monitor.closed:
                yield b": still here\n\n"


class _EventStream(StreamingResponse):
    """Counts itself for as long as it runs, however it ends."""

    def __init__(self, streams: EventStreams, content: AsyncIterator[bytes]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._streams.open >= self._streams.most:
            full = JSONResponse(
                {"detail": f"{self._streams.most} pages are open already: close one"},
                status_code=503,
                headers={"Retry-After": str(_FULL_RETRY_AFTER)},
            )
            await full(scope, receive, send)
            return
        self._streams.open += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.open -= 1
