"""The peer through which all joined dies and comes back; a server is restarted; clocks are wrong by seconds. One story:
each test goes on where the one before it ended."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm import AutoSwarmModelForCausalLM
from swarm.checkpoint import open_checkpoint
from swarm.dht import Directory, ServerRecord
from swarm.node import NodeConfig
from swarm.node_thread import NodeThread
from swarm.scripts.local_swarm import ServerProcess, ServerSpec

PROMPT = torch.tensor([[1, 2, 3, 4, 5]])
START_TIMEOUT = 120.0
PERIOD = 8.0  # seconds between announcements, which live for three of them
SKEW = 8.0  # seconds by which a clock is slow
FLAGS = ("--dtype", "float32", "--cache-tokens", "2048", "--threads", "1")


class Story:
    def __init__(self, folder: Path, scratch: Path):
        self.folder, self.scratch = str(folder), scratch
        self.fingerprint = open_checkpoint(self.folder).fingerprint()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._listen = f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}"
        self.bootstrap = self.start_bootstrap()
        self.address = self.bootstrap.run(self.bootstrap.node.ready_address())
        self.peers: list[Any] = [self.bootstrap]
        self.servers: list[ServerProcess] = []

    def start_bootstrap(self) -> NodeThread:
        """As `swarm run-bootstrap --port PORT --identity-path FILE` does."""
        config = NodeConfig(host_maddrs=(self._listen,), identity_path=self.scratch / "bootstrap")
        return NodeThread.start(config)

    def start_server(self, blocks: str, *flags: str, skew: float) -> ServerProcess:
        spec = ServerSpec(blocks, (*FLAGS, *flags), program=("skewed_server", str(skew)))
        log = self.scratch / f"server-{len(self.servers)}.log"
        self.servers.append(ServerProcess(self.folder, spec, log, [self.address]))
        return self.servers[-1]

    def newcomer(self, *addresses: str) -> NodeThread:
        self.peers.append(NodeThread.start(NodeConfig(initial_peers=addresses, listen=False)))
        return self.peers[-1]  # type: ignore[no-any-return]

    def records_until(self, peer: NodeThread, wanted: Callable[[dict[str, ServerRecord]], bool]) -> Any:
        """The servers by peer id that a peer reads, as soon as they are as wanted."""

        async def read() -> dict[str, ServerRecord]:
            while True:
                found = {record.peer_id: record for record in await Directory(peer.node).servers(self.fingerprint)}
                if wanted(found):
                    return found
                await asyncio.sleep(0.1)

        return peer.run(read(), timeout=60)

    def end(self) -> None:
        for server in self.servers:
            server.kill()
        for peer in self.peers:
            peer.stop()


@pytest.fixture(scope="module")
def story(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A server of all blocks whose clock is slow, and one of blocks 4:7 whose clock is fast."""
    with pytest.MonkeyPatch.context() as patch:
        path = [str(Path(__file__).parent / "fakes"), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        story = Story(tiny_llama_folder, tmp_path_factory.mktemp("story"))
        try:
            story.start_server("0:8", "--announce-period", str(PERIOD), skew=-SKEW)
            keep = ("--identity-path", str(story.scratch / "restarted"), "--announce-period", "20")
            story.start_server("4:7", *keep, skew=SKEW)
            for server in story.servers:
                server.wait_until_ready(START_TIMEOUT)
            yield story
        finally:
            story.end()


def check_generation(story: Story, *initial_peers: str) -> None:
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(story.folder).generate(PROMPT, max_new_tokens=12, do_sample=False)
    model = AutoSwarmModelForCausalLM.from_pretrained(story.folder, initial_peers=initial_peers)
    try:
        assert model.generate(PROMPT, max_new_tokens=12, do_sample=False).tolist() == expected.tolist()
    finally:
        model.close()


def test_clocks_off_by_seconds_do_no_harm(story: Story) -> None:
    """The announcements of both servers are here, and neither is taken for expired."""
    peers = {server.peer_id for server in story.servers}
    assert set(story.records_until(story.bootstrap, lambda found: peers <= set(found))) == peers
    check_generation(story, story.address)


def test_the_bootstrap_dies_and_the_swarm_goes_on(story: Story) -> None:
    whole = story.servers[0]
    story.bootstrap.stop()
    # Any one live peer of several is enough.
    check_generation(story, story.address, whole.address)
    client = story.newcomer(story.address, whole.address)
    before = story.records_until(client, lambda found: whole.peer_id in found)
    old = before[whole.peer_id]
    later = story.records_until(
        client, lambda found: whole.peer_id in found and found[whole.peer_id].expires > old.expires
    )
    assert later[whole.peer_id].info.span == old.info.span


def test_a_restarted_server_takes_its_place_again(story: Story) -> None:
    """Its record still lies in the DHT, and expires later than the new one would: its clock was put back meanwhile."""
    whole, second = story.servers
    second.kill()
    story.address = whole.address
    flags = ("--num-blocks", "3", "--identity-path", str(story.scratch / "restarted"), "--announce-period", str(PERIOD))
    again = story.start_server("", *flags, skew=0.0)
    again.wait_until_ready(START_TIMEOUT)
    assert again.peer_id == second.peer_id
    client = story.newcomer(whole.address)
    # All blocks are held as well by the other one: a server that came new would begin at block 0.
    found = story.records_until(client, lambda found: again.peer_id in found and found[again.peer_id].info.throughput)
    assert str(found[again.peer_id].info.span) == "4:7"
    story.servers.remove(second)


def test_the_bootstrap_comes_back_and_is_found_again(story: Story) -> None:
    peer_id = story.bootstrap.node.peer_id
    story.bootstrap = story.start_bootstrap()
    story.peers.append(story.bootstrap)
    assert story.bootstrap.node.peer_id == peer_id
    client = story.newcomer(story.bootstrap.run(story.bootstrap.node.ready_address()))
    story.records_until(client, lambda found: {server.peer_id for server in story.servers} <= set(found))
