"""Two server processes that do not listen, so that nobody can reach them but through relays, and a client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from swarm import AutoSwarmModelForCausalLM
from swarm.dht import Directory, ServerRecord
from swarm.node import NodeConfig
from swarm.node_thread import NodeThread
from swarm.scripts.local_swarm import LOOPBACK, ServerProcess, ServerSpec

PROMPT = torch.tensor([[1, 2, 3, 4, 5]])
NEW_TOKENS = 40
FLAGS = ("--dtype", "float32", "--cache-tokens", "2048", "--threads", "1", "--announce-period", "2")
START_TIMEOUT = 120.0


@dataclass
class Scene:
    relays: list[NodeThread]
    addresses: list[str]
    servers: list[ServerProcess]


@pytest.fixture(scope="module")
def scene(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Peers without blocks relay; all blocks are behind them."""
    relays = [NodeThread.start(NodeConfig(host_maddrs=(LOOPBACK,)))]
    addresses = [relays[0].run(relays[0].node.ready_address())]
    relays.append(NodeThread.start(NodeConfig(host_maddrs=(LOOPBACK,), initial_peers=tuple(addresses))))
    addresses.append(relays[1].run(relays[1].node.ready_address()))
    logs = tmp_path_factory.mktemp("logs")
    servers = [
        ServerProcess(
            str(tiny_llama_folder),
            ServerSpec(blocks, FLAGS, listens=False),
            logs / f"{blocks.replace(':', '-')}.log",
            addresses,
        )
        for blocks in ("0:4", "4:8")
    ]
    try:
        for server in servers:
            server.wait_until_ready(START_TIMEOUT)
        yield Scene(relays, addresses, servers)
    finally:
        for server in servers:
            server.kill()
        for relay in relays:
            relay.stop()


@pytest.fixture(scope="module")
def connect(scene: Scene, tiny_llama_folder: Path) -> Iterator[Callable[..., Any]]:
    models = []

    def connect(*addresses: str, **settings: Any) -> Any:
        models.append(
            AutoSwarmModelForCausalLM.from_pretrained(
                tiny_llama_folder, initial_peers=addresses or scene.addresses, **settings
            )
        )
        return models[-1]

    yield connect
    for model in models:
        model.close()


@pytest.fixture(scope="module")
def expected(tiny_llama_folder: Path) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    return list(model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist())


def generate(model: Any, **settings: Any) -> list[int]:
    tokens = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, **settings)
    return list(tokens[0].tolist())


async def records_with_two_relays(node: Any, fingerprint: str) -> list[ServerRecord]:
    while True:
        records = await Directory(node).servers(fingerprint)
        if len(records) == 2 and all(len(record.info.relays) == 2 for record in records):
            return records
        await asyncio.sleep(0.1)


def test_tokens_through_relays(scene: Scene, connect: Callable[..., Any], expected: list[int]) -> None:
    for server in scene.servers:
        assert server.address == f"{scene.addresses[0]}/p2p-circuit/p2p/{server.peer_id}"
    model = connect()
    with model.inference_session(max_length=64) as session:
        assert generate(model) == expected
        # The first server pushes to the second, neither of which listens.
        assert "4:8" in str(session.report()) and "pushed" in str(session.report())
    # What the client knows of the way is the relayed round trip.
    pings = model.connection.router.snapshot().pings
    assert pings[scene.servers[0].peer_id] > 0


def test_the_address_of_a_server_behind_a_relay_serves_to_join(
    scene: Scene, connect: Callable[..., Any], expected: list[int]
) -> None:
    assert generate(connect(scene.servers[1].address)) == expected


def test_a_relay_dies_under_a_running_session(
    scene: Scene, connect: Callable[..., Any], expected: list[int], tiny_llama_folder: Path
) -> None:
    """The connections that it carried break; the client comes back over the other relay and replays."""
    from swarm.checkpoint import open_checkpoint

    fingerprint = open_checkpoint(str(tiny_llama_folder)).fingerprint()
    observer = scene.relays[1]
    records = observer.run(records_with_two_relays(observer.node, fingerprint), timeout=60)
    assert all(record.info.relayed for record in records)
    model = connect(ban_time=0.5, retry_delay=0.1)
    seen = 0

    class Killer(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            nonlocal seen
            seen += 1
            if seen == 10:
                scene.relays[0].stop()

        def end(self) -> None:
            pass

    with model.inference_session(max_length=64) as session:
        assert generate(model, streamer=Killer()) == expected
        assert session.replacements
