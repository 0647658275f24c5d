"""One session, as its streams bring it: requests of its owner, and what the server before it in the chain pushes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

import torch

from swarm.errors import (
    CacheFull,
    EngineError,
    MessageTooLarge,
    PeerRefused,
    PeerUnreachable,
    ProtocolError,
    SessionLost,
    SwarmError,
    to_wire,
)
from swarm.protocol import (
    CloseSession,
    ErrorReply,
    Message,
    Moving,
    NextServer,
    OpenSession,
    PromptsTaken,
    PushFailed,
    Relink,
    Relinked,
    SessionOpened,
    SessionPrompts,
    StepRequest,
    StepResult,
    check_rows,
)
from swarm.rpc import ONE_WRITE, FrameStream, clock
from swarm.tensors import DTYPES, all_finite, decode, encode

from .pushes import PushLink
from .quotas import Hold
from .sessions import Session, SessionTable
from .tasks import StepOutput, StepTask

if TYPE_CHECKING:
    from .adapters.registry import Lease
    from .handler import Handler

logger = logging.getLogger(__name__)

#: Bytes that a step may bring beyond what its session reserved: then it is read, and refused with what is wrong.
PAYLOAD_SLACK = 2**16
#: Seconds in which a stream must open its session. Then the server's idle limit holds.
OPENING_PATIENCE = 60.0
#: Streams on which pushes may come for one session: of the server before it, and of the one in whose place that came.
MAX_INCOMING = 2


class SessionStream:
    """The stream of a session's owner. Requests are read while a step runs, so that the stream's end is noticed at
    once, and so that a newer step can take the place of one that runs."""

    def __init__(self, handler: Handler, stream: FrameStream, peer_id: str):
        self._handler = handler
        self._stream = stream
        self._peer_id = peer_id
        self._session: Session | None = None
        self._sessions: SessionTable  # that it is in
        self._link: PushLink | None = None
        self._newest: StepTask | None = None
        self._answered_any = False
        self._work: set[asyncio.Task[None]] = set()
        self._idle: asyncio.Timeout | None = None
        self._held = contextlib.ExitStack()  # a place among the sessions of this peer, and the adapters of the rows
        self._prompts = contextlib.ExitStack()  # what they take of this peer's quota
        #: streams of servers that push steps of this session, oldest first
        self.incoming: list[FrameStream] = []
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a stream is served by a task")
        self.task: asyncio.Task[object] = task

    async def run(self) -> None:
        try:
            async with asyncio.timeout(OPENING_PATIENCE) as self._idle:
                while True:
                    message, size = await self._stream.receive_header()
                    if isinstance(message, CloseSession):
                        return
                    self._check_size(message, size)
                    payload, hold = await self.receive_tensor(self._stream, size)
                    await self._dispatch(message, payload, hold)
        except TimeoutError:
            await self._turn_away(SessionLost(self._why_too_late()))
        except PeerUnreachable:
            pass  # the usual end of a session
        except SwarmError as error:  # after which the stream cannot be understood any more
            await self._turn_away(error)
        except asyncio.CancelledError:  # the server stops
            pass
        finally:
            self._end()

    async def _turn_away(self, error: SwarmError) -> None:
        """Say why this stream ends. What its session held is free before that: the other side may be slow to hear."""
        self._release()
        await self._handler.turn_away(self._stream, self._peer_id, error)

    def _end(self) -> None:
        self._release()
        for stream in (self._stream, *self.incoming):
            stream.close()

    def _release(self) -> None:
        for work in self._work:
            work.cancel()
        if self._link is not None:
            self._link.close()
        if self._session is not None:
            self._sessions.close(self._session)
            self._handler.by_session.pop(self._session.session_id, None)
            self._session = None
        self._held.close()
        self._prompts.close()

    def _why_too_late(self) -> str:
        if self._session is None:
            return f"no session was opened within {OPENING_PATIENCE:g} s: the stream is closed"
        return f"no step for {self._handler.idle_limit:g} s: the session is closed"

    def adopt(self, stream: FrameStream) -> None:
        """End a stream that brings pushes together with this session, or sooner if newer ones come."""
        if stream not in self.incoming:
            self.incoming.append(stream)
            while len(self.incoming) > MAX_INCOMING:
                self.incoming.pop(0).abort()

    def forget(self, stream: FrameStream) -> None:
        with contextlib.suppress(ValueError):
            self.incoming.remove(stream)

    async def receive_tensor(self, stream: FrameStream, size: int) -> tuple[bytes, Hold]:
        """Read the tensor of the message that came last on `stream`, once this session's owner may send one more.

        The caller must release the hold when the tensor has gone. Pushes count as their session's owner's as well: he
        named who pushes, and that server carries the sessions of many.
        """
        await self._handler.quotas.request(self._peer_id)
        hold = await self._handler.quotas.bytes(self._peer_id, size)
        try:
            return await stream.receive_payload(size), hold
        except BaseException:
            hold.release()
            raise

    def _check_size(self, message: Message, payload_size: int) -> None:
        """Refuse a tensor before it takes memory: of somebody who holds no session here, or too large for his own."""
        if isinstance(message, StepRequest):
            self.check_payload(payload_size)
        elif isinstance(message, SessionPrompts):
            self._own_session().check_prompts(message, self._handler.engine.span.hidden_size)
        elif payload_size:
            raise ProtocolError(f"{type(message).__name__} messages carry no tensor")

    def check_payload(self, size: int) -> None:
        session = self._own_session()
        values = len(session.rows) * session.max_length * self._handler.engine.span.hidden_size
        if size > 4 * values + PAYLOAD_SLACK:  # in float32
            raise MessageTooLarge(f"a tensor of {size} bytes, more than this session reserved room for")

    def check_pusher(self, peer_id: str) -> None:
        """Raises PeerRefused unless the session's owner named this peer as the one before us."""
        if self._own_session().previous != peer_id:
            raise PeerRefused("the owner of this session did not name you as the server before this one")

    def _own_session(self) -> Session:
        if self._session is None:
            raise SessionLost("no session was opened on this stream")
        return self._session

    async def _dispatch(self, message: Message, payload: bytes, hold: Hold) -> None:
        step = message.step if isinstance(message, StepRequest) else None
        try:
            if isinstance(message, StepRequest):
                self.accept(message, payload, hold, pushed=False)
                return
            hold.release()
            if isinstance(message, OpenSession):
                await self._open(message)
            elif isinstance(message, Relink):
                await self._relink(message)
            elif isinstance(message, SessionPrompts):
                await self._take_prompts(message, payload)
            else:
                raise ProtocolError(f"a server takes no {type(message).__name__} messages")
        except PeerUnreachable:
            raise
        except SwarmError as error:  # the request was bad, the session is as it was
            await self._refuse(error, step)

    async def _open(self, request: OpenSession) -> None:
        if self._session is not None:
            raise ProtocolError("a stream carries one session, and this one has its own already")
        self._handler.check_request(request)
        check_rows(request.adapters, request.num_rows)
        with contextlib.ExitStack() as held:
            place = self._handler.quotas.session(self._peer_id)
            held.callback(place.release)
            adapters = await self._handler.adapters.lease(request.adapters, request.num_rows)
            held.callback(adapters.release)
            self._session = await self._admit(request, adapters)
            self._sessions = self._handler.sessions
            self._held = held.pop_all()
        self._touch(self._handler.idle_limit)
        self._handler.by_session[request.session_id] = self
        self._connect_next(request.next)
        left = self._handler.engine.cache.tokens_left
        await self._send(SessionOpened(session_id=request.session_id, cache_tokens_left=left, clock=clock()))

    async def _admit(self, request: OpenSession, adapters: Lease) -> Session:
        try:
            return self._handler.open_session(request, self._peer_id, adapters)
        except CacheFull:  # perhaps of prefixes that nobody uses
            if not await self._handler.adapters.make_cache_room(request.num_rows, request.max_length):
                raise
        return self._handler.open_session(request, self._peer_id, adapters)

    async def _relink(self, request: Relink) -> None:
        session = self._own_session()
        session.previous = request.previous
        self._connect_next(request.next)
        await self._send(Relinked())

    async def _take_prompts(self, request: SessionPrompts, payload: bytes) -> None:
        session = self._own_session()
        session.check_prompts(request, self._handler.engine.span.hidden_size)
        prompts = decode(request.prompts, payload)
        if not all_finite(prompts):
            raise ProtocolError("the prompts hold NaN or infinity")
        self._prompts.enter_context(self._handler.quotas.kept(self._peer_id, 4 * prompts.numel()))
        span = self._handler.engine.span
        session.take_prompts(request, prompts.to(span.device, span.dtype))
        await self._send(PromptsTaken())

    def _connect_next(self, target: NextServer | None) -> None:
        self._own_session().next = target
        if self._link is not None:
            if self._link.target == target and not self._link.broken:
                return
            self._link.close()
        self._link = (
            None
            if target is None
            else PushLink(self._handler.p2p, target, self._push_failed, self._handler.tally.traffic)
        )

    def accept(self, request: StepRequest, payload: bytes, hold: Hold, *, pushed: bool) -> None:
        """Run a step; its answer goes to the owner. One that is older than the newest is a late duplicate, and dropped.

        hold: of the payload, released when that is needed no more. Raises SwarmError if the step cannot be run as
        asked; the session is as it was then.
        """
        received_at = clock()
        with contextlib.ExitStack() as refused:
            refused.push(hold)
            task, codec_time = self._check(request, payload)
            if task is None:
                return
            refused.pop_all()
        if self._newest is not None:
            self._newest.future.cancel()  # its client has given it up
        self._newest = task
        self._touch(None)
        work = asyncio.create_task(self._answer(request, task, received_at, codec_time, hold, pushed))
        self._work.add(work)
        work.add_done_callback(self._work.discard)
        work.add_done_callback(lambda _: hold.release())

    def _check(self, request: StepRequest, payload: bytes) -> tuple[StepTask | None, int]:
        """The work that a step asks for, or None for a late duplicate, and how long its tensor took to decode."""
        session = self._own_session()
        session.check_alive()
        if request.step <= session.last_step:
            logger.info("dropped step %d of session %s: a late duplicate", request.step, session.session_id)
            return None, 0
        span = self._handler.engine.span
        rows = session.check_step(request, span.hidden_size)
        started = clock()
        hidden = decode(request.hidden, payload)
        if not all_finite(hidden):
            raise ProtocolError("the hidden states hold NaN or infinity")
        codec_time = clock() - started
        # Compressed outputs are computed in float32: that holds whatever the device's dtype does.
        output_dtype = DTYPES.get(session.output_codec.value, torch.float32)
        task = StepTask(
            hidden,
            rows,
            *span.local(session.span),
            reorder=request.reorder,
            output_dtype=output_dtype,
            deadline=None if request.time_left is None else time.monotonic() + request.time_left / 1e6,
        )
        session.last_step = request.step
        return task, codec_time

    def _touch(self, seconds_left: float | None) -> None:
        """From now on, so many seconds without a step end the session; None: no limit, a step is running."""
        if self._idle is not None and not self._idle.expired():
            with contextlib.suppress(RuntimeError):  # it is over
                when = None if seconds_left is None else asyncio.get_running_loop().time() + seconds_left
                self._idle.reschedule(when)

    async def _answer(
        self, request: StepRequest, task: StepTask, received_at: int, codec_time: int, hold: Hold, pushed: bool
    ) -> None:
        future = self._handler.engine.submit(task)
        try:
            async with asyncio.timeout(self._handler.step_timeout):
                output = await asyncio.wrap_future(future)
            if request.push:  # the next server may wait with reading until its quota has room: not for this one's
                hold.release()
            await self._deliver(request, task, output, received_at, codec_time, pushed)
        except TimeoutError:
            text = f"the step did not finish within {self._handler.step_timeout:g} s"
            await self._refuse(EngineError(text), request.step)
        except PeerUnreachable:
            pass  # the reader sees the end of the stream too
        except SwarmError as error:
            await self._refuse(error, request.step)
        finally:
            future.cancel()
            if task is self._newest:
                self._touch(self._handler.idle_limit)

    async def _deliver(
        self,
        request: StepRequest,
        task: StepTask,
        output: StepOutput,
        received_at: int,
        codec_time: int,
        pushed: bool,
    ) -> None:
        """Push to the next server first, for the sake of whoever waits for the token; then the owner gets the same."""
        started = clock()
        meta, payload = encode(output.hidden, self._own_session().output_codec)
        sent_at = clock()
        result = StepResult(
            step=request.step,
            hidden=meta,
            pushed=pushed,
            request_sent_at=request.sent_at,
            received_at=received_at,
            queue_time=int(output.queue_time * 1e6),
            compute_time=int(output.compute_time * 1e6),
            codec_time=codec_time + sent_at - started,
            sent_at=sent_at,
            moving=self._handler.draining,
        )
        self._count(task, output, (sent_at - received_at) / 1e6)
        if not request.push:
            await self._send(result, payload)
            return
        self._handler.tally.pushes += 1
        if self._link is None:
            await self._send(result, payload)
            self._push_failed(request.step, "the session's owner named no server after this one")
            return
        time_left = None if request.time_left is None else max(0, request.time_left - (sent_at - received_at))
        changes = {"hidden": meta, "sent_at": sent_at, "push": request.push - 1, "time_left": time_left}
        push = request.model_copy(update=changes)
        if len(payload) <= ONE_WRITE and self._link.is_clear:
            await self._link.send(push, payload)
            await self._send(result, payload)
        else:  # a slow link to one of them must not hold up the other
            await asyncio.gather(self._link.send(push, payload), self._send(result, payload))

    def _count(self, task: StepTask, output: StepOutput, seconds: float) -> None:
        first, self._answered_any = not self._answered_any, True
        decode = len(task.hidden) == len(task.rows)
        self._handler.tally.answered_step(seconds, output.queue_time, output.compute_time, first=first, decode=decode)

    def _push_failed(self, step: int, reason: str) -> None:
        self._handler.tally.failed_pushes += 1
        logger.info("could not push step %d of %s: %.300r", step, self._peer_id, reason)
        work = asyncio.create_task(self._tell(PushFailed(step=step, reason=reason[:2000])))
        self._work.add(work)
        work.add_done_callback(self._work.discard)

    async def tell_moving(self) -> None:
        await self._tell(Moving())

    async def _tell(self, message: Message) -> None:
        with contextlib.suppress(PeerUnreachable):
            await self._send(message)

    async def _refuse(self, error: SwarmError, step: int | None = None) -> None:
        logger.info("refused a request of %s: %.300r", self._peer_id, error)  # it may quote a stranger
        self._handler.tally.refused_with(error)
        await self._tell(error_reply(error, step))

    async def refuse_pushed(self, error: SwarmError, step: int) -> None:
        """Tell the owner why a step that was pushed here cannot be run."""
        await self._refuse(error, step)

    async def _send(self, message: Message, payload: bytes | memoryview = b"") -> None:
        """Raises PeerUnreachable if the stream is broken, or its peer reads nothing for the idle limit."""
        try:
            async with asyncio.timeout(self._handler.idle_limit):
                await self._stream.send(message, payload)
        except TimeoutError:
            self._stream.abort()  # ends the session, which would keep its cache for ever
            raise PeerUnreachable("the other side does not read its answers") from None


def error_reply(error: SwarmError, step: int | None = None) -> ErrorReply:
    name, text = to_wire(error)
    tokens_left = error.tokens_left if isinstance(error, CacheFull) else None
    return ErrorReply(error=name, message=text[:2000], tokens_left=tokens_left, step=step)
