"""What tests of checkpoints share: a tiny model, in one weight file and in several."""

import hashlib
from pathlib import Path

import pytest


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
