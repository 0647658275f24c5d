"""Frames over streams, and foreign errors as ours."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import pytest
from hivemind.p2p import P2PContext
from hivemind.proto import runtime_pb2

from swarm.data_structures import BlockSpan, OpeningAnswer, ServerInfo, ServerState
from swarm.errors import MessageTooLarge, PeerRefused, PeerTimeout, PeerUnreachable, ProtocolError
from swarm.node import Node, NodeConfig
from swarm.protocol import (
    INFERENCE_STREAM,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    BlockProtocol,
    CloseSession,
    Message,
    Moving,
    PushFailed,
    pack,
)
from swarm.rpc import FrameStream, open_stream, ping, server_info, timed_info, upload_rate

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
INFO = ServerInfo(
    state=ServerState.ONLINE, span=BlockSpan(start=0, end=8), throughput=1.0, numerics="x", cache_tokens_left=5
)


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">II", len(header), len(payload)) + header + payload


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[FrameStream, asyncio.StreamReader, asyncio.StreamWriter]]:
    """One end as a stream of frames, the other one raw."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    raw_reader, raw_writer = await asyncio.open_connection(sock=theirs)
    try:
        async with asyncio.timeout(LIMIT):
            yield FrameStream(reader, writer), raw_reader, raw_writer
    finally:
        writer.transport.abort()
        raw_writer.transport.abort()


async def test_frames_arrive_in_order_with_their_tensors() -> None:
    async with connected() as (stream, raw_reader, raw_writer):
        other = FrameStream(raw_reader, raw_writer)
        close = CloseSession()
        payload = bytes(range(256)) * 4096
        sending = asyncio.create_task(_send_all(stream, [(Moving(), b""), (close, payload), (Moving(), b"x")]))
        assert await other.receive() == (Moving(), b"")
        assert await other.receive() == (close, payload)
        assert await other.receive() == (Moving(), b"x")
        await sending


async def test_the_frames_of_several_senders_do_not_mix() -> None:
    async with connected() as (stream, raw_reader, raw_writer):
        other = FrameStream(raw_reader, raw_writer)
        # far more than the socket holds, in one write and in two
        payloads = [bytes([number]) * size for number, size in enumerate([2**16, 2**20, 10, 2**21, 0, 2**17])]
        messages = [(PushFailed(step=step, reason=""), payload) for step, payload in enumerate(payloads)]
        sending = [asyncio.create_task(stream.send(*message)) for message in messages]
        await asyncio.sleep(0)
        assert stream.backlog > 0
        assert [await other.receive() for _ in messages] == messages
        await asyncio.gather(*sending)
        assert stream.backlog == 0


async def _send_all(stream: FrameStream, messages: list[tuple[Message, bytes]]) -> None:
    for message, payload in messages:
        await stream.send(message, payload)


@pytest.mark.parametrize("sizes", [(MAX_HEADER_BYTES + 1, 0), (10, MAX_PAYLOAD_BYTES + 1), (2**32 - 1, 2**32 - 1)])
async def test_a_frame_over_the_limits_is_refused_before_any_of_it_is_read(sizes: tuple[int, int]) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(struct.pack(">II", *sizes) + b"rest")
    async with connected() as (stream, _, _writer):
        stream._reader = reader  # one that says how much of it was read
        with pytest.raises(MessageTooLarge, match=f"a message of {sizes[0]} \\+ {sizes[1]} bytes is over the limit"):
            await stream.receive()
    assert await reader.read(100) == b"rest"


async def test_a_message_is_known_before_its_payload_is_read() -> None:
    async with connected() as (stream, _, raw_writer):
        header, payload = pack(Moving()), bytes(range(256)) * 2**16
        raw_writer.write(struct.pack(">II", len(header), MAX_PAYLOAD_BYTES) + header)
        assert await stream.receive_header() == (Moving(), len(payload))
        raw_writer.write(payload)
        assert await stream.receive_payload(len(payload)) == payload


async def test_a_tensor_over_the_limit_is_not_sent() -> None:
    async with connected() as (stream, raw_reader, _):
        with pytest.raises(MessageTooLarge, match="a tensor of"):
            await stream.send(Moving(), bytes(MAX_PAYLOAD_BYTES + 1))
        stream.close()
        assert await raw_reader.read() == b""


@pytest.mark.parametrize("cut", [1, 7, 8, 12, 19])
async def test_the_end_of_the_stream_in_a_frame(cut: int) -> None:
    async with connected() as (stream, _, raw_writer):
        whole = frame(pack(Moving()), b"tensor")
        assert cut < len(whole)
        raw_writer.write(whole[:cut])
        raw_writer.close()
        with pytest.raises(PeerUnreachable, match="closed the connection"):
            await stream.receive()


async def test_a_header_that_is_no_message() -> None:
    async with connected() as (stream, _, raw_writer):
        raw_writer.write(frame(b"hello") + frame(pack(Moving())))
        with pytest.raises(ProtocolError):
            await stream.receive()
        assert await stream.receive() == (Moving(), b"")


async def test_sending_into_a_broken_stream() -> None:
    async with connected() as (stream, _, raw_writer):
        raw_writer.transport.abort()
        with pytest.raises(PeerUnreachable):
            while True:  # the first frames may still find room in buffers
                await stream.send(Moving(), bytes(2**20))


async def test_an_aborted_stream_ends_for_its_reader_though_nobody_takes_what_was_written() -> None:
    async with connected() as (stream, _, _writer):
        sending = asyncio.create_task(stream.send(Moving(), bytes(MAX_PAYLOAD_BYTES)))
        reading = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)  # both have begun
        stream.abort()
        with pytest.raises(PeerUnreachable):
            await reading
        await asyncio.wait({sending})


class Answers:
    """A server that answers questions about itself with whatever it likes."""

    def __init__(self) -> None:
        self.answer: bytes | Exception | None = None
        self.upload_time = 0.0
        self.uploads: list[int] = []
        self.questions: list[str] = []

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        self.questions.append(request.uid)
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is None:
            await asyncio.Event().wait()
        return runtime_pb2.ExpertInfo(serialized_info=self.answer)

    async def rpc_upload(self, request: runtime_pb2.ExpertInfo, context: P2PContext) -> runtime_pb2.ExpertUID:
        self.uploads.append(len(request.serialized_info))
        await asyncio.sleep(self.upload_time)
        return runtime_pb2.ExpertUID(uid="0")


async def test_questions_to_a_server_and_foreign_errors_as_ours() -> None:
    config = NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",))
    server = await Node.start(config)
    client = await Node.start(NodeConfig(initial_peers=(await server.ready_address(),), listen=False))
    try:
        with pytest.raises(PeerUnreachable, match=f"server {server.peer_id} cannot be reached"):
            await open_stream(client.p2p, server.peer_id, LIMIT)  # a peer, but no server
        with pytest.raises(PeerUnreachable, match="'0OIl' is not the id of a peer"):
            await open_stream(client.p2p, "0OIl", LIMIT)

        answers = Answers()
        await BlockProtocol().add_p2p_handlers(server.p2p, wrapper=answers)
        answers.answer = INFO.model_dump_json().encode()
        assert await server_info(client.p2p, server.peer_id, LIMIT) == INFO
        assert 0 < await ping(client.p2p, server.peer_id, LIMIT) < LIMIT
        seconds, answer = await timed_info(client.p2p, server.peer_id, LIMIT)
        assert 0 < seconds < LIMIT
        assert answer == OpeningAnswer(info=INFO)
        assert answers.questions == ["", "", ""]

        standing = OpeningAnswer(info=INFO, before=("a" * 16,), opened=("b" * 16, "c" * 16))
        answers.answer = standing.model_dump_json().encode()
        assert (await timed_info(client.p2p, server.peer_id, LIMIT, "d" * 16))[1] == standing
        assert answers.questions[-1] == "opening/dddddddddddddddd"
        answers.answer = INFO.model_dump_json().encode()
        with pytest.raises(ProtocolError, match="sent a bad description of itself"):
            await timed_info(client.p2p, server.peer_id, LIMIT, "d" * 16)

        assert await upload_rate(client.p2p, server.peer_id, LIMIT) > 2**20 / LIMIT
        # As many as a busy machine makes necessary: one is enough on an idle one.
        assert answers.uploads[0] == 2**16
        assert set(answers.uploads[1:]) == {2**20}
        answers.uploads.clear()
        answers.upload_time = 0.3  # a slow line, which shall not carry the whole of it
        assert 2**16 / LIMIT < await upload_rate(client.p2p, server.peer_id, LIMIT) < 2 * 2**16 / 0.3
        assert answers.uploads == [2**16]

        for junk in (b"", b"junk", b"{}", b'{"state": "online"}'):
            answers.answer = junk
            with pytest.raises(ProtocolError, match="sent a bad description of itself"):
                await server_info(client.p2p, server.peer_id, LIMIT)
        answers.answer = ValueError("out of luck")
        with pytest.raises(PeerRefused, match=r"could not answer.*out of luck"):
            await server_info(client.p2p, server.peer_id, LIMIT)
        answers.answer = None
        with pytest.raises(PeerTimeout, match=r"did not answer within 0\.2 s"):
            await server_info(client.p2p, server.peer_id, 0.2)

        async def echo(_: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            message, payload = await FrameStream(reader, writer).receive()
            await FrameStream(reader, writer).send(message, payload)
            writer.close()

        await server.p2p.add_binary_stream_handler(INFERENCE_STREAM, echo)
        stream = await open_stream(client.p2p, server.peer_id, LIMIT)
        await stream.send(Moving(), b"tensor")
        async with asyncio.timeout(LIMIT):
            assert await stream.receive() == (Moving(), b"tensor")
            with pytest.raises(PeerUnreachable):
                await stream.receive()

        await server.stop()
        for action in (open_stream, server_info, ping, upload_rate):
            with pytest.raises(PeerUnreachable):
                await action(client.p2p, server.peer_id, LIMIT)
    finally:
        await asyncio.gather(server.stop(), client.stop())
