"""Strangers at the door: whatever they send over the real network, honest sessions go on and no cache is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
import torch
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import runtime_pb2

from swarm.codecs import Codec
from swarm.data_structures import BlockSpan
from swarm.errors import (
    AdapterNotHere,
    BadSpan,
    CacheFull,
    EngineError,
    MessageTooLarge,
    PeerRefused,
    ProtocolError,
    SessionLost,
    SessionTooLong,
    SwarmError,
)
from swarm.node import Node, NodeConfig
from swarm.protocol import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    AdapterRef,
    BlockProtocol,
    CloseSession,
    ErrorReply,
    Message,
    Moving,
    NextServer,
    OpenPush,
    OpenSession,
    PushFailed,
    Relink,
    Relinked,
    RowAdapters,
    RowSlice,
    SessionOpened,
    StepRequest,
    StepResult,
    TensorMeta,
    pack,
)
from swarm.rpc import FrameStream, server_info
from swarm.tensors import decode, encode

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("bystander")]

World = Client = Gate = Any  # see conftest.py

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
SPAN = BlockSpan(start=2, end=6)
CACHE_TOKENS = 4096
FINGERPRINT = "ab" * 32


# --- what an honest client sees -----------------------------------------------------------------------------------


async def test_a_session_from_opening_to_closing(world: World) -> None:
    client = await world.connect(world.honest)
    answer = await client.open(max_length=10)
    assert (answer.session_id, answer.cache_tokens_left) == (client.session_id, world.cache.tokens_left)
    assert world.cache.tokens_left == CACHE_TOKENS - 64 - 12  # in pages of 4
    await client.step(9)
    result = await client.step()
    assert not result.moving
    assert answer.clock <= result.received_at < result.sent_at  # all by the server's clock
    assert result.sent_at - result.received_at >= result.queue_time + result.compute_time + result.codec_time
    assert result.compute_time > 0
    await client.send(CloseSession())
    await client.expect_end()
    assert world.cache.tokens_left == CACHE_TOKENS - 64


async def test_a_part_of_the_span(world: World, tiny_model: Any) -> None:
    client = await world.open(world.honest, span=BlockSpan(start=3, end=4))
    request, payload = client.request(4)
    await client.send(request, payload)
    answer, data = await client.receive()
    assert isinstance(answer, StepResult)
    whole = client.outputs[:4]
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
    inputs, outputs = client.inputs, client.outputs

    async def run(*rows: RowSlice) -> None:
        slices = [slice(row.position, row.position + row.num_tokens) for row in rows]
        meta, payload = encode(torch.cat([inputs[tokens] for tokens in slices]), Codec.FLOAT32)
        await client.send(StepRequest(step=client.number, rows=rows, hidden=meta), payload)
        client.number += 1
        answer, data = await client.receive()
        assert isinstance(answer, StepResult), answer
        expected = torch.cat([outputs[tokens] for tokens in slices])
        assert (decode(answer.hidden, data) - expected).abs().max() <= 1e-5 * expected.abs().max()

    await run(RowSlice(1, 0, 9), RowSlice(0, 0, 3))
    await run(RowSlice(0, 3, 1), RowSlice(1, 4, 30))
    await run(RowSlice(1, 2, 1))


async def test_questions_are_answered(world: World) -> None:
    assert await server_info(world.stranger.p2p, world.server.peer_id, LIMIT) == world.info


# --- requests that are refused, after which the stream goes on -----------------------------------------------------


FRENCH = AdapterRef("french", "12" * 8)
BAD_OPENINGS: dict[str, tuple[dict[str, Any], type[SwarmError], str]] = {
    "other weights": ({"fingerprint": "cd" * 32}, PeerRefused, "serves weights abababababab, not the requested cdcd"),
    "blocks before": ({"span": BlockSpan(start=1, end=6)}, BadSpan, "holds blocks 2:6, not all of the requested 1:6"),
    "blocks behind": ({"span": BlockSpan(start=6, end=8)}, BadSpan, "not all of the requested 6:8"),
    "an adapter": (
        {"adapters": RowAdapters((FRENCH,), (0,))},
        AdapterNotHere,
        "this server has no adapter 'french'",
    ),
    "adapters for other rows": ({"adapters": RowAdapters((FRENCH,), (0, -1))}, ProtocolError, "adapters for 2 rows"),
    "an adapter that it does not list": (
        {"adapters": RowAdapters((FRENCH,), (1,))},
        ProtocolError,
        "a row has adapter 1, but 1 are named",
    ),
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
    "bytes of another dtype": (
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
}


@pytest.mark.parametrize("name", BAD_STEPS)
async def test_a_bad_step_is_refused_and_changes_nothing(world: World, name: str) -> None:
    changes, payload, error, text = BAD_STEPS[name]
    client = await world.open(world.stranger)
    await client.step(3)
    request, _ = client.request(**changes)
    await client.send(request, payload)
    await client.expect_error(error, text, step=client.number)
    await client.step(2)


# --- requests after which the stream is of no use ------------------------------------------------------------------


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">II", len(header), len(payload)) + header + payload


def int64_step(client: Client) -> bytes:
    request, _ = client.request()
    values = msgpack.unpackb(pack(request))
    values[values.index([[1, 64], "float32"])] = [[1, 64], "int64"]
    return frame(msgpack.packb(values), bytes(512))


JUNK: dict[str, tuple[Callable[[Client], bytes], type[SwarmError], str]] = {
    "a huge header": (lambda _: struct.pack(">II", 2**32 - 1, 0), MessageTooLarge, "over the limit"),
    "a header over the limit": (lambda _: struct.pack(">II", MAX_HEADER_BYTES + 1, 0), MessageTooLarge, "over"),
    "a huge tensor": (lambda _: struct.pack(">II", 10, 2**32 - 1), MessageTooLarge, "over the limit"),
    "a tensor over the limit": (lambda _: struct.pack(">II", 9, MAX_PAYLOAD_BYTES + 1), MessageTooLarge, "over"),
    "another protocol": (lambda _: b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", MessageTooLarge, "over the limit"),
    "random bytes": (lambda _: bytes([0, 0, 0, 99, 0, 0, 0, 99]) + secrets.token_bytes(198), ProtocolError, ""),
    "no message": (lambda _: frame(msgpack.packb({"sesame": "open"})), ProtocolError, "not a message of protocol"),
    "an unknown message": (lambda _: frame(msgpack.packb(["steal", {}])), ProtocolError, "not a message of protocol"),
    "another dtype": (int64_step, ProtocolError, "hidden.codec"),
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
        await client.send_raw(frame(msgpack.packb(["\x1b[2J\nall is well"])))
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


@pytest.mark.parametrize(
    "message",
    [
        SessionOpened(session_id="ab" * 16, cache_tokens_left=0, clock=0),
        Moving(),
        Relinked(),
        PushFailed(step=1, reason=""),
        OpenPush(session_id="ab" * 16),
    ],
    ids=lambda message: message.kind,
)
async def test_a_message_that_only_servers_send(world: World, message: Message) -> None:
    client = await world.open(world.stranger)
    await client.send(message)
    await client.expect_error(ProtocolError, f"a server takes no {type(message).__name__} messages")
    await client.step()


async def test_a_message_that_carries_no_tensor_with_one(world: World) -> None:
    client = await world.connect(world.stranger)
    opening = OpenSession(
        session_id=client.session_id,
        fingerprint=FINGERPRINT,
        span=SPAN,
        num_rows=1,
        max_length=8,
        output_codec=Codec.FLOAT32,
    )
    await client.send(opening, bytes(100))
    await client.expect_error(ProtocolError, "OpenSession messages carry no tensor")
    await client.expect_end()


async def test_a_tensor_far_larger_than_the_session_is_not_even_read(world: World) -> None:
    client = await world.open(world.stranger)  # of one row, 64 tokens at most
    request, _ = client.request()
    header = pack(request)
    await client.send_raw(frame(header, b"")[:4] + struct.pack(">I", 2**20) + header)
    await client.expect_error(MessageTooLarge, "more than this session reserved room for")
    await client.expect_end()


@pytest.mark.parametrize("length", [1, 8, 50, -1])
async def test_a_frame_cut_short(world: World, length: int) -> None:
    client = await world.open(world.stranger)
    request, payload = client.request()
    whole = frame(pack(request), bytes(payload))
    await client.send_raw(whole[:length])
    client.stream.close()
    await world.wait_until(lambda: world.cache.tokens_left == CACHE_TOKENS - 64)


# --- a stream carries its own session and no other -----------------------------------------------------------------


async def test_a_step_before_a_session(world: World) -> None:
    client = await world.connect(world.honest)
    request, _ = client.request()
    header = pack(request)
    await client.send_raw(struct.pack(">II", len(header), MAX_PAYLOAD_BYTES) + header)  # the tensor never comes
    await client.expect_error(SessionLost, "no session was opened on this stream")
    await client.expect_end()


async def test_a_relinking_before_a_session(world: World) -> None:
    client = await world.connect(world.honest)
    await client.send(Relink(previous=None, next=NextServer(world.server.peer_id, "ab" * 16)))
    await client.expect_error(SessionLost, "no session was opened on this stream")
    assert isinstance(await client.open(), SessionOpened)
    await client.step(2)


async def test_a_goodbye_without_a_session(world: World) -> None:
    client = await world.connect(world.stranger)
    await client.send(CloseSession())
    await client.expect_end()
    assert len(world.handler.sessions) == 1  # the bystander's


def evict(world: World, client: Client) -> None:
    session = world.handler.by_session[client.session_id]._session
    world.cache.evict(session.rows[0].session)


async def test_an_evicted_session_learns_it_at_its_next_step(world: World) -> None:
    client = await world.open(world.stranger)
    await client.step(3)
    left = world.cache.tokens_left
    evict(world, client)
    assert world.cache.tokens_left == left + 64
    await client.send(*client.request())
    await client.expect_error(SessionLost, "was evicted: others needed its cache", step=client.number)
    client.stream.close()
    await world.wait_until(lambda: len(world.handler.sessions) == 1)
    again = await world.open(world.stranger)
    await again.step(4)


# --- the end of a session -----------------------------------------------------------------------------------------


async def test_a_newer_step_takes_the_place_of_one_that_runs(world: World, gate: Gate) -> None:
    client = await world.open(world.stranger)
    await client.send(*client.request(3))
    await gate.wait_for_a_batch()
    client.number += 1
    await client.send(*client.request(5))
    await world.wait_until(lambda: gate.num_steps == 2)
    gate.open()
    await client.expect_result(5)  # and the older one has no answer
    await client.step()


@pytest.mark.parametrize("age", [0, 1])
async def test_a_late_duplicate_is_dropped(world: World, age: int, gate: Gate) -> None:
    gate.open()
    client = await world.open(world.stranger)
    for _ in range(3):
        await client.step(2)
    duplicate = client.request(1, step=client.number - 1 - age, rows=(RowSlice(0, 0, 1),))  # which would rewind
    await client.send(*duplicate)
    await client.step(2)  # at the right position
    assert gate.num_steps == 4


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
    monkeypatch.setattr(world.handler, "idle_limit", 1.0)
    client = await world.open(world.stranger)
    await client.send(*client.request(3))
    await gate.wait_for_a_batch()
    await asyncio.sleep(1.5)  # nothing is to happen meanwhile
    gate.open()
    await client.expect_result(3)


async def test_a_step_that_takes_too_long(world: World, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await world.open(world.stranger)
    monkeypatch.setattr(world.handler, "step_timeout", 0.2)
    await client.send(*client.request(3))
    await client.expect_error(EngineError, "did not finish within 0.2 s", step=client.number)
    monkeypatch.undo()
    gate.open()
    client.number += 1
    await client.step(3)


async def test_a_forward_pass_that_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await world.open(world.stranger)
    with monkeypatch.context() as patch:
        patch.setattr(world.engine.span, "forward", lambda *args: 1 / 0)
        await client.send(*client.request(3))
        await client.expect_error(EngineError, "the forward pass failed: ZeroDivisionError", step=client.number)
    client.number += 1
    await client.step(3)


@pytest.mark.parametrize("codec", [Codec.FLOAT16, Codec.BFLOAT16])
async def test_an_output_that_the_owners_codec_does_not_hold(
    world: World, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await world.open(world.stranger, output_codec=codec)
    forward = world.engine.span.forward
    with monkeypatch.context() as patch:
        patch.setattr(world.engine.span, "forward", lambda *args: forward(*args) * 0 + 1e5)
        await client.send(*client.request(3))
        if codec is Codec.FLOAT16:
            await client.expect_error(EngineError, "the blocks' output overflows float16", step=client.number)
            return
        answer, payload = await client.receive()
    assert isinstance(answer, StepResult)
    assert answer.hidden == TensorMeta(shape=(3, 64), codec=codec)
    assert decode(answer.hidden, payload).eq(99840).all()


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
    await client.send(StepRequest(step=1, rows=rows, hidden=meta), payload)
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
        await client.send(CloseSession())
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
    bystander.__dict__.update(again.__dict__)


async def test_an_upload_is_counted_and_answered_in_a_few_bytes(world: World) -> None:
    stub = BlockProtocol.get_stub(world.stranger.p2p, PeerID.from_base58(world.server.peer_id))
    answer = await stub.rpc_upload(runtime_pb2.ExpertInfo(serialized_info=bytes(2**20)), timeout=LIMIT)
    assert answer.uid == str(2**20) and answer.ByteSize() < 20
    with pytest.raises(P2PHandlerError, match="an upload of 1048577 bytes is over the limit of 1048576"):
        await stub.rpc_upload(runtime_pb2.ExpertInfo(serialized_info=bytes(2**20 + 1)), timeout=LIMIT)
