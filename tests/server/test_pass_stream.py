"""Pass streams, as honest clients and others use them: a bad one gets its typed error, and disturbs nobody else."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import torch
from no_adapters import empty_registry

from swarm import passes as messages
from swarm.checkpoint import Checkpoint
from swarm.codecs import Codec
from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.errors import (
    AdapterNotHere,
    BadSpan,
    EngineError,
    MessageTooLarge,
    NotSupported,
    PeerRefused,
    PeerUnreachable,
    ProtocolError,
    QuotaExceeded,
    SwarmError,
)
from swarm.passes import PassRequest, PassResult, TensorPart
from swarm.protocol import (
    AdapterRef,
    CloseSession,
    ErrorReply,
    Message,
    OpenSession,
    RowAdapters,
    RowSlice,
    SessionOpened,
    StepRequest,
    StepResult,
    TensorMeta,
)
from swarm.rpc import FrameStream
from swarm.server import handler, pass_stream
from swarm.server.engine import Engine
from swarm.server.handler import Handler
from swarm.server.kv_cache import KVCache
from swarm.server.loader import load_span
from swarm.server.passes import PassTask, RunningPass
from swarm.server.quotas import PeerQuotas, QuotaLimits
from swarm.server.sessions import SessionTable
from swarm.server.span import Span
from swarm.tensors import decode, encode

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
SPAN = BlockSpan(start=2, end=6)
FINGERPRINT = "ab" * 32
MAX_PASS_TOKENS = 600
HIDDEN_SIZE = 64
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def span(tiny_checkpoint: Checkpoint) -> Span:
    return load_span(tiny_checkpoint, SPAN, dtype=torch.float32, quantization="none", device=torch.device("cpu"))


class Connection:
    """One stream to the server, and what a client or an attacker may say over it."""

    def __init__(self, stream: FrameStream):
        self.stream = stream

    async def send(self, message: Message, payload: bytes | memoryview = b"") -> None:
        await self.stream.send(message, payload)

    async def send_tensor(self, tensor: torch.Tensor, codec: Codec = Codec.FLOAT32, part: int = 2**24) -> None:
        _, data = encode(tensor, codec)
        for first in range(0, len(data), part):
            await self.send(TensorPart(), data[first : first + part])

    async def receive(self) -> tuple[Message, bytes]:
        async with asyncio.timeout(LIMIT):
            return await self.stream.receive()

    async def receive_tensor(self, meta: TensorMeta) -> torch.Tensor:
        data = b""
        while len(data) < messages.tensor_bytes(meta):
            message, payload = await self.receive()
            assert isinstance(message, TensorPart), message
            data += payload
        return decode(meta, data)

    async def expect_error(self, error: type[SwarmError], text: str) -> None:
        answer, _ = await self.receive()
        assert isinstance(answer, ErrorReply), answer
        assert answer.error == error.__name__, answer
        assert text in answer.message, answer
        await self.expect_end()

    async def expect_end(self) -> None:
        with pytest.raises(PeerUnreachable):
            await self.receive()


class Door:
    """A server's handler behind plain sockets, whose buffers are known."""

    def __init__(self, span: Span, limits: QuotaLimits):
        self.engine = Engine(span, KVCache(len(SPAN), 1024, 4, span.device, span.dtype), max_batch_tokens=32)
        self.engine.start()
        self.handler = Handler(
            fingerprint=FINGERPRINT,
            info=lambda: ServerInfo(
                state=ServerState.ONLINE, span=SPAN, throughput=1.0, numerics="x", cache_tokens_left=5
            ),
            quotas=PeerQuotas(limits),
            idle_limit=600.0,
            step_timeout=120.0,
            pass_timeout=120.0,
            max_pass_tokens=MAX_PASS_TOKENS,
        )
        sessions = SessionTable(self.engine.cache)
        self.handler.open(SimpleNamespace(engine=self.engine, sessions=sessions, adapters=empty_registry()))
        self._serving: list[asyncio.Task[None]] = []
        self._streams: list[FrameStream] = []

    async def connect(self, peer_id: str = "QmStranger", *, session: bool = False) -> Connection:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        serve = self.handler._serve if session else self.handler._serve_pass
        reader, writer = await asyncio.open_connection(sock=theirs)
        info: Any = SimpleNamespace(peer_id=peer_id)
        self._serving.append(asyncio.create_task(serve(info, reader, writer)))
        stream = FrameStream(*await asyncio.open_connection(sock=ours))
        self._streams.append(stream)
        return Connection(stream)

    def usage(self, peer_id: str = "QmStranger") -> tuple[int, int]:
        """Streams, and bytes in flight."""
        usage = self.handler.quotas._peers.get(peer_id)
        return (0, 0) if usage is None else (usage.streams, usage.bytes_in_flight)

    async def all_served(self) -> None:
        """Until every stream so far has ended on this side, too."""
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*self._serving)
        self._serving.clear()

    async def close(self) -> None:
        for stream in self._streams:
            stream.close()
        await self.all_served()
        await asyncio.to_thread(self.engine.stop, LIMIT)


@pytest.fixture(autouse=True)
def no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused clients here wait for the end of the stream, and do not end it themselves."""
    monkeypatch.setattr(handler, "LINGER", 0.01)


@pytest.fixture
def limits() -> QuotaLimits:
    """A test may ask for others with `@pytest.mark.parametrize("limits", ...)`."""
    return QuotaLimits()


@pytest_asyncio.fixture
async def empty_door(span: Span, limits: QuotaLimits) -> AsyncIterator[Door]:
    """Afterwards nobody holds anything."""
    door = Door(span, limits)
    yield door
    await door.close()
    assert door.usage() == door.usage("QmHonest") == (0, 0)


@pytest_asyncio.fixture
async def door(empty_door: Door) -> AsyncIterator[Door]:
    """With an honest session that lives through the test, and an honest pass after it."""
    door, span = empty_door, empty_door.engine.span
    session = await door.connect("QmHonest", session=True)
    opening = OpenSession(
        session_id=secrets.token_hex(16),
        fingerprint=FINGERPRINT,
        span=SPAN,
        num_rows=1,
        max_length=16,
        output_codec=Codec.FLOAT32,
    )
    await session.send(opening)
    assert isinstance((await session.receive())[0], SessionOpened)
    hidden = random(7, seed=5)
    wanted = direct(span, PassTask("", hidden, (7,), 0, len(SPAN))).hidden

    async def step(number: int, first: int, last: int) -> None:
        meta, payload = encode(hidden[first:last], Codec.FLOAT32)
        await session.send(StepRequest(step=number, rows=(RowSlice(0, first, last - first),), hidden=meta), payload)
        answer, data = await session.receive()
        assert isinstance(answer, StepResult), answer
        torch.testing.assert_close(decode(answer.hidden, data), wanted[first:last], rtol=0, atol=1e-4)

    await step(1, 0, 4)
    yield door
    await step(2, 4, 7)
    door.handler.draining = False
    await expect_honest_pass(door)
    await session.send(CloseSession())


def random(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def direct(span: Span, task: PassTask) -> Any:
    running = RunningPass(task, span)
    while not running.advance():
        pass
    running.finish()
    return task.future.result(0)


def meta(rows: int, width: int = HIDDEN_SIZE, codec: Codec = Codec.FLOAT32) -> TensorMeta:
    return TensorMeta(shape=(rows, width), codec=codec)


def request(**changes: Any) -> PassRequest:
    """What an honest client asks for, but for some fields: a forward pass of 3 + 4 tokens."""
    fields: dict[str, Any] = {
        "fingerprint": FINGERPRINT,
        "span": SPAN,
        "lengths": (3, 4),
        "output_codec": Codec.FLOAT32,
        "hidden": meta(7),
    }
    return PassRequest(**(fields | changes))


BACKWARD = {"gradient": meta(7)}
PROMPTED = {"prompts": meta(4 * 2)}  # two tokens for each block


async def expect_honest_pass(door: Door, peer_id: str = "QmHonestToo") -> None:
    connection = await door.connect(peer_id)
    hidden = random(7)
    await connection.send(request())
    await connection.send_tensor(hidden)
    await expect_output(connection, door, hidden)


async def expect_output(connection: Connection, door: Door, hidden: torch.Tensor) -> None:
    answer, _ = await connection.receive()
    assert isinstance(answer, PassResult), answer
    output = await connection.receive_tensor(answer.hidden)
    wanted = direct(door.engine.span, PassTask("", hidden, (3, 4), 0, len(SPAN))).hidden
    assert torch.equal(output, wanted)
    await connection.expect_end()


# --- what an honest client sees --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [2**24, 1000, 100], ids=["one part", "several", "of less than a row"])
async def test_a_backward_pass_with_prompts(door: Door, span: Span, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_PAYLOAD_BYTES", 3 * 4 * HIDDEN_SIZE)  # so the answer comes in several, too
    hidden, prompts, gradient = random(7), random(8, seed=2), random(7, seed=3)
    connection = await door.connect()
    await connection.send(request(**BACKWARD, **PROMPTED))
    for tensor in (hidden, prompts, gradient):
        await connection.send_tensor(tensor, part=part)
    answer, _ = await connection.receive()
    assert isinstance(answer, PassResult), answer
    assert answer.compute_time > 0 and (answer.hidden, answer.prompts) == (meta(7), meta(8))
    found = [await connection.receive_tensor(own) for own in answer.tensors]
    await connection.expect_end()
    task = PassTask("", hidden, (3, 4), 0, 4, prompts.view(4, 2, HIDDEN_SIZE), gradient)
    wanted = direct(span, task)
    assert torch.equal(found[0], wanted.hidden)
    assert wanted.prompts is not None and torch.equal(found[1], wanted.prompts.view(8, HIDDEN_SIZE))


async def test_a_forward_pass_with_prompts_brings_no_gradient_of_them(door: Door) -> None:
    connection = await door.connect()
    await connection.send(request(**PROMPTED))
    await connection.send_tensor(random(7))
    await connection.send_tensor(random(8))
    answer, _ = await connection.receive()
    assert isinstance(answer, PassResult) and answer.prompts is None
    await connection.receive_tensor(answer.hidden)
    await connection.expect_end()


@pytest.mark.parametrize("codec", [Codec.BFLOAT16, Codec.FLOAT16, Codec.BLOCKWISE8])
async def test_tensors_in_other_codecs(door: Door, span: Span, codec: Codec) -> None:
    connection = await door.connect()
    await connection.send(request(hidden=meta(7, codec=codec), output_codec=codec))
    sent_meta, data = encode(random(7), codec)
    await connection.send(TensorPart(), data)
    answer, _ = await connection.receive()
    assert isinstance(answer, PassResult) and answer.hidden == meta(7, codec=codec)
    output = await connection.receive_tensor(answer.hidden)
    wanted = direct(span, PassTask("", decode(sent_meta, data).float(), (3, 4), 0, 4)).hidden
    assert (output.float() - wanted).norm() <= 2e-2 * wanted.norm()


async def test_passes_are_counted(door: Door) -> None:
    for backward in (False, True, True):
        connection = await door.connect()
        hidden = random(7)
        await connection.send(request(**(BACKWARD if backward else {})))
        await connection.send_tensor(hidden)
        if backward:
            await connection.send_tensor(random(7))
        answer, _ = await connection.receive()
        assert isinstance(answer, PassResult), answer
        await connection.receive_tensor(answer.hidden)
    connection = await door.connect()
    await connection.send(request(fingerprint="cd" * 32))
    await connection.expect_error(PeerRefused, "this server serves weights")
    tally = door.handler.tally
    assert (tally.forward_passes, tally.backward_passes, tally.training_tokens) == (1, 2, 21)
    assert tally.refused["PeerRefused"] == 1
    values = 4 * HIDDEN_SIZE * 7
    assert 5 * values < tally.traffic.received < 5 * values + 8 * 1000
    assert 3 * values < tally.traffic.sent < 3 * values + 8 * 1000
    assert door.engine._tally.training_time > 0


async def test_a_part_of_the_span(door: Door, span: Span) -> None:
    connection, hidden = await door.connect(), random(7)
    await connection.send(request(span=BlockSpan(start=3, end=5)))
    await connection.send_tensor(hidden)
    answer, _ = await connection.receive()
    assert isinstance(answer, PassResult)
    wanted = direct(span, PassTask("", hidden, (3, 4), 1, 3)).hidden
    assert torch.equal(await connection.receive_tensor(answer.hidden), wanted)


async def test_many_passes_at_once(door: Door) -> None:
    await asyncio.gather(*(expect_honest_pass(door, f"Qm{number % 3}") for number in range(12)))


# --- refused before a tensor is read ---------------------------------------------------------------------------------

FRENCH = AdapterRef("french", "12" * 8)
BAD_REQUESTS: dict[str, tuple[dict[str, Any], type[SwarmError], str]] = {
    "other weights": ({"fingerprint": "cd" * 32}, PeerRefused, "serves weights abababababab, not the requested cdcd"),
    "blocks before": ({"span": BlockSpan(start=1, end=6)}, BadSpan, "holds blocks 2:6, not all of the requested 1:6"),
    "blocks behind": ({"span": BlockSpan(start=6, end=8)}, BadSpan, "not all of the requested 6:8"),
    "an adapter": (
        {"adapters": RowAdapters((FRENCH,), (0, -1))},
        AdapterNotHere,
        "this server has no adapter 'french'",
    ),
    "adapters for other rows": ({"adapters": RowAdapters((FRENCH,), (0,))}, ProtocolError, "adapters for 1 rows"),
    "too many tokens": (
        {"lengths": (600, 1), "hidden": meta(601)},
        MessageTooLarge,
        "a pass of 601 tokens; this server takes 600 at most: use fewer or shorter rows",
    ),
    "width": ({"hidden": meta(7, 32)}, ProtocolError, "shape [7, 32] for 7 tokens; this model takes [7, 64]"),
    "more tokens than rows list": ({"hidden": meta(8)}, ProtocolError, "shape [8, 64] for 7 tokens"),
    "nothing": ({"hidden": meta(0)}, ProtocolError, "shape [0, 64] for 7 tokens"),
    "a backward pass without inputs": ({"hidden": meta(0), **BACKWARD}, ProtocolError, "shape [0, 64] for 7 tokens"),
    "a gradient for fewer tokens": (
        {"gradient": meta(6)},
        ProtocolError,
        "a gradient of shape [6, 64] for an output of shape [7, 64]",
    ),
    "a gradient of another width": ({"gradient": meta(7, 65)}, ProtocolError, "a gradient of shape [7, 65]"),
    "an empty gradient": ({"gradient": meta(0)}, ProtocolError, "a gradient of shape [0, 64]"),
    "prompts for fewer blocks": ({"prompts": meta(2 * 4 - 1)}, ProtocolError, "shape [7, 64] for 4 blocks"),
    "prompts of another width": ({"prompts": meta(8, 32)}, ProtocolError, "shape [8, 32] for 4 blocks"),
    "empty prompts": ({"prompts": meta(0)}, ProtocolError, "with 1 to 512 prompt tokens"),
    "prompts for too many tokens": ({"prompts": meta(4 * 513)}, ProtocolError, "with 1 to 512 prompt tokens"),
}


async def test_adapters_that_take_too_long_to_load(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a hub that hangs, say."""

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(door.handler, "pass_timeout", 0.01)
        patch.setattr(door.handler.adapters, "lease", never)
        connection = await door.connect()
        await connection.send(request(adapters=RowAdapters((FRENCH,), (0, -1))))
        await connection.expect_error(AdapterNotHere, "were not loaded within 0.01 s")


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_a_request_that_is_refused(door: Door, name: str) -> None:
    changes, error, text = BAD_REQUESTS[name]
    connection = await door.connect()
    await connection.send(request(**changes))
    await connection.expect_error(error, text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lengths": ()}, "lengths"),
        ({"lengths": (7, 0)}, "lengths.1"),
        ({"lengths": (8, -1)}, "lengths.1"),
        ({"lengths": (1,) * 1025}, "lengths"),
        ({"output_codec": "float64"}, "output_codec"),
        ({"hidden": {"shape": (-1, 64), "codec": "float32"}}, "hidden"),
        ({"hidden": None}, "hidden"),
        ({"span": {"start": 5, "end": 5}}, "span"),
    ],
    ids=str,
)
async def test_a_request_that_is_none(door: Door, changes: dict[str, Any], text: str) -> None:
    connection = await door.connect()
    await connection.send(PassRequest.model_construct(**(dict(request()) | changes)))
    await connection.expect_error(ProtocolError, f"bad PassRequest message: {text}")


async def test_a_stream_that_begins_with_something_else(door: Door) -> None:
    connection = await door.connect()
    await connection.send(CloseSession())
    await connection.expect_error(ProtocolError, "begins with PassRequest, not CloseSession")


async def test_a_request_with_a_tensor(door: Door) -> None:
    connection = await door.connect()
    await connection.send(request(), bytes(7 * 256))
    await connection.expect_error(ProtocolError, "PassRequest messages carry no tensor")


async def test_a_stream_that_asks_for_nothing(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_stream, "STREAM_PATIENCE", 0.1)
    connection = await door.connect()
    await connection.expect_error(ProtocolError, "no pass was asked for within 0.1 s")


async def test_a_leaving_server_takes_no_passes(door: Door) -> None:
    door.handler.draining = True
    connection = await door.connect()
    await connection.send(request())
    await connection.expect_error(PeerRefused, "is leaving and takes no new sessions or passes")


async def test_who_sends_on_and_on_learns_why_he_is_refused(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is closed with unread data is reset, and the answer lost."""
    monkeypatch.setattr(handler, "LINGER", LIMIT)
    connection = await door.connect()
    await connection.send(request(lengths=(600, 1), hidden=meta(601)))
    sending = asyncio.create_task(connection.send(TensorPart(), bytes(2**24)))  # far more than the sockets hold
    async with asyncio.timeout(LIMIT):
        await sending
    answer, _ = await connection.receive()
    assert isinstance(answer, ErrorReply) and answer.error == MessageTooLarge.__name__
    connection.stream.close()
    async with asyncio.timeout(LIMIT / 2):
        await door._serving.pop()


# --- tensors that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("bad", [0, 1, 2], ids=["hidden", "prompts", "gradient"])
async def test_numbers_that_are_none(door: Door, bad: int, value: float) -> None:
    tensors = [random(7), random(8), random(7)]
    tensors[bad][3, 5] = value
    connection = await door.connect()
    await connection.send(request(**BACKWARD, **PROMPTED))
    for tensor in tensors[: bad + 1]:
        await connection.send_tensor(tensor)
    await connection.expect_error(ProtocolError, "hold NaN or infinity")
    assert door.usage()[1] == 0


async def test_a_part_that_is_larger_than_what_is_left(door: Door) -> None:
    connection = await door.connect()
    await connection.send(request(**BACKWARD))
    await connection.send_tensor(random(6))
    await connection.send_tensor(random(2))  # no part may reach into the next tensor
    await connection.expect_error(ProtocolError, "TensorPart of 512 bytes after 1536 of 1792 bytes of a tensor")


async def test_an_empty_part(door: Door) -> None:
    """Else a stream of them would go on for ever."""
    connection = await door.connect()
    await connection.send(request())
    await connection.send(TensorPart())
    await connection.expect_error(ProtocolError, "TensorPart of 0 bytes after 0 of 1792 bytes")


async def test_another_message_within_a_tensor(door: Door) -> None:
    connection = await door.connect()
    await connection.send(request())
    await connection.send_tensor(random(3))
    await connection.send(request())
    await connection.expect_error(ProtocolError, "PassRequest of 0 bytes after 768 of 1792 bytes")


async def test_a_gradient_that_never_comes(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_stream, "STREAM_PATIENCE", 0.2)
    connection = await door.connect()
    await connection.send(request(**BACKWARD))
    await connection.send_tensor(random(7))
    await connection.expect_error(ProtocolError, "the next part of a tensor did not come within 0.2 s")


@pytest.mark.parametrize("rows", [0, 3, 7, 12], ids=["at once", "in the first", "between them", "in the second"])
async def test_a_stream_that_breaks_within_its_tensors(door: Door, rows: int) -> None:
    connection = await door.connect()
    await connection.send(request(**BACKWARD))
    for size in (min(rows, 7), rows - 7):
        if size > 0:
            await connection.send_tensor(random(size))
    connection.stream.close()
    # The honest session's stream goes on, so only this one is waited for.
    async with asyncio.timeout(LIMIT):
        await door._serving.pop()
    assert door.usage() == (0, 0)


# --- while a pass runs -----------------------------------------------------------------------------------------------


class Gate:
    """Holds passes on the device until it lets them through. blocks: those that ran."""

    def __init__(self) -> None:
        self.entered = asyncio.Semaphore(0)
        self.opened = threading.Semaphore(0)
        self.blocks: list[int] = []

    async def wait_for_a_piece(self) -> None:
        async with asyncio.timeout(LIMIT):
            await self.entered.acquire()

    def open(self) -> None:
        self.opened.release(1000)


@pytest.fixture
def gate(empty_door: Door, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    loop = asyncio.get_event_loop()
    run_whole = empty_door.engine.span.run_whole

    def gated(hidden: torch.Tensor, batch: Any, block: int) -> torch.Tensor:
        if threading.current_thread().name == "engine":  # not what a test computes itself
            gate.blocks.append(block)
            loop.call_soon_threadsafe(gate.entered.release)
            assert gate.opened.acquire(timeout=LIMIT)
        return run_whole(hidden, batch, block)

    monkeypatch.setattr(empty_door.engine.span, "run_whole", gated)
    yield gate
    gate.open()


async def begin(door: Door, gate: Gate, peer_id: str = "QmStranger") -> Connection:
    """An honest pass, which is on the device now."""
    connection = await door.connect(peer_id)
    await connection.send(request())
    await connection.send_tensor(random(7))
    await gate.wait_for_a_piece()
    return connection


async def test_a_client_that_leaves_takes_its_pass_along(door: Door, gate: Gate) -> None:
    connection = await begin(door, gate)
    connection.stream.abort()
    async with asyncio.timeout(LIMIT):
        await door._serving.pop()
    assert door.usage() == (0, 0)  # at once, not when the device is done
    gate.open()
    await expect_honest_pass(door)
    assert gate.blocks == [0, 0, 1, 2, 3]


async def test_a_message_after_the_pass_ends_it(door: Door, gate: Gate) -> None:
    connection = await begin(door, gate)
    await connection.send(request())
    await connection.expect_error(ProtocolError, "PassRequest after a pass that runs already")
    gate.open()
    await expect_honest_pass(door)
    assert gate.blocks == [0, 0, 1, 2, 3]


async def test_a_pass_that_takes_too_long(door: Door, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door.handler, "pass_timeout", 0.1)
    connection = await begin(door, gate)
    await connection.expect_error(EngineError, "the pass did not finish within 0.1 s")
    monkeypatch.undo()
    gate.open()


async def test_a_pass_that_fails(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(door.engine.span, "run_whole", lambda *_: 1 / 0)
        connection = await door.connect()
        await connection.send(request())
        await connection.send_tensor(random(7))
        await connection.expect_error(EngineError, "the pass failed: ZeroDivisionError")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
async def test_a_result_that_overflows(door: Door, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run_whole = door.engine.span.run_whole
    with monkeypatch.context() as patch:
        patch.setattr(door.engine.span, "run_whole", lambda *args: run_whole(*args) * 1e4)
        half = {"hidden": meta(7, codec=Codec.FLOAT16), "output_codec": Codec.FLOAT16}
        connection = await door.connect()
        if backward:
            await connection.send(request(**half, gradient=meta(7, codec=Codec.FLOAT16)))
            await connection.send_tensor(random(7), Codec.FLOAT16)
        else:
            await connection.send(request(**half))
        await connection.send_tensor(random(7), Codec.FLOAT16)
        await connection.expect_error(EngineError, "NaN or infinity: its input is too large, or float32 on this")


async def test_a_client_that_reads_nothing_is_left(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = await door.connect()
    connection.stream._reader._transport.pause_reading()  # type: ignore[attr-defined]
    await connection.send(request(lengths=(300, 300), hidden=meta(600)))
    monkeypatch.setattr(pass_stream, "STREAM_PATIENCE", 0.3)
    await connection.send_tensor(random(600))  # 150 KiB, and as much comes back: more than the sockets hold
    async with asyncio.timeout(LIMIT):
        await door._serving.pop()
    assert door.usage() == (0, 0)


async def test_a_draining_server_finishes_passes_that_run(empty_door: Door, gate: Gate) -> None:
    connection = await begin(empty_door, gate)
    draining = asyncio.create_task(empty_door.handler.drain(LIMIT))
    await asyncio.wait({draining}, timeout=0.05)  # nothing is to happen meanwhile
    late = await empty_door.connect()
    await late.send(request())
    await late.expect_error(PeerRefused, "is leaving")
    assert not draining.done()
    gate.open()
    await expect_output(connection, empty_door, random(7))
    async with asyncio.timeout(LIMIT):
        await draining


async def test_draining_ends_in_time_though_a_pass_runs(empty_door: Door, gate: Gate) -> None:
    connection = await begin(empty_door, gate)
    async with asyncio.timeout(LIMIT):
        await empty_door.handler.drain(0.1)
    await connection.expect_end()
    gate.open()


# --- what one peer may take ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [QuotaLimits(max_streams=1)])
async def test_too_many_streams_of_one_peer(door: Door, gate: Gate) -> None:
    first = await begin(door, gate)
    second = await door.connect()
    await second.expect_error(QuotaExceeded, "this peer has 1 streams open")
    gate.open()
    await expect_output(first, door, random(7))


@pytest.mark.parametrize("limits", [QuotaLimits(max_streams=1)])
async def test_streams_that_were_refused_are_not_kept_without_end(
    door: Door, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "LINGER", LIMIT)
    monkeypatch.setattr(handler, "MAX_LINGERING", 2)
    first = await begin(door, gate)
    refused = [await door.connect() for _ in range(4)]
    for connection in refused:
        answer, _ = await connection.receive()
        assert isinstance(answer, ErrorReply) and answer.error == QuotaExceeded.__name__
    for connection in refused[2:]:
        await connection.expect_end()
    assert door.handler._lingering == {"QmStranger": 2}
    for connection in refused[:2]:
        connection.stream.close()
    async with asyncio.timeout(LIMIT / 2):
        await asyncio.gather(*door._serving[-4:])
    assert not door.handler._lingering
    gate.open()
    assert isinstance((await first.receive())[0], PassResult)


@pytest.mark.parametrize("limits", [QuotaLimits(max_kept_bytes=2 * 4 * HIDDEN_SIZE * len(SPAN))])
async def test_deep_prompts_beyond_what_a_peer_may_keep(door: Door) -> None:
    """One tensor alone may exceed the bytes in flight: 512 tokens at each of 80 blocks are a gigabyte."""
    fits, too_many = (meta(num_tokens * len(SPAN)) for num_tokens in (2, 3))
    refused = await door.connect()
    await refused.send(request(prompts=too_many))
    await refused.expect_error(QuotaExceeded, "deep prompts of 3072 bytes are beyond the 2048")
    connection = await door.connect()
    await connection.send(request(prompts=fits))
    await connection.send_tensor(random(7))
    await connection.send_tensor(random(2 * len(SPAN)))
    assert isinstance((await connection.receive())[0], PassResult)


async def test_every_part_counts_as_a_request(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a tensor in parts of one byte would bring millions of messages for one request."""
    quota, counted = door.handler.quotas.request, list[str]()

    async def count(peer_id: str) -> None:
        counted.append(peer_id)
        await quota(peer_id)

    monkeypatch.setattr(door.handler.quotas, "request", count)
    connection = await door.connect()
    await connection.send(request())
    await connection.send_tensor(random(7), part=256)
    answer, _ = await connection.receive()
    assert isinstance(answer, PassResult)
    await connection.receive_tensor(answer.hidden)
    assert counted == ["QmStranger"] * (1 + 7)


@pytest.mark.parametrize("limits", [QuotaLimits(max_bytes_in_flight=2500)])
async def test_tensors_beyond_a_peers_share_are_not_read_until_earlier_passes_are_done(door: Door, gate: Gate) -> None:
    first = await begin(door, gate)
    assert door.usage() == (1, 7 * 256)
    second = await door.connect()
    await second.send(request())
    await second.send_tensor(random(7, seed=2))
    gate.open()
    await expect_honest_pass(door)  # others are not held up
    await expect_output(first, door, random(7))
    await expect_output(second, door, random(7, seed=2))


async def test_the_hold_lasts_until_the_answer_is_written(door: Door, gate: Gate) -> None:
    connection = await door.connect()
    await connection.send(request(**BACKWARD, **PROMPTED))
    for rows in (7, 8, 7):
        await connection.send_tensor(random(rows))
    await gate.wait_for_a_piece()
    assert door.usage() == (1, 22 * 256)
    gate.open()
    answer, _ = await connection.receive()
    assert isinstance(answer, PassResult)
    for own in answer.tensors:
        await connection.receive_tensor(own)
    await connection.expect_end()
    assert door.usage() == (0, 0)


def test_every_error_of_a_pass_travels() -> None:
    """Its own type reaches the client, not a substitute."""
    from swarm.errors import from_wire, to_wire

    for error in (BadSpan, EngineError, MessageTooLarge, NotSupported, PeerRefused, ProtocolError, QuotaExceeded):
        assert type(from_wire(*to_wire(error("text")))) is error
