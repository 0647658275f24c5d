"""How a session talks to servers: two small seams, and their implementation over the network.

Tests put a fake behind the same seams that fails on demand.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from swarm.errors import (
    NotSupported,
    PeerRefused,
    PeerTimeout,
    ProtocolError,
    SessionLost,
    SessionTooLong,
    SwarmError,
    UsageError,
    from_wire,
)
from swarm.node import Node
from swarm.protocol import (
    ErrorReply,
    Message,
    Moving,
    OpenSession,
    RowSlice,
    SessionOpened,
    StepRequest,
    StepResult,
)
from swarm.routing.chain import ChainLink
from swarm.rpc import FrameStream, open_stream
from swarm.tensors import all_finite, decode, encode, lossless_codec

from .config import ClientConfig


@dataclass(frozen=True)
class SpanOutput:
    """hidden: [tokens, hidden_size], like the input. Times are the server's own measurements, in seconds."""

    hidden: torch.Tensor
    queue_time: float
    compute_time: float


class OpenSpan(Protocol):
    """One server's part of a session."""

    @property
    def moving(self) -> bool:
        """The server is leaving, and asked the session to go on elsewhere."""

    async def step(self, rows: Sequence[RowSlice], hidden: torch.Tensor) -> SpanOutput:
        """Run new tokens through the server's blocks. hidden: [tokens, hidden_size]. Raises SwarmError."""

    def close(self) -> None:
        """Give the server's cache back. Never fails, may be called twice."""


class BlockClient(Protocol):
    async def open(self, link: ChainLink, *, num_rows: int, max_length: int) -> OpenSpan:
        """Reserve cache on a server. Raises SwarmError."""


class SwarmBlockClient:
    """Opens sessions on real servers."""

    def __init__(self, node: Node, fingerprint: str, config: ClientConfig):
        self._node = node
        self._fingerprint = fingerprint
        self._config = config

    async def open(self, link: ChainLink, *, num_rows: int, max_length: int) -> OpenSpan:
        timeout = self._config.connect_timeout
        stream = await open_stream(self._node.p2p, link.peer_id, timeout)
        span = RemoteSpan(stream, link.peer_id, secrets.token_hex(16), self._config.request_timeout)
        request = OpenSession(
            session_id=span.session_id,
            fingerprint=self._fingerprint,
            span=link.span,
            num_rows=num_rows,
            max_length=max_length,
        )
        try:
            await span.start(request, timeout)
        except BaseException:
            span.close()
            raise
        return span


class RemoteSpan:
    """One server's part of a session, over one stream."""

    def __init__(self, stream: FrameStream, peer_id: str, session_id: str, timeout: float):
        self.session_id = session_id
        self.moving = False
        self._stream = stream
        self._peer_id = peer_id
        self._timeout = timeout
        self._step = 0
        self._closed = False

    async def start(self, request: OpenSession, timeout: float) -> None:
        answer, _ = await self._ask(request, b"", timeout, "accept a session")
        if not isinstance(answer, SessionOpened):
            raise ProtocolError(f"server {self._peer_id} answered {type(answer).__name__} to a request for a session")

    async def step(self, rows: Sequence[RowSlice], hidden: torch.Tensor) -> SpanOutput:
        if self._closed:
            raise SessionLost("the connection was given up when an earlier step was interrupted")
        self._step += 1
        meta, payload = encode(hidden, lossless_codec(hidden.dtype))
        request = StepRequest(session_id=self.session_id, step=self._step, rows=tuple(rows), hidden=meta)
        try:
            answer, data = await self._ask(request, payload, self._timeout, "answer a step")
        except asyncio.CancelledError:
            # The answer will come after all, and nobody will read it: this stream has lost its rhythm.
            self.close()
            raise
        if not isinstance(answer, StepResult) or answer.step != self._step or answer.hidden != meta:
            raise ProtocolError(f"server {self._peer_id} answered step {self._step} with {answer!r:.200}")
        self.moving |= answer.moving
        output = decode(answer.hidden, data)
        if not all_finite(output):
            raise ProtocolError(f"server {self._peer_id} answered with NaN or infinity")
        return SpanOutput(output, answer.queue_time, answer.compute_time)

    async def _ask(
        self, request: Message, payload: bytes | memoryview, timeout: float, action: str
    ) -> tuple[Message, bytes]:
        """Send a request and wait for its answer. `timeout` is for both: a server that hangs stops reading, too."""
        try:
            async with asyncio.timeout(timeout):
                await self._stream.send(request, payload)
                return await self._receive()
        except TimeoutError as error:
            raise PeerTimeout(f"server {self._peer_id} did not {action} within {timeout:g} s") from error

    async def _receive(self) -> tuple[Message, bytes]:
        while True:
            message, payload = await self._stream.receive()
            if isinstance(message, ErrorReply):
                raise self._error(message)
            if not isinstance(message, Moving):
                return message, payload
            self.moving = True

    def _error(self, reply: ErrorReply) -> SwarmError:
        error = from_wire(reply.error, f"server {self._peer_id}: {reply.message}", reply.tokens_left)
        if isinstance(error, UsageError | SessionTooLong | NotSupported):
            # We checked our request ourselves, so this is about the server: it may have restarted with other blocks.
            return PeerRefused(str(error))
        return error

    def close(self) -> None:
        self._closed = True
        self._stream.close()
