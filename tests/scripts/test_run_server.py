"""`run-server` and `swarm run-bootstrap` as processes: what they print, how they end, what they leave behind."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError
from transformers.generation.streamers import BaseStreamer

from swarm import AutoSwarmModelForCausalLM
from swarm.checkpoint import open_checkpoint
from swarm.data_structures import ServerInfo
from swarm.dht import Directory
from swarm.errors import UsageError
from swarm.node import Node, NodeConfig
from swarm.node_thread import NodeThread
from swarm.records import write_record
from swarm.rpc import server_info
from swarm.scripts import run_server, serving
from swarm.scripts.local_swarm import LOOPBACK, LocalSwarm
from swarm.server.config import ServerConfig
from swarm.server.quotas import QuotaLimits
from swarm.server.sizing import block_size

BIN = Path(sys.executable).parent
PEER_ID = "QmXnnyufdzAWL5CqZ2RnSNgPbvCc1ALT73s6epPrRnZ1Xy"
SOMEBODY = f"/ip4/192.0.2.7/tcp/31330/p2p/{PEER_ID}"
READY = re.compile(r"READY (/ip4/[0-9.]+/tcp/[0-9]+/p2p/(Qm[A-Za-z0-9]{44}))\n")
PATIENCE = 120.0  # seconds, for machines that are busy with other tests


@dataclass
class PeerProcess:
    """A peer started as a person would, its output kept."""

    process: subprocess.Popen[str]
    address: str = ""
    peer_id: str = ""
    errors: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, *command: Any) -> PeerProcess:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        peer = cls(process)
        assert process.stderr is not None
        threading.Thread(target=peer.errors.extend, args=(process.stderr,), daemon=True).start()
        return peer

    def wait_until_ready(self) -> None:
        """Reads the READY line, which must be the first and well-formed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = READY.fullmatch(line)
        assert match is not None, (line, self.errors)
        self.address, self.peer_id = match.groups()

    def daemon(self) -> psutil.Process:
        """Its only child, a p2pd."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        assert [child.name() for child in children] == ["p2pd"]
        return children[0]

    def end(self) -> tuple[int, str]:
        """(exit code, the rest of stdout) of a peer that is about to end."""
        assert self.process.stdout is not None
        rest = self.process.stdout.read()
        return self.process.wait(PATIENCE), rest


@pytest.fixture(scope="module")
def start_peer() -> Iterator[Callable[..., PeerProcess]]:
    """`start_peer("swarm", "run-bootstrap", ...)`; whatever is still there at the end is killed."""
    started: list[PeerProcess] = []

    def start(command: str, *arguments: Any) -> PeerProcess:
        started.append(PeerProcess.start(BIN / command, *arguments))
        return started[-1]

    yield start
    for peer in started:
        peer.process.kill()
        peer.process.wait()


@pytest.fixture(scope="module")
def observer() -> Iterator[NodeThread]:
    """A peer of the swarm in this process: the one that the servers join."""
    node = NodeThread.start(NodeConfig(host_maddrs=(LOOPBACK,)))
    yield node
    node.stop()


@pytest.fixture(scope="module")
def servers(
    start_peer: Callable[..., PeerProcess], observer: NodeThread, tiny_llama_folder: Path
) -> dict[str, PeerProcess]:
    """Servers that joined through the second of two addresses, by how these were written. Each serves one test."""
    with socket.socket() as holder:  # nobody listens on this port
        holder.bind(("127.0.0.1", 0))
        dead = f"/ip4/127.0.0.1/tcp/{holder.getsockname()[1]}/p2p/{PEER_ID}"
        live = observer.run(observer.node.ready_address())
        forms = {
            "A B": ["--initial-peers", dead, live],
            "A,B": ["--initial-peers", f"{dead},{live}"],
            "repeated": ["--initial-peers", dead, "--initial-peers", live],
        }
        common = ("--host-maddrs", LOOPBACK, "--threads", "1")
        started = {
            form: start_peer("run-server", *peers, tiny_llama_folder, "--blocks", "2:4", *common)
            for form, peers in forms.items()
        }
        for server in started.values():
            server.wait_until_ready()
        return started


def announced(observer: NodeThread, folder: Path) -> set[str]:
    """The peer ids of those that serve this model, as the observer sees it now."""
    fingerprint = open_checkpoint(str(folder)).fingerprint()
    return {record.peer_id for record in observer.run(Directory(observer.node).servers(fingerprint))}


def test_every_form_of_initial_peers_is_understood(
    servers: dict[str, PeerProcess], observer: NodeThread, tiny_llama_folder: Path
) -> None:
    assert announced(observer, tiny_llama_folder) == {server.peer_id for server in servers.values()}


def test_a_server_is_one_process_and_one_p2pd(servers: dict[str, PeerProcess]) -> None:
    for server in servers.values():
        assert server.daemon().ppid() == server.process.pid


def test_sigterm_withdraws_the_server_and_exits_0(
    servers: dict[str, PeerProcess], observer: NodeThread, tiny_llama_folder: Path
) -> None:
    server = servers["A B"]
    daemon = server.daemon()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == (0, ""), server.errors  # READY was its only line
    assert not any("Traceback" in line for line in server.errors), "\n".join(server.errors)
    assert not daemon.is_running()
    assert server.peer_id not in announced(observer, tiny_llama_folder)


def test_sigkill_takes_p2pd_along(servers: dict[str, PeerProcess]) -> None:
    server = servers["A,B"]
    daemon = server.daemon()
    server.process.kill()
    daemon.wait(timeout=10)


def test_a_dead_p2pd_ends_the_server(servers: dict[str, PeerProcess]) -> None:
    server = servers["repeated"]
    server.daemon().kill()
    assert server.end() == (1, "")
    assert server.errors[-1].startswith("error: the network daemon died, so this server ends: p2pd ended by signal 9")
    assert not any("Traceback" in line for line in server.errors)


def test_servers_take_the_blocks_that_their_memory_holds_where_they_are_needed(
    start_peer: Callable[..., PeerProcess], tiny_chat_folder: Path
) -> None:
    size = block_size(
        open_checkpoint(str(tiny_chat_folder)).config,
        dtype=torch.float32,
        quantization="none",
        device=torch.device("cpu"),
        max_batch_tokens=1024,
    )
    memory = size.activations + 3 * (size.weights + 64 * size.cache_per_token) + 100
    three = ("--max-memory", str(memory), "--cache-tokens", "64")
    common = (tiny_chat_folder, "--host-maddrs", LOOPBACK, "--threads", "1", "--announce-period", "0.5")
    common += ("--dtype", "float32")
    node = NodeThread.start(NodeConfig(host_maddrs=(LOOPBACK,)))
    try:
        peer = node.run(node.node.ready_address())

        def start(*flags: str) -> PeerProcess:
            return start_peer("run-server", "--initial-peers", peer, *common, *flags)

        def ready(server: PeerProcess) -> str:
            server.wait_until_ready()
            return server.peer_id

        def info_of(peer_id: str) -> ServerInfo:
            return node.run(server_info(node.node.p2p, peer_id, PATIENCE))

        server_of_all = start()  # in the meantime
        first = ready(start(*three))
        second = ready(start(*three))
        whole = ready(server_of_all)
        assert [str(info_of(peer_id).span) for peer_id in (first, second, whole)] == ["0:3", "3:6", "0:8"]
        assert info_of(first).cache_tokens_left == 64
        assert info_of(whole).cache_tokens_left == 2**18  # plenty of memory, so the largest cache
        deadline = time.monotonic() + PATIENCE
        for peer_id in (first, second, whole):  # the first one was alone when it looked around for the first time
            while info_of(peer_id).network_rate is None and time.monotonic() < deadline:
                time.sleep(0.1)
            info = info_of(peer_id)
            assert info.network_rate is not None and 1e5 < info.network_rate < 1e11
            assert len(info.decode_times) == 3 and info.throughput == 1 / info.decode_times[0]
        records = node.run(Directory(node.node).servers(open_checkpoint(str(tiny_chat_folder)).fingerprint()))
        assert {record.peer_id for record in records} == {first, second, whole}
        assert all(len(write_record(record.info)) < 600 for record in records)
    finally:
        node.stop()


class SigtermAt(BaseStreamer):
    """Ends a server of the session after some tokens, and lets generation go on once that server drains."""

    def __init__(self, swarm: LocalSwarm, draining: threading.Event, session: Any, count: int):
        self.leaving: Any = None
        self._swarm, self._draining, self._session, self._left = swarm, draining, session, count

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self.leaving = self._swarm.by_peer_id(self._session.chain[0].peer_id)
            self.leaving.process.send_signal(signal.SIGTERM)
            assert self._draining.wait(PATIENCE)

    def end(self) -> None:
        pass


def test_sigterm_moves_a_running_generation(
    tiny_llama_folder: Path, continue_locally: Callable[..., list[int]]
) -> None:
    draining = threading.Event()

    def on_progress(index: int, text: str) -> None:
        if text.startswith("draining"):
            draining.set()

    prompt = [17, 99, 4]
    swarm = LocalSwarm(
        tiny_llama_folder, ["0:8", "0:8"], flags=["--threads", "1", "--dtype", "float32"], on_progress=on_progress
    )
    with swarm:
        model = AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=swarm.initial_peers)
        try:
            with model.inference_session(max_length=203) as session:
                streamer = SigtermAt(swarm, draining, session, count=10)
                output = model.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False, streamer=streamer)
                (replacement,) = session.replacements
                assert replacement.lost.peer_id == streamer.leaving.peer_id
                assert replacement.reason == "the server is leaving"
                assert [link.peer_id for link in session.chain] != [streamer.leaving.peer_id]
            assert streamer.leaving.process.wait(PATIENCE) == 0
        finally:
            model.close()
    assert output[0, len(prompt) :].tolist() == continue_locally(prompt, max_new_tokens=200)


def test_a_second_terminal_joins_by_the_address_of_the_first(
    start_peer: Callable[..., PeerProcess], tiny_chat_folder: Path, continue_locally: Callable[..., list[int]]
) -> None:
    """As in the README, on the default addresses: a bootstrap peer, two servers, and `swarm generate`."""
    bootstrap = start_peer("swarm", "run-bootstrap")
    bootstrap.wait_until_ready()
    servers = [
        start_peer("run-server", tiny_chat_folder, "--initial-peers", bootstrap.address, *flags)
        for flags in (("--blocks", blocks, "--dtype", "float32") for blocks in ("0:4", "4:8"))
    ]
    for server in servers:
        server.wait_until_ready()
    command = [BIN / "swarm", "generate", tiny_chat_folder, "--initial-peers", bootstrap.address]
    command += ["--prompt", "w17 w99", "--max-new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"w{token}" for token in continue_locally([17, 99], max_new_tokens=8)]
    for server in servers:
        assert server.peer_id[-6:] in done.stderr
    bootstrap.process.send_signal(signal.SIGINT)
    assert bootstrap.end() == (0, ""), bootstrap.errors


def test_the_address_is_not_loopback_where_there_is_a_better_one(start_peer: Callable[..., PeerProcess]) -> None:
    bootstrap = start_peer("swarm", "run-bootstrap")
    bootstrap.wait_until_ready()
    host = bootstrap.address.split("/")[2]
    mine = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET
    }
    assert host in mine
    # The kernel's own answer may lie in a range that no swarm can be joined through, as in some sandboxes.
    better = {ip for ip in mine if not ip.startswith(("127.", "192.0.2.", "198.18.", "198.51.100.", "203.0.113."))}
    assert not better or host in better


@pytest.mark.parametrize(
    ("addresses", "best"),
    [
        (["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1"], "/ip4/10.0.0.2/tcp/1"),
        (["/ip4/192.0.2.2/tcp/1", "/ip4/127.0.0.1/tcp/1"], "/ip4/127.0.0.1/tcp/1"),
        (["/ip4/192.0.2.2/tcp/1"], "/ip4/192.0.2.2/tcp/1"),
        (["/ip6/::1/tcp/1", "/ip4/8.8.8.8/udp/1/quic-v1", "/ip4/8.8.8.8/tcp/1"], "/ip4/8.8.8.8/tcp/1"),
    ],
)
async def test_which_address_is_handed_out(addresses: list[str], best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reserved one (192.0.2.0/24) comes last: libp2p tells those who join through it of no other peer."""
    node = await Node.start(NodeConfig(host_maddrs=(LOOPBACK,)))
    try:

        async def made_up(self: Node) -> list[str]:
            return [f"{address}/p2p/{PEER_ID}" for address in addresses]

        monkeypatch.setattr(Node, "addresses", made_up)
        assert await node.ready_address() == f"{best}/p2p/{PEER_ID}"
    finally:
        await node.stop()


@pytest.mark.parametrize(
    ("flags", "limits"),
    [({}, QuotaLimits()), ({"max_sessions_per_peer": 3}, QuotaLimits(max_sessions=3))],
)
def test_what_one_peer_may_take(monkeypatch: pytest.MonkeyPatch, flags: dict[str, int], limits: QuotaLimits) -> None:
    configs: list[ServerConfig] = []
    monkeypatch.setattr(serving, "run_until_stopped", lambda serve, watch: serve())
    monkeypatch.setattr(run_server, "_serve", configs.append)
    run_server.run_server("model", new_swarm=True, **flags)
    assert [config.quota_limits for config in configs] == [limits]


def test_the_size_of_a_pass_is_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[ServerConfig] = []
    monkeypatch.setattr(serving, "run_until_stopped", lambda serve, watch: serve())
    monkeypatch.setattr(run_server, "_serve", configs.append)
    run_server.run_server("model", new_swarm=True)
    run_server.run_server("model", new_swarm=True, max_pass_tokens=2000)
    assert [config.max_pass_tokens for config in configs] == [ServerConfig(model="model").max_pass_tokens, 2000]
    with pytest.raises(ValidationError, match="max_pass_tokens"):  # clients would ban a server that takes less
        ServerConfig(model="model", max_pass_tokens=1023)


@pytest.mark.parametrize(
    ("flags", "listen", "relay"),
    [
        ({"new_swarm": True}, True, "never"),  # there is nobody to ask
        ({"initial_peers": [SOMEBODY]}, True, "auto"),
        ({"initial_peers": [SOMEBODY], "relay": run_server.RelayKind.NEVER}, True, "never"),
        ({"initial_peers": [SOMEBODY], "relay": run_server.RelayKind.ALWAYS}, True, "always"),
        ({"initial_peers": [SOMEBODY], "listen": False}, False, "always"),
    ],
)
def test_how_others_come_here(monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], listen: bool, relay: str) -> None:
    configs: list[ServerConfig] = []
    monkeypatch.setattr(serving, "run_until_stopped", lambda serve, watch: serve())
    monkeypatch.setattr(run_server, "_serve", configs.append)
    run_server.run_server("model", **flags)
    assert [(config.listen, config.relay, config.serve_relay) for config in configs] == [(listen, relay, True)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"new_swarm": True, "listen": False}, "first server"),
        ({"new_swarm": True, "relay": run_server.RelayKind.ALWAYS}, "first server"),
        ({"initial_peers": [SOMEBODY], "listen": False, "relay": run_server.RelayKind.NEVER}, "nobody can reach"),
        ({"initial_peers": [SOMEBODY], "listen": False, "port": 31330}, "nothing to listen on"),
    ],
)
def test_flags_that_contradict_each_other(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run_server.run_server("model", **flags)
