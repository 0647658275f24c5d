"""The comparison of a device with plain transformers, on the CPU; the same on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.checkpoint import open_checkpoint
from swarm.scripts.bench_decode import load_local
from swarm.scripts.bench_quantization import Kind
from swarm.scripts.check_device import (
    KINDS,
    ROUNDING,
    check_graph,
    check_kind,
    first_difference,
    is_rounding,
)


def test_a_swarm_has_the_tokens_of_plain_transformers(
    tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_kind(str(tiny_llama_folder), KINDS[0], device="cpu", num_servers=1, num_clients=2, new_tokens=8)
    gradient, adapters, alone, together = capsys.readouterr().out.splitlines()
    assert gradient.startswith("float32, training: the gradient of 3 x 48 embeddings is")
    assert gradient.endswith("ok")
    assert adapters.startswith("float32, adapters: 13 rows of 6 kinds and none beside each other")
    assert adapters.endswith("ok")
    assert alone.startswith("float32, alone: 2 of 2 texts of 8 tokens equal")
    assert together.startswith("float32, together: 2 of 2 texts of 8 tokens equal")


def test_other_tokens_are_noticed(tiny_llama_folder: Path) -> None:
    plain = load_local(open_checkpoint(str(tiny_llama_folder)), "float32")
    prompt = torch.tensor([[5, 6, 7]])
    tokens = plain.generate(prompt, max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert first_difference(plain, prompt, tokens) is None
    tokens[4] = (tokens[4] + 1) % 256
    lead = first_difference(plain, prompt, tokens)
    assert lead is not None
    assert lead > 0


def test_float32_forgives_nothing() -> None:
    float32, bfloat16, *_ = KINDS
    assert is_rounding(float32, [])
    assert not is_rounding(float32, [1e-9])
    assert is_rounding(bfloat16, [1e-9, ROUNDING / 2])
    assert not is_rounding(bfloat16, [1e-9, ROUNDING])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_on_a_gpu(kind: Kind, tiny_llama_folder: Path) -> None:
    assert check_kind(str(tiny_llama_folder), kind, device="cuda", num_servers=2, num_clients=2, new_tokens=16)


@pytest.mark.gpu
def test_a_decoding_step_as_a_cuda_graph(tiny_llama_folder: Path) -> None:
    assert check_graph(str(tiny_llama_folder), device="cuda", new_tokens=16)
