"""A server is paused by its owner in the middle of a generation, resumed, and ended while it is paused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from swarm import AutoSwarmModelForCausalLM
from swarm.checkpoint import open_checkpoint
from swarm.dht import Directory
from swarm.node import NodeConfig
from swarm.node_thread import NodeThread
from swarm.scripts.local_swarm import LocalSwarm, ServerProcess

PATIENCE = 120.0  # seconds, for machines that are busy with other tests


@pytest.fixture
def observed(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LocalSwarm, NodeThread]]:
    """Two servers of all blocks, and a peer that reads their records."""
    with tempfile.TemporaryDirectory(prefix="petswarm-test-", dir="/tmp") as folder:
        monkeypatch.setenv("PETSWARM_RUNTIME", folder)
        flags = ("--threads", "1", "--dtype", "float32", "--drain-time", "60")
        with LocalSwarm(tiny_llama_folder, ["0:8", "0:8"], flags=flags) as swarm:
            node = NodeThread.start(NodeConfig(initial_peers=tuple(swarm.initial_peers), listen=False))
            yield swarm, node
            node.stop()


class PausedAt(BaseStreamer):
    """Has the session's server paused by its owner after some tokens, and lets generation go on once it drains."""

    def __init__(self, swarm: LocalSwarm, session: Any, states: Callable[[], dict[str, str]], count: int):
        self.command: subprocess.Popen[str]
        self.paused: ServerProcess
        self._swarm, self._session, self._states, self._left = swarm, session, states, count

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self.paused = self._swarm.by_peer_id(self._session.chain[0].peer_id)
            self.command = subprocess.Popen(
                [sys.executable, "-m", "swarm.scripts.main", "pause", self.paused.peer_id[-8:]],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            while self._states()[self.paused.peer_id] == "online":
                assert self.command.poll() is None, self.command.communicate()
                time.sleep(0.05)

    def end(self) -> None:
        pass


def test_a_machine_is_lent_back(
    run_swarm: Callable[..., Any],
    observed: tuple[LocalSwarm, NodeThread],
    tiny_llama_folder: Path,
    continue_locally: Callable[..., list[int]],
) -> None:
    swarm, node = observed
    fingerprint = open_checkpoint(str(tiny_llama_folder)).fingerprint()
    model = AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=swarm.initial_peers)

    def generate(**settings: Any) -> list[int]:
        output = model.generate(torch.tensor([[17, 99, 4]]), max_new_tokens=100, do_sample=False, **settings)
        tokens: list[int] = output[0, 3:].tolist()
        return tokens

    def announced() -> dict[str, str]:
        records = node.run(Directory(node.node).servers(fingerprint), PATIENCE)
        return {record.peer_id: record.info.state.value for record in records}

    def states() -> dict[str, str]:
        """As `swarm servers` says."""
        servers = json.loads(run_swarm("servers", "--json").out)["servers"]
        assert {server["model"] for server in servers} == {"tiny-llama"}
        return {server["peer_id"]: server["state"] for server in servers}

    first, second = (server.peer_id for server in swarm.servers)
    assert states() == announced() == {first: "online", second: "online"}
    expected = continue_locally([17, 99, 4], max_new_tokens=100)
    try:
        with model.inference_session(max_length=103) as session:
            streamer = PausedAt(swarm, session, states, count=10)
            assert generate(streamer=streamer) == expected
            out, error = streamer.command.communicate(timeout=PATIENCE)
            paused = streamer.paused
            (staying,) = {first, second} - {paused.peer_id}
            assert [link.peer_id for link in session.chain] == [staying]
        assert (streamer.command.returncode, error) == (0, "")
        assert out == f"server {paused.pid} (...{paused.peer_id[-8:]}): paused\n"
        assert states() == {paused.peer_id: "paused", staying: "online"}
        assert announced() == {staying: "online"}

        done = run_swarm("resume", paused.pid)
        assert (done.code, done.err) == (0, "")
        assert done.out == f"server {paused.pid} (...{paused.peer_id[-8:]}): online, blocks 0:8 of tiny-llama\n"
        assert states() == {paused.peer_id: "online", staying: "online"}
        deadline = time.monotonic() + PATIENCE
        while announced() != states():  # a moment later
            assert time.monotonic() < deadline
            time.sleep(0.1)

        swarm.by_peer_id(staying).kill()
        with model.inference_session(max_length=103) as session:
            assert generate() == expected
            assert [link.peer_id for link in session.chain] == [paused.peer_id]
    finally:
        model.close()

    # A paused server ends as others do.
    assert run_swarm("pause").code == 0
    daemon = psutil.Process(paused.pid).children()
    paused.process.send_signal(signal.SIGTERM)
    assert paused.process.wait(PATIENCE) == 0
    assert not any(child.is_running() for child in daemon)
    assert run_swarm("servers").out == "this user runs no servers on this machine\n"
