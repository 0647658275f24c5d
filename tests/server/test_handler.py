"""Strangers at the door: whatever they send over the real network, honest sessions go on and no cache is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
import pytest_asyncio
import torch
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import runtime_pb2

from swarm.checkpoint import Checkpoint
from swarm.data_structures import BlockSpan, ServerInfo, ServerState
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
    SessionTooLong,
    SwarmError,
)
from swarm.node import Node, NodeConfig
from swarm.protocol import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    BlockProtocol,
    CloseSession,
    ErrorReply,
    Message,
    Moving,
    OpenSession,
    RowSlice,
    SessionOpened,
    StepRequest,
    StepResult,
    TensorMeta,
    WorkKind,
)
from swarm.rpc import FrameStream, open_stream, server_info
from swarm.server.engine import Engine
from swarm.server.handler import Handler
from swarm.server.kv_cache import KVCache
from swarm.server.loader import load_span
from swarm.server.sessions import SessionTable
from swarm.server.tasks import StepTask
from swarm.tensors import Codec, decode, encode

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
SPAN = BlockSpan(start=2, end=6)
CACHE_TOKENS = 4096
FINGERPRINT = "ab" * 32
INFO = ServerInfo(state=ServerState.ONLINE, span=SPAN, throughput=1.0, numerics="x", cache_tokens_left=5)


class Client:
    """One stream to the server, and what a client or an attacker may say over it."""

    def __init__(self, stream: FrameStream, inputs: torch.Tensor, outputs: torch.Tensor):
        self.stream = stream
        self.session_id = secrets.token_hex(16)
        self.position = 0
        self._inputs, self._outputs = inputs, outputs  # of the span, for one text: [tokens, hidden_size]

    async def send(self, message: Message, payload: bytes | memoryview = b"") -> None:
        await self.stream.send(message, payload)

    async def send_raw(self, data: bytes) -> None:
        self.stream._writer.write(data)
        await self.stream._writer.drain()

    async def receive(self) -> tuple[Message, bytes]:
        async with asyncio.timeout(LIMIT):
            return await self.stream.receive()

    async def open(self, **changes: Any) -> Message:
        fields: dict[str, Any] = {
            "session_id": self.session_id,
            "fingerprint": FINGERPRINT,
            "span": SPAN,
            "num_rows": 1,
            "max_length": 64,
        }
        await self.send(OpenSession(**(fields | changes)))
        return (await self.receive())[0]

    def request(self, num_tokens: int = 1, **changes: Any) -> tuple[StepRequest, memoryview]:
        """The next step of an honest client, or of one that changes some fields."""
        meta, payload = encode(self._inputs[self.position : self.position + num_tokens], Codec.FLOAT32)
        fields: dict[str, Any] = {
            "session_id": self.session_id,
            "step": self.position,
            "rows": (RowSlice(0, self.position, num_tokens),),
            "hidden": meta,
        }
        return StepRequest(**(fields | changes)), payload

    async def expect_result(self, num_tokens: int) -> StepResult:
        """The answer to an honest step, compared with plain transformers."""
        answer, payload = await self.receive()
        assert isinstance(answer, StepResult), answer
        assert answer.step == self.position
        expected = self._outputs[self.position : self.position + num_tokens]
        assert (decode(answer.hidden, payload) - expected).abs().max() <= 1e-5 * expected.abs().max()
        self.position += num_tokens
        return answer

    async def step(self, num_tokens: int = 1) -> StepResult:
        await self.send(*self.request(num_tokens))
        return await self.expect_result(num_tokens)

    async def expect_error(self, error: type[SwarmError], text: str = "") -> ErrorReply:
        answer, _ = await self.receive()
        assert isinstance(answer, ErrorReply), answer
        assert answer.error == error.__name__
        assert text in answer.message
        return answer

    async def expect_end(self) -> None:
        with pytest.raises(PeerUnreachable):
            await self.receive()

    def vanish(self) -> None:
        self.stream.abort()


class World:
    """A server on a part of the tiny Llama, an honest peer and a stranger: three peers of one swarm."""

    def __init__(self, nodes: list[Node], engine: Engine, boundaries: list[torch.Tensor]):
        self.server, self.honest, self.stranger = nodes
        self.engine = engine
        self.cache = engine.cache
        self.changed = asyncio.Event()  # a session was opened or closed
        self.handler = Handler(
            engine,
            SessionTable(engine.cache, on_change=self.changed.set),
            fingerprint=FINGERPRINT,
            info=lambda: INFO,
            idle_limit=600.0,
            step_timeout=120.0,
        )
        self._inputs, self._outputs = boundaries[SPAN.start], boundaries[SPAN.end]
        self._clients: list[Client] = []

    async def connect(self, node: Node) -> Client:
        return self.client(await open_stream(node.p2p, self.server.peer_id, LIMIT))

    def client(self, stream: FrameStream) -> Client:
        client = Client(stream, self._inputs, self._outputs)
        self._clients.append(client)
        return client

    async def open(self, node: Node, **changes: Any) -> Client:
        client = await self.connect(node)
        answer = await client.open(**changes)
        assert isinstance(answer, SessionOpened), answer
        return client

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until something is true that changes when a session is opened or closed."""
        async with asyncio.timeout(LIMIT):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def hang_up(self) -> None:
        """End all streams; all cache comes back."""
        for client in self._clients:
            client.vanish()
        self._clients.clear()
        await self.wait_until(lambda: len(self.handler.sessions) == 0)
        assert self.cache.tokens_left == CACHE_TOKENS


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    tiny_checkpoint: Checkpoint, tiny_model: Any, hidden_at_boundaries: Callable[..., list[torch.Tensor]]
) -> AsyncIterator[World]:
    span = load_span(tiny_checkpoint, SPAN, dtype=torch.float32, quantization="none", device=torch.device("cpu"))
    ids = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(3))
    cache = KVCache(len(SPAN), CACHE_TOKENS, 4, span.device, span.dtype)
    engine = Engine(span, cache, max_batch_tokens=32)
    engine.start()
    nodes = [await Node.start(NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",)))]
    try:
        peers = (await nodes[0].ready_address(),)
        clients = NodeConfig(initial_peers=peers, listen=False)
        nodes += await asyncio.gather(Node.start(clients), Node.start(clients))
        world = World(nodes, engine, hidden_at_boundaries(tiny_model, ids))
        await world.handler.register(nodes[0].p2p)
        yield world
    finally:
        await asyncio.gather(*(node.stop() for node in nodes))
        await asyncio.to_thread(engine.stop, LIMIT)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def bystander(world: World) -> AsyncIterator[Client]:
    """An honest session that lives through every test, and is followed by a new one."""
    bystander = await world.open(world.honest)
    await bystander.step(5)
    yield bystander
    await bystander.step()
    await bystander.step(3)
    newcomer = await world.open(world.honest)
    await newcomer.step(7)
    await newcomer.step()
    await world.hang_up()


class Gate:
    """Holds batches on the device until it lets them through."""

    def __init__(self) -> None:
        self.entered = asyncio.Semaphore(0)
        self.opened = threading.Semaphore(0)
        self.num_steps = 0  # that were handed to the engine

    async def wait_for_a_batch(self) -> None:
        async with asyncio.timeout(LIMIT):
            await self.entered.acquire()

    def open(self) -> None:
        """Let all batches through from now on."""
        self.opened.release(1000)


@pytest.fixture
def gate(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    loop = asyncio.get_event_loop()
    forward, submit = world.engine.span.forward, world.engine.submit

    def gated(*args: Any) -> torch.Tensor:
        loop.call_soon_threadsafe(gate.entered.release)
        assert gate.opened.acquire(timeout=LIMIT)
        return forward(*args)

    def counting(task: StepTask) -> Any:
        gate.num_steps += 1
        world.changed.set()
        return submit(task)

    monkeypatch.setattr(world.engine.span, "forward", gated)
    monkeypatch.setattr(world.engine, "submit", counting)
    yield gate
    gate.open()


# --- what an honest client sees -----------------------------------------------------------------------------------


async def test_a_session_from_opening_to_closing(world: World) -> None:
    client = await world.connect(world.honest)
    answer = await client.open(max_length=10)
    assert answer == SessionOpened(session_id=client.session_id, cache_tokens_left=world.cache.tokens_left)
    assert world.cache.tokens_left == CACHE_TOKENS - 64 - 12  # in pages of 4
    await client.step(9)
    result = await client.step()
    assert (result.moving, result.compute_time > 0, result.queue_time >= 0) == (False, True, True)
    await client.send(CloseSession(session_id=client.session_id))
    await client.expect_end()
    assert world.cache.tokens_left == CACHE_TOKENS - 64


async def test_a_part_of_the_span(world: World, tiny_model: Any) -> None:
    client = await world.open(world.honest, span=BlockSpan(start=3, end=4))
    request, payload = client.request(4)
    await client.send(request, payload)
    answer, data = await client.receive()
    assert isinstance(answer, StepResult)
    whole = client._outputs[:4]
    assert not torch.allclose(decode(answer.hidden, data), whole)


async def test_many_sessions_at_once(world: World) -> None:
    batches, rows = world.engine.num_batches, world.engine.num_batched_rows

    async def live(node: Node, prompt: int) -> None:
        client = await world.open(node)
        await client.step(prompt)
        for _ in range(12):
            await client.step()

    nodes = [world.honest, world.stranger]
    await asyncio.gather(*(live(nodes[number % 2], 1 + number * 5 % 48) for number in range(24)))
    assert world.engine.num_batched_rows - rows > 2 * (world.engine.num_batches - batches)


async def test_a_session_of_several_rows_rewinds_one(world: World) -> None:
    client = await world.open(world.honest, num_rows=2)
    inputs, outputs = client._inputs, client._outputs

    async def run(*rows: RowSlice) -> None:
        slices = [slice(row.position, row.position + row.num_tokens) for row in rows]
        meta, payload = encode(torch.cat([inputs[tokens] for tokens in slices]), Codec.FLOAT32)
        await client.send(StepRequest(session_id=client.session_id, step=1, rows=rows, hidden=meta), payload)
        answer, data = await client.receive()
        assert isinstance(answer, StepResult), answer
        expected = torch.cat([outputs[tokens] for tokens in slices])
        assert (decode(answer.hidden, data) - expected).abs().max() <= 1e-5 * expected.abs().max()

    await run(RowSlice(1, 0, 9), RowSlice(0, 0, 3))
    await run(RowSlice(0, 3, 1), RowSlice(1, 4, 30))
    await run(RowSlice(1, 2, 1))


async def test_questions_are_answered(world: World) -> None:
    assert await server_info(world.stranger.p2p, world.server.peer_id, LIMIT) == INFO


# --- requests that are refused, after which the stream goes on -----------------------------------------------------


BAD_OPENINGS: dict[str, tuple[dict[str, Any], type[SwarmError], str]] = {
    "other weights": ({"fingerprint": "cd" * 32}, PeerRefused, "serves weights abababababab, not the requested cdcd"),
    "blocks before": ({"span": BlockSpan(start=1, end=6)}, BadSpan, "holds blocks 2:6, not all of the requested 1:6"),
    "blocks behind": ({"span": BlockSpan(start=6, end=8)}, BadSpan, "not all of the requested 6:8"),
    "an adapter": ({"adapters": ("french",)}, NotSupported, "holds no adapters"),
    "too much cache": ({"num_rows": 100}, CacheFull, "room for 4032 more tokens"),
}


@pytest.mark.parametrize("name", BAD_OPENINGS)
async def test_an_opening_that_is_refused(world: World, name: str) -> None:
    changes, error, text = BAD_OPENINGS[name]
    client = await world.connect(world.stranger)
    answer = await client.open(**changes)
    assert isinstance(answer, ErrorReply), answer
    assert (answer.error, text in answer.message) == (error.__name__, True), answer
    assert answer.tokens_left == (CACHE_TOKENS - 64 if error is CacheFull else None)
    assert isinstance(await client.open(), SessionOpened)
    await client.step(3)


async def test_an_id_in_use_is_refused_to_owner_and_stranger(world: World, bystander: Client) -> None:
    for node in (world.honest, world.stranger):
        client = await world.connect(node)
        answer = await client.open(session_id=bystander.session_id)
        assert isinstance(answer, ErrorReply), answer
        assert answer.error == PeerRefused.__name__


async def test_a_second_session_on_a_stream_is_refused(world: World) -> None:
    client = await world.open(world.stranger)
    await client.step(2)
    answer = await client.open(session_id=secrets.token_hex(16))
    assert isinstance(answer, ErrorReply), answer
    assert answer.error == ProtocolError.__name__
    assert world.cache.tokens_left == CACHE_TOKENS - 2 * 64
    await client.step()


def hidden(tokens: int, hidden_size: int) -> TensorMeta:
    return TensorMeta(shape=(tokens, hidden_size), codec=Codec.FLOAT32)


BAD_STEPS: dict[str, tuple[dict[str, Any], bytes, type[SwarmError], str]] = {
    "width": ({"hidden": hidden(1, 32)}, bytes(128), ProtocolError, "shape [1, 32]; this model takes [tokens, 64]"),
    "tokens": ({"hidden": hidden(2, 64)}, bytes(512), ProtocolError, "for 2 tokens, but the rows list 1"),
    "too few bytes": ({}, bytes(252), ProtocolError, "takes 256 bytes, but 252 arrived"),
    "too many bytes": ({}, bytes(260), ProtocolError, "takes 256 bytes, but 260 arrived"),
    "bytes of another codec": (
        {"hidden": TensorMeta(shape=(1, 64), codec=Codec.FLOAT16)},
        bytes(256),
        ProtocolError,
        "128",
    ),
    "no tensor": ({}, b"", ProtocolError, "but 0 arrived"),
    "a gap": ({"rows": (RowSlice(0, 4, 1),)}, bytes(256), ProtocolError, "position 4"),
    "no such row": ({"rows": (RowSlice(1, 0, 1),)}, bytes(256), ProtocolError, "row 1 of a session with 1 rows"),
    "a row twice": (
        {"rows": (RowSlice(0, 3, 1), RowSlice(0, 4, 1)), "hidden": hidden(2, 64)},
        bytes(512),
        ProtocolError,
        "lists a row twice",
    ),
    "a row without tokens": (
        {"rows": (RowSlice(0, 3, 0),), "hidden": hidden(0, 64)},
        b"",
        ProtocolError,
        "row 0 has no tokens",
    ),
    "beyond max_length": (
        {"rows": (RowSlice(0, 3, 62),), "hidden": hidden(62, 64)},
        bytes(62 * 256),
        SessionTooLong,
        "3 + 62 tokens are more than the session's max_length of 64",
    ),
    "NaN": ({}, struct.pack("<64f", *[float("nan")], *[0.0] * 63), ProtocolError, "NaN or infinity"),
    "infinity": ({}, struct.pack("<64f", *[0.0] * 63, float("-inf")), ProtocolError, "NaN or infinity"),
    "forward": ({"work": WorkKind.FORWARD}, bytes(256), NotSupported, "not forward passes"),
    "backward": ({"work": WorkKind.BACKWARD}, bytes(256), NotSupported, "not backward passes"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
async def test_a_bad_step_is_refused_and_changes_nothing(world: World, name: str) -> None:
    changes, payload, error, text = BAD_STEPS[name]
    client = await world.open(world.stranger)
    await client.step(3)
    request, _ = client.request(**changes)
    await client.send(request, payload)
    await client.expect_error(error, text)
    await client.step(2)


# --- requests after which the stream is of no use ------------------------------------------------------------------


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">II", len(header), len(payload)) + header + payload


def int64_step(client: Client) -> bytes:
    request, _ = client.request()
    fields = request.model_dump() | {"hidden": {"shape": [1, 64], "codec": "int64"}}
    return frame(msgpack.packb(["step", fields]), bytes(512))


JUNK: dict[str, tuple[Callable[[Client], bytes], type[SwarmError], str]] = {
    "a huge header": (lambda _: struct.pack(">II", 2**32 - 1, 0), MessageTooLarge, "over the limit"),
    "a header over the limit": (lambda _: struct.pack(">II", MAX_HEADER_BYTES + 1, 0), MessageTooLarge, "over"),
    "a huge tensor": (lambda _: struct.pack(">II", 10, 2**32 - 1), MessageTooLarge, "over the limit"),
    "a tensor over the limit": (lambda _: struct.pack(">II", 9, MAX_PAYLOAD_BYTES + 1), MessageTooLarge, "over"),
    "another protocol": (lambda _: b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", MessageTooLarge, "over the limit"),
    "random bytes": (lambda _: bytes([0, 0, 0, 99, 0, 0, 0, 99]) + secrets.token_bytes(198), ProtocolError, ""),
    "no message": (lambda _: frame(msgpack.packb({"open": "sesame"})), ProtocolError, "not a message of protocol"),
    "an unknown message": (lambda _: frame(msgpack.packb(["steal", {}])), ProtocolError, "not a message of protocol"),
    "another codec": (int64_step, ProtocolError, "hidden.codec"),
}


@pytest.mark.parametrize("name", JUNK)
@pytest.mark.parametrize("opened", [False, True], ids=["without session", "with session"])
async def test_junk_ends_the_stream_with_the_reason(world: World, opened: bool, name: str) -> None:
    make, error, text = JUNK[name]
    client = await (world.open if opened else world.connect)(world.stranger)
    await client.send_raw(make(client))
    await client.expect_error(error, text)
    await client.expect_end()
    assert world.cache.tokens_left == CACHE_TOKENS - 64


async def test_a_stranger_cannot_write_lines_of_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    client = await world.connect(world.stranger)
    with caplog.at_level(logging.INFO, logger="swarm.server"):
        await client.send_raw(frame(msgpack.packb(["moving", {"\x1b[2J\nall is well": 1}])))
        await client.expect_error(ProtocolError, "all is well")
    assert any("all is well" in line for line in caplog.messages)
    assert all(line.isprintable() for line in caplog.messages)


async def test_who_goes_on_sending_a_message_over_the_limit_is_cut_off(world: World) -> None:
    client = await world.open(world.stranger)

    async def pump() -> None:
        with contextlib.suppress(ConnectionError):
            await client.send_raw(struct.pack(">II", 10, 2**32 - 1))
            while True:  # 4 GB were announced; the server must not take even 64 MB
                await client.send_raw(bytes(2**16))
                pumped.append(2**16)
                assert sum(pumped) < 64 * 2**20

    pumped: list[int] = []
    pumping = asyncio.create_task(pump())
    await world.wait_until(lambda: world.cache.tokens_left == CACHE_TOKENS - 64)
    client.vanish()
    async with asyncio.timeout(LIMIT):
        await pumping


@pytest.mark.parametrize("message", [SessionOpened(session_id="ab" * 16, cache_tokens_left=0), Moving()])
async def test_a_message_that_only_servers_send(world: World, message: Message) -> None:
    client = await world.open(world.stranger)
    await client.send(message)
    await client.expect_error(ProtocolError, f"a server takes no {type(message).__name__} messages")
    await client.step()


async def test_a_message_that_carries_no_tensor_with_one(world: World) -> None:
    client = await world.connect(world.stranger)
    opening = OpenSession(session_id=client.session_id, fingerprint=FINGERPRINT, span=SPAN, num_rows=1, max_length=8)
    await client.send(opening, bytes(100))
    await client.expect_error(ProtocolError, "OpenSession messages carry no tensor")
    await client.expect_end()


async def test_a_tensor_far_larger_than_the_session_is_not_even_read(world: World) -> None:
    client = await world.open(world.stranger)  # of one row, 64 tokens at most
    request, _ = client.request()
    header = msgpack.packb(["step", request.model_dump()])
    await client.send_raw(frame(header, b"")[:4] + struct.pack(">I", 2**20) + header)
    await client.expect_error(MessageTooLarge, "more than this session reserved room for")
    await client.expect_end()


@pytest.mark.parametrize("length", [1, 8, 50, -1])
async def test_a_frame_cut_short(world: World, length: int) -> None:
    client = await world.open(world.stranger)
    request, payload = client.request()
    whole = frame(msgpack.packb(["step", request.model_dump()]), bytes(payload))
    await client.send_raw(whole[:length])
    client.stream.close()
    await world.wait_until(lambda: world.cache.tokens_left == CACHE_TOKENS - 64)


# --- other people's sessions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_session", [False, True], ids=["without session", "with session"])
@pytest.mark.parametrize("kind", ["step", "close"])
async def test_a_stranger_at_somebodys_session(world: World, bystander: Client, kind: str, own_session: bool) -> None:
    stranger = await (world.open if own_session else world.connect)(world.stranger)
    if kind == "step":
        request, payload = bystander.request()
        await stranger.send(request, payload)
    else:
        await stranger.send(CloseSession(session_id=bystander.session_id))
    await stranger.expect_error(PeerRefused, f"session {bystander.session_id} belongs to another peer")
    await stranger.expect_end()
    assert len(world.handler.sessions) == 1
    await bystander.step()


async def test_a_strangers_tensor_is_refused_before_it_is_read(world: World, bystander: Client) -> None:
    stranger = await world.connect(world.stranger)
    request, _ = bystander.request()
    header = msgpack.packb(["step", request.model_dump()])
    await stranger.send_raw(struct.pack(">II", len(header), MAX_PAYLOAD_BYTES) + header)  # the tensor never comes
    await stranger.expect_error(PeerRefused)
    await stranger.expect_end()


@pytest.mark.parametrize("kind", ["step", "close"])
async def test_ones_own_session_over_another_stream(world: World, bystander: Client, kind: str) -> None:
    other = await world.open(world.honest)
    if kind == "step":
        await other.send(*bystander.request())
    else:
        await other.send(CloseSession(session_id=bystander.session_id))
    await other.expect_error(PeerRefused, "was opened on another stream")
    await other.expect_end()


async def test_a_session_that_is_not_there(world: World) -> None:
    client = await world.connect(world.honest)
    await client.send(*client.request())
    await client.expect_error(SessionLost, "it was closed, or never opened")
    await client.expect_end()


async def test_an_evicted_session_learns_it_at_its_next_step(world: World) -> None:
    client = await world.open(world.stranger)
    await client.step(3)
    left = world.cache.tokens_left
    session = world.handler.sessions.get(client.session_id, world.stranger.peer_id)
    world.cache.evict(session.rows[0].session)
    assert world.cache.tokens_left == left + 64
    await client.send(*client.request())
    await client.expect_error(SessionLost, "was evicted: others needed its cache")
    await client.expect_end()
    await world.wait_until(lambda: len(world.handler.sessions) == 1)
    again = await world.open(world.stranger)
    await again.step(4)


# --- the end of a session -----------------------------------------------------------------------------------------


async def test_a_request_before_the_answer_to_the_last_one(world: World, gate: Gate) -> None:
    client = await world.open(world.stranger)
    await client.send(*client.request())
    await client.send(*client.request())
    await client.expect_error(ProtocolError, "before the one before it was answered")
    await client.expect_end()


async def test_the_cache_of_a_vanished_client_comes_back(world: World) -> None:
    client = await world.open(world.stranger)
    await client.step(5)
    client.vanish()
    await world.wait_until(lambda: world.cache.tokens_left == CACHE_TOKENS - 64)


async def test_the_cache_of_a_client_that_vanished_during_its_step_comes_back(world: World, gate: Gate) -> None:
    batches = world.engine.num_batches
    client = await world.open(world.stranger)
    await client.send(*client.request(5))
    await gate.wait_for_a_batch()
    client.vanish()
    await world.wait_until(lambda: world.cache.tokens_left == CACHE_TOKENS - 64)
    assert world.engine.num_batches == batches  # though the device still works on it


async def test_who_vanishes_from_a_batch_harms_neither_its_neighbours_nor_its_successors(
    world: World, bystander: Client, gate: Gate
) -> None:
    leaving = [await world.open(world.stranger, span=span) for span in (SPAN, BlockSpan(start=3, end=5))]
    staying = await world.open(world.honest)
    await bystander.send(*bystander.request())
    await gate.wait_for_a_batch()
    for client in (*leaving, staying):
        await client.send(*client.request(10))
    await world.wait_until(lambda: gate.num_steps == 4)
    gate.opened.release()
    await bystander.expect_result(1)
    await gate.wait_for_a_batch()  # of the three
    for client in leaving:
        client.vanish()
    await world.wait_until(lambda: len(world.handler.sessions) == 2)
    newcomers = [await world.open(world.honest) for _ in range(3)]
    for client in newcomers:
        await client.send(*client.request(30))
    gate.open()
    await staying.expect_result(10)
    for client in newcomers:
        await client.expect_result(30)
        await client.step(4)


async def test_the_cache_of_a_killed_peer_comes_back(world: World) -> None:
    node = await Node.start(NodeConfig(initial_peers=(await world.server.ready_address(),), listen=False))
    try:
        client = await world.open(node)
        await client.step(5)
        await node._running_daemon().stop()
        await world.wait_until(lambda: world.cache.tokens_left == CACHE_TOKENS - 64)
    finally:
        await node.stop()


async def test_an_idle_session_is_closed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await world.connect(world.stranger)
    monkeypatch.setattr(world.handler, "idle_limit", 0.5)
    assert isinstance(await client.open(), SessionOpened)
    # the limit counts from the last request, so the next one is read under the new limit
    await client.expect_error(SessionLost, "no step for 0.5 s")
    await client.expect_end()
    assert world.cache.tokens_left == CACHE_TOKENS - 64


async def test_a_session_whose_step_runs_is_not_idle(world: World, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await world.open(world.stranger)
    monkeypatch.setattr(world.handler, "idle_limit", 0.1)
    await client.send(*client.request(3))
    await gate.wait_for_a_batch()
    await asyncio.sleep(0.5)  # nothing is to happen meanwhile
    gate.open()
    await client.expect_result(3)


async def test_a_step_that_takes_too_long(world: World, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await world.open(world.stranger)
    monkeypatch.setattr(world.handler, "step_timeout", 0.2)
    await client.send(*client.request(3))
    await client.expect_error(EngineError, "did not finish within 0.2 s")
    monkeypatch.undo()
    gate.open()
    await client.step(3)


async def test_a_forward_pass_that_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await world.open(world.stranger)
    with monkeypatch.context() as patch:
        patch.setattr(world.engine.span, "forward", lambda *args: 1 / 0)
        await client.send(*client.request(3))
        await client.expect_error(EngineError, "the forward pass failed: ZeroDivisionError")
    await client.step(3)


# --- clients that read nothing; the network hides how much it buffers, so these use a plain socket -----------------


@contextlib.asynccontextmanager
async def direct_client(world: World) -> AsyncIterator[Client]:
    """A client on a socket to the handler, so that it is known when the server cannot send any more."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    serving = asyncio.create_task(
        world.handler._serve(
            SimpleNamespace(peer_id="QmDirect"),  # type: ignore[arg-type]
            *await asyncio.open_connection(sock=theirs),
        )
    )
    try:
        yield world.client(FrameStream(reader, writer))
    finally:
        writer.transport.abort()
        await asyncio.wait({serving}, timeout=LIMIT)


async def stall(world: World, client: Client) -> int:
    """Ask for more than the socket holds, and read nothing of it. Returns the number of bytes."""
    num_rows, max_length = 12, 256
    assert isinstance(await client.open(num_rows=num_rows, max_length=max_length), SessionOpened)
    client.stream._reader._transport.pause_reading()  # type: ignore[attr-defined]
    rows = tuple(RowSlice(row, 0, max_length) for row in range(num_rows))
    meta, payload = encode(torch.zeros(num_rows * max_length, 64), Codec.FLOAT32)
    await client.send(StepRequest(session_id=client.session_id, step=0, rows=rows, hidden=meta), payload)
    return len(payload)


async def test_a_client_that_reads_nothing_loses_its_session(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with direct_client(world) as client:
        with monkeypatch.context() as patch:
            patch.setattr(world.handler, "idle_limit", 0.5)
            num_bytes = await stall(world, client)
            await world.wait_until(lambda: world.cache.tokens_left == CACHE_TOKENS - 64)
        client.stream._reader._transport.resume_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(LIMIT):
            assert len(await client.stream._reader.read()) < num_bytes  # nor does what it left unread stay in memory


# --- leaving ------------------------------------------------------------------------------------------------------


async def test_a_draining_server_tells_its_sessions_and_takes_no_new_ones(world: World, bystander: Client) -> None:
    client = await world.open(world.stranger)
    await client.step(3)
    draining = asyncio.create_task(world.handler.drain(LIMIT))
    try:
        assert (await client.receive())[0] == Moving()
        assert (await bystander.receive())[0] == Moving()
        assert (await client.step()).moving
        late = await world.connect(world.stranger)
        answer = await late.open()
        assert isinstance(answer, ErrorReply), answer
        assert (answer.error, "is leaving" in answer.message) == (PeerRefused.__name__, True)
        late.vanish()
        await client.send(CloseSession(session_id=client.session_id))
        await client.expect_end()
        assert not draining.done()  # the bystander is still here
        assert (await bystander.step()).moving
    finally:
        draining.cancel()
        world.handler.draining = False


async def test_draining_ends_when_the_last_session_has_left(world: World, bystander: Client) -> None:
    client = await world.open(world.stranger)
    draining = asyncio.create_task(world.handler.drain(LIMIT))
    try:
        await client.receive()
        await bystander.receive()
        await world.hang_up()
        async with asyncio.timeout(LIMIT / 2):
            await draining
    finally:
        world.handler.draining = False
        await revive(world, bystander)


async def test_draining_ends_though_somebody_stays_and_somebody_reads_nothing(world: World, bystander: Client) -> None:
    async with direct_client(world) as client:
        await stall(world, client)
        try:
            async with asyncio.timeout(LIMIT):
                await world.handler.drain(0.5)
            await world.wait_until(lambda: len(world.handler.sessions) == 0)
            assert (await bystander.receive())[0] == Moving()
            await bystander.expect_end()
        finally:
            world.handler.draining = False
            await revive(world, bystander)


async def revive(world: World, bystander: Client) -> None:
    """Let the bystander of a test that ended its session come back."""
    again = await world.open(world.honest)
    bystander.stream, bystander.session_id, bystander.position = again.stream, again.session_id, again.position


async def test_an_upload_is_counted_and_answered_in_a_few_bytes(world: World) -> None:
    stub = BlockProtocol.get_stub(world.stranger.p2p, PeerID.from_base58(world.server.peer_id))
    answer = await stub.rpc_upload(runtime_pb2.ExpertInfo(serialized_info=bytes(2**20)), timeout=LIMIT)
    assert answer.uid == str(2**20) and answer.ByteSize() < 20
    with pytest.raises(P2PHandlerError, match="an upload of 1048577 bytes is over the limit of 1048576"):
        await stub.rpc_upload(runtime_pb2.ExpertInfo(serialized_info=bytes(2**20 + 1)), timeout=LIMIT)
