"""A join that fails says at which step, and what to try."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from swarm import join
from swarm.errors import BadAddress, JoinFailed
from swarm.join import MAX_CLOCK_SKEW, dial_reason
from swarm.node import Node, NodeConfig
from swarm.p2p_daemon import P2PDaemon

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
OTHER_PEER = "QmXnnyufdzAWL5CqZ2RnSNgPbvCc1ALT73s6epPrRnZ1Xy"


@pytest.fixture
async def first() -> AsyncIterator[Node]:
    node = await Node.start(NodeConfig(host_maddrs=LOOPBACK))
    yield node
    await node.stop()


async def failure(*addresses: str, **settings: Any) -> str:
    with pytest.raises(JoinFailed) as caught:
        await Node.start(NodeConfig(initial_peers=addresses, listen=False, **settings))
    message = str(caught.value)
    assert all(address in message for address in addresses)
    return message


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadAddress, match=r"bad port after /tcp: 'x' .*for example /ip4"):
        await Node.start(NodeConfig(initial_peers=(f"/ip4/127.0.0.1/tcp/x/p2p/{OTHER_PEER}",), listen=False))


async def test_dial() -> None:
    message = await failure(f"/ip4/127.0.0.1/tcp/{closed_port()}/p2p/{OTHER_PEER}")
    assert message.startswith("could not join at the step dial: the initial peer did not answer: ")
    assert message.endswith(
        "(dial: connection refused); check that the peer runs, that the address is the one that it printed, and that "
        "no firewall stands between"
    )


async def test_handshake_with_another_peer(first: Node) -> None:
    message = await failure((await first.ready_address()).replace(first.peer_id, OTHER_PEER))
    assert message.startswith("could not join at the step handshake: ")
    assert f"another peer answers there: {first.peer_id}" in message and "--identity-path" in message


async def test_handshake_with_something_else() -> None:
    async def web_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(web_server, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        message = await failure(f"/ip4/127.0.0.1/tcp/{port}/p2p/{OTHER_PEER}")
    assert "step handshake" in message and "what answers there is not a peer" in message


async def test_dht_of_a_peer_that_is_in_no_swarm() -> None:
    with tempfile.TemporaryDirectory() as folder:
        control = Path(folder) / "p2pd.sock"
        arguments = [f"-listen=/unix{control}", "-hostAddrs=/ip4/127.0.0.1/tcp/0", "-idleTimeout=60s"]
        daemon = await P2PDaemon.start(arguments, 30.0)
        try:
            from hivemind.p2p import P2P
            from hivemind.utils.multiaddr import Multiaddr

            stranger = await P2P.replicate(Multiaddr(f"/unix{control}"))
            [address] = [str(address) for address in await stranger.get_visible_maddrs()]
            message = await failure(address, join_timeout=5.0)
            await stranger.shutdown()
        finally:
            await daemon.stop()
    assert "step DHT" in message and "does not answer as a peer of a swarm" in message
    assert "clocks of both machines" in message


async def test_relay_that_is_gone() -> None:
    relay = "QmdkseWC1TjpNntNGidQgpo76ju1hxVdrF4LCWpPTTcWag"
    address = f"/ip4/127.0.0.1/tcp/{closed_port()}/p2p/{relay}/p2p-circuit/p2p/{OTHER_PEER}"
    message = await failure(address)
    assert "step relay" in message and "(relay: the relay on the way: dial, connection refused)" in message
    assert "check that the relay runs" in message


async def test_the_peer_that_came_nearest_decides_the_advice(first: Node) -> None:
    wrong = (await first.ready_address()).replace(first.peer_id, OTHER_PEER)
    closed = f"/ip4/127.0.0.1/tcp/{closed_port()}/p2p/QmdkseWC1TjpNntNGidQgpo76ju1hxVdrF4LCWpPTTcWag"
    message = await failure(closed, wrong)
    assert message.startswith("could not join at the step handshake: none of the 2 initial peers answered: ")
    assert "(dial: connection refused)" in message and "(handshake: another peer" in message


@pytest.mark.parametrize(
    ("words", "step"),
    [
        ("lookup nowhere.invalid: no such host", "address"),
        ("no addresses", "address"),
        ("dial tcp 10.0.0.1:1: i/o timeout", "dial"),
        ("dial tcp 10.0.0.1:1: connect: no route to host", "dial"),
        ("failed to negotiate security protocol: context deadline exceeded", "handshake"),
        ("all dials failed * [/ip4/10.0.0.1/tcp/1] dial backoff", "dial"),
        ("words that nobody foresaw", "dial"),
    ],
)
def test_where_libp2p_failed(words: str, step: str) -> None:
    assert dial_reason(words)[0] == step


@pytest.mark.parametrize("listen", [True, False])
@pytest.mark.parametrize("ours", [MAX_CLOCK_SKEW - 5, 5 - MAX_CLOCK_SKEW])
async def test_clocks_may_differ_by_seconds(
    first: Node, monkeypatch: pytest.MonkeyPatch, ours: float, listen: bool
) -> None:
    """hivemind alone would refuse more than three seconds."""
    monkeypatch.setattr(join, "get_dht_time", lambda: time.time() + ours)
    address = await first.ready_address()
    node = await Node.start(NodeConfig(initial_peers=(address,), host_maddrs=LOOPBACK, listen=listen))
    assert node.knows_others()
    await node.stop()


@pytest.mark.parametrize(
    ("ours", "words"), [(60.0, "its clock is 60 s behind ours"), (-60.0, "its clock is 60 s ahead of ours")]
)
async def test_clocks_that_differ_by_more_are_named(
    first: Node, monkeypatch: pytest.MonkeyPatch, ours: float, words: str
) -> None:
    monkeypatch.setattr(join, "get_dht_time", lambda: time.time() + ours)
    message = await failure(await first.ready_address())
    assert "step DHT" in message and words in message
