"""Real nodes on loopback are checked: those that can be reached, and one failure for every step."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import runtime_pb2

from swarm.addresses import without_peer_id
from swarm.data_structures import BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import SwarmError, UsageError
from swarm.membership import SwarmKey
from swarm.monitor import reachable
from swarm.monitor.picture import ModelPicture, Picture
from swarm.monitor.reachable import Reachability, _allowed
from swarm.monitor.report import ReachabilityReport
from swarm.node import Node, NodeConfig
from swarm.protocol import BlockProtocol
from swarm.routing.snapshot import Snapshot
from swarm.rpc import ping

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
NOBODY = "QmXnnyufdzAWL5CqZ2RnSNgPbvCc1ALT73s6epPrRnZ1Xy"
#: What libp2p says of a peer that ended, when it dials it or has just done so.
GONE = "(connection refused|no answer a moment ago)"
MODEL = ModelInfo(name="llama", fingerprint="ab" * 32, num_blocks=8, hidden_size=64)


def info_of(**settings: Any) -> ServerInfo:
    whole = BlockSpan(start=0, end=8)
    return ServerInfo(
        state=ServerState.ONLINE, span=whole, throughput=1.0, numerics="float32", cache_tokens_left=1, **settings
    )


class Server:
    """Says that it is one, and nothing else. answer: None for one that hangs."""

    def __init__(self, answer: bytes | None):
        self._answer = answer

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        if self._answer is None:
            await asyncio.Event().wait()
        return runtime_pb2.ExpertInfo(serialized_info=self._answer)

    async def rpc_upload(self, request: runtime_pb2.ExpertInfo, context: P2PContext) -> runtime_pb2.ExpertUID:
        raise NotImplementedError


class World:
    """Starts nodes, and stops them in the end."""

    def __init__(self, stack: AsyncExitStack):
        self._stack = stack

    async def node(self, *initial_peers: str, **settings: Any) -> Node:
        node = await Node.start(NodeConfig(initial_peers=initial_peers, **{"host_maddrs": (LOOPBACK,), **settings}))
        self._stack.push_async_callback(node.stop)
        return node

    async def server(
        self, *initial_peers: str, answer: bytes | None = info_of().model_dump_json().encode(), **settings: Any
    ) -> Node:
        node = await self.node(*initial_peers, **settings)
        await BlockProtocol().add_p2p_handlers(node.p2p, wrapper=Server(answer))  # type: ignore[arg-type]
        return node


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(stack)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def picture_of(
    peer_id: str, info: ServerInfo | None = None, addresses: Mapping[str, tuple[str, ...]] | None = None
) -> Picture:
    snapshot = Snapshot.build(8, [ServerRecord(peer_id, info or info_of(), 1e10)], {}, 0.0)
    return Picture((ModelPicture(MODEL, snapshot),), addresses=addresses or {})


async def address_of(node: Node) -> str:
    return str(without_peer_id(await node.ready_address()))


def check_failure(report: ReachabilityReport, step: str, words: str) -> None:
    assert not report.reachable and report.way is None and report.round_trip is None
    assert report.step == step, report
    assert report.reason is not None and re.search(words, report.reason), report
    assert "; " in report.reason and "127.0.0.1" not in report.reason


def check_success(report: ReachabilityReport, way: str) -> None:
    assert report.reachable and report.way == way, report
    assert report.round_trip is not None and report.round_trip > 0
    assert report.step is None and report.reason is None


async def test_peers_that_can_be_reached(world: World) -> None:
    first = await world.node()
    address = await first.ready_address()
    server = await world.server(address)
    monitor = await world.node(address, listen=False)
    checks = Reachability(monitor)
    check_success(await checks.check(picture_of(server.peer_id), server.peer_id), "direct")
    check_success(await checks.check(Picture(), first.peer_id), "direct")  # it serves no model
    await server.stop()
    check_failure(await checks.check(picture_of(server.peer_id), server.peer_id), "dial", f"{GONE}; check ")


async def test_bad_ids(world: World) -> None:
    monitor = await world.node()
    for bad in ("", "Qm", "<script>", NOBODY[:-1], "x" * 10_000):
        with pytest.raises(UsageError, match="is not the id of a peer: it should look like Qm") as caught:
            await Reachability(monitor).check(Picture(), bad)
        assert len(str(caught.value)) < 300
    with pytest.raises(UsageError, match="this monitor itself"):
        await Reachability(monitor).check(Picture(), monitor.peer_id)


async def test_nobody_knows_where_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await world.node()
    monitor = await world.node(await first.ready_address(), listen=False)
    report = await Reachability(monitor).check(picture_of(NOBODY), NOBODY)
    check_failure(report, "find", "nobody that we asked knows an address of it; check that it runs")
    monkeypatch.setattr(reachable, "fresh_peer", None)  # nobody is called for a peer of whom the swarm knows nothing
    report = await Reachability(monitor).check(picture_of(first.peer_id), NOBODY)
    check_failure(report, "find", "neither a server of this swarm nor a peer that keeps records")


async def test_a_connection_does_not_hide_that_there_is_no_way(world: World) -> None:
    """The server called this node, and nobody can call the server."""
    monitor = await world.node()
    closed = f"/ip4/127.0.0.1/tcp/{closed_port()}"
    server = await world.server(await monitor.ready_address(), announce_maddrs=(closed,), relay="never")
    assert await ping(monitor.p2p, server.peer_id, 20.0) > 0
    check_failure(
        await Reachability(monitor).check(picture_of(server.peer_id), server.peer_id), "dial", "connection refused"
    )


async def test_another_peer_has_its_address(world: World) -> None:
    first = await world.node()
    monitor = await world.node(await first.ready_address(), listen=False)
    picture = picture_of(NOBODY, addresses={NOBODY: (await address_of(first),)})
    report = await Reachability(monitor).check(picture, NOBODY)
    check_failure(report, "handshake", f"another peer answers there: {first.peer_id}; its address may belong")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, r"takes connections but did not answer within 0.5 s: it hangs"),
        (b'{"protocol_version": 4}', r"makes no sense to this version: .*protocol version 4 does not mix"),
        (b"no server", "as a server"),
    ],
)
async def test_it_does_not_answer_as_a_server(
    world: World, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, words: str
) -> None:
    first = await world.node()
    address = await first.ready_address()
    server = await (world.node(address) if answer == b"no server" else world.server(address, answer=answer))
    monitor = await world.node(address, listen=False)
    if answer is None:
        monkeypatch.setattr(reachable, "_ANSWER_TIMEOUT", 0.5)
    check_failure(await Reachability(monitor).check(picture_of(server.peer_id), server.peer_id), "answer", words)


async def test_swarm_keys(world: World, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    SwarmKey.create(ours)
    SwarmKey.create(theirs)
    member = await world.server(swarm_key=ours)
    monitor = await world.node(await member.ready_address(), listen=False, swarm_key=ours)
    check_success(await Reachability(monitor).check(picture_of(member.peer_id), member.peer_id), "direct")
    cases = (
        (await world.server(swarm_key=theirs), monitor, "its swarm is private and has another key"),
        (await world.server(), monitor, "it has no swarm key"),
        (member, await world.node(), "its swarm is private: give its key with --swarm-key"),
    )
    for server, asking, words in cases:
        at = {server.peer_id: (await address_of(server),)}
        await asking.p2p._client.connect(
            PeerID.from_base58(server.peer_id), [without_peer_id(await server.ready_address())]
        )
        check_failure(
            await Reachability(asking).check(picture_of(server.peer_id, addresses=at), server.peer_id), "answer", words
        )


async def test_behind_a_relay(world: World) -> None:
    relay = await world.node()
    first = await world.node(await relay.ready_address(), serve_relay=False)
    hidden = await world.server(await relay.ready_address(), listen=False, relay="always")
    monitor = await world.node(await first.ready_address(), listen=False)
    info = info_of(relayed=True, relays=(relay.peer_id,))
    checks = Reachability(monitor)
    check_success(await checks.check(picture_of(hidden.peer_id, info), hidden.peer_id), "relay")

    none_left = picture_of(hidden.peer_id, info_of(relayed=True))
    check_failure(
        await checks.check(none_left, hidden.peer_id), "relay", "has none at the moment; check that it and its relay"
    )
    wrong = picture_of(hidden.peer_id, info_of(relayed=True, relays=(first.peer_id,)))
    name = re.escape(f"its relay ...{first.peer_id[-6:]}")
    check_failure(await checks.check(wrong, hidden.peer_id), "relay", f"{name} refuses to carry")

    name = re.escape(f"its relay ...{relay.peer_id[-6:]}")
    await hidden.stop()
    report = await checks.check(picture_of(hidden.peer_id, info), hidden.peer_id)
    check_failure(report, "relay", f"{name} does not carry connections to it any more")
    await relay.stop()
    report = await checks.check(picture_of(hidden.peer_id, info), hidden.peer_id)
    check_failure(report, "relay", f"{name} cannot be reached: {GONE}")


async def test_private_networks_are_not_scanned(world: World) -> None:
    """Whoever announces an address in the operator's house would learn what listens there."""
    first = await world.node()
    monitor = await world.node(await first.ready_address(), listen=False)
    picture = picture_of(NOBODY, addresses={NOBODY: ("/ip4/10.1.2.3/tcp/22", "/dns4/no-such-host.invalid/tcp/22")})
    for show in (False, True):
        report = await Reachability(monitor, show_addresses=show).check(picture, NOBODY)
        check_failure(report, "find", "cannot be dialled from here at any of its addresses")
        assert report.reason is not None
        assert ("10.1.2.3" in report.reason) == ("no-such-host" in report.reason) == show


def test_addresses_as_near_as_others_are_allowed() -> None:
    here, house, world = "/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.7/tcp/1", "/ip4/8.8.8.8/tcp/1"
    assert _allowed([here, house, world], [world]) == [world]
    assert _allowed([here, house, world], [house]) == [house, world]
    assert _allowed([here, house, world], [here, house]) == [here, house, world]


async def test_a_check_comes_to_an_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relays, addresses and their names are a stranger's choice: each of them may take as long as it is let."""
    first = await world.node()
    monitor = await world.node(await first.ready_address(), listen=False)

    async def endless(*_: Any) -> str:
        await asyncio.Event().wait()
        raise AssertionError

    checks = Reachability(monitor)
    with monkeypatch.context() as patch:
        patch.setattr(Reachability, "_meet", endless)
        patch.setattr(reachable, "_TIME_LIMIT", 1.0)
        report = await checks.check(Picture(), first.peer_id)
    check_failure(report, "dial", "no way to it was found within 1 s; check that it runs")
    check_success(await checks.check(Picture(), first.peer_id), "direct")


async def test_one_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await world.node()
    monitor = await world.node(await first.ready_address(), listen=False)
    running, most, fresh_peer = 0, 0, reachable.fresh_peer

    @asynccontextmanager
    async def counted(*arguments: Any) -> AsyncIterator[Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        async with fresh_peer(*arguments) as peer:
            yield peer
        running -= 1

    monkeypatch.setattr(reachable, "fresh_peer", counted)
    checks = Reachability(monitor)
    for report in await asyncio.gather(*(checks.check(Picture(), first.peer_id) for _ in range(3))):
        check_success(report, "direct")
    assert most == 1
    monkeypatch.setattr(reachable, "_LINE_TIMEOUT", 0.05)
    async with checks._one:
        with pytest.raises(SwarmError, match="other peers are being checked: try again"):
            await checks.check(Picture(), first.peer_id)
