"""Real nodes on loopback: some cannot be reached, others relay to them, and relays go."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hivemind.p2p import P2PDaemonError, PeerID

from swarm import relay_service, reservations
from swarm.addresses import peer_id_of, without_peer_id
from swarm.circuit import HOP_STREAM, CircuitMessage, Hop, Status, receive_hop, send_hop
from swarm.errors import JoinFailed, PeerUnreachable
from swarm.membership import SwarmKey
from swarm.node import Node, NodeConfig
from swarm.rpc import open_stream

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


class World:
    """Starts nodes, and stops them in the end."""

    def __init__(self, stack: AsyncExitStack):
        self._stack = stack

    async def node(self, *initial_peers: str, **settings: Any) -> Node:
        settings = {"host_maddrs": (LOOPBACK,), "rejoin_period": 0.5, **settings}
        node = await Node.start(NodeConfig(initial_peers=initial_peers, **settings))
        self._stack.push_async_callback(node.stop)
        return node

    async def hidden(self, *initial_peers: str, **settings: Any) -> Node:
        """One that nobody can reach, which sends back what it gets."""
        node = await self.node(*initial_peers, listen=False, relay="always", **settings)

        async def echo(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while data := await reader.read(2**16):
                    writer.write(data)
                    await writer.drain()
            except ConnectionError:
                pass
            writer.close()

        await node.p2p.add_binary_stream_handler("echo", echo)
        return node


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(stack)


async def echoes(client: Node, peer_id: str, data: bytes) -> bool:
    async with asyncio.timeout(30):
        _, reader, writer = await client.p2p.call_binary_stream_handler(PeerID.from_base58(peer_id), "echo")
        _, received = await asyncio.gather(_send(writer, data), reader.readexactly(len(data)))
        writer.close()
    return received == data


async def echoes_again(client: Node, peer_id: str) -> None:
    """Once libp2p has noticed that the connection of before is dead, as it may do a moment late."""
    async with asyncio.timeout(30):
        while True:
            try:
                assert await echoes(client, peer_id, b"hello again")
                return
            except (P2PDaemonError, EOFError, OSError):
                await asyncio.sleep(0.1)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def until(condition: Any, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


async def test_megabytes_through_a_relay(world: World) -> None:
    """p2pd's own relay would cut the connection after 128 KiB."""
    relay = await world.node()
    address = await relay.ready_address()
    hidden = await world.hidden(address)
    assert hidden.relayed and hidden.relays == (relay.peer_id,)
    assert await hidden.ready_address() == f"{address}/p2p-circuit/p2p/{hidden.peer_id}"
    client = await world.node(address, listen=False)
    with pytest.raises(P2PDaemonError):  # there is no other way
        await client.p2p.call_binary_stream_handler(PeerID.from_base58(hidden.peer_id), "echo")
    client.p2p.learn_relays(hidden.peer_id, hidden.relays)
    assert await echoes(client, hidden.peer_id, os.urandom(3_000_000))


async def test_relays_that_are_no_peers_are_passed_over(world: World) -> None:
    """Strangers announce them; whoever asked such a server met a ValueError of a library."""
    relay = await world.node()
    hidden = await world.hidden(await relay.ready_address())
    client = await world.node(await relay.ready_address(), listen=False)
    client.p2p.learn_relays(hidden.peer_id, ("0", "nobody", *hidden.relays))
    assert await echoes(client, hidden.peer_id, b"hello")
    stranger = "QmXnnyufdzAWL5CqZ2RnSNgPbvCc1ALT73s6epPrRnZ1Xy"
    client.p2p.learn_relays(stranger, ("0",))
    with pytest.raises(PeerUnreachable):
        await open_stream(client.p2p, stranger, 20.0)


async def test_the_relayed_address_serves_to_join(world: World) -> None:
    relay = await world.node()
    hidden = await world.hidden(await relay.ready_address())
    client = await world.node(await hidden.ready_address(), listen=False)
    assert client.dht.protocol.routing_table.get(peer_id=relay.p2p.peer_id) is not None
    assert await echoes(client, hidden.peer_id, b"hello")


async def test_when_a_relay_dies_the_other_one_carries_on(world: World) -> None:
    relays = [await world.node()]
    relays.append(await world.node(await relays[0].ready_address()))
    hidden = await world.hidden(await relays[0].ready_address())  # it hears of the other by itself
    async with asyncio.timeout(60):
        while len(hidden.relays) < 2:
            await hidden.dht.find_nearest_nodes([hidden.dht.node_id])  # as servers do whenever they read the records
            await asyncio.sleep(0.1)
    assert set(hidden.relays) == {relay.peer_id for relay in relays}
    client = await world.node(await relays[1].ready_address(), listen=False)
    client.p2p.learn_relays(hidden.peer_id, hidden.relays)
    assert await echoes(client, hidden.peer_id, b"hello")
    first = next(relay for relay in relays if relay.peer_id == hidden.relays[0])
    changes: list[tuple[str, ...]] = []
    hidden.on_new_relays = lambda: changes.append(hidden.relays)
    await first.stop()
    await until(lambda: first.peer_id not in hidden.relays)
    assert changes[0] == hidden.relays != ()
    assert peer_id_of((await hidden.ready_address()).partition("/p2p-circuit")[0]) in hidden.relays
    await echoes_again(client, hidden.peer_id)


async def test_the_only_relay_dies_and_comes_back(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(reservations, "_CHECK", 0.2)
    monkeypatch.setattr(reservations, "_LAST_PAUSE", 0.2)
    relay = await world.node(identity_path=tmp_path / "identity")
    address = await relay.ready_address()
    hidden = await world.hidden(address)
    await relay.stop()
    await until(lambda: not hidden.relays)
    assert "others cannot reach this peer; looking for another" in caplog.text
    port = address.split("/")[4]
    await world.node(identity_path=tmp_path / "identity", host_maddrs=(f"/ip4/127.0.0.1/tcp/{port}",))
    await until(lambda: hidden.relays)
    assert "others can reach this peer again" in caplog.text
    client = await world.node(address, listen=False)
    client.p2p.learn_relays(hidden.peer_id, hidden.relays)
    assert await echoes(client, hidden.peer_id, b"hello")


async def test_without_a_relay_the_error_says_so(world: World) -> None:
    bootstrap = await world.node(serve_relay=False)
    with pytest.raises(JoinFailed, match=r"at the step relay: others cannot reach this peer.*it does not relay.*run"):
        await world.hidden(await bootstrap.ready_address(), relay_timeout=4.0)


async def ask(node: Node, peer: Node, message: CircuitMessage) -> int | None:
    """The status with which a peer answers on a hop stream."""
    async with asyncio.timeout(20):
        reader, writer = await node.p2p.open_direct_stream(peer.p2p.peer_id, HOP_STREAM)
        await send_hop(writer, message)
        return (await receive_hop(reader)).status


async def test_who_does_not_relay(world: World) -> None:
    """Neither clients, nor those that are behind relays themselves, though p2pd would."""
    relay = await world.node()
    address = await relay.ready_address()
    hidden, client = await world.hidden(address), await world.node(address, listen=False)
    quiet = await world.node(address, serve_relay=False)
    hidden.p2p.learn_relays(client.peer_id, ())
    client.p2p.learn_relays(hidden.peer_id, hidden.relays)
    assert await echoes(client, hidden.peer_id, b"hello")
    for peer, asker in ((hidden, client), (client, hidden), (quiet, client)):
        assert await ask(asker, peer, CircuitMessage(Hop.RESERVE)) == Status.PERMISSION_DENIED


async def test_what_strangers_may_take(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await world.node()
    address = await relay.ready_address()
    hidden, client = await world.hidden(address), await world.node(address, listen=False)
    connect = CircuitMessage(Hop.CONNECT, peer=hidden.p2p.peer_id.to_bytes())
    monkeypatch.setattr(relay_service, "MAX_RESERVATIONS", 1)
    assert await ask(client, relay, CircuitMessage(Hop.RESERVE)) == Status.RESERVATION_REFUSED
    for limit in ("MAX_CIRCUITS", "MAX_CIRCUITS_TO", "MAX_CIRCUITS_FROM"):
        with monkeypatch.context() as patch:
            patch.setattr(relay_service, limit, 0)
            assert await ask(client, relay, connect) == Status.RESOURCE_LIMIT_EXCEEDED
    with monkeypatch.context() as patch:
        patch.setattr(relay_service, "MAX_STREAMS_FROM", 0)
        with pytest.raises((EOFError, OSError)):
            await ask(client, relay, connect)
    assert await ask(client, relay, connect) == Status.OK
    stranger = CircuitMessage(Hop.CONNECT, peer=client.p2p.peer_id.to_bytes())
    assert await ask(client, relay, stranger) == Status.NO_RESERVATION
    assert await ask(client, relay, CircuitMessage(Hop.CONNECT)) == Status.MALFORMED_MESSAGE
    assert await ask(client, relay, CircuitMessage(Hop.STATUS)) == Status.UNEXPECTED_MESSAGE


async def test_a_relay_keeps_nothing_of_those_that_left(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    services: list[relay_service.RelayService] = []
    register = relay_service.RelayService.register

    async def watched(self: relay_service.RelayService) -> None:
        services.append(self)
        await register(self)

    monkeypatch.setattr(relay_service.RelayService, "register", watched)
    relay = await world.node()
    hidden = await world.hidden(await relay.ready_address())
    client = await world.node(await relay.ready_address(), listen=False)
    client.p2p.learn_relays(hidden.peer_id, hidden.relays)
    assert await echoes(client, hidden.peer_id, b"hello")
    assert (services[0].num_reservations, services[0].num_circuits) == (1, 1)
    await client.stop()
    await until(lambda: services[0].num_circuits == 0)
    assert not services[0]._circuits_from
    await hidden.stop()
    await until(lambda: services[0].num_reservations == 0)


async def test_reservations_are_renewed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "_RENEWAL", 0.1)
    renewals = 0

    async def counted(*arguments: Any) -> CircuitMessage:
        nonlocal renewals
        answer = await ask_once(*arguments)
        renewals += 1
        return answer

    ask_once = reservations._ask
    monkeypatch.setattr(reservations, "_ask", counted)
    relay = await world.node()
    hidden = await world.hidden(await relay.ready_address())
    changes: list[None] = []
    hidden.on_new_relays = lambda: changes.append(None)
    await until(lambda: renewals >= 5)
    assert hidden.relays and not changes


async def test_a_relay_forgets_who_does_not_renew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_service, "RESERVATION_TIME", 0.5)
    relay = await world.node()
    hidden = await world.hidden(await relay.ready_address())
    changes: list[None] = []
    hidden.on_new_relays = lambda: changes.append(None)
    await until(lambda: changes)


async def test_a_relay_of_a_private_swarm_keeps_places_for_members(world: World, tmp_path: Path) -> None:
    SwarmKey.create(tmp_path / "key")
    member = {"swarm_key": tmp_path / "key"}
    relay = await world.node(**member)
    hidden = await world.hidden(await relay.ready_address(), **member)
    client = await world.node(await hidden.ready_address(), listen=False, **member)
    assert await echoes(client, hidden.peer_id, os.urandom(300_000))

    stranger = await world.node(listen=False)
    await stranger.p2p._client.connect(relay.p2p.peer_id, [without_peer_id(await relay.ready_address())])
    reader, writer = await stranger.p2p.open_direct_stream(relay.p2p.peer_id, HOP_STREAM)
    await send_hop(writer, CircuitMessage(Hop.RESERVE))
    assert (await receive_hop(reader)).status == Status.PERMISSION_DENIED
    # It may have bytes carried to a member, who then hears that it lacks the key.
    stranger.p2p.learn_relays(hidden.peer_id, hidden.relays)
    _, reader, writer = await stranger.p2p.call_binary_stream_handler(PeerID.from_base58(hidden.peer_id), "echo")
    writer.write(b"hello")
    assert b"this swarm is private" in await reader.read()
