"""`swarm health`: what it says of real swarms, of made-up records, and by its exit code."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from swarm.addresses import EXAMPLE_PEER
from swarm.checkpoint import open_checkpoint
from swarm.data_structures import AdapterInfo, BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.monitor.picture import ModelPicture, Picture
from swarm.monitor.summary import problems, summarize
from swarm.node import NodeConfig
from swarm.node_thread import NodeThread
from swarm.routing.snapshot import Snapshot
from swarm.scripts import health_watch
from swarm.scripts.health_table import print_tables
from swarm.scripts.health_web import Listener
from swarm.scripts.local_swarm import LOOPBACK, LocalSwarm

PATIENCE = 120.0  # seconds
NOW = 1_000_000.0
MODEL = ModelInfo(name="llama", fingerprint="ab" * 32, num_blocks=8, hidden_size=64)


def record(
    peer_id: str, start: int, end: int, state: ServerState = ServerState.ONLINE, name: str = "", **measured: Any
) -> ServerRecord:
    usual = {"throughput": 12.5, "numerics": "float32", "cache_tokens_left": 1000}
    info = ServerInfo(state=state, span=BlockSpan(start=start, end=end), public_name=name, **{**usual, **measured})
    return ServerRecord(peer_id, info, expires=1e10)


def picture_of(*records: ServerRecord, silent: str = "", model: ModelInfo = MODEL) -> ModelPicture:
    pings = {record.peer_id: math.inf if record.peer_id == silent else 0.01 for record in records}
    return ModelPicture(model, Snapshot.build(model.num_blocks, records, pings, 0.0))


def table_of(model: ModelPicture, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_tables(summarize(Picture((model,), made_at=NOW)), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_replicas_are_counted_per_block() -> None:
    model = picture_of(record("QmA", 0, 4), record("QmB", 4, 8), record("QmC", 2, 6))
    assert model.replicas == (1, 1, 2, 2, 2, 2, 1, 1)
    assert model.complete and problems(Picture((model,))) == []


def test_only_servers_that_are_online_and_answer_count() -> None:
    joining, draining = ServerState.JOINING, ServerState.DRAINING
    model = picture_of(
        record("QmA", 0, 4),
        record("QmB", 4, 8),
        record("QmC", 0, 8, joining),
        record("QmD", 0, 8, draining),
        silent="QmB",
    )
    assert model.replicas == (1, 1, 1, 1, 0, 0, 0, 0)
    assert model.missing_blocks == (4, 5, 6, 7) and not model.complete
    (problem,) = problems(Picture((model,)))
    assert problem.startswith(f"llama (fingerprint {'ab' * 6}) is incomplete") and "blocks 4:8 of 8" in problem


def test_a_server_outside_the_model_is_left_out() -> None:
    assert picture_of(record("QmA", 0, 8), record("QmB", 6, 12)).replicas == (1,) * 8


def test_absent_models_are_problems() -> None:
    assert problems(Picture()) == ["no server of this swarm serves any model"]
    model = picture_of(record("QmA", 0, 8))
    assert problems(Picture((model,)), ["llama", "abab"]) == []
    assert problems(Picture((model,)), ["mistral", "ba"]) == [
        "no server of this swarm serves mistral",
        "no server of this swarm serves ba",
    ]


def test_what_strangers_wrote_is_text_and_not_markup() -> None:
    model = ModelInfo(name="[bold]llama[/nonsense]", fingerprint="ab" * 32, num_blocks=8, hidden_size=64)
    text = table_of(picture_of(record("QmA", 0, 8, name="[link=http://x]a[/]"), model=model))
    assert "[bold]llama[/nonsense]" in text and "[link=http://x]a[/]" in text


def row_of(table: str, name: str) -> str:
    (row,) = [line for line in table.splitlines() if name in line]
    return " ".join(row.split())


def test_the_table_of_an_incomplete_model() -> None:
    replicas = [record(f"Qm{index}", 0, 2) for index in range(10)]
    measured = {"forward_rate": 456.7, "network_rate": 1.25e7, "running_rows": 3, "waiting_rows": 2}
    alice = record("QmB", 4, 8, name="alice", **measured)
    table = table_of(picture_of(*replicas, record("QmSilent", 2, 4), alice, silent="QmSilent"))
    headline, bar, *_ = table.splitlines()
    assert headline == f"llama  fingerprint {'ab' * 6}, 8 blocks, incomplete"
    assert bar.strip() == "replicas of each block: ++001111  missing 2:4"
    assert row_of(table, "QmSilent") == "- ...QmSilent 2:4 online direct 12.5 - - float32 0+0 1000 left - - - silent -"
    assert row_of(table, "alice") == (
        "alice ...QmB 4:8 online direct 12.5 457 12.5 float32 3+2 1000 left - - - 10.0 loses 4:8"
    )


def test_the_table_of_a_complete_model() -> None:
    quick = {"decode_times": (0.01,), "numerics": "bfloat16/nf4/cuda/torch-2.13", "cache_tokens": 100_000}
    adapters = (AdapterInfo("fr", "lora", "1" * 16), AdapterInfo("de", "lora", "2" * 16))
    times = {"started_at": int(NOW) - 3 * 86_400, "announced_at": int(NOW) + 5}
    model = picture_of(
        record("QmQuick", 0, 8, **quick, **times, adapters=adapters),
        record("QmSlow", 0, 8, decode_times=(0.05,), relayed=True, started_at=int(NOW) - 7250, announced_at=int(NOW)),
    )
    for width in (120, 160):
        headline, bar, *_ = table_of(model, width).splitlines()
        # 10 ms of round trip, and a little for what lies around the blocks
        (speed,) = re.findall(r"complete, ([0-9.]+) tokens/s expected from here over a server", headline)
        assert 45 < float(speed) <= 50
        assert bar.strip() == "replicas of each block: 22222222"
        assert all(len(line) <= width for line in table_of(model, width).splitlines())
    table = table_of(model)
    assert row_of(table, "QmQuick").startswith("- ...QmQuick 0:8 online direct 12.5 - - bfloat16 nf4 cuda 0+0 99%/100k")
    slower = row_of(table, "QmQuick").removesuffix(" slower").rpartition(" ")[2]
    assert slower.endswith("%") and int(slower[:-1]) > 150
    assert " 2 3d 0s 10.0 " in row_of(table, "QmQuick")
    assert row_of(table, "QmSlow").endswith("relay 12.5 - - float32 0+0 1000 left - 2h 0s 10.0 no loss")


def test_a_complete_swarm(run_swarm: Callable[..., Any], tiny_swarm: LocalSwarm, tiny_chat_folder: Path) -> None:
    done = run_swarm("health", "--initial-peers", tiny_swarm.initial_peers[0], "--once", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["healthy"] and report["problems"] == []
    (model,) = report["models"]
    fingerprint = open_checkpoint(str(tiny_chat_folder)).fingerprint()
    assert (model["name"], model["fingerprint"], model["num_blocks"]) == ("tiny-chat", fingerprint, 8)
    assert model["complete"] and model["replicas"] == [1] * 8
    servers = model["servers"]
    assert [server["peer_id"] for server in servers] == [server.peer_id for server in tiny_swarm.servers]
    assert [server["span"] for server in servers] == [[0, 4], [4, 8]]
    assert servers[0]["public_name"] == "[red]evil[/red]"
    for server in servers:
        assert server["state"] == "online" and server["numerics"].startswith("float32/none/cpu")
        assert server["cache_tokens_left"] > 0 and server["throughput"] > 0 and 0 < server["round_trip"] < 5
        assert list(server["decode_times"]) == ["1", "4", "16"] and server["forward_rate"] > 0
        assert (server["running_rows"], server["waiting_rows"]) == (0, 0)

    done = run_swarm("health", "--initial-peers", tiny_swarm.initial_peers[0], "--once", "--model", fingerprint[:8])
    assert done.code == 0 and done.err == ""
    assert "tiny-chat" in done.out and "11111111" in done.out and "[red]evil[/red]" in done.out


def test_a_wanted_model_that_is_absent(run_swarm: Callable[..., Any], tiny_swarm: LocalSwarm) -> None:
    peer = tiny_swarm.initial_peers[0]
    done = run_swarm("health", "--initial-peers", peer, "--once", "--model", "tiny-chat", "--model", "mistral")
    assert done.code == 1
    assert done.err == "no server of this swarm serves mistral\n"


@pytest.fixture
def lonely_node() -> Iterator[str]:
    """The address of a swarm of one peer that serves nothing."""
    node = NodeThread.start(NodeConfig(host_maddrs=(LOOPBACK,)))
    yield node.run(node.node.ready_address())
    node.stop()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_swarm_without_models(run_swarm: Callable[..., Any], lonely_node: str, as_json: bool) -> None:
    done = run_swarm("health", "--initial-peers", lonely_node, "--once", *(["--json"] if as_json else []))
    assert done.code == 1
    assert done.err == "no server of this swarm serves any model\n"
    if as_json:
        assert json.loads(done.out)["models"] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--once --watch", "--once and --watch exclude each other"),
        ("--once --stop-with-stdin", "--once ends by itself"),
        ("--json", "--json goes with --once or --watch"),
        ("--once --update-period 3", "--update-period says how often to look, but --once looks once"),
        ("--once --port 0", "--port is an option of the web monitor, which --once does not start"),
        ("--watch --json --show-addresses", "--show-addresses is an option of the web monitor, which --watch"),
        ("--watch", "--watch draws on a terminal, which standard output is not: add --json"),
        ("--host nobody.invalid", "--host nobody.invalid is neither an address nor a name that can be found"),
        ("--host 192.0.2.1 --port 0", "cannot listen on port 0 of 192.0.2.1"),
    ],
)
def test_options_that_cannot_be_done(run_swarm: Callable[..., Any], options: str, words: str) -> None:
    done = run_swarm("health", "--initial-peers", EXAMPLE_PEER, *options.split())
    assert done.code == 2
    assert done.error.startswith(words)


def test_a_port_in_use(run_swarm: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_swarm("health", "--initial-peers", EXAMPLE_PEER, "--port", port)
    assert done.code == 1
    assert done.error == (
        f"another program listens on port {port} of 127.0.0.1 already: choose another --port, or 0 for any"
    )


@contextmanager
def started(*arguments: Any, terminal: bool = False) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`swarm health ARGUMENTS` as a process, and where its standard output can be read."""
    command = [sys.executable, "-m", "swarm.scripts.main", "health", *map(str, arguments)]
    ours, theirs = pty.openpty() if terminal else os.pipe()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


class Reading:
    """What a process writes. said: without what only moves the cursor or changes colours."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.seen = b""

    @property
    def said(self) -> str:
        return re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", self.seen).decode(errors="replace")

    def until(self, *texts: str) -> None:
        """Until all of these were said."""
        deadline = time.monotonic() + PATIENCE
        while not all(text in self.said for text in texts):
            left = max(deadline - time.monotonic(), 0.0)
            assert select.select([self._descriptor], [], [], left)[0], f"not all of {texts} in {self.seen!r}"
            self.seen += os.read(self._descriptor, 65_536)


def test_watching_in_a_terminal(tiny_swarm: LocalSwarm) -> None:
    arguments = ("--initial-peers", tiny_swarm.initial_peers[0], "--watch", "--model", "mistral")
    with started(*arguments, terminal=True) as (process, output):
        reading = Reading(output)
        reading.until(
            "no server of this swarm serves mistral", "tokens/s expected from here over 2 servers", "block: 11111111"
        )
        assert b"\x1b[?1049h" in reading.seen and b"\x1b[?1049l" not in reading.seen  # on a screen of its own
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        reading.seen += os.read(output, 65_536)
        assert b"\x1b[?1049l" in reading.seen
        assert process.stderr is not None and process.stderr.read() == ""


def test_watching_as_json_until_nobody_reads_it(tiny_swarm: LocalSwarm) -> None:
    """As in `swarm health --watch --json | head -2`."""
    arguments = ("--initial-peers", tiny_swarm.initial_peers[0], "--watch", "--json", "--update-period", 1)
    with started(*arguments) as (process, output):
        reading = Reading(output)
        while reading.seen.count(b"\n") < 2:
            reading.seen += os.read(output, 65_536)
        first, second = map(json.loads, reading.said.splitlines()[:2])
        assert first["healthy"] and second["healthy"] and second["revision"] > first["revision"]
        os.dup2(os.open(os.devnull, os.O_RDONLY), output)
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None and process.stderr.read() == ""


def test_somebody_who_reads_slowly_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    report = summarize(Picture()).model_copy(update={"problems": ("x" * 2**20,)})  # more than a pipe takes
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    with open(reading) as lines:

        async def test() -> None:
            with health_watch.as_lines() as show:
                showing = asyncio.ensure_future(show(report))
                await asyncio.sleep(0.01)
                assert not showing.done()
                assert json.loads(await asyncio.to_thread(lines.readline))["problems"] == list(report.problems)
                await showing

        watchdog = threading.Timer(PATIENCE, lambda: os.close(reading))
        watchdog.start()
        asyncio.run(test())
        watchdog.cancel()
    sys.stdout.close()


def test_where_the_web_monitor_listens() -> None:
    for host, url, is_loopback in (
        ("127.0.0.1", "http://127.0.0.1:{}/", True),
        ("localhost", "http://localhost:{}/", True),
        ("0.0.0.0", "http://127.0.0.1:{}/", False),
    ):
        listener = Listener.open(host, 0)
        with listener.socket:
            assert (listener.url, listener.is_loopback) == (url.format(listener.port), is_loopback)
            with socket.create_connection(("127.0.0.1", listener.port), timeout=PATIENCE):
                pass


@contextmanager
def web_monitor(swarm: LocalSwarm, *arguments: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the address of its page, once it has seen the swarm."""
    peer = swarm.initial_peers[0]
    with started("--initial-peers", peer, "--port", 0, "--update-period", 1, *arguments) as (process, output):
        reading = Reading(output)
        reading.until("\n")
        word, url = reading.said.split()
        assert word == "READY" and re.fullmatch(r"http://127\.0\.0\.1:[0-9]+/", url)
        while not get(f"{url}api/v1/state")["models"]:
            time.sleep(0.1)
        yield process, url


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return json.load(answer)


def test_the_web_monitor_from_its_start_to_its_end(tiny_swarm: LocalSwarm) -> None:
    with web_monitor(tiny_swarm, "--model", "mistral") as (process, url):
        state = get(f"{url}api/v1/state")
        assert state["problems"] == ["no server of this swarm serves mistral"]
        assert [model["complete"] for model in state["models"]] == [True]
        with urllib.request.urlopen(url, timeout=PATIENCE) as page:
            assert "text/html" in page.headers["Content-Type"]
        with urllib.request.urlopen(f"{url}api/v1/events", timeout=PATIENCE) as events:
            while not (line := events.readline()).startswith(b"data:"):
                assert line
            process.terminate()
            events.read()  # a stream that would go on for ever ends
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None and process.stderr.read() == "stopping ...\n"


def test_the_web_monitor_ends_if_its_daemon_does(tiny_swarm: LocalSwarm) -> None:
    with web_monitor(tiny_swarm, "--probe-period", 0) as (process, _):
        (daemon,) = psutil.Process(process.pid).children()
        daemon.kill()
        assert process.wait(PATIENCE) == 1
        assert process.stderr is not None
        last = process.stderr.read().splitlines()[-1]
        assert last.startswith("error: the network daemon died, so the monitor ends: ")
