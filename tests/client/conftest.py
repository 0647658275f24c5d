"""Clients over a swarm of fake servers, see `tests/fakes`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import HIDDEN_SIZE
from fake_swarm import FakeNode, FakeSwarm
from local_blocks import LocalConnection
from transformers import LlamaForCausalLM

from swarm.client.model import AutoSwarmModelForCausalLM
from swarm.node_thread import NodeThread


@pytest.fixture(scope="session")
def node_thread() -> Iterator[NodeThread]:
    """A node's thread without a node."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    node_thread = NodeThread(loop, thread, FakeNode())  # type: ignore[arg-type]
    yield node_thread
    node_thread.stop()


@pytest.fixture
def fake_swarm(node_thread: NodeThread, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSwarm]:
    """An empty fake swarm for a model of 8 blocks."""
    swarm = FakeSwarm(node_thread, monkeypatch)
    yield swarm
    for user in swarm.users:
        user.session.close()
    swarm.run(swarm.end())


@pytest.fixture(params=[True, False], ids=["push", "no push"])
def either_way(request: pytest.FixtureRequest, fake_swarm: FakeSwarm) -> bool:
    """Whether servers push to each other; every client of the fake swarm is told so."""
    direct_push: bool = request.param
    fake_swarm.settings["direct_push"] = direct_push
    return direct_push


@pytest.fixture
def small_messages(monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps travel in parts of 4 tokens."""
    monkeypatch.setattr("swarm.client.history.MAX_PAYLOAD_BYTES", 4 * HIDDEN_SIZE * 4)
    return 4


# --- clients whose blocks run right here, see `tests/fakes/local_blocks.py` -------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_llama_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval().requires_grad_(False)


@pytest.fixture
def connection(plain: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> LocalConnection:
    connection = LocalConnection(plain)
    monkeypatch.setattr("swarm.client.model.SwarmConnection", lambda checkpoint, config: connection)
    return connection


@pytest.fixture
def model(connection: LocalConnection, tiny_llama_folder: Path) -> Any:
    peer = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"  # nobody asks it
    return AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[peer])
