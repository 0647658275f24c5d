"""Messages of libp2p's circuit relay, version 2: how one peer has another carry connections to it.

See https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md. A peer that cannot be reached asks a relay for a
*reservation* on a *hop* stream. Who wants to reach it opens another hop stream and asks to be *connected*; the relay
opens a *stop* stream to the first peer, and from then on copies bytes between the two streams, over which the two peers
speak libp2p: they authenticate each other and encrypt, so that the relay sees nothing but lengths.

p2pd takes part by itself on both ends of a connection. Only reservations and the relay in the middle are ours, see
`reservations` and `relay_service`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import IntEnum

from .errors import ProtocolError

HOP_STREAM = "/libp2p/circuit/relay/0.2.0/hop"
STOP_STREAM = "/libp2p/circuit/relay/0.2.0/stop"

#: On these p2pd itself is at the other end, or may be: nothing but the messages of this protocol may travel there.
CIRCUIT_STREAMS = frozenset({HOP_STREAM, STOP_STREAM})

#: As in go-libp2p.
MAX_MESSAGE_BYTES = 4096


class Hop(IntEnum):
    """Kinds of messages between a relay and who wants something of it."""

    RESERVE = 0
    CONNECT = 1
    STATUS = 2


class Stop(IntEnum):
    """Kinds of messages between a relay and a peer that has a reservation there."""

    CONNECT = 0
    STATUS = 1


class Status(IntEnum):
    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


@dataclass(frozen=True)
class CircuitMessage:
    """kind: a `Hop` or `Stop`. peer: the bytes of a peer id. status: a `Status`; strangers may send others.

    expires: Unix time in seconds at which a reservation ends. addresses: of the relay, binary multiaddresses.
    """

    kind: int
    peer: bytes | None = None
    status: int | None = None
    expires: int | None = None
    addresses: tuple[bytes, ...] = ()


# Numbers of fields. A hop and a stop message differ in that of the status.
_KIND, _PEER, _RESERVATION = 1, 2, 3
_HOP_STATUS, _STOP_STATUS = 5, 4
_PEER_ID = 1
_EXPIRES, _ADDRESSES = 1, 2


async def send_hop(writer: asyncio.StreamWriter, message: CircuitMessage) -> None:
    await _send(writer, message, _HOP_STATUS)


async def send_stop(writer: asyncio.StreamWriter, message: CircuitMessage) -> None:
    await _send(writer, message, _STOP_STATUS)


async def receive_hop(reader: asyncio.StreamReader) -> CircuitMessage:
    """Raises ProtocolError for what is no such message, IncompleteReadError at the stream's end."""
    return _decode(await _receive(reader), _HOP_STATUS)


async def receive_stop(reader: asyncio.StreamReader) -> CircuitMessage:
    """Raises like `receive_hop`."""
    return _decode(await _receive(reader), _STOP_STATUS)


async def _send(writer: asyncio.StreamWriter, message: CircuitMessage, status_field: int) -> None:
    data = _encode(message, status_field)
    writer.write(_varint(len(data)) + data)
    await writer.drain()


async def _receive(reader: asyncio.StreamReader) -> bytes:
    """A message behind its length. Not a byte more is read: what follows belongs to the connection that is carried."""
    length = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift > 14:
            raise ProtocolError("a message of the relay protocol has a length that makes no sense")
    if length > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {length} bytes is over the relay protocol's limit of {MAX_MESSAGE_BYTES}")
    return await reader.readexactly(length)


def _encode(message: CircuitMessage, status_field: int) -> bytes:
    data = _number(_KIND, message.kind)
    if message.peer is not None:
        data += _bytes(_PEER, _bytes(_PEER_ID, message.peer))
    if message.expires is not None:
        addresses = b"".join(_bytes(_ADDRESSES, address) for address in message.addresses)
        data += _bytes(_RESERVATION, _number(_EXPIRES, message.expires) + addresses)
    if message.status is not None:
        data += _number(status_field, message.status)
    return data


def _decode(data: bytes, status_field: int) -> CircuitMessage:
    fields = _fields(data)
    kind = _last_number(fields, _KIND)
    if kind is None:
        raise ProtocolError("a message of the relay protocol does not say what it is")
    peer, reservation = _last_bytes(fields, _PEER), _last_bytes(fields, _RESERVATION)
    reserved = [] if reservation is None else _fields(reservation)
    return CircuitMessage(
        kind,
        peer=None if peer is None else _last_bytes(_fields(peer), _PEER_ID),
        status=_last_number(fields, status_field),
        expires=_last_number(reserved, _EXPIRES),
        addresses=tuple(value for number, value in reserved if number == _ADDRESSES and isinstance(value, bytes)),
    )


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """(number, value) of every field of a protobuf message. Raises ProtocolError for bytes that are none."""
    fields: list[tuple[int, int | bytes]] = []
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, at = _read_varint(data, at)
            fields.append((number, value))
        elif wire_type == 2:
            length, at = _read_varint(data, at)
            if at + length > len(data):
                raise ProtocolError("a message of the relay protocol ends in the middle of a field")
            fields.append((number, data[at : at + length]))
            at += length
        else:
            raise ProtocolError(f"a message of the relay protocol has a field of the unknown type {wire_type}")
    return fields


def _last_number(fields: list[tuple[int, int | bytes]], number: int) -> int | None:
    return next((value for at, value in reversed(fields) if at == number and isinstance(value, int)), None)


def _last_bytes(fields: list[tuple[int, int | bytes]], number: int) -> bytes | None:
    return next((value for at, value in reversed(fields) if at == number and isinstance(value, bytes)), None)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at this place, and the place behind it."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ProtocolError("a message of the relay protocol ends in the middle of a number")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ProtocolError("a message of the relay protocol has a number that is too long")
