"""A session's deep prompts on their way to a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from swarm.client.block_client import RemoteSpan, SessionSpec
from swarm.client.config import ClientConfig
from swarm.codecs import Codec
from swarm.errors import PeerTimeout
from swarm.protocol import Message, PromptsTaken

SPEC = SessionSpec("s", 1, 8, 4, output_codec=Codec.FLOAT32, previous=None, next=None)


class SlowLine:
    """A stream to a server that takes the prompts once `arrived` is set."""

    def __init__(self) -> None:
        self.arrived, self.sent = asyncio.Event(), asyncio.Event()
        self.answered = False

    async def send(self, message: Message, payload: Any = b"") -> None:
        self.sent.set()

    async def receive(self) -> tuple[Message, bytes]:
        if not self.answered:
            await self.arrived.wait()
            self.answered = True
            return PromptsTaken(), b""
        return await asyncio.Future()

    def close(self) -> None:
        pass


def connect(line: SlowLine, **timeouts: float) -> RemoteSpan:
    return RemoteSpan(None, line, "QmServer", SPEC, ClientConfig(**timeouts))  # type: ignore[arg-type]


async def test_prompts_may_take_as_long_as_a_step() -> None:
    """Ten megabytes need more than the few seconds in which a server accepts a session."""
    line = SlowLine()
    span = connect(line, connect_timeout=0.01, request_timeout=60.0)
    giving = asyncio.create_task(span.give_prompts(torch.zeros(2, 3, 4), Codec.FLOAT32))
    await line.sent.wait()
    await asyncio.wait({giving}, timeout=0.05)  # nothing is to happen meanwhile
    assert not giving.done()
    line.arrived.set()
    await giving
    span.close()


async def test_a_server_that_never_takes_them_is_given_up() -> None:
    span = connect(SlowLine(), request_timeout=0.01)
    with pytest.raises(PeerTimeout, match=r"server QmServer did not take the prompts within 0\.01 s"):
        await span.give_prompts(torch.zeros(2, 3, 4), Codec.FLOAT32)
    span.close()
