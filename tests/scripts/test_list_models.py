"""`swarm models`: what it says of made-up records, and of a swarm with two models."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hivemind.p2p import P2PContext
from hivemind.proto import runtime_pb2
from rich.console import Console

from swarm.data_structures import AdapterInfo, BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import Directory, ServerRecord
from swarm.monitor.picture import ModelPicture
from swarm.node import NodeConfig
from swarm.node_thread import NodeThread
from swarm.protocol import BlockProtocol
from swarm.routing.snapshot import Snapshot
from swarm.scripts.list_models import print_table, to_json
from swarm.scripts.local_swarm import LOOPBACK

LLAMA = ModelInfo(name="llama", fingerprint="ab" * 32, num_blocks=8, hidden_size=64)
OTHER = ModelInfo(name="[b]other", fingerprint="cd" * 32, num_blocks=6, hidden_size=64)
FR, DE = AdapterInfo("fr", "lora", "1" * 16), AdapterInfo("de", "lora", "2" * 16)


def info(start: int, end: int, state: ServerState = ServerState.ONLINE, *adapters: AdapterInfo) -> ServerInfo:
    return ServerInfo(
        state=state,
        span=BlockSpan(start=start, end=end),
        throughput=12.5,
        numerics="float32",
        cache_tokens_left=1000,
        adapters=tuple(adapters),
    )


RECORDS = {
    LLAMA.fingerprint: [
        ServerRecord("QmA", info(0, 5, ServerState.ONLINE, FR, DE), 1e10),
        ServerRecord("QmB", info(3, 8, ServerState.ONLINE, FR), 1e10),
        ServerRecord("QmC", info(0, 8, ServerState.JOINING), 1e10),
        ServerRecord("QmSilent", info(0, 8), 1e10),
    ],
    OTHER.fingerprint: [ServerRecord("QmD", info(0, 2), 1e10), ServerRecord("QmE", info(4, 5), 1e10)],
}


def pictures() -> tuple[ModelPicture, ...]:
    pings = {f"Qm{letter}": 0.01 for letter in "ABCDE"}
    return tuple(
        ModelPicture(model, Snapshot.build(model.num_blocks, RECORDS[model.fingerprint], pings, 0.0))
        for model in (OTHER, LLAMA)
    )


def test_what_is_told_of_each_model() -> None:
    other, llama = to_json(pictures())["models"]
    assert llama == {
        "name": "llama",
        "fingerprint": "ab" * 32,
        "num_blocks": 8,
        "complete": True,
        "covered_blocks": 8,
        "missing_blocks": "",
        "servers": 2,
        "replicas": 1,
        "weakest_blocks": "0:3, 5:8",
        "adapters": 2,
    }
    assert (other["name"], other["complete"], other["covered_blocks"]) == ("[b]other", False, 3)
    assert (other["missing_blocks"], other["weakest_blocks"], other["replicas"]) == ("2:4, 5:6", "2:4, 5:6", 0)


def table_of(models: tuple[ModelPicture, ...]) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    print_table(models, console)
    assert isinstance(console.file, io.StringIO)
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_the_table() -> None:
    rows = table_of(pictures())
    assert ["llama", "abababababab", "complete", "8", "of", "8", "-", "2", "1", "(blocks", "0:3,", "5:8)", "2"] in rows
    # Names are no markup.
    assert ["[b]other", "cdcdcdcdcdcd", "incomplete", "3", "of", "6", "2:4,", "5:6", "2", "0", "0"] in rows
    assert table_of(()) == [["no", "server", "of", "this", "swarm", "serves", "any", "model"]]


class Answering(BlockProtocol):
    """What a server says when it is asked, and nothing else."""

    def __init__(self, info: ServerInfo):
        self._info = info

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        return runtime_pb2.ExpertInfo(serialized_info=self._info.model_dump_json().encode())


@pytest.fixture
def two_models() -> Iterator[str]:
    """An address of a swarm with two models: `llama` is whole, `other` lacks what a server that does not answer has."""
    with ExitStack() as stack:

        def add(model: ModelInfo, info: ServerInfo, peers: tuple[str, ...], answers: bool = True) -> str:
            thread = NodeThread.start(NodeConfig(host_maddrs=(LOOPBACK,), initial_peers=peers))
            stack.callback(thread.stop)
            if answers:
                thread.run(BlockProtocol().add_p2p_handlers(thread.node.p2p, wrapper=Answering(info)))
            thread.run(Directory(thread.node).announce(model, info, ttl=60.0))
            return thread.run(thread.node.ready_address())

        first = add(LLAMA, info(0, 8, ServerState.ONLINE, FR), ())
        add(OTHER, info(0, 4), (first,))
        add(OTHER, info(3, 6), (first,), answers=False)
        yield first


def test_a_swarm_with_two_models(run_swarm: Callable[..., Any], two_models: str) -> None:
    done = run_swarm("models", "--initial-peers", two_models, "--json")
    assert (done.code, done.err) == (0, "")
    other, llama = json.loads(done.out)["models"]
    assert (llama["name"], llama["complete"], llama["servers"], llama["adapters"]) == ("llama", True, 1, 1)
    assert (other["name"], other["complete"], other["servers"]) == ("[b]other", False, 1)
    assert other["missing_blocks"] == "4:6"

    done = run_swarm("models", "--initial-peers", two_models)
    assert (done.code, done.err) == (0, "")
    assert "[b]other" in done.out and "4 of 6" in done.out
    done = run_swarm("health", "--initial-peers", two_models, "--once")
    assert done.code == 1  # that is the probe


def test_which_swarm_has_to_be_said(run_swarm: Callable[..., Any]) -> None:
    done = run_swarm("models")
    assert done.code == 2 and done.error.startswith("say which swarm: --initial-peers")
