"""What a `run-server` process says from its start to its end, and that it ends though somebody or something stays."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stubborn_peer
import torch

from swarm import AutoSwarmModelForCausalLM
from swarm.scripts.local_swarm import LOOPBACK

PATIENCE = 120.0  # seconds, for machines that are busy with other tests


class Running:
    """A server in a process of its own. lines: of its stderr, None at the end. said: those that were taken already."""

    def __init__(self, *arguments: Any):
        command = [sys.executable, "-m", "swarm.scripts.main", "run-server", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def address(self) -> str:
        assert self.process.stdout is not None
        word, address = self.process.stdout.readline().split()
        assert word == "READY"
        return address

    def wait_for(self, part: str) -> None:
        """Until a line with this in it was said."""
        while (line := self.lines.get(timeout=PATIENCE)) is not None:
            self.said.append(line)
            if part in line:
                return
        raise AssertionError((part, self.said))

    def end(self) -> int:
        """The exit code of a server that is about to end; all that it said is in `said` then."""
        assert self.process.stdout is not None
        assert self.process.stdout.read() == ""  # nothing but READY
        while (line := self.lines.get(timeout=PATIENCE)) is not None:
            self.said.append(line)
        return self.process.wait(PATIENCE)


@pytest.fixture
def run(tiny_llama_folder: Path) -> Iterator[Callable[..., Running]]:
    """`run(*flags)`: a server of all blocks, alone in its swarm."""
    started: list[Running] = []

    def run(*flags: Any) -> Running:
        common = ("--new-swarm", "--host-maddrs", LOOPBACK, "--threads", 1, "--dtype", "float32")
        started.append(Running(tiny_llama_folder, *common, *flags))
        return started[-1]

    yield run
    for server in started:
        server.process.kill()
        server.process.wait()


def test_a_second_signal_ends_the_drain_and_all_that_was_said_is_json(
    run: Callable[..., Running], tiny_llama_folder: Path
) -> None:
    server = run("--log-json", "--verbose", "--drain-time", 3600)
    model = AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[server.address()])
    try:
        with model.inference_session(max_length=8):  # nobody else could take it over
            model.generate(torch.tensor([[17, 99]]), max_new_tokens=2)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            server.process.send_signal(signal.SIGINT)
            assert server.end() == 0
    finally:
        model.close()
    records = [json.loads(line) for line in server.said]
    progress = [record["message"] for record in records if record["logger"] == "swarm.progress"]
    assert progress[0].startswith("opening ") and progress[1].startswith("loading blocks 0:8 of ")
    assert progress[2:] == ["stopping", "draining: sessions move to other servers"]
    assert not {"ERROR", "CRITICAL"} & {record["level"] for record in records}


def test_an_ordinary_life_takes_four_lines(run: Callable[..., Running], tiny_llama_folder: Path) -> None:
    server = run()
    model = AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[server.address()])
    try:
        model.generate(torch.tensor([[17, 99]]), max_new_tokens=2)
    finally:
        model.close()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert [line.split()[0] for line in server.said] == ["opening", "loading", "stopping", "draining:"], server.said


def test_stopped_before_it_is_ready(run: Callable[..., Running]) -> None:
    server = run("--log-json")
    server.wait_for("opening")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert json.loads(server.said[-1])["message"] == "stopped while starting"


@pytest.mark.parametrize(
    ("how", "code", "last"),
    [
        ("waits", 0, "stopped while starting ..."),
        ("computes", 0, "stopped while starting ..."),
        ("stays", 1, "error: this peer could not leave the swarm in order, so it ends as it is"),
    ],
)
def test_a_peer_ends_though_something_does_not(how: str, code: int, last: str) -> None:
    process = subprocess.Popen(
        [sys.executable, stubborn_peer.__file__, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        if how == "stays":
            assert process.stdout.readline().startswith("READY ")
        process.terminate()
        _, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors.splitlines()[-1]) == (code, last)
    finally:
        process.kill()
        process.wait()
