"""A swarm without a network: fake servers behind fake streams, which compute a simple function of their history, push
to each other like real ones, and fail on demand. The client is all real, down to the messages it writes."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest
import torch

from swarm.client.block_client import SwarmBlockClient
from swarm.client.config import ClientConfig
from swarm.client.inference_session import InferenceSession
from swarm.client.links import Links
from swarm.data_structures import BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import (
    CacheFull,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    SessionLost,
    SwarmError,
    to_wire,
)
from swarm.node import NodeThread
from swarm.protocol import (
    ErrorReply,
    Message,
    Moving,
    NextServer,
    OpenSession,
    PushFailed,
    Relink,
    Relinked,
    RowSlice,
    SessionOpened,
    StepRequest,
    StepResult,
)
from swarm.routing.router import Router, RouterConfig
from swarm.rpc import clock
from swarm.tensors import all_finite, decode, encode

FINGERPRINT = "f" * 64
NUM_BLOCKS = 8
HIDDEN_SIZE = 4
MODULUS = 251  # all values are exact even in bfloat16


def run_block(index: int, inputs: torch.Tensor) -> torch.Tensor:
    """A block: [tokens, hidden_size] of small whole numbers, exact in float32. Depends on all tokens and positions."""
    positions = torch.arange(1, len(inputs) + 1)[:, None]
    return (3 * inputs + (index + 2) * inputs.cumsum(0) + (index + 1) * positions) % MODULUS


def run_blocks(span: BlockSpan, inputs: torch.Tensor) -> torch.Tensor:
    for index in span.blocks():
        inputs = run_block(index, inputs)
    return inputs


#: (an answer, its tensor's bytes) -> what is sent instead, to the owner and to the next server
Tamper: TypeAlias = Callable[[StepResult, bytes], tuple[Message, bytes]]


@dataclass
class Fault:
    """Raised by the calls number `after`, `after` + 1, ... of `times` calls, counted from when it was ordered."""

    error: SwarmError
    after: int
    times: int


@dataclass
class FakeServer:
    """Strict about positions, like a real one.

    opened: counts sessions. requests: every step that was computed. reorders: numbers of those that were done.
    pushes: every push that left, for tests that send it again. dropped: late duplicates. pings: questions for a sign
    of life.
    """

    swarm: FakeSwarm
    name: str
    span: BlockSpan
    numerics: str = "fp32"
    throughput: float = 10.0
    network_rate: float | None = None
    cache_tokens: int = 100_000
    announced_cache_tokens: int = 100_000
    state: ServerState = ServerState.ONLINE
    listed: bool = True
    moving: bool = False
    opened: int = 0
    requests: list[StepRequest] = field(default_factory=list)
    reorders: list[int] = field(default_factory=list)
    pushes: list[tuple[NextServer, StepRequest, bytes]] = field(default_factory=list)
    dropped: int = 0
    pings: int = 0
    faults: dict[str, list[Fault]] = field(default_factory=lambda: {name: [] for name in ("open", "step", "push")})
    sessions: dict[str, FakeSession] = field(default_factory=dict)
    compute: Callable[[BlockSpan, torch.Tensor], torch.Tensor] = run_blocks
    tamper: Tamper | None = None
    #: set by a test to hold back steps; `reached` is set when a step waits
    gate: asyncio.Event | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    #: the same for answers to the owner, in their order
    copy_gate: asyncio.Event | None = None
    copies_first: bool = False  # before the push, as it may happen to large ones
    loses_copies: int = 0  # so many of what it pushes
    loses_pushes: bool = False  # and does not notice
    relink_gate: asyncio.Event | None = None  # holds back answers to changes of the chain
    hung: bool = False  # answers nothing, neither steps nor pings; nothing breaks
    dies_before: str | None = None  # "push" or "copy" of a step
    clock_offset: int = 0  # microseconds ahead of the client's
    takes: float = 0.0  # seconds for a step

    def fail(self, where: str, error: SwarmError, *, after: int = 0, times: int = 1) -> None:
        """where: "open", "step" or "push" (its owner is told). The error comes after so many good calls, so many times.

        A step that fails with PeerUnreachable or PeerTimeout takes its stream with it.
        """
        self.faults[where].append(Fault(error, after, times))

    def die(self) -> None:
        """The next that is asked of it finds it gone."""
        for where in ("open", "step"):
            self.fail(where, PeerUnreachable(f"{self.name} is gone"), times=10**9)

    def kill(self) -> None:
        """Gone at once: its streams break."""
        self.swarm.run(self.killed())

    async def killed(self) -> None:
        self.die()
        for session in list(self.sessions.values()):
            session.stream.end(PeerUnreachable(f"{self.name} is gone"))

    def leave(self) -> None:
        """Ask its sessions to go on elsewhere."""
        self.moving = True
        for session in self.sessions.values():
            session.stream.tell(Moving())
        self.swarm.settle()

    def lose_sessions(self) -> None:
        for session in self.sessions.values():
            session.lost = True

    def may_fail(self, where: str) -> None:
        for fault in self.faults[where]:
            if fault.after > 0:
                fault.after -= 1
            elif fault.times > 0:
                fault.times -= 1
                raise fault.error

    def open(self, request: OpenSession, stream: FakeStream) -> FakeSession:
        self.opened += 1
        self.may_fail("open")
        assert self.span.covers(request.span)
        tokens = request.num_rows * request.max_length
        if tokens > self.cache_tokens:
            raise CacheFull(f"{self.name} is full", self.cache_tokens)
        self.cache_tokens -= tokens
        session = self.sessions[request.session_id] = FakeSession(self, request, stream)
        return session

    @property
    def steps(self) -> list[list[RowSlice]]:
        return [list(request.rows) for request in self.requests]

    @property
    def pushed_steps(self) -> int:
        """Steps that this server pushed on."""
        return len(self.pushes)

    def clock(self) -> int:
        return clock() + self.clock_offset


class FakeSession:
    """What a real server keeps of one session, and does with its steps."""

    def __init__(self, server: FakeServer, request: OpenSession, stream: FakeStream):
        self.server, self.stream, self.request = server, stream, request
        self.previous, self.next = request.previous, request.next
        self.rows = [torch.empty(0, 0)] * request.num_rows
        self.last_step = -1
        self.reorder_number = 0
        self.lost = False
        self._running: asyncio.Task[None] | None = None

    def accept(self, request: StepRequest, payload: bytes, *, pushed: bool) -> None:
        """Start a step, in the place of one that runs; drop a late duplicate. Raises SwarmError."""
        received_at, running = self.server.clock(), self._running
        if self.lost:
            raise SessionLost("no such session")
        if request.step <= self.last_step:
            self.server.dropped += 1
            return
        hidden = decode(request.hidden, payload, torch.float32)
        if not all_finite(hidden):
            raise ProtocolError("the hidden states hold NaN or infinity")
        self.last_step = request.step
        self._running = self.server.swarm.start(self._run(request, hidden, received_at, pushed))
        if running is not None:
            running.cancel()

    async def _run(self, request: StepRequest, hidden: torch.Tensor, received_at: int, pushed: bool) -> None:
        server = self.server
        if server.gate is not None:
            server.reached.set()
            await server.gate.wait()
        started = clock()
        if server.takes:
            await asyncio.sleep(server.takes)
        if not self.stream.ended:
            try:
                server.requests.append(request)
                server.may_fail("step")
                output = self._compute(request, hidden)
            except SwarmError as error:
                self.stream.refuse(error, request.step)
                return
            times = (received_at, started - (received_at - server.clock_offset), clock() - started)
            server.swarm.start(self._deliver(request, output, times, pushed))

    def _compute(self, request: StepRequest, hidden: torch.Tensor) -> torch.Tensor:
        reorder, outputs = request.reorder, []
        if reorder is not None and len(request.rows) != len(self.rows):
            raise ProtocolError("a step that reorders has tokens for every row")
        if reorder is not None and reorder.number > self.reorder_number:
            self.rows = [self.rows[source] for source in reorder.sources]
            self.reorder_number = reorder.number
            self.server.reorders.append(reorder.number)
        for row, part in zip(request.rows, hidden.split([row.num_tokens for row in request.rows]), strict=True):
            cached = self.rows[row.row]
            if row.position > len(cached):
                raise ProtocolError(f"row {row.row} goes on at {row.position}, but only {len(cached)} are cached")
            if row.position + row.num_tokens > self.request.max_length:
                raise ProtocolError("longer than declared")
            self.rows[row.row] = torch.cat([cached[: row.position], part]) if row.position else part.clone()
            outputs.append(self.server.compute(self.request.span, self.rows[row.row])[row.position :])
        return torch.cat(outputs)

    async def _deliver(
        self, request: StepRequest, output: torch.Tensor, times: tuple[int, int, int], pushed: bool
    ) -> None:
        server = self.server
        meta, data = encode(output, self.request.output_codec)
        result: Message = StepResult(
            step=request.step,
            hidden=meta,
            pushed=pushed,
            request_sent_at=request.sent_at,
            received_at=times[0],
            queue_time=times[1],
            compute_time=times[2],
            codec_time=0,
            sent_at=server.clock(),
            moving=server.moving,
        )
        payload = bytes(data)
        if server.tamper is not None and isinstance(result, StepResult):
            result, payload = server.tamper(result, payload)
        pushes = request.push > 0 and self.next is not None
        for act in ("copy", "push") if server.copies_first else ("push", "copy"):
            if server.copies_first:
                await _idle()  # the client has read the one before the other comes
            if act == server.dies_before:
                await server.killed()
                return
            if act == "push" and pushes:
                self._push(request, result, payload)
            elif act == "copy" and pushes and server.loses_copies:
                server.loses_copies -= 1
            elif act == "copy":
                if server.copy_gate is not None:
                    server.reached.set()
                    await server.copy_gate.wait()
                self.stream.tell(result, payload)

    def _push(self, request: StepRequest, result: Message, payload: bytes) -> None:
        assert self.next is not None
        hidden = result.hidden if isinstance(result, StepResult) else request.hidden
        update = {"hidden": hidden, "sent_at": self.server.clock(), "push": request.push - 1}
        push = self.next, request.model_copy(update=update), payload
        self.server.pushes.append(push)
        try:
            self.server.may_fail("push")
            self.server.swarm.take_push(self.server.name, *push)
        except SwarmError as error:
            self.stream.tell(PushFailed(step=request.step, reason=str(error)))

    def close(self) -> None:
        if self.server.sessions.pop(self.request.session_id, None) is not None:
            self.server.cache_tokens += len(self.rows) * self.request.max_length
            if self._running is not None:
                self._running.cancel()


class FakeStream:
    """A `FrameStream` of one session to a fake server."""

    def __init__(self, server: FakeServer):
        self.server = server
        self.session: FakeSession | None = None
        self.ended = False
        self._answers: asyncio.Queue[tuple[Message, bytes] | SwarmError] = asyncio.Queue()

    async def send(self, message: Message, payload: bytes | bytearray | memoryview = b"") -> None:
        if self.ended:
            raise PeerUnreachable("the connection broke")
        if self.server.hung:
            return
        try:
            self._take(message, bytes(payload))
        except SwarmError as error:
            self.refuse(error, message.step if isinstance(message, StepRequest) else None)

    def _take(self, message: Message, payload: bytes) -> None:
        if isinstance(message, OpenSession):
            self.session = self.server.open(message, self)
            self.tell(
                SessionOpened(session_id=message.session_id, cache_tokens_left=1, clock=self.server.clock()),
            )
        elif isinstance(message, Relink):
            assert self.session is not None
            self.session.previous, self.session.next = message.previous, message.next
            self.server.swarm.start(self._answer_relink())
        elif isinstance(message, StepRequest):
            assert self.session is not None
            self.session.accept(message, payload, pushed=False)
        else:
            raise ProtocolError(f"a server takes no {type(message).__name__}")

    async def _answer_relink(self) -> None:
        if self.server.relink_gate is not None:
            self.server.reached.set()
            await self.server.relink_gate.wait()
        self.tell(Relinked())

    def refuse(self, error: SwarmError, step: int | None) -> None:
        if isinstance(error, PeerUnreachable | PeerTimeout):  # what a client says of a server, never it of itself
            self.end(error)
            return
        name, text = to_wire(error)
        tokens_left = error.tokens_left if isinstance(error, CacheFull) else None
        self.tell(ErrorReply(error=name, message=text, tokens_left=tokens_left, step=step))

    def tell(self, message: Message, payload: bytes = b"") -> None:
        if not self.ended:
            self._answers.put_nowait((message, payload))

    def end(self, error: SwarmError) -> None:
        if not self.ended:
            self.ended = True
            self._answers.put_nowait(error)
            if self.session is not None:
                self.session.close()

    async def receive(self) -> tuple[Message, bytes]:
        answer = await self._answers.get()
        if isinstance(answer, SwarmError):
            raise answer
        return answer

    def close(self) -> None:
        self.end(PeerUnreachable("closed"))


class FakeNode:
    p2p = None

    async def stop(self) -> None:
        pass


class FakeSwarm:
    """A directory, pings and streams of fake servers. settings: of every client, unless it says otherwise."""

    def __init__(self, thread: NodeThread, monkeypatch: pytest.MonkeyPatch):
        self.thread = thread
        self.servers: dict[str, FakeServer] = {}
        self.settings: dict[str, Any] = {"retry_delay": 0.01, "max_retry_delay": 0.02, "retry_time": 20.0}
        self.directory_error: SwarmError | None = None
        self.users: list[User] = []
        self._tasks: set[asyncio.Task[None]] = set()
        monkeypatch.setattr("swarm.client.block_client.open_stream", self._open_stream)
        monkeypatch.setattr("swarm.client.block_client.ping", self._probe)

    def add(self, name: str, start: int, end: int, **settings: Any) -> FakeServer:
        server = self.servers[name] = FakeServer(self, name, BlockSpan(start=start, end=end), **settings)
        return server

    def __getitem__(self, name: str) -> FakeServer:
        return self.servers[name]

    def connect(self, *, num_blocks: int = NUM_BLOCKS, **settings: Any) -> FakeConnection:
        config = ClientConfig(**{**self.settings, **settings})
        router = Router(
            FakeDirectory(self),
            self._ping,
            FINGERPRINT,
            num_blocks,
            "Fake",
            RouterConfig(**config.model_dump(include=set(RouterConfig.model_fields))),
            rng=random.Random(0),
        )
        return FakeConnection(self, router, config, num_blocks)

    def take_push(self, pusher: str, target: NextServer, request: StepRequest, payload: bytes) -> None:
        """A push arrives. Raises what its sender is told; the session's owner is told of a step that cannot be run."""
        server = self.servers[target.peer_id]
        session = server.sessions.get(target.session_id)
        if server.hung or self.servers[pusher].loses_pushes:
            return
        if session is None:
            raise SessionLost("no such session")
        if session.previous != pusher:
            raise PeerRefused(f"{session.previous} was named as the server before this one, not {pusher}")
        try:
            session.accept(request, payload, pushed=True)
        except SwarmError as error:
            session.stream.refuse(error, request.step)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """In the thread of clients and servers, and then until all that follows from it is done."""
        result = self.thread.run(coroutine)
        self.settle()
        return result

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()

    def settle(self) -> None:
        """Wait until clients and servers have nothing left to do."""
        self.thread.run(_idle())

    async def _ping(self, peer_id: str, timeout: float) -> float:
        return 0.001

    async def _probe(self, p2p: object, peer_id: str, timeout: float) -> float:
        server = self.servers[peer_id]
        server.pings += 1
        if server.hung:
            await asyncio.sleep(timeout)
            raise PeerTimeout(f"{peer_id} did not answer within {timeout:g} s")
        return 0.001

    async def _open_stream(self, p2p: object, peer_id: str, timeout: float) -> FakeStream:
        return FakeStream(self.servers[peer_id])


async def _idle() -> None:
    for _ in range(30):  # each makes way for everything that is ready
        await asyncio.sleep(0)


class FakeDirectory:
    """The records of a fake swarm."""

    def __init__(self, swarm: FakeSwarm):
        self._swarm = swarm

    async def servers(self, fingerprint: str) -> list[ServerRecord]:
        if self._swarm.directory_error is not None:
            raise self._swarm.directory_error
        return [_record(server) for server in self._swarm.servers.values() if server.listed]

    async def models(self) -> dict[str, ModelInfo]:
        return {}


def _record(server: FakeServer) -> ServerRecord:
    info = ServerInfo(
        state=server.state,
        span=server.span,
        throughput=server.throughput,
        numerics=server.numerics,
        network_rate=server.network_rate,
        cache_tokens_left=server.announced_cache_tokens,
    )
    return ServerRecord(server.name, info, expires=1e12)


class FakeConnection:
    """What `SwarmConnection` is to the model, and a short way to sessions."""

    def __init__(self, swarm: FakeSwarm, router: Router, config: ClientConfig, num_blocks: int):
        self.thread, self.router, self.config = swarm.thread, router, config
        self._swarm = swarm
        self.num_blocks = num_blocks
        self.links = Links(router, config)
        self.client = SwarmBlockClient(FakeNode(), FINGERPRINT, config)  # type: ignore[arg-type]

    def open_session(self, span: BlockSpan, num_rows: int, max_length: int, bytes_per_token: int) -> InferenceSession:
        return InferenceSession(
            self.thread,
            self.router,
            self.client,
            self.config,
            self.links,
            span=span,
            num_rows=num_rows,
            max_length=max_length,
            bytes_per_token=bytes_per_token,
        )

    @property
    def banned(self) -> set[str]:
        return set(self.router.banned())

    def user(self, num_rows: int = 1, max_length: int = 64, start: int = 0, end: int | None = None) -> User:
        span = BlockSpan(start=start, end=self.num_blocks if end is None else end)
        user = User(self.open_session(span, num_rows, max_length, 4 * HIDDEN_SIZE), span)
        self._swarm.users.append(user)
        return user


class User:
    """Feeds a session with random tokens, and compares each output with that of an uninterrupted run."""

    def __init__(self, session: InferenceSession, span: BlockSpan):
        self.session, self.span = session, span
        self.inputs = [torch.empty(0, HIDDEN_SIZE)] * session.num_rows
        self._random = torch.Generator().manual_seed(0)

    def step(self, *num_tokens: int) -> None:
        """So many new tokens for each row (default: one for each). Raises what the session raises."""
        counts = num_tokens or (1,) * self.session.num_rows
        new = [torch.randint(0, MODULUS, (count, HIDDEN_SIZE), generator=self._random).float() for count in counts]
        rows = [RowSlice(row, len(self.inputs[row]), count) for row, count in enumerate(counts) if count]
        output = self.session.step(torch.cat(new), rows)
        self.inputs = [torch.cat([old, part]) for old, part in zip(self.inputs, new, strict=True)]
        expected = [
            run_blocks(self.span, inputs)[len(inputs) - count :]
            for inputs, count in zip(self.inputs, counts, strict=True)
        ]
        torch.testing.assert_close(output, torch.cat(expected), rtol=0, atol=0)

    def rewind(self, *lengths: int) -> None:
        self.session.rewind(lengths)
        self.inputs = [inputs[:length] for inputs, length in zip(self.inputs, lengths, strict=True)]

    def reorder(self, *sources: int) -> None:
        self.session.reorder(sources)
        self.inputs = [self.inputs[source] for source in sources]

    @property
    def route(self) -> list[tuple[str, str]]:
        return [(link.peer_id, str(link.span)) for link in self.session.chain]


@pytest.fixture(scope="session")
def node_thread() -> Iterator[NodeThread]:
    """A node's thread without a node."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    node_thread = NodeThread(loop, thread, FakeNode())  # type: ignore[arg-type]
    yield node_thread
    node_thread.stop()


@pytest.fixture
def fake_swarm(node_thread: NodeThread, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSwarm]:
    """An empty fake swarm for a model of 8 blocks."""
    swarm = FakeSwarm(node_thread, monkeypatch)
    yield swarm
    for user in swarm.users:
        user.session.close()
    swarm.run(swarm.end())


@pytest.fixture(params=[True, False], ids=["push", "no push"])
def either_way(request: pytest.FixtureRequest, fake_swarm: FakeSwarm) -> bool:
    """Whether servers push to each other; every client of the fake swarm is told so."""
    direct_push: bool = request.param
    fake_swarm.settings["direct_push"] = direct_push
    return direct_push


@pytest.fixture
def small_messages(monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps travel in parts of 4 tokens."""
    monkeypatch.setattr("swarm.client.history.MAX_PAYLOAD_BYTES", 4 * HIDDEN_SIZE * 4)
    return 4
