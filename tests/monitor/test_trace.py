"""Traces through real servers: what they report, how they fail, and that they leave nothing behind."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch

from swarm.client.chain_session import ChainSession
from swarm.data_structures import BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import CacheFull, MissingBlocks, PeerError, PeerTimeout, SwarmError, UsageError
from swarm.membership import SwarmKey
from swarm.monitor.picture import ModelPicture
from swarm.monitor.report import TraceReport, TraceRequest
from swarm.monitor.trace import Tracer, find_best
from swarm.monitor.watcher import Watcher
from swarm.node import Node, NodeConfig
from swarm.routing.snapshot import Snapshot
from swarm.rpc import server_info
from swarm.scripts.local_swarm import LocalSwarm, ServerProcess, ServerSpec

FLAGS = ("--threads", "1", "--cache-tokens", "256", "--announce-period", "2")


@pytest.fixture(scope="module")
def swarm_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "swarm.key"
    SwarmKey.create(path)
    return path


@pytest.fixture(scope="module")
def swarm(tiny_llama_folder: Path, swarm_key: Path) -> Iterator[LocalSwarm]:
    """A private swarm: the first server relays to the quantised second one; the last tests stop and kill the third."""
    first = ServerSpec("0:4", ("--dtype", "bfloat16", "--public-name", "first"))
    second = ServerSpec("4:8", ("--dtype", "float32", "--quantization", "nf4"), listens=False)
    third = ServerSpec("4:8", ("--dtype", "float32", "--no-serve-relay"))
    flags = (*FLAGS, "--swarm-key", str(swarm_key))
    with LocalSwarm(tiny_llama_folder, [first, second, third], flags=flags) as swarm:
        yield swarm


@pytest.fixture
async def node(swarm: LocalSwarm, swarm_key: Path) -> AsyncIterator[Node]:
    node = await Node.start(NodeConfig(initial_peers=tuple(swarm.initial_peers), listen=False, swarm_key=swarm_key))
    yield node
    await node.stop()


@pytest.fixture
async def model(node: Node) -> ModelPicture:
    return (await Watcher(node).look()).models[0]


def request(*servers: ServerProcess, prompt_tokens: int = 16, new_tokens: int = 8) -> TraceRequest:
    peers = tuple(server.peer_id for server in servers) or None
    return TraceRequest(model="tiny-llama", peers=peers, prompt_tokens=prompt_tokens, new_tokens=new_tokens)


async def sessions_on(node: Node, *servers: ServerProcess) -> int:
    """How many rows servers hold. Each has all of its cache left if and only if it holds none."""
    infos = [await server_info(node.p2p, server.peer_id, 20.0) for server in servers]
    for info in infos:
        assert (info.session_rows == 0) == (info.cache_tokens_left == info.cache_tokens)
    return sum(info.session_rows for info in infos)


async def until_no_sessions(node: Node, *servers: ServerProcess) -> None:
    async with asyncio.timeout(30):
        while await sessions_on(node, *servers):
            await asyncio.sleep(0.05)


def check_sums(report: TraceReport, num_hops: int, new_tokens: int) -> None:
    assert len(report.step_times) == new_tokens and all(seconds > 0 for seconds in report.step_times)
    assert report.time_to_first_token == report.connect_time + report.prompt.total
    assert min(report.step_times) <= report.time_per_output_token <= max(report.step_times)
    assert report.token.total == pytest.approx(sum(report.step_times) / new_tokens)
    assert report.predicted_step_time is not None and report.predicted_step_time > 0
    for step in (report.prompt, report.token):
        assert len(step.hops) == num_hops
        assert [hop.pushed for hop in step.hops] == [False] + [True] * (num_hops - 1)
        assert all(hop.computed > 0 and hop.queued >= 0 and hop.codec >= 0 for hop in step.hops)
        known = step.codec + sum(hop.network + hop.queued + hop.computed + hop.codec + hop.other for hop in step.hops)
        assert 0 < known <= step.total


async def test_the_fastest_chain(swarm: LocalSwarm, node: Node, model: ModelPicture) -> None:
    """Its servers compute in different dtypes."""
    report = await Tracer(node).trace(model, request())
    assert (report.model, report.fingerprint) == (model.model.name, model.model.fingerprint)
    assert report.prompt_tokens == 16 and abs(report.made_at - time.time()) < 600
    check_sums(report, 2, 8)
    assert [hop.blocks for hop in report.token.hops] == [(0, 4), (4, 8)]
    expected = [link.peer_id for link in find_best(model, request())]
    assert [hop.peer_id for hop in report.prompt.hops] == [hop.peer_id for hop in report.token.hops] == expected
    assert report.token.hops[0].public_name == "first"
    await until_no_sessions(node, *swarm.servers)


async def test_a_chosen_chain(swarm: LocalSwarm, node: Node, model: ModelPicture) -> None:
    """One goes to the quantised server behind the relay."""
    relayed = model.snapshot.get(swarm.servers[1].peer_id)
    assert relayed is not None and relayed.info.relayed and relayed.info.relays == (swarm.servers[0].peer_id,)
    for last in swarm.servers[1:]:
        report = await Tracer(node).trace(model, request(swarm.servers[0], last, prompt_tokens=3, new_tokens=1))
        check_sums(report, 2, 1)
        assert [hop.peer_id for hop in report.token.hops] == [swarm.servers[0].peer_id, last.peer_id]
    with pytest.raises(UsageError, match="lacks blocks 4:8"):
        await Tracer(node).trace(model, request(swarm.servers[0]))


async def test_only_what_is_needed_is_reserved(
    swarm: LocalSwarm, node: Node, model: ModelPicture, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    step = ChainSession.step

    async def watched(self: ChainSession, hidden: torch.Tensor) -> None:
        await step(self, hidden)
        left.append((await server_info(node.p2p, swarm.servers[0].peer_id, 20.0)).cache_tokens_left)

    monkeypatch.setattr(ChainSession, "step", watched)
    free = (await server_info(node.p2p, swarm.servers[0].peer_id, 20.0)).cache_tokens_left
    await Tracer(node).trace(model, request(prompt_tokens=20, new_tokens=2))
    page = 64
    assert left == [free - page] * 3
    await until_no_sessions(node, *swarm.servers)


async def test_traces_come_one_after_another(node: Node, model: ModelPicture, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0
    step = ChainSession.step

    async def counted(self: ChainSession, hidden: torch.Tensor) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await step(self, hidden)
        running -= 1

    monkeypatch.setattr(ChainSession, "step", counted)
    tracer = Tracer(node)
    await asyncio.gather(*(tracer.trace(model, request(new_tokens=3)) for _ in range(3)))
    assert most == 1


async def test_who_waits_too_long_for_others_is_told() -> None:
    tracer = Tracer(None, time_limit=0.05)  # type: ignore[arg-type]
    async with tracer._one:
        with pytest.raises(SwarmError, match="other traces are running: try again"):
            await tracer.trace(made_up(), request())


async def test_cancelled_it_gives_everything_back(
    swarm: LocalSwarm, node: Node, model: ModelPicture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepping = asyncio.Event()

    async def endless(self: ChainSession, hidden: torch.Tensor) -> None:
        stepping.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(ChainSession, "step", endless)
        tracer = Tracer(node)
        trace = asyncio.create_task(tracer.trace(model, request()))
        await stepping.wait()
        assert await sessions_on(node, *swarm.servers) == 2
        trace.cancel()
        with pytest.raises(asyncio.CancelledError):
            await trace
        await until_no_sessions(node, *swarm.servers)
        hurried = Tracer(node, time_limit=0.2)
        with pytest.raises(PeerTimeout, match=r"given up after 0.2 s.*ask for fewer tokens"):
            await hurried.trace(model, request())
        await until_no_sessions(node, *swarm.servers)
    check_sums(await tracer.trace(model, request()), 2, 8)


async def test_a_hung_server_is_named(swarm: LocalSwarm, node: Node, model: ModelPicture) -> None:
    first, _, victim = swarm.servers
    victim.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(PeerTimeout, match=f"server {victim.peer_id} did not accept a session within 5 s"):
            await Tracer(node).trace(model, request(first, victim))
    finally:
        victim.process.send_signal(signal.SIGCONT)
    await until_no_sessions(node, *swarm.servers)


async def test_a_server_that_hangs_later_is_named(
    swarm: LocalSwarm, node: Node, model: ModelPicture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, victim = swarm.servers
    before_step(monkeypatch, 3, lambda: victim.process.send_signal(signal.SIGSTOP))
    try:
        with pytest.raises(PeerTimeout, match=f"server {victim.peer_id} answered neither a step nor a ping within"):
            await Tracer(node).trace(model, request(first, victim))
    finally:
        victim.process.send_signal(signal.SIGCONT)
    await until_no_sessions(node, *swarm.servers)


async def test_a_killed_server_is_named_and_nobody_takes_its_place(
    swarm: LocalSwarm, node: Node, model: ModelPicture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other, victim = swarm.servers
    with monkeypatch.context() as patch:
        before_step(patch, 3, victim.kill)
        with pytest.raises(PeerError, match=f"server {victim.peer_id}"):
            await Tracer(node).trace(model, request(first, victim))
    with pytest.raises(PeerError, match=f"server {victim.peer_id} cannot be reached"):
        await Tracer(node).trace(model, request(first, victim))
    await until_no_sessions(node, first, other)
    report = await Tracer(node).trace((await Watcher(node).look()).models[0], request())
    assert [hop.peer_id for hop in report.token.hops] == [first.peer_id, other.peer_id]


def before_step(patch: pytest.MonkeyPatch, number: int, act: object) -> None:
    step, count = ChainSession.step, 0

    async def stepping(self: ChainSession, hidden: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == number:
            act()  # type: ignore[operator]
        await step(self, hidden)

    patch.setattr(ChainSession, "step", stepping)


def made_up(cache_tokens_left: int = 1000, state: ServerState = ServerState.ONLINE, end: int = 8) -> ModelPicture:
    info = ServerInfo(
        state=state,
        span=BlockSpan(start=0, end=end),
        throughput=1.0,
        numerics="float32",
        cache_tokens_left=cache_tokens_left,
    )
    model = ModelInfo(name="llama", fingerprint="ab" * 32, num_blocks=8, hidden_size=2**20)
    return ModelPicture(model, Snapshot.build(8, [ServerRecord("QmA", info, 1e10)], {"QmA": 0.01}, 0.0))


def test_why_there_is_no_chain() -> None:
    assert [link.peer_id for link in find_best(made_up(), request())] == ["QmA"]
    with pytest.raises(CacheFull, match="no server has cache for 24 tokens"):
        find_best(made_up(cache_tokens_left=23), request())
    with pytest.raises(MissingBlocks, match=r"no usable server holds blocks 0:8 of llama.*1 joining"):
        find_best(made_up(state=ServerState.JOINING), request())
    with pytest.raises(MissingBlocks, match="blocks 6:8"):
        find_best(made_up(end=6), request())


async def test_what_a_stranger_announces_costs_no_memory() -> None:
    """2 GiB of states, if the announced hidden size were believed."""
    with pytest.raises(UsageError, match=r"a step of 512 tokens with 1048576 values each is too large.*take 4 tokens"):
        await Tracer(None).trace(made_up(), request(prompt_tokens=512))  # type: ignore[arg-type]
