"""The door of a server: streams and questions of all peers come in here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from hivemind.p2p import P2P, P2PContext
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2

from swarm.data_structures import BlockSpan, ServerInfo
from swarm.errors import (
    BadSpan,
    MessageTooLarge,
    PeerRefused,
    PeerUnreachable,
    ProtocolError,
    QuotaExceeded,
    SessionLost,
    SwarmError,
)
from swarm.passes import PASS_STREAM, PassRequest
from swarm.protocol import (
    INFERENCE_STREAM,
    MAX_UPLOAD_BYTES,
    PUSH_STREAM,
    BlockProtocol,
    OpenPush,
    OpenSession,
    StepRequest,
)
from swarm.rpc import FrameStream

from .adapters.registry import AdapterRegistry, Lease
from .engine import Engine
from .openings import Openings
from .pass_stream import STREAM_PATIENCE, serve_pass
from .quotas import Hold, PeerQuotas
from .session_stream import SessionStream, error_reply
from .sessions import Session, SessionTable
from .tally import Tally

logger = logging.getLogger(__name__)

#: Seconds within which a push stream must say which session it is for, and again for that session to be here.
PUSH_PATIENCE = 60.0
#: Seconds that somebody who was refused has to read why, and to stop sending.
LINGER = 1.0
#: Streams of one peer that get this time at once. They count in no quota any more, so further ones are closed at once.
MAX_LINGERING = 32
#: Seconds for a stream that was told to end, which takes none.
_END_OF_STREAM = 2.0


class Hosted(Protocol):
    """What a server has as long as it holds the same blocks."""

    engine: Engine
    sessions: SessionTable
    adapters: AdapterRegistry


class Handler:
    """Serves the streams and questions of all peers, on the node's event loop."""

    def __init__(
        self,
        *,
        fingerprint: str,
        info: Callable[[], ServerInfo],
        quotas: PeerQuotas,
        idle_limit: float,
        step_timeout: float,
        pass_timeout: float,
        max_pass_tokens: int,
        tally: Tally | None = None,
    ):
        """It serves nobody before `open`. tally: counts what is done, among what was done before."""
        self._hosted: Hosted | None = None
        self._fingerprint = fingerprint
        self._info = info
        self.idle_limit = idle_limit
        self.step_timeout = step_timeout
        self.pass_timeout = pass_timeout
        self.max_pass_tokens = max_pass_tokens
        self.quotas = quotas
        self.tally = Tally() if tally is None else tally
        self._openings = Openings()
        self.p2p: P2P
        self.by_session: dict[str, SessionStream] = {}
        self._streams: set[SessionStream] = set()
        self._passes: set[asyncio.Task[object]] = set()
        self._lingering: Counter[str] = Counter()  # streams that were refused, by peer
        self.draining = False

    def open(self, hosted: Hosted) -> None:
        """Serve these blocks from now on."""
        self._hosted = hosted
        self.draining = False

    def close(self) -> None:
        """Forget them, after `drain`."""
        self._hosted = None

    @property
    def engine(self) -> Engine:
        return self._present.engine

    @property
    def sessions(self) -> SessionTable:
        return self._present.sessions

    @property
    def adapters(self) -> AdapterRegistry:
        return self._present.adapters

    @property
    def _present(self) -> Hosted:
        if self._hosted is None:
            raise PeerRefused("this server holds no blocks at the moment: it is paused, or loads others")
        return self._hosted

    async def register(self, p2p: P2P) -> None:
        await BlockProtocol().add_p2p_handlers(p2p, wrapper=self)
        self.p2p = p2p
        await p2p.add_binary_stream_handler(INFERENCE_STREAM, self._serve)
        await p2p.add_binary_stream_handler(PUSH_STREAM, self._serve_pushes)
        await p2p.add_binary_stream_handler(PASS_STREAM, self._serve_pass)

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        await self.quotas.request(str(context.remote_id))
        answer = self._openings.answer(request.uid, str(context.remote_id), self._info())
        return runtime_pb2.ExpertInfo(serialized_info=answer.model_dump_json().encode())

    async def rpc_upload(self, request: runtime_pb2.ExpertInfo, context: P2PContext) -> runtime_pb2.ExpertUID:
        await self.quotas.request(str(context.remote_id))
        size = len(request.serialized_info)
        if size > MAX_UPLOAD_BYTES:
            raise MessageTooLarge(f"an upload of {size} bytes is over the limit of {MAX_UPLOAD_BYTES}")
        return runtime_pb2.ExpertUID(uid=str(size))

    async def drain(self, timeout: float) -> None:
        """Take no more sessions and passes, tell the running sessions to move, and wait until they did and the running
        passes are done, `timeout` seconds at most. Then nothing uses the blocks any more."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):  # telling too: a peer that reads nothing must not keep us here
                await asyncio.gather(*(stream.tell_moving() for stream in self._streams))
                while remaining := self._serving():
                    await asyncio.wait(remaining)
        cancelled = self._serving()
        for task in cancelled:
            task.cancel()
        if cancelled:
            await asyncio.wait(cancelled, timeout=_END_OF_STREAM)

    def _serving(self) -> set[asyncio.Task[object]]:
        """The tasks that serve sessions and passes at this moment."""
        return {stream.task for stream in self._streams} | self._passes

    def open_session(self, request: OpenSession, peer_id: str, adapters: Lease) -> Session:
        """adapters: of its rows; the caller releases them when the session has ended."""
        self.check_request(request)
        session = self.sessions.open(request, peer_id)
        for row, adapter in zip(session.rows, adapters.rows, strict=True):
            row.adapter = adapter
        self._openings.opened(peer_id)
        return session

    def check_request(self, request: OpenSession | PassRequest) -> None:
        """Raises SwarmError unless this is a server for it."""
        if self.draining:
            raise PeerRefused("this server is leaving and takes no new sessions or passes")
        if request.fingerprint != self._fingerprint:
            raise PeerRefused(
                f"this server serves weights {self._fingerprint[:12]}, not the requested {request.fingerprint[:12]}"
            )
        blocks: BlockSpan = self.engine.span.blocks
        if not blocks.covers(request.span):
            raise BadSpan(f"this server holds blocks {blocks}, not all of the requested {request.span}")

    async def _serve_pass(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream, peer_id = FrameStream(reader, writer, self.tally.traffic), str(info.peer_id)
        task = asyncio.current_task()
        assert task is not None
        self._passes.add(task)
        try:
            with self.quotas.stream(peer_id):
                try:
                    await serve_pass(self, stream, peer_id)
                except PeerUnreachable:
                    pass  # nobody waits for the answer
                except SwarmError as error:
                    await self.turn_away(stream, peer_id, error)
        except QuotaExceeded as error:
            await self.turn_away(stream, peer_id, error)
        except asyncio.CancelledError:  # the server stops
            pass
        finally:
            self._passes.discard(task)
            stream.close()

    async def _serve(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames, peer_id = FrameStream(reader, writer, self.tally.traffic), str(info.peer_id)
        try:
            hold = self.quotas.stream(peer_id)
        except QuotaExceeded as error:
            await self.turn_away(frames, peer_id, error)
            return
        with hold:
            stream = SessionStream(self, frames, peer_id)
            self._streams.add(stream)
            try:
                await stream.run()
            finally:
                self._streams.discard(stream)

    async def _serve_pushes(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Steps that a server pushes. Complaints about it go back to it, others to the owner of the session."""
        stream, peer_id = FrameStream(reader, writer, self.tally.traffic), str(info.peer_id)
        try:
            with self.quotas.stream(peer_id) as hold:
                await self._take_pushes(stream, peer_id, hold)
        except PeerUnreachable:
            pass  # the usual end
        except SwarmError as error:
            await self.turn_away(stream, peer_id, error)
        except TimeoutError:
            logger.info("closed a stream of %s, which did not say within %g s what for", info.peer_id, PUSH_PATIENCE)
        finally:
            stream.close()

    async def _take_pushes(self, stream: FrameStream, peer_id: str, place: Hold) -> None:
        """place: among the streams of this peer. Given up once the stream belongs to a session, which bounds it."""
        async with asyncio.timeout(PUSH_PATIENCE):
            opening, size = await stream.receive_header()
        if not isinstance(opening, OpenPush):
            raise ProtocolError(f"a push stream begins with OpenPush, not {type(opening).__name__}")
        if size:
            raise ProtocolError("OpenPush messages carry no tensor")

        # The session may open only now, and its first step take long to come through the servers before us.
        expiry = asyncio.get_running_loop().call_later(PUSH_PATIENCE, self._adopt_or_close, stream, opening, peer_id)
        try:
            while True:
                message, size = await stream.receive_header()
                if not isinstance(message, StepRequest):
                    raise ProtocolError(f"a push stream takes no {type(message).__name__} messages")
                session = self._pushed_session(opening.session_id, peer_id)
                session.check_payload(size)
                payload, hold = await session.receive_tensor(stream, size)
                try:
                    # Asked again: while the tensor arrived, the owner may have named another server, or left.
                    session = self._pushed_session(opening.session_id, peer_id)
                except SwarmError:
                    hold.release()
                    raise
                session.adopt(stream)
                place.release()
                try:
                    session.accept(message, payload, hold, pushed=True)
                except SwarmError as error:
                    await session.refuse_pushed(error, message.step)
        finally:
            expiry.cancel()
            if opening.session_id in self.by_session:
                self.by_session[opening.session_id].forget(stream)

    def _adopt_or_close(self, stream: FrameStream, opening: OpenPush, peer_id: str) -> None:
        """A push stream is kept as long as the session that it is for; one that is for none was opened in vain."""
        try:
            self._pushed_session(opening.session_id, peer_id).adopt(stream)
        except SwarmError as error:
            logger.info("closed a push stream of %s: %.300r", peer_id, error)
            stream.abort()

    def _pushed_session(self, session_id: str, peer_id: str) -> SessionStream:
        """Raises SessionLost if it is not here, PeerRefused if this peer may not push to it."""
        session = self.by_session.get(session_id)
        if session is None:
            raise SessionLost(f"no session {session_id} here: it was closed, or never opened")
        session.check_pusher(peer_id)
        return session

    async def turn_away(self, stream: FrameStream, peer_id: str, error: SwarmError) -> None:
        """Say why, and close the stream once what was on its way has come: else that could take the answer along."""
        logger.info("refused a stream of %s: %.300r", peer_id, error)  # it may quote a stranger
        self.tally.refused_with(error)
        with contextlib.suppress(PeerUnreachable, TimeoutError):
            async with asyncio.timeout(STREAM_PATIENCE):
                await stream.send(error_reply(error))
            if self._lingering[peer_id] < MAX_LINGERING:
                self._lingering[peer_id] += 1
                try:
                    await stream.linger(LINGER)
                finally:
                    self._lingering[peer_id] -= 1
                    if not self._lingering[peer_id]:
                        del self._lingering[peer_id]
        stream.close()
