"""Check a request, hand it to the engine, reply. One stream carries one session; its end ends the session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from hivemind.p2p import P2P, P2PContext
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2

from swarm.data_structures import BlockSpan, ServerInfo
from swarm.errors import (
    BadSpan,
    CacheFull,
    EngineError,
    MessageTooLarge,
    NotSupported,
    PeerRefused,
    PeerUnreachable,
    ProtocolError,
    SessionLost,
    SwarmError,
    to_wire,
)
from swarm.protocol import (
    INFERENCE_STREAM,
    MAX_UPLOAD_BYTES,
    BlockProtocol,
    CloseSession,
    ErrorReply,
    Message,
    Moving,
    OpenSession,
    SessionOpened,
    StepRequest,
    StepResult,
)
from swarm.rpc import FrameStream
from swarm.tensors import all_finite, from_bytes, to_bytes

from .engine import Engine
from .openings import Openings
from .sessions import Session, SessionTable
from .tasks import StepTask

logger = logging.getLogger(__name__)

#: Bytes that a step may bring beyond what its session reserved: then it is read, and refused with what is wrong.
PAYLOAD_SLACK = 2**16


class Handler:
    """Serves the streams and questions of all peers, on the node's event loop."""

    def __init__(
        self,
        engine: Engine,
        sessions: SessionTable,
        *,
        fingerprint: str,
        info: Callable[[], ServerInfo],
        idle_limit: float,
        step_timeout: float,
    ):
        self.engine = engine
        self.sessions = sessions
        self._fingerprint = fingerprint
        self._info = info
        self.idle_limit = idle_limit
        self.step_timeout = step_timeout
        self._openings = Openings()
        self._streams: set[_SessionStream] = set()
        self.draining = False

    async def register(self, p2p: P2P) -> None:
        await BlockProtocol().add_p2p_handlers(p2p, wrapper=self)
        await p2p.add_binary_stream_handler(INFERENCE_STREAM, self._serve)

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        answer = self._openings.answer(request.uid, str(context.remote_id), self._info())
        return runtime_pb2.ExpertInfo(serialized_info=answer.model_dump_json().encode())

    async def rpc_upload(self, request: runtime_pb2.ExpertInfo, context: P2PContext) -> runtime_pb2.ExpertUID:
        size = len(request.serialized_info)
        if size > MAX_UPLOAD_BYTES:
            raise MessageTooLarge(f"an upload of {size} bytes is over the limit of {MAX_UPLOAD_BYTES}")
        return runtime_pb2.ExpertUID(uid=str(size))

    async def drain(self, timeout: float) -> None:
        """Take no more sessions, tell the running ones to move, and wait until they did, `timeout` seconds at most."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):  # telling too: a peer that reads nothing must not keep us here
                await asyncio.gather(*(stream.tell_moving() for stream in self._streams))
                while self._streams:
                    await asyncio.wait({stream.task for stream in self._streams})
        for stream in list(self._streams):
            stream.task.cancel()

    def open_session(self, request: OpenSession, peer_id: str) -> Session:
        if self.draining:
            raise PeerRefused("this server is leaving and takes no new sessions")
        if request.fingerprint != self._fingerprint:
            raise PeerRefused(
                f"this server serves weights {self._fingerprint[:12]}, not the requested {request.fingerprint[:12]}"
            )
        blocks: BlockSpan = self.engine.span.blocks
        if not blocks.covers(request.span):
            raise BadSpan(f"this server holds blocks {blocks}, not all of the requested {request.span}")
        if any(adapter is not None for adapter in request.adapters):
            raise NotSupported("this server holds no adapters")
        session = self.sessions.open(request, peer_id)
        self._openings.opened(peer_id)
        return session

    async def _serve(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = _SessionStream(self, FrameStream(reader, writer), str(info.peer_id))
        self._streams.add(stream)
        try:
            await stream.run()
        finally:
            self._streams.discard(stream)


class _SessionStream:
    """One peer's stream. Requests are read while a step runs, so that the stream's end is noticed at once."""

    def __init__(self, handler: Handler, stream: FrameStream, peer_id: str):
        self._handler = handler
        self._stream = stream
        self._peer_id = peer_id
        self._session: Session | None = None
        self._reply: asyncio.Task[None] | None = None
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a stream is served by a task")
        self.task: asyncio.Task[object] = task

    async def run(self) -> None:
        try:
            while True:
                message, payload = await self._next_message()
                if isinstance(message, CloseSession):
                    return
                await self._dispatch(message, payload)
        except PeerUnreachable:
            pass  # the usual end of a session
        except SwarmError as error:  # after which the stream cannot be understood any more
            await self._refuse(error)
        except asyncio.CancelledError:  # the server stops
            pass
        finally:
            if self._reply is not None:
                self._reply.cancel()
            if self._session is not None:
                self._handler.sessions.close(self._session)
            self._stream.close()

    async def _next_message(self) -> tuple[Message, bytes]:
        while True:
            try:
                async with asyncio.timeout(self._handler.idle_limit):
                    return await self._stream.receive(self._check_sender)
            except TimeoutError:
                if self._reply is None or self._reply.done():
                    raise SessionLost(f"no step for {self._handler.idle_limit:g} s: the session is closed") from None

    def _check_sender(self, message: Message, payload_size: int) -> None:
        """Refuse a tensor before it takes memory: of somebody who holds no session here, or too large for his own."""
        if isinstance(message, StepRequest | CloseSession):
            session = self._own_session(message.session_id)
            values = len(session.rows) * session.max_length * self._handler.engine.span.hidden_size
            if payload_size > 4 * values + PAYLOAD_SLACK:  # in float32
                raise MessageTooLarge(f"a tensor of {payload_size} bytes, more than this session reserved room for")
        elif payload_size:
            raise ProtocolError(f"{type(message).__name__} messages carry no tensor")

    def _own_session(self, session_id: str) -> Session:
        session = self._handler.sessions.get(session_id, self._peer_id)
        if session is not self._session:
            raise PeerRefused(f"session {session_id} was opened on another stream")
        return session

    async def _dispatch(self, message: Message, payload: bytes) -> None:
        if self._reply is not None and not self._reply.done():
            raise ProtocolError("a request arrived before the one before it was answered")
        try:
            if isinstance(message, OpenSession):
                await self._open(message)
            elif isinstance(message, StepRequest):
                task = self._check(self._own_session(message.session_id), message, payload)
                self._reply = asyncio.create_task(self._answer(message.step, task))
            else:
                raise ProtocolError(f"a server takes no {type(message).__name__} messages")
        except PeerUnreachable:
            raise
        except SwarmError as error:  # the request was bad, the session is as it was
            await self._refuse(error)

    async def _open(self, request: OpenSession) -> None:
        if self._session is not None:
            raise ProtocolError("a stream carries one session, and this one has its own already")
        self._session = self._handler.open_session(request, self._peer_id)
        left = self._handler.engine.cache.tokens_left
        await self._send(SessionOpened(session_id=request.session_id, cache_tokens_left=left))

    def _check(self, session: Session, request: StepRequest, payload: bytes) -> StepTask:
        span = self._handler.engine.span
        rows = session.check_step(request, span.hidden_size)
        hidden = from_bytes(request.hidden, payload)
        if not all_finite(hidden):
            raise ProtocolError("the hidden states hold NaN or infinity")
        start, end = span.local(session.span)
        return StepTask(hidden, rows, start, end)

    async def _answer(self, step: int, task: StepTask) -> None:
        future = self._handler.engine.submit(task)
        try:
            async with asyncio.timeout(self._handler.step_timeout):
                output = await asyncio.wrap_future(future)
            meta, payload = to_bytes(output.hidden)
            result = StepResult(
                step=step,
                hidden=meta,
                queue_time=output.queue_time,
                compute_time=output.compute_time,
                moving=self._handler.draining,
            )
            await self._send(result, payload)
        except TimeoutError:
            await self._refuse(EngineError(f"the step did not finish within {self._handler.step_timeout:g} s"))
        except PeerUnreachable:
            pass  # the reader sees the end of the stream too
        except SwarmError as error:
            await self._refuse(error)
        finally:
            future.cancel()

    async def tell_moving(self) -> None:
        with contextlib.suppress(PeerUnreachable):
            await self._send(Moving())

    async def _refuse(self, error: SwarmError) -> None:
        name, text = to_wire(error)
        logger.info("refused a request of %s: %s: %.300r", self._peer_id, name, text)  # it may quote a stranger
        tokens_left = error.tokens_left if isinstance(error, CacheFull) else None
        with contextlib.suppress(PeerUnreachable):
            await self._send(ErrorReply(error=name, message=text[:2000], tokens_left=tokens_left))

    async def _send(self, message: Message, payload: bytes | memoryview = b"") -> None:
        """Raises PeerUnreachable if the stream is broken, or its peer reads nothing for the idle limit."""
        try:
            async with asyncio.timeout(self._handler.idle_limit):
                await self._stream.send(message, payload)
        except TimeoutError:
            self._stream.abort()  # ends the session, which would keep its cache for ever
            raise PeerUnreachable("the other side does not read its answers") from None
