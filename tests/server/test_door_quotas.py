"""What one peer may take of a server, asked for at its door. `test_quotas.py` has the counting itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from swarm.data_structures import BlockSpan
from swarm.errors import BadSpan, QuotaExceeded
from swarm.protocol import PUSH_STREAM, CloseSession, ErrorReply, OpenPush
from swarm.rpc import open_stream, server_info
from swarm.server.quotas import PeerQuotas, QuotaLimits

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("bystander")]

World = Client = Gate = Any  # see conftest.py

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
TOKEN = 256  # bytes of a token's hidden states


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def limit(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PeerQuotas]:
    """Sets limits for who comes from now on, until the test ends."""

    def set_limits(**limits: Any) -> PeerQuotas:
        quotas = PeerQuotas(QuotaLimits(**limits))
        monkeypatch.setattr(world.handler, "quotas", quotas)
        return quotas

    return set_limits


async def all_given_back(world: World, quotas: PeerQuotas) -> None:
    for client in world._clients[1:]:  # the first is the bystander
        client.vanish()
    await until(lambda: len(quotas) == 0)


async def refused(world: World) -> None:
    """The stranger's next session."""
    client = await world.connect(world.stranger)
    reply = await client.open()
    assert isinstance(reply, ErrorReply), reply
    assert (reply.error, "close some, or go on elsewhere" in reply.message) == (QuotaExceeded.__name__, True)


async def test_sessions_beyond_the_limit_are_refused_until_some_are_closed(world: World, limit: Any) -> None:
    quotas = limit(max_sessions=2)
    clients = [await world.open(world.stranger) for _ in range(2)]
    await refused(world)
    honest = await world.open(world.honest)
    await honest.step(2)
    await clients[0].send(CloseSession())
    await clients[0].expect_end()
    clients[0] = await world.open(world.stranger)
    for client in clients:
        await client.step(3)
    await all_given_back(world, quotas)


async def test_a_session_that_could_not_be_opened_does_not_count(world: World, limit: Any) -> None:
    quotas = limit(max_sessions=1)
    client = await world.connect(world.stranger)
    for _ in range(3):
        reply = await client.open(span=BlockSpan(start=0, end=8))
        assert reply.error == BadSpan.__name__
    opened = await world.open(world.stranger)
    await opened.step()
    await all_given_back(world, quotas)


async def test_streams_beyond_the_limit_are_refused(world: World, limit: Any) -> None:
    quotas = limit(max_streams=2)
    clients = [await world.open(world.stranger) for _ in range(2)]
    await refused(world)
    for client in clients:
        await client.step()
    await all_given_back(world, quotas)


async def test_pushes_count_as_the_owners_and_their_streams_are_only_counted_until_they_proved_of_use(
    world: World, limit: Any
) -> None:
    quotas = limit()
    clients = [await world.open(world.honest, previous=world.stranger.peer_id) for _ in range(2)]
    quotas._limits = QuotaLimits(max_streams=1)
    for client in clients:  # the second stream is welcome: the first one belongs to its session by now
        stream = await open_stream(world.stranger.p2p, world.server.peer_id, LIMIT, PUSH_STREAM)
        await stream.send(OpenPush(session_id=client.session_id))
        await stream.send(*client.request(2))
        await client.expect_result(2, pushed=True)
    holders = dict(quotas._peers)
    assert holders[world.honest.peer_id].sessions == 2
    assert world.stranger.peer_id not in holders or holders[world.stranger.peer_id].holds_nothing
    await all_given_back(world, quotas)


async def test_bytes_beyond_the_limit_wait_and_hold_up_nobody_else(world: World, limit: Any, gate: Gate) -> None:
    quotas = limit(max_bytes_in_flight=4 * TOKEN)
    first, second, honest = [await world.open(node) for node in (world.stranger, world.stranger, world.honest)]
    await first.send(*first.request(3))
    await gate.wait_for_a_batch()
    await second.send(*second.request(2))
    await until(lambda: quotas._peers[world.stranger.peer_id].waiting == 1)
    await honest.send(*honest.request(4))
    await world.wait_until(lambda: gate.num_steps == 2)
    assert quotas._peers[world.stranger.peer_id].bytes_in_flight == 3 * TOKEN
    assert gate.num_steps == 2
    gate.open()
    await first.expect_result(3)
    await second.expect_result(2)
    await honest.expect_result(4)
    await all_given_back(world, quotas)


async def test_who_waits_for_room_may_leave(world: World, limit: Any, gate: Gate) -> None:
    quotas = limit(max_bytes_in_flight=4 * TOKEN)
    first, second = [await world.open(world.stranger) for _ in range(2)]
    await first.send(*first.request(3))
    await gate.wait_for_a_batch()
    await second.send(*second.request(2))
    await until(lambda: quotas._peers[world.stranger.peer_id].waiting == 1)
    second.vanish()
    gate.open()
    await first.expect_result(3)
    await first.step(2)
    await all_given_back(world, quotas)


async def test_requests_beyond_the_rate_wait(world: World, limit: Any) -> None:
    quotas = limit(requests_per_second=20.0, request_burst=2)
    started = time.monotonic()
    for _ in range(6):
        await server_info(world.stranger.p2p, world.server.peer_id, LIMIT)
    assert time.monotonic() - started >= 4 / 20
    await all_given_back(world, quotas)
