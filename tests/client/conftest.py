"""A swarm without a network: fake servers that compute a simple function of their history, and fail on demand."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import pytest
import torch

from swarm.client.block_client import SpanOutput, SwarmBlockClient
from swarm.client.config import ClientConfig
from swarm.client.inference_session import InferenceSession
from swarm.data_structures import BlockSpan, ModelInfo, OpeningAnswer, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import CacheFull, PeerUnreachable, ProtocolError, SessionLost, SwarmError, to_wire
from swarm.node import NodeThread
from swarm.protocol import ErrorReply, Moving, OpenSession, RowSlice, SessionOpened, StepRequest, StepResult
from swarm.routing.router import Router, RouterConfig
from swarm.tensors import from_bytes, to_bytes

FINGERPRINT = "f" * 64
NUM_BLOCKS = 8
HIDDEN_SIZE = 4
MODULUS = 251


def run_block(index: int, inputs: torch.Tensor) -> torch.Tensor:
    """A block: [tokens, hidden_size] of small whole numbers, exact in float32. Depends on all tokens and positions."""
    positions = torch.arange(1, len(inputs) + 1)[:, None]
    return (3 * inputs + (index + 2) * inputs.cumsum(0) + (index + 1) * positions) % MODULUS


def run_blocks(span: BlockSpan, inputs: torch.Tensor) -> torch.Tensor:
    for index in span.blocks():
        inputs = run_block(index, inputs)
    return inputs


#: (an answer, its tensor's bytes) -> what is sent instead
Tamper: TypeAlias = Callable[[StepResult, bytes], tuple[object, bytes]]


def _as_it_is(result: StepResult, data: bytes) -> tuple[object, bytes]:
    return result, data


@dataclass
class Fault:
    """Raised by the calls number `after`, `after` + 1, ... of `times` calls, counted from when it was ordered."""

    error: SwarmError
    after: int
    times: int


@dataclass
class FakeServer:
    """Strict about positions, like a real one. `opened` counts sessions, `steps` lists the rows of every step."""

    name: str
    span: BlockSpan
    numerics: str = "fp32"
    throughput: float = 10.0
    cache_tokens: int = 100_000
    announced_cache_tokens: int = 100_000
    state: ServerState = ServerState.ONLINE
    listed: bool = True
    moving: bool = False
    opened: int = 0
    steps: list[list[RowSlice]] = field(default_factory=list)
    faults: dict[str, list[Fault]] = field(default_factory=lambda: {"open": [], "step": []})
    spans: set[FakeSpan] = field(default_factory=set)
    compute: Callable[[BlockSpan, torch.Tensor], torch.Tensor] = run_blocks
    #: set by a test to hold back answers; `reached` is set when a step waits
    gate: asyncio.Event | None = None
    reached: threading.Event = field(default_factory=threading.Event)

    def fail(self, where: str, error: SwarmError, *, after: int = 0, times: int = 1) -> None:
        """where: "open" or "step". The error comes after so many good calls, so many times."""
        self.faults[where].append(Fault(error, after, times))

    def die(self) -> None:
        for where in self.faults:
            self.fail(where, PeerUnreachable(f"{self.name} is gone"), times=10**9)

    def lose_sessions(self) -> None:
        for span in self.spans:
            span.lost = True

    def may_fail(self, where: str) -> None:
        for fault in self.faults[where]:
            if fault.after > 0:
                fault.after -= 1
            elif fault.times > 0:
                fault.times -= 1
                raise fault.error

    def open(self, span: BlockSpan, num_rows: int, max_length: int) -> FakeSpan:
        self.opened += 1
        self.may_fail("open")
        assert self.span.covers(span)
        if num_rows * max_length > self.cache_tokens:
            raise CacheFull(f"{self.name} is full", self.cache_tokens)
        self.cache_tokens -= num_rows * max_length
        opened = FakeSpan(self, span, num_rows, max_length)
        self.spans.add(opened)
        return opened


class FakeSpan:
    """An `OpenSpan` on a fake server."""

    def __init__(self, server: FakeServer, span: BlockSpan, num_rows: int, max_length: int):
        self.server, self.span, self.max_length = server, span, max_length
        self.rows: list[torch.Tensor] = [torch.empty(0, 0)] * num_rows
        self.closed = self.lost = False

    def __hash__(self) -> int:
        return id(self)

    @property
    def moving(self) -> bool:
        return self.server.moving

    async def step(self, rows: Sequence[RowSlice], hidden: torch.Tensor) -> SpanOutput:
        if self.closed or self.lost:
            raise SessionLost("no such session")
        try:
            if self.server.gate is not None:
                self.server.reached.set()
                await self.server.gate.wait()
        except asyncio.CancelledError:
            self.close()  # as a real stream that lost its rhythm
            raise
        self.server.steps.append(list(rows))
        self.server.may_fail("step")
        return SpanOutput(self.run(rows, hidden), 0.0, 0.0)

    def run(self, rows: Sequence[RowSlice], hidden: torch.Tensor) -> torch.Tensor:
        outputs = []
        for row, part in zip(rows, hidden.split([row.num_tokens for row in rows]), strict=True):
            cached = self.rows[row.row]
            if row.position > len(cached):
                raise ProtocolError(f"row {row.row} goes on at {row.position}, but only {len(cached)} are cached")
            if row.position + row.num_tokens > self.max_length:
                raise ProtocolError("longer than declared")
            self.rows[row.row] = torch.cat([cached[: row.position], part]) if row.position else part.clone()
            outputs.append(self.server.compute(self.span, self.rows[row.row])[row.position :])
        return torch.cat(outputs)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.server.spans.discard(self)
            self.server.cache_tokens += len(self.rows) * self.max_length


class FakeStream:
    """A `FrameStream` to a fake server: puts the real `RemoteSpan` into the game. `tamper` spoils the answers."""

    def __init__(self, server: FakeServer, tamper: Tamper):
        self.server, self.tamper = server, tamper
        self.span: FakeSpan | None = None
        self.answers: asyncio.Queue[tuple[object, bytes]] = asyncio.Queue()

    async def send(self, message: object, payload: bytes | memoryview = b"") -> None:
        try:
            await self._take(message, bytes(payload))
        except PeerUnreachable:
            raise
        except SwarmError as error:
            name, text = to_wire(error)
            self.answers.put_nowait((ErrorReply(error=name, message=text), b""))

    async def _take(self, message: object, payload: bytes) -> None:
        if isinstance(message, OpenSession):
            self.span = self.server.open(message.span, message.num_rows, message.max_length)
            self.answers.put_nowait((SessionOpened(session_id=message.session_id, cache_tokens_left=1), b""))
        elif isinstance(message, StepRequest) and self.span is not None:
            if self.server.moving:
                self.answers.put_nowait((Moving(), b""))
            output = await self.span.step(message.rows, from_bytes(message.hidden, payload))
            meta, data = to_bytes(output.hidden)
            result = StepResult(step=message.step, hidden=meta, queue_time=0.0, compute_time=0.0)
            self.answers.put_nowait(self.tamper(result, bytes(data)))

    async def receive(self) -> tuple[object, bytes]:
        return await self.answers.get()

    def close(self) -> None:
        if self.span is not None:
            self.span.close()


class FakeNode:
    p2p = None

    async def stop(self) -> None:
        pass


class FakeSwarm:
    """A directory, pings and a `BlockClient` over fake servers; the router, the sessions and the fail-over are real."""

    def __init__(self, thread: NodeThread, monkeypatch: pytest.MonkeyPatch):
        self.thread = thread
        self.servers: dict[str, FakeServer] = {}
        self._tamper: dict[str, Tamper] = {}
        self.directory_error: SwarmError | None = None
        self._monkeypatch = monkeypatch

    def add(self, name: str, start: int, end: int, **settings: object) -> FakeServer:
        server = FakeServer(name, BlockSpan(start=start, end=end), **settings)  # type: ignore[arg-type]
        self.servers[name] = server
        return server

    def tamper(self, name: str, tamper: Tamper) -> None:
        """From now on, spoil this server's answers (of clients with `streams`)."""
        self._tamper[name] = tamper

    def __getitem__(self, name: str) -> FakeServer:
        return self.servers[name]

    def connect(self, *, streams: bool = False, num_blocks: int = NUM_BLOCKS, **settings: object) -> FakeConnection:
        """A client. streams: let it speak the protocol, over fake streams."""
        fast = {"retry_delay": 0.01, "max_retry_delay": 0.02, "retry_time": 20.0}
        config = ClientConfig(**{**fast, **settings})  # type: ignore[arg-type]
        client: object = self
        if streams:
            self._monkeypatch.setattr("swarm.client.block_client.open_stream", self._open_stream)
            client = SwarmBlockClient(FakeNode(), FINGERPRINT, config)  # type: ignore[arg-type]
        router = Router(
            FakeDirectory(self),
            self._ping,
            FINGERPRINT,
            num_blocks,
            "Fake",
            RouterConfig(**config.model_dump(include=set(RouterConfig.model_fields))),
            rng=random.Random(0),
        )
        return FakeConnection(self.thread, router, client, config, num_blocks)

    async def _ping(self, peer_id: str, timeout: float, opening_key: str | None) -> tuple[float, OpeningAnswer]:
        return 0.001, OpeningAnswer(info=_record(self.servers[peer_id]).info)

    async def open(self, link, *, num_rows, max_length):  # type: ignore[no-untyped-def]
        return self.servers[link.peer_id].open(link.span, num_rows, max_length)

    async def _open_stream(self, p2p: object, peer_id: str, timeout: float) -> FakeStream:
        return FakeStream(self.servers[peer_id], lambda *answer: self._tamper.get(peer_id, _as_it_is)(*answer))


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
        cache_tokens_left=server.announced_cache_tokens,
    )
    return ServerRecord(server.name, info, expires=1e12)


class FakeConnection:
    """What `SwarmConnection` is to the model, and a short way to sessions."""

    def __init__(self, thread: NodeThread, router: Router, client: object, config: ClientConfig, num_blocks: int):
        self.thread, self.router, self.client, self.config = thread, router, client, config
        self.num_blocks = num_blocks

    def open_session(self, span: BlockSpan, num_rows: int, max_length: int, bytes_per_token: int) -> InferenceSession:
        return InferenceSession(
            self.thread,
            self.router,
            self.client,  # type: ignore[arg-type]
            self.config,
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
        return User(self.open_session(span, num_rows, max_length, 4 * HIDDEN_SIZE), span)


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
def fake_swarm(node_thread: NodeThread, monkeypatch: pytest.MonkeyPatch) -> FakeSwarm:
    """An empty fake swarm for a model of 8 blocks."""
    return FakeSwarm(node_thread, monkeypatch)


@pytest.fixture
def small_messages(monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps travel in parts of 4 tokens."""
    monkeypatch.setattr("swarm.client.history.MAX_PAYLOAD_BYTES", 4 * HIDDEN_SIZE * 4)
    return 4
