"""`swarm adapters`: what it says of made-up records, and of a real swarm without any."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from swarm.checkpoint import open_checkpoint
from swarm.data_structures import AdapterInfo, BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import ModelNotServed, UsageError
from swarm.scripts import adapters as command
from swarm.scripts.adapters import choose_model, print_table, summarize, to_json
from swarm.scripts.local_swarm import LocalSwarm

MODEL = ModelInfo(name="llama", fingerprint="ab" * 32, num_blocks=8, hidden_size=64)
FR, OTHER_FR, DE = (AdapterInfo(name, "lora", digit * 16) for name, digit in (("fr", "1"), ("fr", "2"), ("[b]de", "3")))


def record(peer_id: str, start: int, end: int, *adapters: AdapterInfo, **more: Any) -> ServerRecord:
    settings = {"state": ServerState.ONLINE, **more}
    span = BlockSpan(start=start, end=end)
    info = ServerInfo(
        span=span, throughput=1.0, numerics="fp32", cache_tokens_left=1, adapters=tuple(adapters), **settings
    )
    return ServerRecord(peer_id, info, expires=1e10)


RECORDS = [
    record("QmA", 0, 5, FR, DE),
    record("QmB", 5, 8, FR, FR._replace(name="it")),
    record("QmC", 4, 6, OTHER_FR, DE._replace(kind="adapter"), fetches_adapters=True),
    record("QmD", 0, 2, DE),
    record("QmE", 0, 8, DE, state=ServerState.DRAINING),
]


def test_blocks_and_servers_of_each_adapter() -> None:
    report = to_json(summarize(MODEL, RECORDS))
    assert (report["model"], report["fingerprint"], report["num_blocks"]) == ("llama", MODEL.fingerprint, 8)
    assert report["fetching_blocks"] == "4:6"
    assert [tuple(adapter.values()) for adapter in report["adapters"]] == [
        ("[b]de", "lora", DE.digest, "0:6", 3, False),
        ("fr", "lora", FR.digest, "0:8", 2, True),
        ("fr", "lora", OTHER_FR.digest, "4:6", 1, False),
        ("it", "lora", FR.digest, "5:8", 1, False),
    ]
    assert list(report["adapters"][0]) == ["name", "kind", "digest", "blocks", "servers", "complete"]


def table_of(*records: ServerRecord) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    print_table(summarize(MODEL, records), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table() -> None:
    lines = table_of(*RECORDS).splitlines()
    assert lines[0] == "llama  fingerprint abababababab, 8 blocks"
    words = [line.split() for line in lines]
    assert ["[b]de", "lora", DE.digest, "0:6", "3", "incomplete"] in words  # names are no markup
    assert ["fr", "lora", FR.digest, "0:8", "2", "complete"] in words
    assert lines[-1] == "servers of blocks 4:6 fetch adapters of the hub when asked to"


def test_no_adapters() -> None:
    assert table_of(record("QmA", 0, 8)).splitlines()[1:] == ["no server has any adapter"]


def test_the_model_is_found_by_name_or_fingerprint() -> None:
    other = ModelInfo(name="other", fingerprint="cd" * 32, num_blocks=3, hidden_size=64)
    twin = ModelInfo(name="llama", fingerprint="ef" * 32, num_blocks=8, hidden_size=64)
    assert choose_model([MODEL, other], "llama", "llama") == MODEL
    assert choose_model([MODEL, other, twin], "cdcd", "cdcd") == other
    with pytest.raises(ModelNotServed, match="no server in the swarm serves lama; models in the swarm: llama, other"):
        choose_model([other, MODEL], "lama", "lama")
    with pytest.raises(UsageError, match=r"name one by its fingerprint \(abababababab, efefefefefef\)"):
        choose_model([twin, MODEL, other], "llama", "llama")


def test_json_of_a_real_swarm(run_swarm: Callable[..., Any], tiny_swarm: LocalSwarm, tiny_chat_folder: Path) -> None:
    peers = ["--initial-peers", *tiny_swarm.initial_peers]
    for model in (tiny_chat_folder, "tiny-chat"):
        done = run_swarm("adapters", model, *peers, "--json")
        assert done.code == 0, done.err
        report = json.loads(done.out)
        assert report["fingerprint"] == open_checkpoint(str(tiny_chat_folder)).fingerprint()
        assert (report["model"], report["num_blocks"], report["adapters"]) == ("tiny-chat", 8, [])


def test_the_command_prints_what_it_found(run_swarm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def look(peers: tuple[str, ...], given: str, name: str) -> tuple[ModelInfo, list[ServerRecord]]:
        assert (given, name) == ("llama", "llama")
        return MODEL, RECORDS

    monkeypatch.setattr(command, "_look", look)
    address = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
    done = run_swarm("adapters", "llama", "--initial-peers", address)
    assert done.code == 0, done.err
    assert "complete" in done.out and "[b]de" in done.out
