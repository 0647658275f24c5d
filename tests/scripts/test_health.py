"""`swarm health`: what it says of real swarms, of made-up records, and by its exit code."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from swarm.checkpoint import open_checkpoint
from swarm.data_structures import BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.monitor.picture import ModelPicture, Picture
from swarm.monitor.summary import problems, summarize
from swarm.node import NodeConfig
from swarm.node_thread import NodeThread
from swarm.routing.snapshot import Snapshot
from swarm.scripts.health_table import print_tables
from swarm.scripts.local_swarm import LOOPBACK, LocalSwarm

MODEL = ModelInfo(name="llama", fingerprint="ab" * 32, num_blocks=8, hidden_size=64)


def record(
    peer_id: str, start: int, end: int, state: ServerState = ServerState.ONLINE, name: str = "", **measured: Any
) -> ServerRecord:
    info = ServerInfo(
        state=state,
        span=BlockSpan(start=start, end=end),
        throughput=12.5,
        numerics="float32",
        cache_tokens_left=1000,
        public_name=name,
        **measured,
    )
    return ServerRecord(peer_id, info, expires=1e10)


def picture_of(*records: ServerRecord, silent: str = "", model: ModelInfo = MODEL) -> ModelPicture:
    pings = {record.peer_id: math.inf if record.peer_id == silent else 0.01 for record in records}
    return ModelPicture(model, Snapshot.build(model.num_blocks, records, pings, 0.0))


def table_of(model: ModelPicture) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    print_tables(summarize(Picture((model,))).models, console)
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


def test_the_table_of_a_model() -> None:
    replicas = [record(f"Qm{index}", 0, 2) for index in range(10)]
    measured = {"forward_rate": 456.7, "network_rate": 1.25e7, "running_rows": 3, "waiting_rows": 2}
    alice = record("QmB", 4, 8, name="alice", **measured)
    text = table_of(picture_of(*replicas, record("QmSilent", 2, 4), alice, silent="QmSilent"))
    headline, bar, *table = text.splitlines()
    assert headline == f"llama  fingerprint {'ab' * 6}, 8 blocks, incomplete"
    assert bar.strip() == "replicas of each block: ++001111"
    (silent,) = [line.split() for line in table if "QmSilent" in line]
    assert " ".join(silent) == "- ...QmSilent 2:4 online 12.5 - - float32 0 + 0 1000 -"
    (row,) = [line.split() for line in table if "alice" in line]
    assert " ".join(row) == "alice ...QmB 4:8 online 12.5 457 12.5 MB/s float32 3 + 2 1000 10.0 ms"


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


def test_there_is_no_web_monitor_yet(run_swarm: Callable[..., Any]) -> None:
    done = run_swarm("health", "--initial-peers", "/ip4/127.0.0.1/tcp/1")
    assert done.code == 2
    assert done.error.startswith("the web monitor is not part of this version: use --once")
