"""How a session talks to servers: two small seams, and their implementation over the network.

Tests put a fake behind the same seams that fails on demand.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from swarm.codecs import Codec, row_bytes
from swarm.errors import (
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    SessionLost,
    SwarmError,
)
from swarm.node import Node
from swarm.protocol import (
    MAX_PAYLOAD_BYTES,
    ErrorReply,
    Message,
    Moving,
    NextServer,
    OpenSession,
    PromptsTaken,
    PushFailed,
    Relink,
    Relinked,
    RowAdapters,
    SessionOpened,
    SessionPrompts,
    StepRequest,
    StepResult,
    TensorMeta,
)
from swarm.routing.chain import ChainLink
from swarm.rpc import FrameStream, clock, open_stream, ping
from swarm.tensors import DTYPES, encode

from .config import ClientConfig
from .history import WireTensor
from .peer_clock import PeerClock
from .reported_errors import reported_error

#: A message without a tensor.
NOTHING = memoryview(b"")


class Misled(ProtocolError):
    """A server ran a step that we never asked for: the one before it pushes steps of its own, or it lies itself.

    The session is lost there: a server takes no step that is older than the newest it knows.
    """


class Unanswered(PeerTimeout):
    """A server answers pings, but not a step: it does not work, or the one before it keeps it busy with others."""


@dataclass(frozen=True)
class SpanOutput:
    """A server's output, how it reports of the step, and when that was here, in microseconds of our clock."""

    tensor: WireTensor
    report: StepResult
    arrived_at: int


@dataclass(frozen=True)
class SessionSpec:
    """What a server is asked to reserve, who stands beside it in the chain, and which adapters the rows have."""

    session_id: str
    num_rows: int
    max_length: int
    hidden_size: int
    output_codec: Codec
    previous: str | None = None
    next: NextServer | None = None
    adapters: RowAdapters | None = None


@dataclass
class Expected:
    """The answer of one server to one step.

    meta: of the output that we asked for. on_news: called when it came or failed, and when it could not be pushed on.
    """

    step: int
    meta: TensorMeta
    on_news: Callable[[], None]
    answer: asyncio.Future[SpanOutput] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def output(self) -> SpanOutput | None:
        """None until it is here."""
        return self.answer.result() if self.answer.done() and self.error is None else None

    @property
    def tensor(self) -> WireTensor:
        """Of an answer that is here."""
        assert self.output is not None
        return self.output.tensor

    @property
    def error(self) -> SwarmError | None:
        """Why there will be none."""
        if not self.answer.done():
            return None
        if self.answer.cancelled():
            return PeerUnreachable("nobody waits for this answer any more")
        return self.answer.exception()  # type: ignore[return-value]  # nothing else is set

    def settle(self, result: SpanOutput | SwarmError) -> None:
        if self.answer.done():
            return
        if isinstance(result, SpanOutput):
            self.answer.set_result(result)
        else:
            self.answer.set_exception(result)
            self.answer.exception()  # seen, whether or not somebody asks
        self.on_news()


class OpenSpan(Protocol):
    """One server's part of a session."""

    @property
    def session_id(self) -> str: ...

    @property
    def moving(self) -> bool:
        """The server is leaving, and asked the session to go on elsewhere."""

    @property
    def broken(self) -> SwarmError | None:
        """Why this part is lost, if it is."""

    @property
    def cannot_push(self) -> bool:
        """The server does not reach the next one; the client must carry its outputs."""

    @property
    def clock(self) -> PeerClock:
        """The server's."""

    def expect(self, step: int, num_tokens: int, on_news: Callable[[], None]) -> Expected:
        """Prepare for the server's answer to a step of so many tokens."""

    async def send(self, request: StepRequest, payload: bytes | bytearray | memoryview) -> None:
        """Send a step; its answer goes to whoever expects it. Raises SwarmError."""

    async def give_prompts(self, prompts: torch.Tensor, codec: Codec) -> None:
        """Before the first step: deep prompts, [blocks, prompt tokens, hidden_size]. Raises SwarmError."""

    async def relink(self, previous: str | None, following: NextServer | None) -> None:
        """Tell the server who stands beside it now. Raises SwarmError."""

    async def probe(self, timeout: float) -> None:
        """Raises PeerError unless the server shows a sign of life within `timeout` seconds."""

    def close(self) -> None:
        """Give the server's cache back. Never fails, may be called twice."""


class BlockClient(Protocol):
    async def open(self, link: ChainLink, spec: SessionSpec) -> OpenSpan:
        """Reserve cache on a server. Raises SwarmError."""


def new_session_id() -> str:
    return secrets.token_hex(16)


class SwarmBlockClient:
    """Opens sessions on real servers."""

    def __init__(self, node: Node, fingerprint: str, config: ClientConfig):
        self._node = node
        self._fingerprint = fingerprint
        self._config = config

    async def open(self, link: ChainLink, spec: SessionSpec) -> OpenSpan:
        timeout = self._config.connect_timeout
        stream = await open_stream(self._node.p2p, link.peer_id, timeout)
        span = RemoteSpan(self._node, stream, link.peer_id, spec, self._config)
        request = OpenSession(
            session_id=spec.session_id,
            fingerprint=self._fingerprint,
            span=link.span,
            num_rows=spec.num_rows,
            max_length=spec.max_length,
            output_codec=spec.output_codec,
            previous=spec.previous,
            next=spec.next,
            adapters=spec.adapters,
        )
        try:
            await span.start(request)
        except BaseException:
            span.close()
            raise
        return span


class RemoteSpan:
    """One server's part of a session, over one stream. A task reads what comes, whenever it comes."""

    def __init__(self, node: Node, stream: FrameStream, peer_id: str, spec: SessionSpec, config: ClientConfig):
        self.session_id = spec.session_id
        self.moving = False
        self.broken: SwarmError | None = None
        self.cannot_push = False
        self.clock = PeerClock()
        self._node = node
        self._stream = stream
        self._peer_id = peer_id
        self._config = config
        self._output_codec, self._hidden_size = spec.output_codec, spec.hidden_size
        self._awaited: dict[int, Expected] = {}
        self._newest = 0  # number of the newest step that may have been sent
        #: told when something happens that a step may have waited for, also after this server answered it
        self._on_news: Callable[[], None] = lambda: None
        #: oldest first; those that were given up stay until their answers come
        self._questions: deque[asyncio.Future[Message]] = deque()
        self._reading = asyncio.create_task(self._read())

    async def start(self, request: OpenSession) -> None:
        asked_at = clock()
        answer = await self._ask(request, "accept a session", slow=request.adapters is not None)
        if not isinstance(answer, SessionOpened):
            raise ProtocolError(f"server {self._peer_id} answered {type(answer).__name__} to a request for a session")
        self.clock = PeerClock.asked(asked_at, answer.clock, clock())

    def expect(self, step: int, num_tokens: int, on_news: Callable[[], None]) -> Expected:
        meta = TensorMeta(shape=(num_tokens, self._hidden_size), codec=self._output_codec)
        expected = Expected(step, meta, on_news)
        self._newest = step
        self._on_news = on_news
        if self.broken is not None:
            expected.settle(self.broken)
        else:
            self._awaited[step] = expected
        return expected

    async def send(self, request: StepRequest, payload: bytes | bytearray | memoryview) -> None:
        await self._write(request, payload, self._config.request_timeout, "read a step")

    async def give_prompts(self, prompts: torch.Tensor, codec: Codec) -> None:
        blocks, num_tokens, hidden_size = prompts.shape
        share = max(1, MAX_PAYLOAD_BYTES // (num_tokens * row_bytes(codec, hidden_size)))
        for first in range(0, blocks, share):
            meta, data = encode(prompts[first : first + share].reshape(-1, hidden_size).to(DTYPES[codec]), codec)
            message = SessionPrompts(first=first, num_tokens=num_tokens, prompts=meta)
            answer = await self._ask(message, "take the prompts", data)
            if not isinstance(answer, PromptsTaken):
                raise ProtocolError(f"server {self._peer_id} answered {type(answer).__name__} to the prompts")

    async def relink(self, previous: str | None, following: NextServer | None) -> None:
        answer = await self._ask(Relink(previous=previous, next=following), "change places in its chain")
        if not isinstance(answer, Relinked):
            raise ProtocolError(f"server {self._peer_id} answered {type(answer).__name__} to a change of the chain")
        self.cannot_push = False

    async def probe(self, timeout: float) -> None:
        """Asked on a way of its own: behind a long prompt, a question would wait for all of it to arrive."""
        await ping(self._node.p2p, self._peer_id, timeout)

    def close(self) -> None:
        self._break(SessionLost(f"the session on server {self._peer_id} was closed"))  # by us, and no fault of its
        self._reading.cancel()
        self._stream.close()

    async def _ask(
        self, request: Message, action: str, payload: memoryview = NOTHING, *, slow: bool = False
    ) -> Message:
        """Send a request that is no step and wait for its answer. Answers come in the order of the questions.

        One with a tensor may take as long as a step: megabytes of prompts need their time on a slow line. So may a slow
        one, for which the server has adapters to load, as long as it shows signs of life.
        """
        if self.broken is not None:
            raise self.broken
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._questions.append(answer)
        patience = self._config.connect_timeout
        timeout = self._config.request_timeout if payload or slow else patience
        try:
            async with asyncio.timeout(timeout):
                await self._stream.send(request, payload)
                while slow and not (await asyncio.wait({answer}, timeout=patience))[0]:
                    await self.probe(patience)
                return await answer
        except TimeoutError as error:
            raise self._late_error(action, timeout) from error
        finally:
            answer.cancel()  # where nobody waits for it any more

    async def _write(
        self, message: Message, payload: bytes | bytearray | memoryview, timeout: float, action: str
    ) -> None:
        """A server that hangs stops reading at some point."""
        if self.broken is not None:
            raise self.broken
        try:
            async with asyncio.timeout(timeout):
                await self._stream.send(message, payload)
        except TimeoutError as error:
            raise self._late_error(action, timeout) from error

    def _late_error(self, action: str, timeout: float) -> PeerTimeout:
        return PeerTimeout(f"server {self._peer_id} did not {action} within {timeout:g} s")

    async def _read(self) -> None:
        try:
            while True:
                self._take(*await self._stream.receive())
        except SwarmError as error:
            self._break(error)

    def _break(self, error: SwarmError) -> None:
        """Nothing will come any more."""
        if self.broken is None:
            self.broken = error
        waiting = list(self._awaited.values())
        self._awaited.clear()
        for expected in waiting:
            expected.settle(error)
        for question in self._questions:
            if not question.done():
                question.set_exception(error)
        self._on_news()

    def _take(self, message: Message, payload: bytes) -> None:
        if isinstance(message, StepResult | ErrorReply) and message.step is not None and message.step > self._newest:
            raise Misled(f"server {self._peer_id} ran step {message.step}, which nobody asked for")
        if isinstance(message, StepResult):
            self._take_result(message, payload)
        elif isinstance(message, ErrorReply):
            self._take_error(message)
        elif isinstance(message, PushFailed):
            self.cannot_push = True
            self._on_news()
        elif isinstance(message, Moving):
            self.moving = True
        elif self._questions:
            question = self._questions.popleft()
            if not question.done():
                question.set_result(message)
        else:
            raise ProtocolError(f"server {self._peer_id} sent {type(message).__name__}, which nobody had asked for")

    def _take_result(self, report: StepResult, payload: bytes) -> None:
        self.moving |= report.moving
        # A server answers in order: what was before was given up there.
        for step in [step for step in self._awaited if step < report.step]:
            self._awaited.pop(step).settle(ProtocolError(f"server {self._peer_id} left step {step} for a newer one"))
        expected = self._awaited.pop(report.step, None)
        if expected is None:
            return
        if report.hidden != expected.meta or len(payload) != expected.meta.shape[0] * row_bytes(
            self._output_codec, self._hidden_size
        ):
            expected.settle(
                ProtocolError(
                    f"server {self._peer_id} answered step {report.step} with {len(payload)} bytes as "
                    f"{report.hidden!r:.200}; wanted {expected.meta!r}"
                )
            )
        else:
            expected.settle(SpanOutput(WireTensor(report.hidden, payload), report, clock()))

    def _take_error(self, reply: ErrorReply) -> None:
        error = reported_error(self._peer_id, reply)
        if reply.step is not None:
            expected = self._awaited.pop(reply.step, None)
            if expected is not None:
                expected.settle(error)
        elif self._questions:
            question = self._questions.popleft()
            if not question.done():
                question.set_exception(error)
        else:
            self._break(error)
