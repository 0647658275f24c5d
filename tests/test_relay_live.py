"""Servers that nobody can reach directly: processes that do not listen, behind relays of the same swarm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.scripts.local_swarm import LocalSwarm, ServerSpec

PROMPT = torch.tensor([[1, 2, 3, 4, 5]])
FLAGS = ("--dtype", "float32", "--cache-tokens", "2048", "--threads", "1", "--announce-period", "1")


def plain(folder: Path, new_tokens: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return list(model.generate(PROMPT, max_new_tokens=new_tokens, do_sample=False)[0].tolist())


@pytest.fixture(scope="module")
def swarm(tiny_llama_folder: Path) -> Iterator[LocalSwarm]:
    """One server that all can reach, of no use for the last blocks; two behind it."""
    hidden = [ServerSpec(blocks, listens=False) for blocks in ("2:5", "5:8")]
    with LocalSwarm(tiny_llama_folder, ["0:2", *hidden], flags=FLAGS) as swarm:
        yield swarm


def test_tokens_through_relays(swarm: LocalSwarm, connect: Any, tiny_llama_folder: Path, one_thread: None) -> None:
    open_one, *hidden = swarm.servers
    for server in hidden:
        assert server.address == f"{open_one.address}/p2p-circuit/p2p/{server.peer_id}"
    model = connect()
    with model.inference_session(max_length=64) as session:
        tokens = model.generate(PROMPT, max_new_tokens=24, do_sample=False)
        assert tokens[0].tolist() == plain(tiny_llama_folder, 24)
        print(session.report())
