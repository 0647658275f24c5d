"""A session is opened soon, or where a server has adapters to load, as long as it lives."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from swarm.client.block_client import RemoteSpan, SessionSpec
from swarm.client.config import ClientConfig
from swarm.codecs import Codec
from swarm.data_structures import AdapterRef, BlockSpan
from swarm.errors import PeerTimeout, PeerUnreachable
from swarm.protocol import Message, OpenSession, SessionOpened, row_adapters

ID = "ab" * 16
ADAPTERS = row_adapters([AdapterRef("french", "12" * 8)])


class SlowServer:
    """A stream to a server that accepts a session after so many probes."""

    def __init__(self, probes: float = float("inf")):
        self.accepted = asyncio.Event()
        self.probes_left = probes
        self.lives = True

    async def probe(self, timeout: float) -> None:
        if not self.lives:
            raise PeerUnreachable("it is gone")
        self.probes_left -= 1
        if not self.probes_left:
            self.accepted.set()

    async def send(self, message: Message, payload: Any = b"") -> None:
        pass

    async def receive(self) -> tuple[Message, bytes]:
        await self.accepted.wait()
        self.accepted.clear()
        return SessionOpened(session_id=ID, cache_tokens_left=0, clock=0), b""

    def close(self) -> None:
        pass


async def open_session(server: SlowServer, monkeypatch: pytest.MonkeyPatch, *, adapters: bool) -> None:
    spec = SessionSpec(ID, 1, 8, 4, output_codec=Codec.FLOAT32)
    config = ClientConfig(connect_timeout=0.01, request_timeout=60.0)
    span = RemoteSpan(None, server, "QmServer", spec, config)  # type: ignore[arg-type]
    monkeypatch.setattr(span, "probe", server.probe)
    request = OpenSession(
        session_id=ID,
        fingerprint="ab" * 32,
        span=BlockSpan(start=0, end=1),
        num_rows=1,
        max_length=8,
        output_codec=Codec.FLOAT32,
        adapters=ADAPTERS if adapters else None,
    )
    try:
        await span.start(request)
    finally:
        span.close()


async def test_a_server_that_loads_adapters_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SlowServer(probes=3)
    await open_session(server, monkeypatch, adapters=True)
    assert server.probes_left == 0


async def test_one_that_gives_no_sign_of_life_meanwhile_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SlowServer()
    server.lives = False
    with pytest.raises(PeerUnreachable, match="it is gone"):
        await open_session(server, monkeypatch, adapters=True)


async def test_without_adapters_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerTimeout, match=r"did not accept a session within 0\.01 s"):
        await open_session(SlowServer(), monkeypatch, adapters=False)
