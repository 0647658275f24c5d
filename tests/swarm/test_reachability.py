"""Nodes ask others to call them back, and draw the right conclusion; who is asked dials nobody but the caller."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from ipaddress import ip_address
from typing import Any

import pytest
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from swarm import dial_back
from swarm.addresses import without_peer_id
from swarm.dial_back import MAX_QUESTION_BYTES, DialBack, DialBackAnswer, ReachabilityProtocol
from swarm.errors import JoinFailed
from swarm.node import Node, NodeConfig
from swarm.reachability import distance, judge

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
PUBLIC, PRIVATE, HERE = "8.8.8.8", "192.168.1.7", "127.0.0.1"


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def start(stack: AsyncExitStack, *initial_peers: str, **settings: Any) -> Node:
    node = await Node.start(NodeConfig(initial_peers=initial_peers, **{"host_maddrs": (LOOPBACK,), **settings}))
    stack.push_async_callback(node.stop)
    return node


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def ask(caller: Node, peer: Node, question: str) -> DialBackAnswer:
    stub = ReachabilityProtocol.get_stub(caller.p2p, peer.p2p.peer_id)
    response = await stub.rpc_dial_back(runtime_pb2.ExpertUID(uid=question), timeout=30.0)
    return DialBackAnswer.model_validate_json(response.serialized_info)


async def own_address(node: Node) -> str:
    return str(without_peer_id(await node.ready_address()))


async def test_a_server_whose_port_is_closed_takes_a_relay(stack: AsyncExitStack) -> None:
    """Like one behind a router that does not forward its port: it listens, but where others are told to look nobody
    answers."""
    first = await start(stack)
    address = await first.ready_address()
    closed = f"/ip4/127.0.0.1/tcp/{free_port()}"
    server = await start(stack, address, announce_maddrs=(closed,), relay="auto")
    assert server.relayed and not server.stores_records
    assert await server.ready_address() == f"{address}/p2p-circuit/p2p/{server.peer_id}"
    stubborn = await start(stack, address, announce_maddrs=(closed,), relay="never")
    assert await stubborn.ready_address() == f"{closed}/p2p/{stubborn.peer_id}"


async def test_a_server_that_is_called_back_needs_no_relay(stack: AsyncExitStack) -> None:
    first = await start(stack)
    port = free_port()
    open_one = f"/ip4/127.0.0.1/tcp/{port}"
    asked: list[Any] = []
    dial = dial_back._dial

    async def watched(*arguments: Any) -> bool:
        asked.append(await dial(*arguments))
        return bool(asked[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dial_back, "_dial", watched)
        server = await start(
            stack,
            await first.ready_address(),
            host_maddrs=(open_one,),
            announce_maddrs=(f"/dns4/localhost/tcp/{port}",),
            relay="auto",
        )
    assert asked == [True]
    assert not server.relayed and server.stores_records


async def test_without_a_relay_a_server_that_needs_one_does_not_start(stack: AsyncExitStack) -> None:
    first = await start(stack, serve_relay=False)
    with pytest.raises(JoinFailed, match="step relay"):
        closed = (f"/ip4/127.0.0.1/tcp/{free_port()}",)
        await start(stack, await first.ready_address(), announce_maddrs=closed, relay="auto", relay_timeout=0.5)


async def test_only_the_caller_is_dialled(stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_back, "PEER_PAUSE", 0.0)
    first = await start(stack)
    caller = await start(stack, await first.ready_address())
    assert (await ask(caller, first, await own_address(caller))).reached
    # another peer at the caller's own ip address: that it listens there is not told
    assert (await ask(caller, first, await own_address(first))).reached is False
    dialled: list[Any] = []
    monkeypatch.setattr(dial_back, "_dial", lambda *arguments: dialled.append(arguments))
    for question in (
        "/ip4/10.0.0.1/tcp/22",
        "/ip4/8.8.8.8/tcp/80,/ip6/::1/tcp/80",
        "/dns4/no-such-host.invalid/tcp/80",
        f"/ip4/127.0.0.1/tcp/80/p2p/{first.peer_id}/p2p-circuit",
        "junk",
        "",
    ):
        answer = await ask(caller, first, question)
        assert answer.reached is False and answer.elsewhere and str(answer.seen_at) == "127.0.0.1"
    assert (await ask(caller, first, "x" * (MAX_QUESTION_BYTES + 1))).reached is None
    assert not dialled


async def test_a_caller_behind_a_relay_is_not_dialled(stack: AsyncExitStack) -> None:
    relay = await start(stack)
    address = await relay.ready_address()
    asked = await start(stack, address, listen=False, relay="always")
    await DialBack(asked.p2p).register()
    caller = await start(stack, address, listen=False)
    caller.p2p.learn_relays(asked.peer_id, asked.relays)
    answer = await ask(caller, asked, "/ip4/127.0.0.1/tcp/22")
    assert answer.seen_at is None and answer.reached is None and "relay" in answer.reason


async def test_who_asks_too_often_is_put_off(stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = 0

    async def dial(*arguments: Any) -> bool:
        nonlocal dialled
        dialled += 1
        return True

    monkeypatch.setattr(dial_back, "_dial", dial)
    first = await start(stack)
    caller = await start(stack, await first.ready_address())
    address = await own_address(caller)
    assert [(await ask(caller, first, address)).reached for _ in range(3)] == [True, None, None]
    # Peer ids cost nothing, addresses do.
    monkeypatch.setattr(dial_back, "PEER_PAUSE", 0.0)
    answers = [(await ask(caller, first, address)).reached for _ in range(dial_back.IP_BURST + 2)]
    assert answers.count(True) == dialled - 1 <= dial_back.IP_BURST and answers[-1] is None


async def test_one_call_at_a_time_and_few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PEER_PAUSE", "IP_PERIOD"):
        monkeypatch.setattr(dial_back, name, 0.0)
    running, most, go_on = 0, 0, asyncio.Event()

    async def dial(*arguments: Any) -> bool:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go_on.wait()
        running -= 1
        return True

    monkeypatch.setattr(dial_back, "_dial", dial)
    service = DialBack(None)  # type: ignore[arg-type]

    async def ip_of(caller: PeerID) -> Any:
        return ip_address("127.0.0.1")

    monkeypatch.setattr(service, "_ip_of", ip_of)
    callers = [PeerID(b"\x12\x20" + bytes([number]) * 32) for number in range(dial_back.MAX_WAITING + 3)]
    asking = [asyncio.create_task(service._answer(caller, "/ip4/127.0.0.1/tcp/1")) for caller in callers]
    while sum(task.done() for task in asking) < 3:
        await asyncio.sleep(0)
    go_on.set()
    reached = [answer.reached for answer in await asyncio.gather(*asking)]
    assert most == 1
    assert reached.count(True) == dial_back.MAX_WAITING and reached.count(None) == 3


async def test_what_is_remembered_of_callers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_back, "_MAX_REMEMBERED", 10)
    service = DialBack(None)  # type: ignore[arg-type]
    allowed = [service._may_ask(f"peer {number}", 1, 20.0) for number in range(30)]
    assert allowed == [True] * 10 + [False] * 20 and len(service._asked) == 10


def answer(ip: str | None, reached: bool | None, elsewhere: bool = False) -> DialBackAnswer:
    return DialBackAnswer(seen_at=None if ip is None else ip_address(ip), reached=reached, elsewhere=elsewhere)


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([], None),
        ([answer(PUBLIC, None), answer(None, None)], None),
        ([answer(PUBLIC, True)], True),
        ([answer(PUBLIC, False)], False),
        ([answer(PUBLIC, True), answer(PUBLIC, True), answer(PUBLIC, False)], True),
        ([answer(PUBLIC, True), answer(PUBLIC, False)], False),  # in doubt a relay does no harm
        ([answer(PRIVATE, True), answer(PUBLIC, False)], False),  # the neighbour's word does not count outside
        ([answer(HERE, True), answer(HERE, True), answer(PRIVATE, False)], False),
        ([answer(HERE, True), answer(PUBLIC, None)], True),
        ([answer(PUBLIC, False, elsewhere=True)], False),
    ],
)
def test_conclusions(answers: list[DialBackAnswer], verdict: bool | None) -> None:
    assert judge(answers, announced=False) is verdict


def test_who_cannot_check_announced_addresses_has_no_say() -> None:
    assert judge([answer(PUBLIC, False, elsewhere=True)], announced=True) is None
    assert judge([answer(PUBLIC, False, elsewhere=True), answer(PUBLIC, True)], announced=True) is True


async def test_a_verdict_may_change(stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that is closed later makes a server take relays, one that is opened lets it give them up."""
    verdicts: list[bool | None] = [True]

    async def ask_peers(self: Any) -> bool | None:
        return verdicts[0]

    monkeypatch.setattr("swarm.reachability.Reachability._ask_peers", ask_peers)
    monkeypatch.setattr("swarm.reachability._ASK_AGAIN", 0.05)
    first = await start(stack)
    server = await start(stack, await first.ready_address(), relay="auto")
    direct = await server.ready_address()
    for verdict, relays in ((False, (first.peer_id,)), (None, (first.peer_id,)), (True, ())):
        verdicts[0] = verdict
        async with asyncio.timeout(20):
            while server.relays != relays:
                await asyncio.sleep(0.05)
        assert server.relayed == bool(relays)
    assert await server.ready_address() == direct


@pytest.mark.parametrize(
    ("ips", "far"),
    [
        (("127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0"), 0),
        (("10.1.2.3", "192.168.1.7", "169.254.169.254", "100.64.0.1", "fc00::1", "fe80::1", "::ffff:10.1.2.3"), 1),
        (("224.0.0.1", "ff02::1", "255.255.255.255"), 1),
        (("8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", None), 2),
    ],
)
def test_how_far_an_address_is(ips: tuple[str | None, ...], far: int) -> None:
    """A stranger who writes one in an unusual form shall not make it look farther."""
    assert {ip: distance(ip) for ip in ips} == dict.fromkeys(ips, far)
