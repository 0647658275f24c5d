"""Embeddings and head on another device than the CPU. The tests of what a GPU computes need one: pytest -m gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from local_blocks import LocalConnection
from transformers import LlamaForCausalLM

from swarm.client.model import AutoSwarmModelForCausalLM
from swarm.devices import device_of
from swarm.errors import UsageError

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


def load(folder: Path, **settings: Any) -> Any:
    return AutoSwarmModelForCausalLM.from_pretrained(folder, initial_peers=[PEER], **settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "no such device: 'gpu'; write cpu, cuda or cuda:N"),
        ("meta", "'meta' is no device to compute on"),
        ("cuda", "device cuda is not available here; use cpu"),
        ("cuda:1", "device cuda:1 is not available here"),
    ],
)
def test_devices_that_are_not_there(
    name: str, message: str, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anybody is contacted."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("swarm.client.model.SwarmConnection", None)
    with pytest.raises(UsageError, match=message):
        load(tiny_llama_folder, device=name)


def test_a_device_behind_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert device_of("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="there is no cuda:2: this machine has 2 CUDA devices"):
        device_of("cuda:2")


@pytest.mark.gpu
@pytest.mark.parametrize("moved", [False, True], ids=["from_pretrained", "to"])
def test_a_client_on_a_gpu(
    moved: bool, connection: LocalConnection, plain: LlamaForCausalLM, tiny_llama_folder: Path
) -> None:
    model = load(tiny_llama_folder).to("cuda") if moved else load(tiny_llama_folder, device="cuda")
    assert model.device.type == "cuda"
    ids = torch.randint(1, 256, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for options in ({}, {"num_beams": 3}, {"output_hidden_states": True}, {"use_cache": False}):
        options = {"attention_mask": mask, "max_new_tokens": 8, **options}
        expected = plain.generate(ids, **options)
        cuda = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        assert torch.equal(model.generate(ids.cuda(), **cuda).cpu(), expected)
    soft = model.add_soft_prompts(3)
    model(ids.cuda(), labels=ids.cuda()).loss.backward()
    assert soft.grad.device.type == "cuda" and soft.grad.abs().sum() > 0
