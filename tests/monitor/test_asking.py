"""In which order and how often servers are asked: questions that the test answers, or leaves open."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from running import running

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.errors import PeerUnreachable
from swarm.monitor import asking
from swarm.monitor.asking import Asker, AskLimits

PATIENCE = 60.0  # seconds for what takes milliseconds on an idle machine
INFO = ServerInfo(
    state=ServerState.ONLINE, span=BlockSpan(start=0, end=4), throughput=1.0, numerics="float32", cache_tokens_left=9
)


class Servers:
    """asked: questions to each, answered or not. out: those that wait for an answer now."""

    def __init__(self) -> None:
        self.asked = Counter[str]()
        self.out = Counter[str]()
        self.hanging = set[str]()
        self.gone = set[str]()
        self._changed = asyncio.Event()

    async def ask(self, peer_id: str, timeout: float) -> tuple[float, ServerInfo]:
        self.asked[peer_id] += 1
        self.out[peer_id] += 1
        self.note()
        try:
            if peer_id in self.gone:
                raise PeerUnreachable("gone")
            if peer_id in self.hanging:
                await asyncio.Event().wait()
            return 0.02, INFO
        finally:
            self.out[peer_id] -= 1
            self.note()

    def note(self) -> None:
        self._changed.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not is_so():
                await self._changed.wait()
                self._changed.clear()


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@asynccontextmanager
async def alone(asker: Asker) -> AsyncIterator[None]:
    """It runs meanwhile, and leaves nothing behind."""
    before = asyncio.all_tasks()
    async with running(asker.run()):
        yield
    assert asyncio.all_tasks() == before


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_servers_that_hang_do_not_hold_up_the_others() -> None:
    async def test() -> None:
        servers = Servers()
        hanging, answering = [f"Hang{n}" for n in range(6)], [f"Good{n}" for n in range(3)]
        servers.hanging.update(hanging)
        limits = AskLimits(slots=2, timeout=0.02, silent_slots=1, silent_timeout=3600.0)
        asker = Asker(servers.ask, 0.01, servers.note, limits)
        async with alone(asker):
            asker.take([*hanging, *answering])
            await servers.until(lambda: asker.round_trips.keys() == {*hanging, *answering})
            # from now on one of them keeps the only slot of its lane
            await servers.until(lambda: sum(servers.out[peer_id] for peer_id in hanging) == 1)
            before = Counter(servers.asked)
            await servers.until(lambda: all(servers.asked[peer_id] > before[peer_id] + 5 for peer_id in answering))
            assert sum(servers.asked[peer_id] for peer_id in hanging) == len(hanging) + 1
            assert [peer_id for peer_id, time in asker.round_trips.items() if time != math.inf] == answering
        assert not +servers.out

    run(test())


def test_strangers_that_hang_do_not_hold_up_those_that_answered_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_MAX_RATE", 1e9)

    async def test() -> None:
        servers = Servers()
        strangers = [f"Hang{n}" for n in range(300)]
        servers.hanging.update(strangers)
        asker = Asker(servers.ask, 0.01, servers.note, AskLimits(slots=1, timeout=0.02))
        async with alone(asker):
            asker.take(["Good"])
            await servers.until(lambda: "Good" in asker.infos)
            asker.take(["Good", *strangers])
            goal = servers.asked["Good"] + 3
            await servers.until(lambda: servers.asked["Good"] >= goal)
            assert sum(servers.asked[peer_id] for peer_id in strangers) < 100

    run(test())


def test_who_does_not_answer_is_asked_soon_and_then_less_and_less_often() -> None:
    async def test() -> None:
        servers, clock = Servers(), Clock()
        servers.gone.add("Gone")
        asker = Asker(servers.ask, 0.001, servers.note, clock=clock)

        async def look_through(seconds: float) -> int:
            """How many times it was asked by then. The other server is due each time, and asked in the same breath."""
            clock.seconds += seconds
            goal = servers.asked["Good"] + 1
            asker.take(["Gone", "Good"])
            await servers.until(lambda: servers.asked["Good"] >= goal and not +servers.out)
            return servers.asked["Gone"]

        async with alone(asker):
            assert await look_through(0.01) == 1
            for number, pause in enumerate([1, 2, 4, 8, 16, 32, 60, 60], start=1):
                assert await look_through(pause - 0.25) == number
                assert await look_through(0.25) == number + 1
            servers.gone.clear()
            await look_through(60.0)
            assert asker.round_trips["Gone"] == 0.02
            servers.gone.add("Gone")
            await look_through(0.5)
            assert asker.round_trips["Gone"] == math.inf
            asked = servers.asked["Gone"]
            assert await look_through(1.0) == asked + 1  # the pauses are short again

    run(test())


def test_those_that_left_are_forgotten_though_they_are_being_asked() -> None:
    async def test() -> None:
        servers = Servers()
        servers.hanging.add("Hang")
        asker = Asker(servers.ask, 3600.0, servers.note)
        async with alone(asker):
            asker.take(["Hang", "Good"])
            await servers.until(lambda: servers.out["Hang"] == 1 and "Good" in asker.infos)
            assert asker.round_trips == {"Good": 0.02}
            await asyncio.wait_for(asker.all_asked(0.0), PATIENCE)  # only waits
            asker.take([])
            await servers.until(lambda: servers.out["Hang"] == 0)
            assert (asker.round_trips, asker.noises, asker.infos) == ({}, {}, {})
            asker.take(["Good"])
            await asyncio.wait_for(asker.all_asked(math.inf), PATIENCE)
            assert asker.round_trips == {"Good": 0.02}

    run(test())


def test_the_more_servers_the_less_often_each_is_asked() -> None:
    async def test() -> None:
        servers, clock = Servers(), Clock()
        many = [f"Qm{number}" for number in range(500)]
        asker = Asker(servers.ask, 1.0, servers.note, clock=clock)
        async with alone(asker):
            asker.take(many)
            await asyncio.wait_for(asker.all_asked(math.inf), PATIENCE)
            before = servers.asked.total()
            clock.seconds += 4.9
            asker.take([*many, "New"])
            await servers.until(lambda: "New" in asker.infos)
            assert servers.asked.total() == before + 2
            clock.seconds += 0.2
            asker.take(many)
            await servers.until(lambda: servers.asked.total() == before + 2 + len(many))

    run(test())


def test_asked_once_all_together() -> None:
    async def test() -> None:
        servers = Servers()
        many = [f"Hang{number}" for number in range(300)]
        servers.hanging.update(many)
        servers.gone.add("Gone")
        asker = Asker(servers.ask, 1.0)
        asker.take([*many, "Gone", "Good"])
        await asker.ask_all(0.2)
        assert asker.round_trips == {"Good": 0.02, "Gone": math.inf, **dict.fromkeys(many, math.inf)}
        assert (
            max(servers.asked.values()) == 2 and not +servers.out
        )  # a new one is asked twice: to connect, and for time
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(test())


def test_an_error_of_ours_is_told_and_the_server_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async def ask(peer_id: str, timeout: float) -> tuple[float, ServerInfo]:
            raise ZeroDivisionError("a mistake")

        asker = Asker(ask, 1.0)
        asker.take(["Qm"])
        await asker.ask_all(PATIENCE)
        assert asker.round_trips == {"Qm": math.inf}

    run(test())
    assert "could not ask server Qm" in caplog.text and "a mistake" in caplog.text
