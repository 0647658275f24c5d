"""Real nodes on loopback: start, join, fail clearly, and leave no p2pd behind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from swarm.errors import BadAddress, JoinFailed, NetworkError, PortInUse, UsageError
from swarm.identity import Identity, peer_id_of_public_key
from swarm.node import Node, NodeConfig
from swarm.node_thread import NodeThread

LOOPBACK = NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",))
OTHER_PEER = "QmXnnyufdzAWL5CqZ2RnSNgPbvCc1ALT73s6epPrRnZ1Xy"


def joining(*addresses: str, **settings: Any) -> NodeConfig:
    return NodeConfig(host_maddrs=LOOPBACK.host_maddrs, initial_peers=addresses, **settings)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # dead, and whoever adopted it has yet to notice
    except psutil.NoSuchProcess:
        return True


def are_gone(processes: list[psutil.Process]) -> bool:
    return all(is_gone(process.pid) for process in processes)


def wait_until(condition: Callable[[], Any], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"nothing happened within {timeout} s")
        time.sleep(0.01)


@contextlib.contextmanager
def silent_listener() -> Iterator[int]:
    """A port where connections are taken and nobody ever says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("in_main_thread", [True, False])
def test_nodes_start_meet_and_stop(run: Callable[[Coroutine[Any, Any, None]], None], in_main_thread: bool) -> None:
    done = []

    async def story() -> None:
        first = await Node.start(LOOPBACK)
        address = await first.ready_address()
        assert address.startswith("/ip4/127.0.0.1/tcp/") and address.endswith(f"/p2p/{first.peer_id}")
        server, client = await asyncio.gather(Node.start(joining(address)), Node.start(joining(address, listen=False)))
        try:
            assert await client.addresses() == []
            with pytest.raises(NetworkError, match="does not listen"):
                await client.ready_address()
            # The client was told of `first` only, but libp2p finds the other one's address.
            [reply] = await asyncio.gather(client.dht.protocol.call_ping(server.p2p.peer_id))
            assert reply == server.dht.node_id
            assert os.getpgid(server.daemon_pid) != os.getpgid(0)
            assert os.getsid(server.daemon_pid) != os.getsid(0)
        finally:
            pids = [node.daemon_pid for node in (first, server, client)]
            folders = [Path(node._folder.name) for node in (first, server, client)]
            began = time.monotonic()
            await asyncio.gather(first.stop(), server.stop(), client.stop(), client.stop())
            await client.stop()
            assert time.monotonic() - began < 5
        assert all(map(is_gone, pids))
        assert not any(folder.exists() for folder in folders)
        assert not any(node.died.is_set() for node in (first, server, client))
        done.append(True)

    if in_main_thread:
        run(story())
    else:
        thread = threading.Thread(target=run, args=(story(),))
        thread.start()
        thread.join(60)
    assert done


async def test_p2pd_talks_to_given_addresses_only() -> None:
    first = await Node.start(LOOPBACK)
    client = await Node.start(joining(await first.ready_address(), listen=False))
    try:
        sockets = {node: psutil.Process(node.daemon_pid).net_connections("inet") for node in (first, client)}
        remote = {connection.raddr.ip for found in sockets.values() for connection in found if connection.raddr}
        assert remote == {"127.0.0.1"}
        assert any(connection.status == psutil.CONN_LISTEN for connection in sockets[first])
        assert not any(connection.status == psutil.CONN_LISTEN for connection in sockets[client])
    finally:
        await asyncio.gather(first.stop(), client.stop())


async def test_announced_address_is_the_ready_address() -> None:
    node = await Node.start(joining(announce_maddrs=("/dns4/example.org/tcp/443", "/ip4/203.0.113.9/tcp/1")))
    try:
        assert await node.ready_address() == f"/dns4/example.org/tcp/443/p2p/{node.peer_id}"
        assert f"/ip4/203.0.113.9/tcp/1/p2p/{node.peer_id}" in await node.addresses()
    finally:
        await node.stop()


@pytest.mark.parametrize(
    "config",
    [
        joining("127.0.0.1:80"),
        joining("/ip4/127.0.0.1/tcp/80"),
        NodeConfig(host_maddrs=("/ip4/127.0.0.1",)),
        NodeConfig(host_maddrs=()),
        joining(announce_maddrs=("/ip4/1.2.3.4/tcp/0",)),
        NodeConfig(host_maddrs=("/ip4/203.0.113.7/tcp/0",)),  # not an address of this machine
    ],
)
async def test_bad_addresses_are_refused_before_anything_starts(config: NodeConfig) -> None:
    with pytest.raises(BadAddress):
        await Node.start(config)
    assert not [child for child in psutil.Process().children() if child.name() == "p2pd" and not is_gone(child.pid)]


async def test_refused_port_fails_at_once() -> None:
    address = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{OTHER_PEER}"
    began = time.monotonic()
    with pytest.raises(JoinFailed) as caught:
        await Node.start(joining(address, join_timeout=20.0))
    assert time.monotonic() - began < 10
    assert address in str(caught.value) and "connection refused" in str(caught.value)


async def test_black_hole_fails_within_the_join_timeout() -> None:
    with silent_listener() as port, silent_listener() as other_port:
        addresses = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{OTHER_PEER}" for port in (port, other_port)]
        began = time.monotonic()
        with pytest.raises(JoinFailed) as caught:
            await Node.start(joining(*addresses, join_timeout=1.0))
        assert 1.0 <= time.monotonic() - began < 8
    assert all(address in str(caught.value) for address in addresses)
    assert "none of the 2 initial peers answered within 1 s" in str(caught.value)


async def test_wrong_peer_id_at_a_right_address_is_named() -> None:
    first = await Node.start(LOOPBACK)
    try:
        address = (await first.ready_address()).replace(first.peer_id, OTHER_PEER)
        began = time.monotonic()
        with pytest.raises(JoinFailed) as caught:
            await Node.start(joining(address, join_timeout=20.0))
        assert time.monotonic() - began < 10
        assert address in str(caught.value) and f"another peer answers there: {first.peer_id}" in str(caught.value)
    finally:
        await first.stop()


async def test_one_good_initial_peer_suffices() -> None:
    first = await Node.start(LOOPBACK)
    with silent_listener() as port:
        dead = (f"/ip4/127.0.0.1/tcp/{port}/p2p/{OTHER_PEER}", f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{OTHER_PEER}")
        began = time.monotonic()
        node = await Node.start(joining(*dead, await first.ready_address(), join_timeout=30.0))
        assert time.monotonic() - began < 10
        assert node.dht.protocol.routing_table.get(peer_id=first.p2p.peer_id) is not None
        await asyncio.gather(node.stop(), first.stop())


async def test_restarted_initial_peer_is_found_again(tmp_path: Path) -> None:
    address = f"/ip4/127.0.0.1/tcp/{free_port()}"
    config = NodeConfig(host_maddrs=(address,), identity_path=tmp_path / "identity")
    first = await Node.start(config)
    server = await Node.start(joining(await first.ready_address(), rejoin_period=0.3))
    peer_id = first.peer_id
    try:
        await first.stop()
        first = await Node.start(config)
        assert first.peer_id == peer_id
        async with asyncio.timeout(20):
            while first.dht.protocol.routing_table.get(peer_id=server.p2p.peer_id) is None:
                await asyncio.sleep(0.05)
    finally:
        await asyncio.gather(first.stop(), server.stop())


async def test_list_of_initial_peers_may_name_the_node_itself(tmp_path: Path) -> None:
    identity = Identity.load_or_create(tmp_path / "identity")
    address = f"/ip4/127.0.0.1/tcp/{free_port()}"
    node = await Node.start(
        NodeConfig((f"{address}/p2p/{identity.peer_id}",), host_maddrs=(address,), identity_path=identity.path)
    )
    await node.stop()


async def test_port_in_use_names_the_address() -> None:
    with silent_listener() as port:
        taken = f"/ip4/127.0.0.1/tcp/{port}"
        for host_maddrs in ((taken,), ("/ip4/127.0.0.1/tcp/0", taken)):
            with pytest.raises(PortInUse, match=taken):
                await Node.start(NodeConfig(host_maddrs=host_maddrs))


async def test_two_nodes_cannot_share_a_port() -> None:
    """libp2p by itself would let them, each getting half of the connections."""
    config = NodeConfig(host_maddrs=(f"/ip4/127.0.0.1/tcp/{free_port()}",))
    outcomes = await asyncio.gather(*(Node.start(config) for _ in range(3)), return_exceptions=True)
    nodes = [outcome for outcome in outcomes if isinstance(outcome, Node)]
    try:
        assert len(nodes) == 1
        assert sum(isinstance(outcome, PortInUse) for outcome in outcomes) == 2
    finally:
        await asyncio.gather(*(node.stop() for node in nodes))


async def test_dead_p2pd_is_noticed() -> None:
    node = await Node.start(LOOPBACK)
    assert not node.died.is_set()
    os.kill(node.daemon_pid, signal.SIGKILL)
    await asyncio.wait_for(node.died.wait(), 5)
    assert "signal 9" in node.death_message
    await asyncio.wait_for(node.stop(), 5)


async def test_cancelled_start_leaves_nothing() -> None:
    with silent_listener() as port:
        start = asyncio.create_task(Node.start(joining(f"/ip4/127.0.0.1/tcp/{port}/p2p/{OTHER_PEER}")))
        async with asyncio.timeout(20):
            while not (daemons := [child for child in psutil.Process().children() if child.name() == "p2pd"]):
                await asyncio.sleep(0.02)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
    assert all(is_gone(daemon.pid) for daemon in daemons)


class TestIdentity:
    async def test_is_kept_and_private(self, tmp_path: Path) -> None:
        path = tmp_path / "identity"
        node = await Node.start(NodeConfig(host_maddrs=LOOPBACK.host_maddrs, identity_path=path))
        try:
            assert node.p2p.peer_id.to_base58() == node.peer_id  # p2pd and we agree on who we are
            assert path.stat().st_mode & 0o377 == 0
            owner = node.validator.local_public_key.removeprefix(b"[owner:").removesuffix(b"]")
            assert peer_id_of_public_key(owner) == node.peer_id
            with pytest.raises(UsageError, match="in use by another running peer"):
                await Node.start(NodeConfig(host_maddrs=LOOPBACK.host_maddrs, identity_path=path))
        finally:
            await node.stop()
        assert Identity.load(path).peer_id == node.peer_id

    @pytest.mark.parametrize("content", [b"", b"junk", b"\x08\x00\x12\x04junk", os.urandom(1000)])
    def test_broken_file_is_named(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "identity"
        path.write_bytes(content)
        with pytest.raises(UsageError, match=str(path)):
            Identity.load_or_create(path)

    def test_unusable_path_is_named(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "absent" / "identity"):
            with pytest.raises(UsageError, match=str(path)):
                Identity.load_or_create(path)

    def test_public_keys_that_belong_to_no_peer(self) -> None:
        key = b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
        for bad in (b"", b"ssh-rsa AAAA", key):
            with pytest.raises(ValueError):
                peer_id_of_public_key(bad)


class TestNodeThread:
    def test_runs_coroutines_and_stops(self) -> None:
        with_node = NodeThread.start(LOOPBACK)
        pid = with_node.node.daemon_pid
        assert with_node.run(with_node.node.ready_address()).endswith(with_node.node.peer_id)
        with pytest.raises(TimeoutError):
            with_node.run(asyncio.sleep(60), timeout=0.05)
        with pytest.raises(ZeroDivisionError):
            with_node.run(_divide_by_zero())
        with_node.stop()
        with_node.stop()
        assert is_gone(pid)
        with pytest.raises(NetworkError, match="stopped"):
            with_node.run(asyncio.sleep(0))

    def test_start_raises_what_went_wrong(self) -> None:
        threads = threading.active_count()
        with pytest.raises(JoinFailed):
            NodeThread.start(joining(f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{OTHER_PEER}"))
        wait_until(lambda: threading.active_count() <= threads, 5)

    def test_collected_with_its_owner(self) -> None:
        with_node = NodeThread.start(LOOPBACK)
        pid = with_node.node.daemon_pid
        del with_node
        gc.collect()
        wait_until(lambda: is_gone(pid), 5)


async def _divide_by_zero() -> float:
    return 1 / 0


def start_process(code: str, **options: Any) -> subprocess.Popen[str]:
    program = (
        "from swarm.node import *\nfrom swarm.node_thread import NodeThread\nimport asyncio, time, uvloop\n"
        + textwrap.dedent(code)
    )
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("moment", ["at its birth", "soon after", "before we join it", "ready"])
def test_killed_process_takes_p2pd_along(loop: str, moment: str) -> None:
    code = f"""
        async def wait(_):
            await asyncio.sleep(60)

        async def main():
            print("imported", flush=True)
            input()
            if {moment == "before we join it"}:  # p2pd is up, waiting for the first connection
                WayfindingP2P.replicate = wait
            await Node.start(NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",)))
            print("ready", flush=True)
            await asyncio.sleep(60)

        {loop}.run(main())
    """
    with start_process(code, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "imported\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        children: list[psutil.Process] = []
        while not children:
            children = psutil.Process(process.pid).children()
        if moment == "soon after":
            time.sleep(0.03)
        elif moment == "before we join it":
            time.sleep(2.0)
        elif moment == "ready":
            assert process.stdout.readline() == "ready\n"
        process.kill()
    wait_until(functools.partial(are_gone, children), 2)


def test_exiting_process_leaves_no_p2pd_and_no_files() -> None:
    process = start_process("""
        thread = NodeThread.start(NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",)))
        print(thread.node.daemon_pid, thread.node._folder.name, flush=True)
    """)
    output, _ = process.communicate(timeout=60)
    pid, folder = output.split()
    assert process.returncode == 0
    assert is_gone(int(pid))
    assert not Path(folder).exists()


def test_terminals_interrupt_does_not_reach_p2pd() -> None:
    code = """
        thread = NodeThread.start(NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",)))
        try:
            print(thread.node.daemon_pid, flush=True)  # in here: the interrupt may come before the next line
            time.sleep(60)
        except KeyboardInterrupt:
            try:
                thread.run(thread.node.died.wait(), timeout=1.0)
            except TimeoutError:
                print("alive", flush=True)
    """
    process = start_process(code, start_new_session=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    output, _ = process.communicate(timeout=30)
    assert output == "alive\n"
    assert is_gone(pid)


def test_importing_node_does_not_import_transformers() -> None:
    code = "import sys, swarm.node, swarm.dht; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
