"""Streams of frames between peers, time-outs, and the one place where foreign errors become ours.

A frame is: header length (uint32), payload length (uint32), header, payload, lengths in big-endian order. The header is
a packed message, the payload its tensor. Both are capped before a byte of them is read: hivemind's own protobuf streams
have no cap and cannot tell a dead peer from a slow one, so steps travel on raw binary streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure
from hivemind.proto import runtime_pb2
from pydantic import ValidationError

from .codecs import SLOW_LINK
from .data_structures import OpeningAnswer, ServerInfo
from .errors import MessageTooLarge, PeerRefused, PeerTimeout, PeerUnreachable, ProtocolError
from .protocol import (
    INFERENCE_STREAM,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_UPLOAD_BYTES,
    OPENING_QUESTION,
    BlockProtocol,
    Message,
    explain,
    pack,
    unpack,
)

Answer = TypeVar("Answer", ServerInfo, OpeningAnswer)

_LENGTHS = struct.Struct(">II")
#: A payload up to this many bytes is copied behind its header: one system call costs more than the copy.
ONE_WRITE = 64 * 2**10
#: What a measurement of the network sends first; the whole only over a link that takes this much in so many seconds.
_SMALL_UPLOAD_BYTES = 64 * 2**10
_QUICK_UPLOAD = 0.25
#: Uploads of the whole to one server, at most; fewer once one was so fast (bytes/s), or after so many seconds.
_MAX_UPLOADS = 5
_SURELY_FAST = 2 * SLOW_LINK
_LONG_ENOUGH = 1.0


def clock() -> int:
    """This machine's clock in microseconds, for `Microseconds` in messages. It starts anywhere and never jumps."""
    return time.monotonic_ns() // 1000


class Traffic:
    """Bytes of frames that streams carried, headers included."""

    def __init__(self) -> None:
        self.received = 0
        self.sent = 0


class FrameStream:
    """Messages over one binary stream. Concurrent senders do not mix their frames; there must be one receiver."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, traffic: Traffic | None = None):
        """traffic: counts what this stream carries, among others."""
        self._reader = reader
        self._writer = writer
        self._traffic = Traffic() if traffic is None else traffic

    async def send(self, message: Message, payload: bytes | bytearray | memoryview = b"") -> None:
        """Write one frame. Raises MessageTooLarge before anything is sent, PeerUnreachable if the stream is broken."""
        size = len(payload)
        if size > MAX_PAYLOAD_BYTES:
            raise MessageTooLarge(f"a tensor of {size} bytes is over the limit of {MAX_PAYLOAD_BYTES} per message")
        header = pack(message)
        try:
            if size <= ONE_WRITE:
                self._writer.write(b"".join((_LENGTHS.pack(len(header), size), header, payload)))
            else:
                self._writer.write(_LENGTHS.pack(len(header), size) + header)
                self._writer.write(payload)
            self._traffic.sent += _LENGTHS.size + len(header) + size
            await self._writer.drain()
        except (ConnectionError, RuntimeError, OSError) as error:
            raise PeerUnreachable(f"the connection broke: {error}") from error

    async def receive(self) -> tuple[Message, bytes]:
        """Read one frame. Raises like `receive_header` and `receive_payload`."""
        message, size = await self.receive_header()
        return message, await self.receive_payload(size)

    async def receive_header(self) -> tuple[Message, int]:
        """Read a message, and how many bytes its payload has. Those cost no memory until they are read, which must come
        next; who does not want them can only close the stream.

        Raises PeerUnreachable at the stream's end, MessageTooLarge for a frame over the limits (of which nothing was
        read: the stream is of no use afterwards), ProtocolError for a header that is no message.
        """
        with _end_of_stream():
            header_size, payload_size = _LENGTHS.unpack(await self._reader.readexactly(_LENGTHS.size))
            if header_size > MAX_HEADER_BYTES or payload_size > MAX_PAYLOAD_BYTES:
                raise MessageTooLarge(
                    f"a message of {header_size} + {payload_size} bytes is over the limit of "
                    f"{MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}"
                )
            header = await self._reader.readexactly(header_size)
            self._traffic.received += _LENGTHS.size + header_size
            return unpack(header), payload_size

    async def receive_payload(self, size: int) -> bytes:
        """Read the tensor of the message that came last. Raises PeerUnreachable at the stream's end."""
        if not size:
            return b""
        with _end_of_stream():
            payload = await self._reader.readexactly(size)
            self._traffic.received += size
            return payload

    async def linger(self, seconds: float) -> None:
        """Read and drop what still comes until the other side ends the stream, for so long at most. A stream that is
        closed with unread data is reset, and then what was sent last may be lost."""
        with contextlib.suppress(TimeoutError, ConnectionError, OSError):
            async with asyncio.timeout(seconds):
                while await self._reader.read(ONE_WRITE):
                    pass

    @property
    def backlog(self) -> int:
        """Bytes that were written and have not left this process yet."""
        return self._writer.transport.get_write_buffer_size()

    def abort(self) -> None:
        """Drop the stream with all that was not sent yet; the reader sees its end."""
        self._writer.transport.abort()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a stream that cannot be closed is closed
            self._writer.close()


@contextmanager
def _end_of_stream() -> Iterator[None]:
    try:
        yield
    except (asyncio.IncompleteReadError, ConnectionError, OSError) as error:
        raise PeerUnreachable("the other side closed the connection") from error


@contextmanager
def _translated(peer_id: str, action: str, timeout: float) -> Iterator[None]:
    """hivemind's and asyncio's errors, as ours."""
    try:
        yield
    except TimeoutError as error:
        raise PeerTimeout(f"server {peer_id} did not {action} within {timeout:g} s") from error
    except P2PHandlerError as error:
        raise PeerRefused(f"server {peer_id} could not {action}: {error}") from error
    except (
        ControlFailure,
        DispatchFailure,
        P2PDaemonError,
        ConnectionError,
        OSError,
        asyncio.IncompleteReadError,
    ) as error:
        raise PeerUnreachable(f"server {peer_id} cannot be reached: {error}") from error


async def open_stream(
    p2p: P2P, peer_id: str, timeout: float, kind: str = INFERENCE_STREAM, traffic: Traffic | None = None
) -> FrameStream:
    """Open a stream to a server. An open stream does not prove that the server lives: only a reply does.

    traffic: counts what it carries, among others.

    Raises PeerUnreachable or PeerTimeout.
    """
    try:
        peer = PeerID.from_base58(peer_id)
    except ValueError as error:
        raise PeerUnreachable(f"{peer_id!r} is not the id of a peer: {error}") from error
    with _translated(peer_id, "accept a connection", timeout):
        async with asyncio.timeout(timeout):
            _, reader, writer = await p2p.call_binary_stream_handler(peer, kind)
    return FrameStream(reader, writer, traffic)


async def server_info(p2p: P2P, peer_id: str, timeout: float) -> ServerInfo:
    """What a server says about itself right now. Raises PeerError, or ProtocolError for an answer that is no info."""
    return await _ask(p2p, peer_id, "", timeout, ServerInfo)


async def timed_info(
    p2p: P2P, peer_id: str, timeout: float, opening_key: str | None = None
) -> tuple[float, OpeningAnswer]:
    """Seconds of one round trip to a server, and what it says about itself right now. Raises like `server_info`.

    opening_key: under which the caller joins the line of those who are about to open a session; None: he does not.
    """
    started = time.perf_counter()
    if opening_key is None:
        answer = OpeningAnswer(info=await server_info(p2p, peer_id, timeout))
    else:
        answer = await _ask(p2p, peer_id, OPENING_QUESTION + opening_key, timeout, OpeningAnswer)
    return time.perf_counter() - started, answer


async def _ask(p2p: P2P, peer_id: str, question: str, timeout: float, answer_type: type[Answer]) -> Answer:
    stub = BlockProtocol.get_stub(p2p, PeerID.from_base58(peer_id))
    with _translated(peer_id, "answer", timeout):
        response = await stub.rpc_info(runtime_pb2.ExpertUID(uid=question), timeout=timeout)
    try:
        return answer_type.model_validate_json(response.serialized_info)
    except ValidationError as error:
        raise ProtocolError(f"server {peer_id} sent a bad description of itself: {explain(error)}") from error


async def ping(p2p: P2P, peer_id: str, timeout: float) -> float:
    """Seconds of one round trip to a server. Raises PeerError."""
    return (await timed_info(p2p, peer_id, timeout))[0]


async def upload_rate(p2p: P2P, peer_id: str, timeout: float) -> float:
    """Bytes/s to a server. Raises PeerError.

    Measured with 64 KiB, over a link that takes those quickly with 1 MiB, and as that may have met a busy moment, with
    a few more if the link looks slow: the best counts. timeout: seconds for each of the calls.
    """
    await ping(p2p, peer_id, timeout)  # connects, which takes longer than a round trip
    round_trip = await ping(p2p, peer_id, timeout)
    stub = BlockProtocol.get_stub(p2p, PeerID.from_base58(peer_id))

    async def upload(size: int) -> tuple[float, float]:
        """Seconds, and bytes/s."""
        request = runtime_pb2.ExpertInfo(serialized_info=bytes(size))
        started = time.perf_counter()
        with _translated(peer_id, "take an upload", timeout):
            await stub.rpc_upload(request, timeout=timeout)
        elapsed = time.perf_counter() - started
        # A busy peer may answer a question later than it takes an upload.
        return elapsed, size / max(elapsed - round_trip, elapsed / 2)

    elapsed, rate = await upload(_SMALL_UPLOAD_BYTES)
    if elapsed > _QUICK_UPLOAD:
        return rate
    best, total = 0.0, 0.0
    for _ in range(_MAX_UPLOADS):
        elapsed, rate = await upload(MAX_UPLOAD_BYTES)
        best, total = max(best, rate), total + elapsed
        if best > _SURELY_FAST or total > _LONG_ENOUGH:
            break
    return best
