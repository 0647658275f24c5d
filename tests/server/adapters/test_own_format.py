"""Petswarm's own format: everything of the normal form goes out and comes back, and what only it has is read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_adapters import FINGERPRINT, apply_forms, plain_base
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from swarm.data_structures import BlockSpan
from swarm.errors import AdapterError
from swarm.server.adapters.base import BaseBlocks, base_weight
from swarm.server.adapters.forms import (
    AdapterForms,
    BlockForms,
    Bottleneck,
    KeyValuePrefix,
    LinearForm,
    LowRank,
    NormForm,
    Sparse,
    tensors_of,
)
from swarm.server.adapters.importing import import_adapter, read_manifest
from swarm.server.adapters.importing.own import unpack_bits, write_own
from swarm.server.loader import load_span

IDS = torch.arange(24).reshape(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        answer: torch.Tensor = model(input_ids=IDS).logits
    return answer


def write(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir()
    config = {"format": 1, "kind": "test", "base": FINGERPRINT, "num_blocks": 8} | changes
    (folder / "petswarm_adapter.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter.safetensors")
    return folder


def everything() -> AdapterForms:
    """Every part of the normal form, different in each block."""
    torch.manual_seed(3)

    def block(number: int) -> BlockForms:
        linear = LinearForm(
            torch.randn(64),
            torch.randn(64),
            torch.randn(64),
            LowRank(torch.randn(number + 1, 64), torch.randn(64, number + 1)),
            Sparse.of(torch.tensor([0, 5, 64 * 64 - 1], dtype=torch.int32), torch.randn(3), 64, 64),
        )
        behind_mlp = Bottleneck(torch.randn(4, 64), torch.randn(64, 4), torch.randn(4), torch.randn(64), "gelu")
        behind_block = Bottleneck(torch.randn(2, 64), torch.randn(64, 2), activation="tanh")
        norms = {"input_layernorm": NormForm(weight=torch.randn(64))}
        return BlockForms({"self_attn.q_proj": linear}, {"": behind_block, "mlp": behind_mlp}, norms)

    prefix = KeyValuePrefix(torch.randn(8, 2, 5, 16), torch.randn(8, 2, 5, 16))
    return AdapterForms([block(number) for number in range(8)], prefix)


def test_all_of_the_normal_form_comes_back(tiny_model: Any, tmp_path: Path) -> None:
    forms = everything()
    write_own(tmp_path / "adapter", forms, "mixture", FINGERPRINT)
    manifest = read_manifest(tmp_path / "adapter")
    assert (manifest.kind, manifest.format) == ("mixture", "petswarm")
    again = import_adapter(tmp_path / "adapter", plain_base(tiny_model))
    pairs = list(zip(tensors_of(forms), tensors_of(again), strict=True))
    assert len(pairs) == 8 * (8 + 4 + 2 + 1) + 2
    assert all(torch.equal(old, new) and old.dtype == new.dtype for old, new in pairs)
    assert [b.activation for b in again.blocks[0].bottlenecks.values()] == ["tanh", "gelu"]


def test_a_span_gets_its_blocks(tiny_model: Any, tmp_path: Path) -> None:
    forms = everything()
    write_own(tmp_path / "adapter", forms, "mixture", FINGERPRINT)
    part = import_adapter(tmp_path / "adapter", plain_base(tiny_model, BlockSpan(start=3, end=5)))
    assert forms.prefix is not None and part.prefix is not None
    cut = AdapterForms(forms.blocks[3:5], KeyValuePrefix(forms.prefix.keys[3:5], forms.prefix.values[3:5]))
    assert all(torch.equal(old, new) for old, new in zip(tensors_of(cut), tensors_of(part), strict=True))


def test_forms_are_of_the_spans_dtype_and_sparse_values_are_not(tiny_model: Any, tmp_path: Path) -> None:
    write_own(tmp_path / "adapter", everything(), "mixture", FINGERPRINT)
    model = copy.deepcopy(tiny_model).bfloat16()
    forms = import_adapter(tmp_path / "adapter", plain_base(model))
    dtypes = [tensor.dtype for tensor in tensors_of(forms)]
    assert [dtypes.count(kind) for kind in (torch.float32, torch.int32, torch.int16)] == [8, 8, 8]
    assert set(dtypes) == {torch.float32, torch.int32, torch.int16, torch.bfloat16}
    assert all(tensor.is_contiguous() for tensor in tensors_of(forms))


def test_bitfit_adds_to_biases_and_replaces_norms(tiny_model: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    changed = copy.deepcopy(tiny_model)
    tensors = {}
    for number, block in enumerate(changed.model.layers):
        bias, norm = torch.randn(128), torch.rand(64) + 0.5
        block.mlp.up_proj.bias = torch.nn.Parameter(bias)
        block.post_attention_layernorm.weight.data = norm
        tensors[f"blocks.{number}.mlp.up_proj.bias_out"] = bias
        tensors[f"blocks.{number}.post_attention_layernorm.norm.weight"] = norm
    folder = write(tmp_path / "adapter", tensors, kind="bitfit")
    with apply_forms(tiny_model, import_adapter(folder, plain_base(tiny_model))):
        answer, expected = logits(tiny_model), logits(changed)
    assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert read_manifest(folder).kind == "bitfit"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_diff_pruning_adds_to_some_entries(tiny_model: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    changed = copy.deepcopy(tiny_model)
    tensors = {}
    for number, block in enumerate(changed.model.layers):
        indices, values = torch.randperm(64 * 128)[:50], torch.randn(50)
        block.mlp.down_proj.weight.data.view(-1)[indices] += values
        tensors[f"blocks.{number}.mlp.down_proj.sparse.indices"] = indices.to(dtype)
        tensors[f"blocks.{number}.mlp.down_proj.sparse.values"] = values
    folder = write(tmp_path / "adapter", tensors, kind="diff")
    with apply_forms(tiny_model, import_adapter(folder, plain_base(tiny_model))):
        answer, expected = logits(tiny_model), logits(changed)
    assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_mask_switches_weights_off(tiny_model: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    changed = copy.deepcopy(tiny_model)
    tensors = {}
    for number, block in enumerate(changed.model.layers):
        keep = torch.rand(64, 128) > 0.1
        block.mlp.down_proj.weight.data *= keep
        tensors[f"blocks.{number}.mlp.down_proj.mask"] = torch.from_numpy(np.packbits(keep.numpy(), axis=1))
    folder = write(tmp_path / "adapter", tensors, kind="maskbert")
    with apply_forms(tiny_model, import_adapter(folder, plain_base(tiny_model))):
        answer, expected = logits(tiny_model), logits(changed)
    assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def quantised_base(tiny_checkpoint: Any) -> BaseBlocks:
    """Blocks 2 and 3 of the tiny Llama in int8."""
    cpu, blocks = torch.device("cpu"), BlockSpan(start=2, end=4)
    span = load_span(tiny_checkpoint, blocks, dtype=torch.float32, quantization="int8", device=cpu)
    base = BaseBlocks(
        span._model.layers, blocks, span._architecture, tiny_checkpoint.config, FINGERPRINT, cpu, torch.float32
    )
    name = "model.layers.3.self_attn.q_proj.weight"
    exact = tiny_checkpoint.read([name])[name]
    assert (base_weight(base.linear(3, "self_attn.q_proj")) - exact).abs().max() > 1e-4, (
        "the weights were not quantised"
    )
    return base


def test_a_mask_takes_away_what_the_quantised_base_multiplies_by(tmp_path: Path, quantised_base: BaseBlocks) -> None:
    keep = torch.rand(64, 64) > 0.5
    mask = torch.from_numpy(np.packbits(keep.numpy(), axis=1))
    folder = write(tmp_path / "adapter", {"blocks.3.self_attn.q_proj.mask": mask})
    sparse = import_adapter(folder, quantised_base).blocks[1].linear["self_attn.q_proj"].sparse
    assert sparse is not None
    assert torch.equal(sparse.values, -base_weight(quantised_base.linear(3, "self_attn.q_proj"))[~keep])


def test_dora_divides_by_the_norm_of_the_quantised_base(tmp_path: Path, quantised_base: BaseBlocks) -> None:
    """With magnitudes that are these norms and no difference, it does nothing."""
    tensors = {}
    for block in (2, 3):
        name = f"base_model.model.model.layers.{block}.self_attn.q_proj"
        weight = base_weight(quantised_base.linear(block, "self_attn.q_proj"))
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = torch.ones(4, 64), torch.zeros(64, 4)
        tensors[f"{name}.lora_magnitude_vector"] = weight.norm(dim=1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    scale = import_adapter(folder, quantised_base).blocks[1].linear["self_attn.q_proj"].scale_out
    assert scale is not None and (scale - 1).abs().max() < 1e-6


@given(st.integers(1, 40), st.integers(1, 5), st.randoms(use_true_random=False))
def test_bits_are_those_of_numpy(length: int, rows: int, random: Any) -> None:
    bits = np.array([[random.random() < 0.5 for _ in range(length)] for _ in range(rows)])
    assert torch.equal(unpack_bits(torch.from_numpy(np.packbits(bits, axis=1)), length), torch.from_numpy(bits))


def test_different_activations_behind_one_module_cannot_be_written(tmp_path: Path) -> None:
    blocks = [
        BlockForms(bottlenecks={"mlp": Bottleneck(torch.ones(1, 4), torch.ones(4, 1), activation=activation)})
        for activation in ("relu", "gelu")
    ]
    with pytest.raises(AdapterError, match="same activation"):
        write_own(tmp_path / "adapter", AdapterForms(blocks), "x", FINGERPRINT)
    assert not (tmp_path / "adapter").exists()
