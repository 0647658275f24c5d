"""Sessions that come and go, in order and otherwise, leave a server as it was: its cache free, its memory no larger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from swarm.checkpoint import open_checkpoint
from swarm.client.block_client import RemoteSpan
from swarm.client.config import ClientConfig
from swarm.client.connection import SwarmConnection
from swarm.data_structures import BlockSpan
from swarm.rpc import server_info
from swarm.scripts.bench_echo import EchoSession
from swarm.scripts.local_swarm import LocalSwarm

PATIENCE = 60.0  # seconds for what takes milliseconds on an idle machine
WAVE = 12  # sessions at once
PROMPT, STEPS = 70, 3  # tokens: more than a page


class Users:
    """Waves of sessions on one server: of each three, one ends before its time."""

    def __init__(self, folder: Path, swarm: LocalSwarm):
        self.server = swarm.servers[0]
        self._checkpoint = open_checkpoint(str(folder))
        self._config = ClientConfig(initial_peers=tuple(swarm.initial_peers))
        self._hidden = torch.randn(PROMPT, 64, generator=torch.Generator().manual_seed(0))
        self.connection = self.connect()

    def connect(self) -> SwarmConnection:
        return SwarmConnection(self._checkpoint, self._config)

    def come_and_go(self, count: int) -> None:
        """At least `count` sessions. In each wave a whole peer is killed with the sessions that it has."""
        for _ in range(-(-count // WAVE)):
            doomed = self.connect()
            try:
                staying = asyncio.run_coroutine_threadsafe(self._wave(), self.connection.thread.loop)
                doomed.thread.run(self._leave_open(doomed))
                doomed.thread.run(doomed.thread.node._running_daemon().stop())
                staying.result(PATIENCE)
            finally:
                doomed.thread.stop()

    async def _wave(self) -> None:
        lives = [self._live, self._live, self._cancel, self._live, self._live, self._vanish]
        await asyncio.gather(*(lives[index % len(lives)]() for index in range(WAVE - 1)))

    async def _open(self, connection: SwarmConnection) -> EchoSession:
        span = BlockSpan(start=0, end=connection.num_blocks)
        chain = await connection.router.find_chain(span, cache_tokens=PROMPT + STEPS)
        return await EchoSession.open(connection, chain, PROMPT + STEPS, self._hidden)

    async def _prefill(self, session: EchoSession) -> None:
        await session.step(0, self._hidden)

    async def _live(self) -> None:
        session = await self._open(self.connection)
        await self._prefill(session)
        for position in range(PROMPT, PROMPT + STEPS):
            await session.step(position, self._hidden[:1])
        session.close()

    async def _cancel(self) -> None:
        session = await self._open(self.connection)
        step = asyncio.create_task(self._prefill(session))
        await asyncio.sleep(0)  # it is on its way
        step.cancel()
        await asyncio.wait({step})
        session.close()

    async def _vanish(self) -> None:
        session = await self._open(self.connection)
        step = asyncio.create_task(self._prefill(session))
        await asyncio.sleep(0)
        assert isinstance(session.hops[0].span, RemoteSpan)
        session.hops[0].span._stream.abort()
        await asyncio.wait({step})
        step.exception()

    async def _leave_open(self, connection: SwarmConnection) -> None:
        await self._prefill(await self._open(connection))

    def tokens_left(self) -> int:
        asked = server_info(self.connection.thread.node.p2p, self.server.peer_id, PATIENCE)
        return self.connection.thread.run(asked).cache_tokens_left

    def wait_for(self, tokens_left: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while (left := self.tokens_left()) != tokens_left:
            assert time.monotonic() < deadline, f"{left} tokens are left, not {tokens_left}"
            time.sleep(0.05)

    def memory(self) -> int:
        """Bytes of the server's process."""
        rss: int = psutil.Process(self.server.pid).memory_info().rss
        return rss


@pytest.fixture
def users(tiny_llama_folder: Path) -> Iterator[Users]:
    # A cache that the sessions fill: its pages take memory when they are first written.
    with LocalSwarm(tiny_llama_folder, ["0:8"], flags=["--threads", "1", "--cache-tokens", "4096"]) as swarm:
        users = Users(tiny_llama_folder, swarm)
        try:
            yield users
        finally:
            users.connection.thread.stop()


@pytest.mark.parametrize("count", [4 * WAVE, pytest.param(1000, marks=pytest.mark.slow)])
def test_sessions_leave_nothing_behind(users: Users, count: int) -> None:
    left = users.tokens_left()
    users.come_and_go(max(4 * WAVE, count // 10))  # warms up: compiled products, pages of allocators
    users.wait_for(left)
    memory = users.memory()
    users.come_and_go(count)
    users.wait_for(left)
    after = users.memory()
    assert abs(after - memory) <= 0.05 * memory, f"{memory} bytes before, {after} after {count} sessions"
