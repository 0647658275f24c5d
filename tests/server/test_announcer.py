"""What a server measures of the ways to others."""

import asyncio
from types import SimpleNamespace

import pytest

from swarm.data_structures import MAX_NEXT_PINGS, BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import NetworkError, PeerTimeout
from swarm.server.announcer import MAX_PINGS, Announcer


def info(start, end):
    return ServerInfo(
        state=ServerState.ONLINE,
        span=BlockSpan(start=start, end=end),
        throughput=1.0,
        numerics="x",
        cache_tokens_left=5,
    )


class World:
    """An announcer of blocks 0:4 among servers whose distances a test sets."""

    def __init__(self, monkeypatch, records):
        self.round_trips = {}
        self.asked = []
        self.records = records
        model = ModelInfo(name="m", fingerprint="a" * 64, num_blocks=12, hidden_size=64)
        self.announcer = Announcer(
            SimpleNamespace(p2p=None, peer_id="me", complaints=None), model, lambda: info(0, 4), 20.0
        )
        self.announcer._directory = SimpleNamespace(servers=self.servers)
        self.announcer._upload_after = float("inf")
        monkeypatch.setattr("swarm.server.announcer.ping", self.ping)

    async def servers(self, fingerprint):
        return self.records

    async def ping(self, p2p, peer_id, timeout):
        self.asked.append(peer_id)
        if self.round_trips[peer_id] is None:
            raise PeerTimeout("it did not answer")
        return self.round_trips[peer_id]

    async def look_around(self):
        await self.announcer._look_around()
        return self.announcer.next_pings


def server(peer_id, start, end):
    return ServerRecord(peer_id, info(start, end), expires=100.0)


async def test_only_holders_of_the_next_block_are_pinged(monkeypatch):
    world = World(
        monkeypatch, [server("before", 0, 4), server("next", 4, 8), server("over", 2, 6), server("far", 6, 12)]
    )
    world.round_trips = {"next": 0.1, "over": 0.2}
    assert await world.look_around() == {"next": 0.1, "over": 0.2}


async def test_the_first_call_connects_and_later_ones_are_smoothed(monkeypatch):
    world = World(monkeypatch, [server("next", 4, 8)])
    world.round_trips = {"next": 0.1}
    await world.look_around()
    assert world.asked == ["next", "next"]
    world.round_trips = {"next": 0.2}
    assert 0.1 < (await world.look_around())["next"] < 0.2
    assert world.asked == ["next"] * 3


async def test_who_does_not_answer_or_left_is_not_announced(monkeypatch):
    world = World(monkeypatch, [server("A", 4, 8), server("B", 4, 8)])
    world.round_trips = {"A": 0.1, "B": 0.2}
    assert len(await world.look_around()) == 2
    world.round_trips["A"] = None
    assert await world.look_around() == {"B": pytest.approx(0.2)}
    world.records = [world.records[0]]
    assert await world.look_around() == {}


async def test_few_are_pinged_at_a_time_and_only_the_nearest_announced(monkeypatch):
    number = 2 * MAX_NEXT_PINGS
    world = World(monkeypatch, [server(f"P{one}", 4, 8) for one in range(number)])
    world.round_trips = {f"P{one}": 0.001 * (one + 1) for one in range(number)}
    await world.look_around()
    assert len(set(world.asked)) == MAX_PINGS
    while len(set(world.asked)) < number:
        pings = await world.look_around()
    assert pings.keys() == {f"P{one}" for one in range(MAX_NEXT_PINGS)}
    info(0, 4).model_validate({**info(0, 4).model_dump(), "next_pings": pings})  # fits into a record


async def test_an_outage_is_logged_once_and_its_end_too(monkeypatch, caplog):
    world = World(monkeypatch, [])
    tried = asyncio.Event()
    failing = True
    attempts = {"announce": 0, "servers": 0}

    def attempt(what):
        attempts[what] += 1
        if min(attempts.values()) >= 3:
            tried.set()
        if failing:
            raise NetworkError("the DHT does not answer")

    async def announce(model, info, ttl):
        attempt("announce")

    async def servers(fingerprint):
        attempt("servers")
        return []

    world.announcer._directory = SimpleNamespace(announce=announce, servers=servers)
    world.announcer._period = 0.01
    failing = False
    await world.announcer.start()
    failing = True
    for expected in ("could not announce this server", "can announce this server again"):
        tried.clear()
        attempts.update(announce=0, servers=0)
        async with asyncio.timeout(20):
            await tried.wait()
        assert caplog.text.count(expected) == 1
        failing = False
    assert caplog.text.count("could not read the list of servers") == 1
    assert caplog.text.count("can read the list of servers again") == 1
    assert all(not task.done() for task in world.announcer._tasks)
    await world.announcer.stop()


async def test_announcements_go_out_one_after_the_other():
    """An older one that is slow to be stored, and stored anew, would take the place of a newer one."""
    state, stored, stuck = ServerState.ONLINE, [], asyncio.Event()

    async def announce(model, info, ttl):
        if info.state is ServerState.ONLINE:
            await stuck.wait()
        stored.append(info.state)

    announcer = Announcer(
        SimpleNamespace(p2p=None, peer_id="me", complaints=None),
        ModelInfo(name="m", fingerprint="a" * 64, num_blocks=12, hidden_size=64),
        lambda: info(0, 4).model_copy(update={"state": state}),
        20.0,
    )
    announcer._directory = SimpleNamespace(announce=announce)
    heartbeat = asyncio.create_task(announcer.announce())
    await asyncio.sleep(0)
    state = ServerState.DRAINING
    news = asyncio.create_task(announcer.announce())
    for _ in range(5):
        await asyncio.sleep(0)
    assert stored == []
    stuck.set()
    await asyncio.gather(heartbeat, news)
    assert stored == [ServerState.ONLINE, ServerState.DRAINING]


async def test_what_was_never_announced_is_not_withdrawn():
    announcer = Announcer(
        SimpleNamespace(p2p=None, peer_id="me", complaints=None),
        ModelInfo(name="m", fingerprint="a" * 64, num_blocks=12, hidden_size=64),
        lambda: pytest.fail("there is nothing to say yet"),
        20.0,
    )
    await announcer.stop()
