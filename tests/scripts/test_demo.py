"""`swarm demo` as a process: it passes, and however it ends, none of its processes outlives it for long."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

SWARM = Path(sys.executable).with_name("swarm")

#: Seconds within which everything must be gone after the demo has ended.
GONE_WITHIN = 30.0


class DemoProcess:
    """A running `swarm demo`. Its descendants are known by a mark in their environment, whoever their parent is now."""

    def __init__(self, *args: str):
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [SWARM, "demo", *args],
            env={**os.environ, "DEMO_TEST_MARK": self._mark, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""

    def descendants(self) -> list[psutil.Process]:
        """All live processes that it started, directly or not."""
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get("DEMO_TEST_MARK") == self._mark
                if marked and process.pid != self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue  # gone, or not ours to look at
        return found

    def running(self, part_of_command: str) -> bool:
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):  # gone meanwhile
                if part_of_command in " ".join(process.cmdline()):
                    return True
        return False

    def read_until(self, text: str) -> None:
        """Read its output up to the line that begins with `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if line.startswith(text):
                return
        raise AssertionError(f"the demo ended before it said {text!r}:\n{self.output}")

    def finish(self) -> int:
        """Read the rest of its output and return its exit code."""
        rest, _ = self.process.communicate()
        self.output += rest
        return self.process.returncode

    def survivors(self) -> list[str]:
        """What still runs after everything had time to end."""
        deadline = time.monotonic() + GONE_WITHIN
        while (alive := self.descendants()) and time.monotonic() < deadline:
            psutil.wait_procs(alive, timeout=1.0)
        return [f"{process.pid}: {process.cmdline()}" for process in alive]


@pytest.fixture
def start_demo() -> Iterator[Callable[..., DemoProcess]]:
    started: list[DemoProcess] = []

    def start(*args: str) -> DemoProcess:
        started.append(DemoProcess(*args))
        return started[-1]

    yield start
    for demo in started:
        for process in [demo.process, *demo.descendants()]:
            process.kill()
        demo.process.wait()


def check_passed(data: dict[str, Any]) -> None:
    """What the JSON of a demo with a middle server must tell."""
    assert data["passed"] is True
    assert data["failures"] == []
    for answer in data["answers"]:
        assert answer["equal"] is True
        assert answer["tokens"] == answer["expected"]
        assert answer["tokens_per_second"] > 0
        assert answer["first_token_seconds"] > 0
    second = data["answers"][1]
    assert len(second["tokens"]) >= 32

    killed = data["killed"]
    assert killed["in_chain"] is True
    assert killed["exit_code"] == -signal.SIGKILL
    assert killed["peer_id"] in [link["peer_id"] for link in second["chain"][1:-1]]
    assert 4 <= killed["after_tokens"] <= 24
    assert killed["peer_id"] not in [link["peer_id"] for link in data["final_chain"]]
    assert killed["blocks"] in [server["blocks"] for server in data["servers"]]

    first_loss = data["replacements"][0]
    assert first_loss["lost"]["peer_id"] == killed["peer_id"]
    # the prompt, and all tokens of the answer but the last were in the lost server's cache
    assert first_loss["replayed_tokens"] >= len(second["prompt_tokens"]) + killed["after_tokens"] - 1
    assert second["longest_pause"] >= first_loss["seconds"]
    for links in (second["chain"], data["final_chain"]):
        ends = [link["blocks"].split(":") for link in links]
        assert [int(start) for start, _ in ends] == [0, *(int(end) for _, end in ends[:-1])]

    phases = {"start", "connect", "first answer", "second answer", "stop", "compare"}
    assert phases < set(data["seconds"])
    assert data["seconds"]["total"] >= sum(data["seconds"][name] for name in phases)


def test_the_demo_passes_and_leaves_nothing(
    start_demo: Callable[..., DemoProcess], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "demo.json"
    demo = start_demo("--model", str(tiny_llama_folder), "--servers", "4", "--prompt", "Hello.", "--json", str(file))
    assert demo.finish() == 0, demo.output
    assert demo.survivors() == []
    data = json.loads(file.read_text())
    check_passed(data)
    assert data["answers"][0]["prompt_tokens"] == list(b"Hello.")
    assert [server["role"] for server in data["servers"]] == ["main", "main", "main", "spare"]
    assert "<SIGKILL: server" in demo.output
    assert "PASSED" in demo.output
    for noise in ("WARNING", "Warning", "Traceback", "it/s]"):
        assert noise not in demo.output


def first_server(demo: DemoProcess) -> None:
    """Its first server process is there, too young to have done anything."""
    while not demo.running("run-server"):
        assert demo.process.poll() is None, demo.finish()


def first_p2pd(demo: DemoProcess) -> None:
    """Its first server has a p2pd and loads its blocks."""
    while not demo.running("p2pd"):
        assert demo.process.poll() is None, demo.finish()


def generation(demo: DemoProcess) -> None:
    """The first question is on the screen: servers, client and three p2pd are running."""
    demo.read_until("> ")
    assert len(demo.descendants()) == 5


EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}

#: Every moment and every signal once; the other combinations are slow tests.
QUICK = {
    (first_server, signal.SIGTERM),
    (first_p2pd, signal.SIGINT),
    (generation, signal.SIGKILL),
}
ENDINGS = [
    pytest.param(
        moment,
        number,
        id=f"{moment.__name__}-{number.name}",
        marks=() if (moment, number) in QUICK else pytest.mark.slow,
    )
    for moment in (first_server, first_p2pd, generation)
    for number in EXIT_CODES
]


@pytest.mark.parametrize(("moment", "number"), ENDINGS)
def test_a_demo_that_is_ended_leaves_nothing(
    moment: Callable[[DemoProcess], None],
    number: signal.Signals,
    start_demo: Callable[..., DemoProcess],
    tiny_llama_folder: Path,
) -> None:
    demo = start_demo("--model", str(tiny_llama_folder), "--servers", "2")
    moment(demo)
    assert demo.descendants()
    demo.process.send_signal(number)
    assert demo.finish() == EXIT_CODES[number], demo.output
    assert demo.survivors() == []
    assert "Traceback" not in demo.output


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--servers", "1"), "error: --servers 1 leaves nobody to take over: a fail-over needs at least 2 servers"),
        (("--json", "/no/such/folder/demo.json"), "error: cannot write /no/such/folder/demo.json: there is no folder"),
        (("--model", "/no/such/model"), "error: there is no folder '/no/such/model'"),
        (("--quantization", "int3"), "Invalid value"),
    ],
)
def test_bad_options_are_one_clear_message(
    args: tuple[str, ...], line: str, start_demo: Callable[..., DemoProcess]
) -> None:
    demo = start_demo(*args)
    assert demo.finish() == 2
    assert line in demo.output
    assert "Traceback" not in demo.output


@pytest.mark.slow
@pytest.mark.parametrize("num_servers", [2, 3, 7])
def test_other_numbers_of_servers(
    num_servers: int, start_demo: Callable[..., DemoProcess], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "demo.json"
    demo = start_demo("--model", str(tiny_llama_folder), "--servers", str(num_servers), "--json", str(file))
    assert demo.finish() == 0, demo.output
    data = json.loads(file.read_text())
    assert data["passed"] is True
    assert len(data["servers"]) == num_servers
    assert demo.survivors() == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_real_model(
    quantization: str, start_demo: Callable[..., DemoProcess], smollm2_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "demo.json"
    demo = start_demo("--quantization", quantization, "--json", str(file))
    assert demo.finish() == 0, demo.output
    data = json.loads(file.read_text())
    check_passed(data)
    assert [server["blocks"] for server in data["servers"]] == ["0:10", "10:20", "20:30", "8:14", "14:22"]
    assert "Paris" in data["answers"][0]["text"]
    assert demo.survivors() == []
