"""Carries connections to peers that cannot be reached directly: the relay of libp2p's circuit protocol.

p2pd has a relay of its own, but it cuts a connection after 128 KiB or two minutes: it registers a second relay with the
library's defaults over the one that its flags configure. So the relay is ours, on every peer that listens; it replaces
p2pd's there, and elsewhere refuses (p2pd's cannot be turned off).

What strangers may take is bounded: reservations, connections in all, to one peer and from one peer, bytes that wait.
There is no limit of time or bytes: a long session shall live. Nothing that passes can be read here. In a private swarm
only members get reservations; who connects to them need not have met the relay, and greets them himself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from .circuit import (
    HOP_STREAM,
    STOP_STREAM,
    CircuitMessage,
    Hop,
    Status,
    Stop,
    receive_hop,
    receive_stop,
    send_hop,
    send_stop,
)
from .errors import ProtocolError
from .ways import WayfindingP2P

logger = logging.getLogger(__name__)

#: Seconds that a reservation lives without being renewed.
RESERVATION_TIME = 60.0
MAX_RESERVATIONS = 128
#: Connections that are carried at once: in all, to one peer, and from one peer.
MAX_CIRCUITS = 1024
MAX_CIRCUITS_TO = 256
MAX_CIRCUITS_FROM = 64
#: Streams of one peer: those of its connections, its reservation, and those on which it has yet to say what it wants.
MAX_STREAMS_FROM = 96
#: Seconds for a peer to say what it wants, or to take a connection.
_PATIENCE = 10.0
#: Bytes that are copied at a time; about twice as many of each direction wait here for a slow peer.
_CHUNK = 64 * 2**10


class RelayService:
    """Answers the hop streams of one node."""

    def __init__(self, p2p: WayfindingP2P, own_address: Callable[[], Awaitable[bytes | None]]):
        """own_address: where others reach this node directly, as a binary multiaddress with its peer id; None: they
        do not, so it cannot be a relay."""
        self._p2p = p2p
        self._own_address = own_address
        self._reservations: dict[bytes, object] = {}
        self._circuits_to: Counter[bytes] = Counter()
        self._circuits_from: Counter[bytes] = Counter()
        self._streams_from: Counter[bytes] = Counter()

    async def register(self) -> None:
        await self._p2p.add_binary_stream_handler(HOP_STREAM, self._serve)

    @property
    def num_circuits(self) -> int:
        return self._circuits_to.total()

    @property
    def num_reservations(self) -> int:
        return len(self._reservations)

    async def _serve(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source = info.peer_id.to_bytes()
        if self._streams_from[source] >= MAX_STREAMS_FROM:
            writer.close()
            return
        self._streams_from[source] += 1
        try:
            async with asyncio.timeout(_PATIENCE):
                request = await receive_hop(reader)
            if request.kind == Hop.RESERVE:
                await self._reserve(source, reader, writer)
            elif request.kind == Hop.CONNECT:
                await self._connect(source, request.peer, reader, writer)
            else:
                await _refuse(writer, Status.UNEXPECTED_MESSAGE)
        except ProtocolError:
            with contextlib.suppress(OSError, RuntimeError):
                await _refuse(writer, Status.MALFORMED_MESSAGE)
        except (EOFError, OSError, RuntimeError):  # time-outs included
            pass  # the usual end of a stream
        finally:
            writer.close()
            _uncount(self._streams_from, source)

    async def _reserve(self, source: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The reservation lives as long as its stream, on which it is renewed: so each side sees at once when the other
        is gone. (Others close the stream after the answer, and so lose the reservation.)"""
        if not self._p2p._client.control.may_be_served(PeerID(source)):
            await _refuse(writer, Status.PERMISSION_DENIED)
            return
        if source not in self._reservations and len(self._reservations) >= MAX_RESERVATIONS:
            await _refuse(writer, Status.RESERVATION_REFUSED)
            return
        mine = self._reservations[source] = object()  # a peer that lost its old stream comes with a new one
        try:
            while (address := await self._own_address()) is not None:
                expires = int(time.time() + RESERVATION_TIME)
                granted = CircuitMessage(Hop.STATUS, status=Status.OK, expires=expires, addresses=(address,))
                await send_hop(writer, granted)
                async with asyncio.timeout(RESERVATION_TIME):
                    if (await receive_hop(reader)).kind != Hop.RESERVE:
                        raise ProtocolError("only renewals may follow a reservation")
            await _refuse(writer, Status.PERMISSION_DENIED)
        finally:
            if self._reservations.get(source) is mine:
                del self._reservations[source]

    async def _connect(
        self, source: bytes, target: bytes | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if target is None:
            raise ProtocolError("it does not say which peer to connect to")
        if target not in self._reservations:
            await _refuse(writer, Status.NO_RESERVATION)
            return
        if (
            self.num_circuits >= MAX_CIRCUITS
            or self._circuits_to[target] >= MAX_CIRCUITS_TO
            or self._circuits_from[source] >= MAX_CIRCUITS_FROM
        ):
            await _refuse(writer, Status.RESOURCE_LIMIT_EXCEEDED)
            return
        self._circuits_to[target] += 1
        self._circuits_from[source] += 1
        try:
            await self._carry(source, target, reader, writer)
        finally:
            _uncount(self._circuits_to, target)
            _uncount(self._circuits_from, source)

    async def _carry(
        self, source: bytes, target: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                far_reader, far_writer = await self._stop_stream(source, target)
        except (ProtocolError, P2PDaemonError, EOFError, OSError, RuntimeError) as error:
            logger.info("could not connect a peer to %s: %r", PeerID(target), error)
            await _refuse(writer, Status.CONNECTION_FAILED)
            return
        try:
            await send_hop(writer, CircuitMessage(Hop.STATUS, status=Status.OK))
            copies = [
                asyncio.create_task(_copy(reader, far_writer)),
                asyncio.create_task(_copy(far_reader, writer)),
            ]
            try:
                # A connection has ended when one of its directions has.
                await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in copies:
                    task.cancel()
        finally:
            far_writer.close()

    async def _stop_stream(self, source: bytes, target: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self._p2p.open_direct_stream(PeerID(target), STOP_STREAM)
        try:
            await send_stop(writer, CircuitMessage(Stop.CONNECT, peer=source))
            answer = await receive_stop(reader)
            if answer.kind != Stop.STATUS or answer.status != Status.OK:
                raise ProtocolError(f"it refused the connection with status {answer.status}")
        except BaseException:
            writer.close()
            raise
        return reader, writer


async def refuse_to_relay(p2p: WayfindingP2P) -> None:
    """For nodes that do not listen or shall not relay: without this, p2pd would."""

    async def refuse(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The request is read before: closing a stream with unread data may take the answer along.
        with contextlib.suppress(ProtocolError, EOFError, OSError, RuntimeError):
            async with asyncio.timeout(_PATIENCE):
                await receive_hop(reader)
                await _refuse(writer, Status.PERMISSION_DENIED)
        writer.close()

    await p2p.add_binary_stream_handler(HOP_STREAM, refuse)


def _uncount(counter: Counter[bytes], peer: bytes) -> None:
    counter[peer] -= 1
    if not counter[peer]:
        del counter[peer]


async def _refuse(writer: asyncio.StreamWriter, status: Status) -> None:
    await send_hop(writer, CircuitMessage(Hop.STATUS, status=status))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
