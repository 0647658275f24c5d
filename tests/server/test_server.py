"""A server that cannot serve says so at its start; one whose engine dies leaves the swarm."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scraped import metrics_at

from swarm.codecs import Codec
from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.dht import Directory
from swarm.errors import EngineError, ModelNotFound, NetworkError, UsageError
from swarm.node import Node, NodeConfig
from swarm.progress import Progress, Stopped
from swarm.protocol import OpenSession, RowSlice, SessionOpened, StepRequest
from swarm.rpc import FrameStream, open_stream, server_info
from swarm.server.config import ServerConfig
from swarm.server.hosting import Loaded
from swarm.server.server import Server
from swarm.server.tasks import RowWork, StepTask
from swarm.tensors import encode

LIMIT = 60.0  # seconds for what takes milliseconds on an idle machine


async def test_a_server_ends_with_its_engine(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(
        ServerConfig(model=str(tiny_llama_folder), host_maddrs=("/ip4/127.0.0.1/tcp/0",), cache_tokens=64, threads=1)
    )
    await server.start()
    assert server._hosting is not None
    engine = server._hosting.engine

    def bug(*args: Any) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(engine, "_schedule", bug)
    (row,) = engine.cache.admit(1, 4)
    future = engine.submit(StepTask(torch.zeros(1, 64), [RowWork(row, 0, 1)], 0, 8))
    with pytest.raises(EngineError, match="the engine died, so this server ends"):
        await server.serve_until_stopped()
    with pytest.raises(EngineError):
        future.result(timeout=10)
    assert server.node._stopped is not None


async def test_a_folder_of_adapters_that_is_not_there_is_known_before_anything_is_loaded(tmp_path: Path) -> None:
    """Neither is the model, which is found out later."""
    server = Server(ServerConfig(model=str(tmp_path / "model"), adapters=(str(tmp_path / "adapters"),)))
    with pytest.raises(UsageError, match=r"--adapters .*: there is no folder"):
        await server.start()


async def test_memory_that_adapters_do_not_leave(tiny_llama_folder: Path) -> None:
    config = ServerConfig(
        model=str(tiny_llama_folder),
        host_maddrs=("/ip4/127.0.0.1/tcp/0",),
        max_memory="500MB",  # type: ignore[arg-type]
        adapters_from_hub=True,
    )
    with pytest.raises(UsageError, match=r"beside 1\.1GB for adapters \(--adapter-memory\),.* but 0B of memory"):
        await Server(config).start()


async def test_a_server_that_cannot_read_who_serves_what_says_so_and_leaves(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no blocks yet, so there is nothing to withdraw."""
    server = Server(
        ServerConfig(model=str(tiny_llama_folder), host_maddrs=("/ip4/127.0.0.1/tcp/0",), num_blocks=4, threads=1)
    )

    async def no_answer() -> list[Any]:
        raise NetworkError("nobody answers")

    monkeypatch.setattr(server, "records", no_answer)
    with pytest.raises(NetworkError, match="nobody answers"):
        await server.start()
    assert server.node._stopped is not None


async def test_a_server_can_be_stopped_while_it_waits_for_adapters(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes from the hub may take an hour."""
    reached = asyncio.Event()

    async def for_ever(*args: Any) -> None:
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("swarm.server.hosting.register_all", for_ever)
    server = Server(
        ServerConfig(model=str(tiny_llama_folder), host_maddrs=("/ip4/127.0.0.1/tcp/0",), cache_tokens=64, threads=1)
    )
    starting = asyncio.create_task(server.start())
    await reached.wait()
    starting.cancel()
    await asyncio.wait([starting], timeout=60)
    assert starting.cancelled()
    assert server.node._stopped is not None


@pytest.fixture
async def client() -> AsyncIterator[Node]:
    """A peer that servers join, and that then uses them."""
    node = await Node.start(NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",)))
    yield node
    await node.stop()


@pytest.fixture
async def server(tiny_llama_folder: Path) -> AsyncIterator[Server]:
    """Of four blocks that it chose itself, in a swarm of its own."""
    server = Server(
        ServerConfig(
            model=str(tiny_llama_folder),
            host_maddrs=("/ip4/127.0.0.1/tcp/0",),
            num_blocks=4,
            cache_tokens=64,
            threads=1,
            announce_period=1.0,
        )
    )
    await server.start()
    yield server
    server.stop()
    await server.serve_until_stopped()


async def announced(server: Server) -> list[tuple[ServerState, str]]:
    return [(record.info.state, str(record.info.span)) for record in await server.records()]


async def test_a_paused_server_holds_no_blocks_and_is_in_no_list(server: Server) -> None:
    assert await announced(server) == [(ServerState.ONLINE, "0:4")]
    assert server._hosting is not None
    span, engine = weakref.ref(server._hosting.engine.span), weakref.ref(server._hosting.engine)
    await server.pause()
    assert await announced(server) == []
    assert (span(), engine()) == (None, None)  # so their memory is free
    await server.pause()  # once more does no harm
    await server.resume()
    assert await announced(server) == [(ServerState.ONLINE, "0:4")]
    assert server._handler.engine.span.blocks == server.span
    await server.resume()


async def test_a_server_that_moves_serves_its_new_blocks(server: Server) -> None:
    assert server._hosting is not None
    old = weakref.ref(server._hosting.engine.span)
    assert await server.move(BlockSpan(start=3, end=7))
    assert old() is None
    assert await announced(server) == [(ServerState.ONLINE, "3:7")]
    assert str(server._handler.engine.span.blocks) == "3:7"
    assert not server._handler.draining


async def opened(server: Server, client: Node) -> FrameStream:
    """A session of 10 tokens for all blocks of a server, which takes one of its pages."""
    stream = await open_stream(client.p2p, server.node.peer_id, LIMIT)
    fields: dict[str, Any] = {"num_rows": 1, "max_length": 10, "output_codec": Codec.FLOAT32}
    session_id = secrets.token_hex(16)
    await stream.send(
        OpenSession(session_id=session_id, fingerprint=server.model.fingerprint, span=server.span, **fields)
    )
    async with asyncio.timeout(LIMIT):
        answer, _ = await stream.receive()
    assert isinstance(answer, SessionOpened), answer
    return stream


async def until_announced(server: Server, **wanted: Any) -> ServerInfo:
    """The record of a server once it says so."""
    async with asyncio.timeout(LIMIT):
        while True:
            for record in await server.records():
                if all(getattr(record.info, name) == value for name, value in wanted.items()):
                    return record.info
            await asyncio.sleep(0.05)


async def test_what_its_records_say(tiny_llama_folder: Path, client: Node) -> None:
    """Of a cache of 150 tokens, two pages of 64 can be used."""
    before = int(time.time())
    server = Server(
        ServerConfig(
            model=str(tiny_llama_folder),
            initial_peers=(await client.ready_address(),),
            host_maddrs=("/ip4/127.0.0.1/tcp/0",),
            num_blocks=4,
            cache_tokens=150,
            threads=1,
            announce_period=1.0,
        )
    )
    await server.start()
    try:
        idle = await until_announced(server, state=ServerState.ONLINE, cache_tokens=128, cache_tokens_left=128)
        assert idle.started_at is not None and idle.announced_at is not None
        assert before <= idle.started_at <= idle.announced_at <= time.time()
        assert await Directory(client).models() == {server.model.fingerprint: server.model}
        assert server.model.hidden_size == 64

        stream = await opened(server, client)
        busy = await until_announced(server, session_rows=1)
        assert (busy.cache_tokens, busy.cache_tokens_left) == (128, 64)
        stream.close()
        later = await until_announced(server, session_rows=0)
        assert (later.cache_tokens, later.cache_tokens_left) == (128, 128)

        assert await server.move(BlockSpan(start=3, end=7))
        moved = await until_announced(server, span=BlockSpan(start=3, end=7), state=ServerState.ONLINE)
        assert (moved.cache_tokens, moved.cache_tokens_left) == (128, 128)
        assert moved.started_at == idle.started_at and moved.announced_at >= later.announced_at  # type: ignore[operator]

        await server.pause()  # nobody reads of it, but who knows it may ask
        paused = await server_info(client.p2p, server.node.peer_id, LIMIT)
        assert paused.state is ServerState.OFFLINE
        assert (paused.cache_tokens, paused.cache_tokens_left, paused.session_rows) == (128, 128, 0)
        assert paused.started_at == idle.started_at
    finally:
        server.stop()
        await server.serve_until_stopped()


async def test_metrics_go_on_over_moves_and_pauses(tiny_llama_folder: Path, client: Node) -> None:
    said: list[str] = []
    server = Server(
        ServerConfig(
            model=str(tiny_llama_folder),
            initial_peers=(await client.ready_address(),),
            host_maddrs=("/ip4/127.0.0.1/tcp/0",),
            num_blocks=4,
            cache_tokens=64,
            threads=1,
            metrics_port=0,
        ),
        report=said.append,
    )
    reached: list[dict[str, float]] = []

    async def read() -> dict[str, float]:
        assert server.metrics_url is not None
        reached.append(await asyncio.to_thread(metrics_at, server.metrics_url))
        return reached[-1]

    load = server._load

    def watched(span: BlockSpan, progress: Progress) -> Loaded:
        assert server.metrics_url is not None
        reached.append(metrics_at(server.metrics_url))
        return load(span, progress)

    server._load = watched  # type: ignore[method-assign]
    await server.start()
    try:
        url = server.metrics_url
        assert url is not None and said[0] == f"metrics at {url}"
        assert (reached[0]["state joining"], reached[0]["first_block"], reached[0]["sessions"]) == (1, 0, 0)
        stream = await opened(server, client)
        found = await read()
        assert (found["state online"], found["first_block"], found["last_block"]) == (1, 0, 3)
        assert (found["sessions"], found["session_rows"], found["cache_left_tokens"]) == (1, 1, 0)
        assert (found["cache_tokens"], found["throughput_tokens_per_second"] > 0) == (64, True)
        meta, payload = encode(torch.zeros(3, 64), Codec.FLOAT32)
        await stream.send(StepRequest(step=1, rows=(RowSlice(0, 0, 3),), hidden=meta), payload)
        async with asyncio.timeout(LIMIT):
            await stream.receive()
        stream.close()
        before = await read()
        assert before["tokens_total prefill"] == 3
        assert await server.move(BlockSpan(start=3, end=7))
        await server.pause()
        paused = await read()
        assert (paused["state paused"], paused["state online"], paused["sessions"]) == (1, 0, 0)
        assert "first_block" not in paused
        await server.resume()
        after = await read()
        assert after["state online"] == 1
        grown = [name for name in before if "_total" in name or "_count" in name]
        assert all(after[name] >= paused[name] >= before[name] for name in grown)
    finally:
        server.stop()
        await server.serve_until_stopped()
    assert server.metrics_url is None
    host, _, port = url.removeprefix("http://").removesuffix("/metrics").partition(":")
    socket.create_server((host, int(port))).close()


async def test_a_server_that_cannot_start_frees_its_port_for_metrics(tmp_path: Path) -> None:
    said: list[str] = []
    server = Server(ServerConfig(model=str(tmp_path / "nowhere"), metrics_port=0), report=said.append)
    with pytest.raises(ModelNotFound):
        await server.start()
    port = int(said[0].removesuffix("/metrics").rpartition(":")[2])
    socket.create_server(("127.0.0.1", port)).close()


async def test_while_it_loads_a_server_announces_how_fast_it_will_be(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server._hosting is not None
    speed, load, seen = server._hosting.speed, server._load, list[ServerInfo]()

    def watched(span: BlockSpan, progress: Progress) -> Loaded:
        seen.append(server._info())
        return load(span, progress)

    monkeypatch.setattr(server, "_load", watched)
    await server.move(BlockSpan(start=3, end=7))
    (info,) = seen
    assert (info.state, info.decode_times) == (ServerState.JOINING, speed.decode_times)


async def test_a_server_that_cannot_load_other_blocks_goes_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = server._load

    def fail(span: BlockSpan, progress: Progress) -> Loaded:
        if span.start == 4:
            raise ModelNotFound("the disk is gone")
        return load(span, progress)

    monkeypatch.setattr(server, "_load", fail)
    assert not await server.move(BlockSpan(start=4, end=8))
    assert await announced(server) == [(ServerState.ONLINE, "0:4")]

    monkeypatch.setattr(server, "_load", lambda span, progress: fail(BlockSpan(start=4, end=8), progress))
    await server.pause()
    with pytest.raises(ModelNotFound):
        await server.resume()
    assert await announced(server) == []
    monkeypatch.undo()
    await server.resume()  # the disk is back
    assert await announced(server) == [(ServerState.ONLINE, "0:4")]


async def test_a_server_that_can_load_nothing_any_more_ends(tiny_llama_folder: Path) -> None:
    config = ServerConfig(
        model=str(tiny_llama_folder), host_maddrs=("/ip4/127.0.0.1/tcp/0",), num_blocks=4, cache_tokens=64, threads=1
    )
    server = Server(config)
    await server.start()
    assert server._mover is not None

    async def decide() -> None:
        await server.move(BlockSpan(start=4, end=8))

    def fail(span: BlockSpan, progress: Progress) -> Loaded:
        raise ModelNotFound("the disk is gone")

    server._mover.check, server._load = decide, fail  # type: ignore[method-assign]
    server._mover._alarm.set()
    with pytest.raises(ModelNotFound, match="the disk is gone"):
        await server.serve_until_stopped()
    assert server.node._stopped is not None


async def test_a_pause_in_the_middle_of_a_move_loses_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it falls: while the old blocks are let go, while the new ones are loaded, while they are opened."""
    open_, let_go = server._open, server._let_go
    reached, go_on = asyncio.Event(), asyncio.Event()
    spans = weakref.WeakSet[Any]()

    async def slowly(loaded: Loaded) -> None:
        spans.add(loaded.span)
        reached.set()
        await go_on.wait()
        await open_(loaded)

    async def go_slowly() -> None:
        reached.set()
        await go_on.wait()
        await let_go()

    for name, slow in (("_open", slowly), ("_let_go", go_slowly)):
        reached.clear()
        go_on.clear()
        with monkeypatch.context() as patch:
            patch.setattr(server, name, slow)
            assert server._mover is not None
            server._mover.check = partial(server.move, BlockSpan(start=3, end=7))  # type: ignore[method-assign]
            server._mover._alarm.set()
            await reached.wait()
            pausing = asyncio.create_task(server.pause())
            await asyncio.sleep(0)
            go_on.set()
            await pausing
        assert (server.state, server._hosting, server._moving) == (ServerState.OFFLINE, None, None)
        assert [thread.name for thread in threading.enumerate() if thread.name == "engine"] == []
        assert not spans
        await server.resume()
        assert [state for state, _ in await announced(server)] == [ServerState.ONLINE]


async def test_a_load_that_nobody_waits_for_any_more_ends(server: Server) -> None:
    """Else a paused server would go on fetching and taking memory, and load twice once it resumes."""
    loading, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    class Watched(Progress):
        def loaded(self, done: int, total: int) -> None:
            loading.set()
            go_on.wait(60)

    load = server._load

    def watched(span: BlockSpan, progress: Progress) -> Loaded:
        try:
            return load(span, progress)
        except Stopped:
            ended.set()
            raise

    server._progress, server._load = Watched(), watched  # type: ignore[method-assign]
    moving = asyncio.create_task(server.move(BlockSpan(start=3, end=7)))
    assert await asyncio.to_thread(loading.wait, 60)
    moving.cancel()
    await asyncio.wait([moving])
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 60)


async def test_a_server_that_is_told_to_end_does_not_come_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner resumes it at the same moment: nobody may read of a server that is gone."""
    await server.pause()
    reached = asyncio.Event()

    async def choose() -> BlockSpan:
        reached.set()
        return await asyncio.Event().wait()  # type: ignore[return-value]

    monkeypatch.setattr(server, "_choose_span", choose)
    resuming = asyncio.create_task(server.resume())
    await reached.wait()
    server.stop()
    await server.serve_until_stopped()
    await asyncio.wait([resuming], timeout=60)
    assert resuming.done() and (resuming.cancelled() or resuming.exception() is not None)
    assert server.state is ServerState.OFFLINE
    with pytest.raises(NetworkError, match="ends"):
        await server.resume()
