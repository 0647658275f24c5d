"""Outputs go straight to the next server of a chain: the sending half. `session_stream` has the receiving one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from hivemind.p2p import P2P

from swarm.errors import PeerUnreachable, SwarmError
from swarm.protocol import PUSH_STREAM, ErrorReply, NextServer, OpenPush, StepRequest
from swarm.rpc import FrameStream, Traffic, open_stream

logger = logging.getLogger(__name__)

#: Seconds for the next server to take the connection. Then the client carries the outputs itself.
CONNECT_TIMEOUT = 5.0
#: Seconds for a step to leave, over a link that may be slow to a server that may wait for room.
SEND_TIMEOUT = 60.0


class PushLink:
    """Carries one session's steps to the session that the same client has at the next server.

    on_failure(step, reason): called when a step may not have arrived, with the number of the last one that was sent.
    traffic: counts what it carries, among others.
    """

    def __init__(
        self, p2p: P2P, target: NextServer, on_failure: Callable[[int, str], None], traffic: Traffic | None = None
    ):
        self.target = target
        self._p2p = p2p
        self._on_failure = on_failure
        self._traffic = traffic
        self._last_step: int | None = None
        self._broken: str | None = None
        self._closed = False
        self._stream: asyncio.Future[FrameStream] = asyncio.get_running_loop().create_future()
        # At once, so that the first step need not wait for a connection.
        self._task = asyncio.create_task(self._open_and_listen())

    @property
    def broken(self) -> bool:
        """It carries nothing any more."""
        return self._broken is not None

    @property
    def is_clear(self) -> bool:
        """A small step is gone at once: the connection stands and nothing waits before it, or it is broken anyway."""
        if not self._stream.done():
            return False
        return self.broken or self._stream.result().backlog == 0

    async def send(self, request: StepRequest, payload: bytes | memoryview) -> None:
        """Push a step. What goes wrong, now or later, goes to `on_failure`."""
        self._last_step = request.step
        try:
            stream = await asyncio.shield(self._stream)
            if self._broken is None:
                async with asyncio.timeout(SEND_TIMEOUT):
                    await stream.send(request, payload)
        except SwarmError as error:
            self._broken = str(error)
        except TimeoutError:
            self._broken = f"it did not take a step within {SEND_TIMEOUT:g} s"
            stream.abort()
        if self._broken is not None:
            self._complain(self._broken)

    def close(self) -> None:
        """Whoever waits in `send` goes on; nothing is complained of any more."""
        self._closed = True
        self._task.cancel()
        self._fail(PeerUnreachable("the link was closed"))

    def _fail(self, error: SwarmError) -> None:
        """There will be no stream, unless there is one."""
        if not self._stream.done():
            self._broken = str(error)
            self._stream.set_exception(error)
            self._stream.exception()  # seen: `send` will say it

    async def _open_and_listen(self) -> None:
        """Open the stream; then wait for its end, since the other side speaks only to complain."""
        try:
            stream = await open_stream(self._p2p, self.target.peer_id, CONNECT_TIMEOUT, PUSH_STREAM, self._traffic)
        except SwarmError as error:
            self._fail(error)
            return
        try:
            await stream.send(OpenPush(session_id=self.target.session_id))
            self._stream.set_result(stream)
            message, _ = await stream.receive()
            reason = message.message if isinstance(message, ErrorReply) else f"it answered {type(message).__name__}"
        except SwarmError as error:
            reason = str(error)
            self._fail(error)
        finally:
            stream.abort()
        self._broken = reason
        self._complain(reason)

    def _complain(self, reason: str) -> None:
        """The last step may not have arrived. Called once for each step at most."""
        step, self._last_step = self._last_step, None
        if step is not None and not self._closed:
            self._on_failure(step, f"server {self.target.peer_id}: {reason}")
