"""Messages of the relay protocol: what libp2p writes is read, and whatever else strangers write is refused."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.circuit import (
    MAX_MESSAGE_BYTES,
    CircuitMessage,
    Hop,
    Status,
    Stop,
    receive_hop,
    receive_stop,
    send_hop,
    send_stop,
)
from swarm.errors import ProtocolError


class Wire:
    """A writer whose bytes can be read back."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data

    async def drain(self) -> None:
        pass

    def reader(self) -> asyncio.StreamReader:
        reader = asyncio.StreamReader()
        reader.feed_data(self.data)
        reader.feed_eof()
        return reader


messages = st.builds(
    CircuitMessage,
    kind=st.integers(0, 2),
    peer=st.none() | st.binary(max_size=64),
    status=st.none() | st.integers(0, 2**32 - 1),
    expires=st.integers(0, 2**63 - 1),
    addresses=st.lists(st.binary(max_size=80), max_size=4).map(tuple),
)


@given(messages, st.binary(max_size=100))
def test_what_was_sent_is_received_and_not_a_byte_more(message: CircuitMessage, rest: bytes) -> None:
    async def story() -> None:
        for send, receive in ((send_hop, receive_hop), (send_stop, receive_stop)):
            wire: Any = Wire()
            await send(wire, message)
            wire.write(rest)
            reader = wire.reader()
            assert await receive(reader) == message
            assert await reader.read() == rest

    asyncio.run(story())


async def test_as_libp2p_writes_them() -> None:
    """Bytes that go-libp2p sent: a request to connect, and the answer of a peer that takes the connection."""
    peer = bytes.fromhex("1220") + bytes(range(32))
    wire = Wire()
    wire.data = bytes([40]) + b"\x08\x01\x12\x24\x0a\x22" + peer
    assert await receive_hop(wire.reader()) == CircuitMessage(Hop.CONNECT, peer=peer)
    wire.data = b"\x04\x08\x01\x20\x64"
    assert await receive_stop(wire.reader()) == CircuitMessage(Stop.STATUS, status=Status.OK)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    async def story() -> None:
        wire = Wire()
        wire.data = data
        with contextlib.suppress(ProtocolError, EOFError):
            await receive_hop(wire.reader())

    asyncio.run(story())


@pytest.mark.parametrize("length", [b"\x81\x20", b"\xff\xff\xff\xff\x7f"])
async def test_long_messages_are_refused_before_they_are_read(length: bytes) -> None:
    assert MAX_MESSAGE_BYTES == 4096
    stream = asyncio.StreamReader()
    stream.feed_data(length)  # nothing follows: who waited for it would wait for ever
    with pytest.raises(ProtocolError):
        await asyncio.wait_for(receive_hop(stream), 5)
