"""The picture that the watcher keeps: of a made-up swarm, where the order of events matters, and of real processes."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from running import running

from swarm.data_structures import BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import NetworkError, PeerUnreachable
from swarm.monitor import watcher as watcher_module
from swarm.monitor.asking import AskLimits
from swarm.monitor.picture import ModelPicture, Picture
from swarm.monitor.watcher import Watcher, WatchSettings
from swarm.node import Node, NodeConfig
from swarm.node_thread import NodeThread
from swarm.scripts.local_swarm import LocalSwarm

PATIENCE = 120.0  # seconds
LLAMA = ModelInfo(name="llama", fingerprint="ab" * 32, num_blocks=8, hidden_size=64)
OTHER = ModelInfo(name="other", fingerprint="cd" * 32, num_blocks=8, hidden_size=64)


def info(start: int = 0, end: int = 8, *, at: int | None = 100, **fields: Any) -> ServerInfo:
    """at: when it was said, by the server's clock."""
    usual = {"state": ServerState.ONLINE, "throughput": 12.5, "numerics": "float32", "cache_tokens_left": 1000}
    return ServerInfo(span=BlockSpan(start=start, end=end), announced_at=at, **{**usual, **fields})


class FakeSight:
    """A swarm to order. records: by model. answers: of servers; others do not answer. seconds: of the clock."""

    def __init__(self) -> None:
        self.records: dict[ModelInfo, list[ServerRecord]] = {}
        self.answers: dict[str, ServerInfo] = {}
        self.unreadable: Collection[str] = ()
        self.seconds = 1000.0
        self.known_addresses: dict[str, tuple[str, ...]] = {}
        self.frozen = False

    async def _wait_if_frozen(self) -> None:
        while self.frozen:
            await asyncio.Event().wait()

    def add(self, peer_id: str, said: ServerInfo, model: ModelInfo = LLAMA, expires: float = 1060.0) -> None:
        self.records.setdefault(model, []).append(ServerRecord(peer_id, said, expires))
        self.answers.setdefault(peer_id, said)

    async def models(self) -> Mapping[str, ModelInfo]:
        await self._wait_if_frozen()
        if "models" in self.unreadable:
            raise NetworkError("nobody at /ip4/192.0.2.7/tcp/31337 answers")
        return {model.fingerprint: model for model in self.records}

    async def servers(self, fingerprint: str) -> list[ServerRecord]:
        if fingerprint in self.unreadable:
            raise NetworkError("nobody at /ip4/192.0.2.7/tcp/31337 answers")
        return [record for model, all_ in self.records.items() if model.fingerprint == fingerprint for record in all_]

    async def ask(self, peer_id: str, timeout: float) -> tuple[float, ServerInfo]:
        await self._wait_if_frozen()
        if peer_id not in self.answers:
            raise PeerUnreachable("gone")
        return 0.02, self.answers[peer_id]

    async def addresses(self, peer_ids: Collection[str]) -> Mapping[str, tuple[str, ...]]:
        return {peer_id: known for peer_id, known in self.known_addresses.items() if peer_id in peer_ids}


def watch(sight: FakeSight, update_period: float = 0.01) -> Watcher:
    limits = AskLimits(timeout=3600.0)
    now = partial(getattr, sight, "seconds")
    return Watcher(cast(Node, None), WatchSettings(update_period), sight=sight, limits=limits, now=now)


def look(sight: FakeSight) -> Picture:
    return asyncio.run(watch(sight).look())


def model_of(picture: Picture) -> ModelPicture:
    (model,) = picture.models
    return model


@asynccontextmanager
async def alone(watcher: Watcher) -> AsyncIterator[None]:
    """It runs meanwhile, and leaves nothing behind; a search of hivemind, if cancelled, takes its seconds to end."""
    before = tasks_of_the_monitor()
    async with running(watcher.run()):
        yield
    assert tasks_of_the_monitor() == before


def tasks_of_the_monitor() -> set[asyncio.Task[Any]]:
    coroutines = {task: cast(Coroutine[Any, Any, Any], task.get_coro()) for task in asyncio.all_tasks()}
    return {task for task, it in coroutines.items() if "/monitor/" in it.cr_code.co_filename}  # type: ignore[attr-defined]


async def until(watcher: Watcher, is_so: Callable[[Picture], object]) -> Picture:
    async with asyncio.timeout(PATIENCE):
        while not is_so(watcher.picture):
            await watcher.changed(watcher.picture.revision, PATIENCE)
    return watcher.picture


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures follow each other closely."""
    monkeypatch.setattr(watcher_module, "_LEAST_PAUSE", 0.01)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_what_one_look_shows() -> None:
    sight = FakeSight()
    sight.add("QmA", info(0, 5))
    sight.add("QmB", info(3, 8))
    sight.add("QmSilent", info(0, 8))
    sight.add("QmOther", info(0, 4), OTHER)
    del sight.answers["QmSilent"]
    sight.known_addresses = {"QmA": ("/ip4/192.0.2.1/tcp/4",), "QmStranger": ("/ip4/192.0.2.2/tcp/4",)}
    picture = look(sight)
    assert (picture.revision, picture.made_at, picture.read_at, picture.trouble) == (1, 1000.0, 1000.0, None)
    llama, other = picture.models
    assert llama.model == LLAMA and llama.replicas == (1, 1, 1, 2, 2, 1, 1, 1) and other.missing_blocks == (4, 5, 6, 7)
    assert llama.snapshot.pings == {"QmA": 0.02, "QmB": 0.02, "QmSilent": math.inf}
    assert llama.snapshot.ping_noise["QmA"] == 0.01
    assert picture.addresses == {"QmA": ("/ip4/192.0.2.1/tcp/4",)}


def test_whatever_a_server_said_last_counts() -> None:
    sight = FakeSight()
    for peer_id, announced, answered in (("QmA", 100, 101), ("QmB", 100, 100), ("QmC", 102, 101)):
        sight.add(peer_id, info(0, 4, at=announced))
        sight.answers[peer_id] = info(4, 8, at=answered, state=ServerState.DRAINING)
    sight.add("QmD", info(0, 4, at=None))
    sight.answers["QmD"] = info(4, 8, at=None)
    servers = {server.peer_id: server.info for server in model_of(look(sight)).snapshot.servers}
    assert {peer_id: str(said.span) for peer_id, said in servers.items()} == {
        "QmA": "4:8",
        "QmB": "4:8",
        "QmC": "0:4",
        "QmD": "4:8",
    }
    assert servers["QmA"].state is ServerState.DRAINING and servers["QmC"].state is ServerState.ONLINE


def test_a_server_that_says_that_it_stopped_has_left() -> None:
    sight = FakeSight()
    sight.add("QmA", info())
    sight.add("QmB", info(), OTHER)
    sight.answers["QmB"] = info(state=ServerState.OFFLINE)
    assert model_of(look(sight)).model == LLAMA  # nobody serves the other model any more


def test_after_a_restart_with_another_model_a_server_serves_that_alone() -> None:
    sight = FakeSight()
    sight.add("QmA", info(0, 8, at=100), LLAMA, expires=1060.0)
    sight.add("QmA", info(0, 6, at=130), OTHER, expires=1050.0)
    assert model_of(look(sight)).model == OTHER


def test_a_swarm_with_too_many_models_and_servers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watcher_module, "MAX_MODELS", 1)
    monkeypatch.setattr(watcher_module, "MAX_SERVERS", 2)
    sight = FakeSight()
    watcher = watch(sight)
    sight.add("QmA", info())
    asyncio.run(watcher.look())
    for number in range(9):
        sight.records[LLAMA].insert(0, ServerRecord(f"QmNew{number}", info(), 1060.0))
    sight.add("QmB", info(), OTHER)
    servers = model_of(asyncio.run(watcher.look())).snapshot.servers
    assert len(servers) == 2 and servers[0].peer_id == "QmA"  # who was known stays
    assert "2 models and 10 servers, over 1 and 2" in caplog.text


def test_a_look_that_cannot_read_fails() -> None:
    sight = FakeSight()
    sight.add("QmA", info())
    for what in ("models", LLAMA.fingerprint):
        sight.unreadable = (what,)
        with pytest.raises(NetworkError, match="nobody at"):
            look(sight)


def test_the_picture_follows_the_swarm() -> None:
    async def test() -> None:
        sight = FakeSight()
        watcher = watch(sight)
        assert await watcher.changed(0, 0.0) == 0
        async with alone(watcher):
            first = await until(watcher, lambda picture: picture.revision)
            assert first.models == () and first.trouble is None
            sight.add("QmA", info())
            joined = await until(watcher, lambda picture: picture.models and model_of(picture).complete)
            assert joined.revision > first.revision
            sight.answers["QmA"] = info(0, 4, at=105)
            await until(watcher, lambda picture: model_of(picture).missing_blocks == (4, 5, 6, 7))
            del sight.answers["QmA"]
            await until(watcher, lambda picture: model_of(picture).answers("QmA") is False)
            assert len(model_of(watcher.picture).snapshot.servers) == 1
            sight.answers["QmA"] = info(0, 8, at=110)
            await until(watcher, lambda picture: model_of(picture).complete)
            sight.records.clear()
            await until(watcher, lambda picture: not picture.models)

    run(test())


def test_when_records_cannot_be_read_the_old_ones_stay_until_they_expire(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        sight = FakeSight()
        sight.add("QmAlive", info())
        sight.add("QmGone", info(), OTHER)
        del sight.answers["QmGone"]
        watcher = watch(sight)
        async with alone(watcher):
            await until(watcher, lambda picture: picture.revision)
            for what in ("models", OTHER.fingerprint):
                sight.unreadable = (what,)
                troubled = await until(watcher, lambda picture: picture.trouble)
                assert len(troubled.models) == 2 and model_of(Picture(troubled.models[:1])).complete
                assert troubled.trouble is not None and "192.0.2.7" not in troubled.trouble
                sight.seconds += 1.0
                later = await until(watcher, lambda picture: picture.made_at == sight.seconds)
                assert later.read_at == troubled.read_at < later.made_at
                sight.unreadable = ()
                await until(watcher, lambda picture: not picture.trouble and picture.read_at == sight.seconds)
            sight.unreadable = ("models",)
            sight.seconds = 1061.0  # all have expired
            await until(watcher, lambda picture: len(picture.models) == 1)
            assert model_of(watcher.picture).model == LLAMA  # whose server answers
            del sight.answers["QmAlive"]
            await until(watcher, lambda picture: not picture.models)

    run(test())
    warnings = [record.getMessage() for record in caplog.records if "192.0.2.7" in record.getMessage()]
    assert len(warnings) == 3  # once each time, not at each attempt


def test_after_waiting_for_peers_that_do_not_answer_it_reads_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher_module, "_READING_SHARE", 0.5 / (2 * PATIENCE))

    class Slow(FakeSight):
        readings = 0

        async def models(self) -> Mapping[str, ModelInfo]:
            self.readings += 1
            if self.readings == 1:
                await asyncio.sleep(0.5)
                raise NetworkError("no answer within 20 s")
            return await super().models()

    async def test() -> None:
        sight = Slow()
        sight.add("QmA", info())
        watcher = watch(sight)
        async with alone(watcher):
            await until(watcher, lambda picture: picture.models)

    run(test())


@pytest.mark.parametrize("update_period", [0.5, 3600.0])
def test_figures_alone_make_a_new_picture_when_the_period_ends(update_period: float) -> None:
    async def test() -> None:
        sight = FakeSight()
        sight.add("QmA", info())
        watcher = watch(sight, update_period)

        def hear(said: ServerInfo) -> None:
            watcher._asker._infos["QmA"] = said
            watcher._note()

        def rows(picture: Picture) -> int:
            return model_of(picture).snapshot.servers[0].info.running_rows

        async with alone(watcher):
            first = await until(watcher, lambda picture: picture.revision)
            sight.frozen = True  # it is told nothing from here on but by us
            hear(info(at=101, running_rows=3))
            if update_period < PATIENCE:
                await until(watcher, lambda picture: rows(picture) == 3)
                return
            assert await watcher.changed(first.revision, 0.3) == first.revision
            hear(info(at=102, running_rows=3, state=ServerState.DRAINING))  # that cannot wait
            await until(watcher, lambda picture: rows(picture) == 3)

    run(test())


def test_an_error_of_ours_ends_it() -> None:
    class Broken(FakeSight):
        async def models(self) -> Mapping[str, ModelInfo]:
            raise ZeroDivisionError

    async def test() -> None:
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(watch(Broken()).run(), PATIENCE)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(test())


@pytest.fixture
def two_servers(tiny_llama_folder: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(tiny_llama_folder, ["0:8", "0:8"], flags=["--threads", "1", "--dtype", "float32"]) as swarm:
        yield swarm


def test_servers_that_hang_and_die(two_servers: LocalSwarm) -> None:
    first, second = two_servers.servers
    thread = NodeThread.start(NodeConfig(initial_peers=tuple(two_servers.initial_peers), listen=False))

    async def test() -> None:
        watcher = Watcher(thread.node, WatchSettings(update_period=0.5))

        def answers(picture: Picture, server: Any) -> bool | None:
            return model_of(picture).answers(server.peer_id)

        async with alone(watcher):
            picture = await until(watcher, lambda picture: picture.models and min(model_of(picture).replicas) == 2)
            assert picture.addresses.keys() == {first.peer_id, second.peer_id}
            assert all(one.startswith("/ip4/127.0.0.1/tcp/") for one in picture.addresses[first.peer_id])
            os.kill(first.pid, signal.SIGSTOP)
            await until(watcher, lambda picture: answers(picture, first) is False)
            assert model_of(watcher.picture).replicas == (1,) * 8
            second.kill()
            await until(watcher, lambda picture: answers(picture, second) is False)
            assert model_of(watcher.picture).missing_blocks == tuple(range(8))
            os.kill(first.pid, signal.SIGCONT)
            await until(watcher, lambda picture: answers(picture, first))
            assert model_of(watcher.picture).replicas == (1,) * 8

    try:
        thread.run(test())
    finally:
        thread.stop()
