"""What tests of checkpoints share: a tiny model, in one weight file and in several, and a hub that has it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import FakeHub, ask

from swarm import range_download


@pytest.fixture(scope="session")
def llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def folder(llama, tmp_path):
    """One weight file."""
    llama.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def sharded(llama, tmp_path):
    """Several weight files and an index."""
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


@pytest.fixture
def hashed(monkeypatch):
    """The files whose contents were hashed."""
    seen = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: seen.append(Path(file.name)) or digest(file, name))
    return seen


@pytest.fixture
def hub_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of the test's own, and a hub that is not waited for long."""
    monkeypatch.setenv("PETSWARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(range_download, "RETRY_DELAYS", (0.01, 0.01))


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], FakeHub]]:
    """A function that starts a hub with the files of a folder and makes it the one that is asked."""
    hubs = []

    def start(folder: Path) -> FakeHub:
        hubs.append(FakeHub(folder))
        ask(hubs[-1].url, monkeypatch)
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.close()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    ask("http://127.0.0.1:9", monkeypatch)
