"""Adapters made up for benchmarks: each kind is what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.checkpoint import open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.scripts.made_adapters import BOTTLENECK, KINDS, RANK, made_adapter
from swarm.server.adapters.base import base_weight
from swarm.server.loader import load_span
from swarm.server.span import Span


@pytest.fixture(scope="module")
def span(tiny_llama_folder: Path) -> Span:
    blocks = BlockSpan(start=0, end=2)
    checkpoint = open_checkpoint(str(tiny_llama_folder))
    return load_span(checkpoint, blocks, dtype=torch.float32, quantization="none", device=torch.device("cpu"))


def test_lora(span: Span) -> None:
    first, second = made_adapter(span, "LoRA", 0).blocks
    assert set(first.linear) == set(second.linear) == {"self_attn.q_proj", "self_attn.v_proj"}
    for form in first.linear.values():
        assert form.low_rank is not None and len(form.low_rank.down) == RANK and form.sparse is None


def test_adapters(span: Span) -> None:
    for block in made_adapter(span, "adapters", 0).blocks:
        (path,) = block.bottlenecks
        assert path == "mlp.down_proj" and len(block.bottlenecks[path].down) == BOTTLENECK and not block.linear


def test_bitfit(span: Span) -> None:
    for block in made_adapter(span, "BitFit", 0).blocks:
        assert len(block.linear) == 7 and all(form.bias_out is not None for form in block.linear.values())


def test_diff_pruning_changes_few_weights(span: Span) -> None:
    forms = [form.sparse for block in made_adapter(span, "diff pruning", 0).blocks for form in block.linear.values()]
    shares = [len(form.values) / (form.out_features * form.in_features) for form in forms if form is not None]
    assert len(shares) == 14 and all(0.004 < share < 0.007 for share in shares)
    for form in forms:
        assert form is not None and bool((form.indices[1:] > form.indices[:-1]).all())


def test_maskbert_switches_weights_off(span: Span) -> None:
    form = made_adapter(span, "MaskBert", 0).blocks[1].linear["mlp.up_proj"].sparse
    assert form is not None
    weight = base_weight(span.modules[1].mlp.up_proj).flatten().clone()
    assert bool((weight != 0).all())
    weight[form.indices.long()] += form.values
    assert int((weight == 0).sum()) == len(form.indices) > 0


def test_another_seed_is_another_task_of_the_same_size(span: Span) -> None:
    for kind in KINDS:
        one, same, other = (made_adapter(span, kind, seed) for seed in (0, 0, 1))
        assert one.nbytes == same.nbytes == pytest.approx(other.nbytes, rel=0.02)
