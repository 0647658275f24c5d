"""A swarm of fake servers: a directory, pings and streams. Router, sessions and fail-over are real, and so is what
clients write and read."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
import torch
from fake_server import HIDDEN_SIZE, MODULUS, FakeServer, FakeStream, idle, run_blocks

from swarm.client.block_client import SwarmBlockClient
from swarm.client.config import ClientConfig
from swarm.client.inference_session import InferenceSession
from swarm.client.links import Links
from swarm.data_structures import AdapterInfo, AdapterRef, BlockSpan, ModelInfo, OpeningAnswer, ServerInfo
from swarm.dht import ServerRecord
from swarm.errors import PeerRefused, PeerTimeout, PeerUnreachable, SessionLost, SwarmError
from swarm.node_thread import NodeThread
from swarm.protocol import NextServer, RowAdapters, RowSlice, StepRequest, row_adapters
from swarm.routing.router import Router, RouterConfig

FINGERPRINT = "f" * 64
NUM_BLOCKS = 8


class FakeNode:
    p2p = None

    async def stop(self) -> None:
        pass


class FakeSwarm:
    """A directory, pings and streams of fake servers. settings: of every client, unless it says otherwise."""

    def __init__(self, thread: NodeThread, monkeypatch: pytest.MonkeyPatch):
        self.thread = thread
        self.servers: dict[str, FakeServer] = {}
        self.settings: dict[str, Any] = {"retry_delay": 0.01, "max_retry_delay": 0.02, "retry_time": 20.0}
        self.directory_error: SwarmError | None = None
        self.clock = time.monotonic  # of routers
        self.users: list[User] = []
        self._tasks: set[asyncio.Task[None]] = set()
        monkeypatch.setattr("swarm.client.block_client.open_stream", self._open_stream)
        monkeypatch.setattr("swarm.client.block_client.ping", self._probe)

    def add(self, name: str, start: int, end: int, **settings: Any) -> FakeServer:
        server = self.servers[name] = FakeServer(self, name, BlockSpan(start=start, end=end), **settings)
        return server

    def __getitem__(self, name: str) -> FakeServer:
        return self.servers[name]

    def connect(self, *, num_blocks: int = NUM_BLOCKS, **settings: Any) -> FakeConnection:
        config = ClientConfig(**{**self.settings, **settings})
        router = Router(
            FakeDirectory(self),
            self._ping,
            FINGERPRINT,
            num_blocks,
            "Fake",
            RouterConfig(**config.model_dump(include=set(RouterConfig.model_fields))),
            clock=lambda: self.clock(),
            rng=random.Random(0),
        )
        return FakeConnection(self, router, config, num_blocks)

    def take_push(self, pusher: str, target: NextServer, request: StepRequest, payload: bytes) -> None:
        """A push arrives. Raises what its sender is told; the session's owner is told of a step that cannot be run."""
        server = self.servers[target.peer_id]
        session = server.sessions.get(target.session_id)
        if server.hung or self.servers[pusher].loses_pushes:
            return
        if session is None:
            raise SessionLost("no such session")
        if session.previous != pusher:
            raise PeerRefused(f"{session.previous} was named as the server before this one, not {pusher}")
        try:
            session.accept(request, payload, pushed=True)
        except SwarmError as error:
            session.stream.refuse(error, request.step)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """In the thread of clients and servers, and then until all that follows from it is done."""
        result = self.thread.run(coroutine)
        self.settle()
        return result

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()

    def settle(self) -> None:
        """Wait until clients and servers have nothing left to do."""
        self.thread.run(idle())

    async def _ping(self, peer_id: str, timeout: float, opening_key: str | None) -> tuple[float, OpeningAnswer]:
        return 0.001, OpeningAnswer(info=_record(self.servers[peer_id]).info)

    async def _probe(self, p2p: object, peer_id: str, timeout: float) -> float:
        server = self.servers[peer_id]
        server.pings += 1
        if server.hung:
            await asyncio.sleep(timeout)
            raise PeerTimeout(f"{peer_id} did not answer within {timeout:g} s")
        if server.gone and not server.reconnects:
            raise PeerUnreachable(f"{peer_id} is gone")
        return 0.001

    async def _open_stream(self, p2p: object, peer_id: str, timeout: float) -> FakeStream:
        return FakeStream(self.servers[peer_id])


class FakeDirectory:
    """The records of a fake swarm."""

    def __init__(self, swarm: FakeSwarm):
        self._swarm = swarm

    async def servers(self, fingerprint: str) -> list[ServerRecord]:
        if self._swarm.directory_error is not None:
            raise self._swarm.directory_error
        return [_record(server) for server in self._swarm.servers.values() if server.listed]

    async def models(self) -> dict[str, ModelInfo]:
        return {}


def _record(server: FakeServer) -> ServerRecord:
    info = ServerInfo(
        state=server.state,
        span=server.span,
        throughput=server.throughput,
        numerics=server.numerics,
        network_rate=server.network_rate,
        cache_tokens_left=server.announced_cache_tokens,
        adapters=tuple(AdapterInfo(ref.name, "lora", ref.digest) for ref in server.adapters),
        fetches_adapters=server.fetches_adapters,
    )
    return ServerRecord(server.name, info, expires=1e12)


class FakeConnection:
    """What `SwarmConnection` is to the model, and a short way to sessions."""

    def __init__(self, swarm: FakeSwarm, router: Router, config: ClientConfig, num_blocks: int):
        self.thread, self.router, self.config = swarm.thread, router, config
        self._swarm = swarm
        self.num_blocks = num_blocks
        self.links = Links(router, config)
        self.client = SwarmBlockClient(FakeNode(), FINGERPRINT, config)  # type: ignore[arg-type]

    def open_session(
        self,
        span: BlockSpan,
        num_rows: int,
        max_length: int,
        bytes_per_token: int,
        prompts: torch.Tensor | None = None,
        adapters: RowAdapters | None = None,
    ) -> InferenceSession:
        return InferenceSession(
            self.thread,
            self.router,
            self.client,
            self.config,
            self.links,
            span=span,
            num_rows=num_rows,
            max_length=max_length,
            bytes_per_token=bytes_per_token,
            prompts=prompts,
            adapters=adapters,
        )

    def find_adapter(self, name: str, span: BlockSpan) -> AdapterRef:
        return self.thread.run(self.router.adapter(name, span))

    @property
    def banned(self) -> set[str]:
        return set(self.router.banned())

    def user(
        self,
        num_rows: int = 1,
        max_length: int = 64,
        start: int = 0,
        end: int | None = None,
        adapters: Sequence[AdapterRef | None] = (),
    ) -> User:
        """adapters: of the rows; none: no row has one."""
        span = BlockSpan(start=start, end=self.num_blocks if end is None else end)
        rows = row_adapters(adapters)
        user = User(self.open_session(span, num_rows, max_length, 4 * HIDDEN_SIZE, adapters=rows), span)
        self._swarm.users.append(user)
        return user


class User:
    """Feeds a session with random tokens, and compares each output with that of an uninterrupted run."""

    def __init__(self, session: InferenceSession, span: BlockSpan):
        self.session, self.span = session, span
        self.inputs = [torch.empty(0, HIDDEN_SIZE)] * session.num_rows
        self._random = torch.Generator().manual_seed(0)

    def step(self, *num_tokens: int) -> None:
        """So many new tokens for each row (default: one for each). Raises what the session raises."""
        counts = num_tokens or (1,) * self.session.num_rows
        new = [torch.randint(0, MODULUS, (count, HIDDEN_SIZE), generator=self._random).float() for count in counts]
        rows = [RowSlice(row, len(self.inputs[row]), count) for row, count in enumerate(counts) if count]
        output = self.session.step(torch.cat(new), rows)
        self.inputs = [torch.cat([old, part]) for old, part in zip(self.inputs, new, strict=True)]
        expected = [
            run_blocks(self.span, inputs, self._adapter(row))[len(inputs) - count :]
            for row, (inputs, count) in enumerate(zip(self.inputs, counts, strict=True))
        ]
        torch.testing.assert_close(output, torch.cat(expected), rtol=0, atol=0)

    def _adapter(self, row: int) -> AdapterRef | None:
        return None if self.session.adapters is None else self.session.adapters.of_row(row)

    def rewind(self, *lengths: int) -> None:
        self.session.rewind(lengths)
        self.inputs = [inputs[:length] for inputs, length in zip(self.inputs, lengths, strict=True)]

    def reorder(self, *sources: int) -> None:
        self.session.reorder(sources)
        self.inputs = [self.inputs[source] for source in sources]

    @property
    def route(self) -> list[tuple[str, str]]:
        return [(link.peer_id, str(link.span)) for link in self.session.chain]
