"""Every kind of peft's adapters that can be imported gives peft's own logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_adapters import plain_base
from safetensors.torch import load_file, save_file
from tiny_families import ALWAYS, blocks_of, tiny_config
from transformers import AutoModelForCausalLM, Qwen2Config

from swarm.architectures import architecture_of
from swarm.errors import AdapterError
from swarm.server.adapters.base import is_norm, linear_layers
from swarm.server.adapters.importing import import_adapter, read_manifest

peft = pytest.importorskip("peft")

Save = Callable[..., tuple[Path, torch.Tensor]]
Check = Callable[..., Any]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model_with_biases() -> Any:
    """A Qwen2 of 6 blocks, whose q, k and v have biases that are not zero."""
    config = Qwen2Config(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=256,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 9},
        {"use_dora": True},
        {
            "rank_pattern": {"q_proj": 3, "layers.4.mlp.up_proj": 5},
            "alpha_pattern": {r"^model\.layers\.2\.mlp\.up_proj": 1},
        },
        {"alpha_pattern": {r"model.layers.\d+.self_attn.k_proj": 64, "k_proj": 1}},
        {"layers_to_transform": [3, 4], "layers_pattern": "layers"},
        {"exclude_modules": ["down_proj"]},
        {"target_modules": r".*\.(3|4)\.self_attn\.[qv]_proj"},
        {"modules_to_save": ["input_layernorm"]},
    ],
    ids=str,
)
def test_lora(tiny_model: Any, save_peft: Save, check: Check, settings: dict[str, Any]) -> None:
    config = peft.LoraConfig(**({"r": 6, "lora_alpha": 5, "target_modules": ALL} | settings))
    folder, expected = save_peft(tiny_model, config)
    check(folder, tiny_model, expected)
    manifest = read_manifest(folder)
    assert (manifest.kind, manifest.format) == ("dora" if "use_dora" in settings else "lora", "peft")


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"use_dora": True},
        {"use_dora": True, "bias": "all"},
    ],
    ids=str,
)
def test_lora_with_biases(model_with_biases: Any, save_peft: Save, check: Check, settings: dict[str, Any]) -> None:
    config = peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings))
    folder, expected = save_peft(model_with_biases, config)
    check(folder, model_with_biases, expected)


#: The client's part of these has biases, or their experts do, which "all" would train as well.
OTHER_BIASES = {"bloom", "falcon", "gpt_neox", "gpt_oss", "opt", "stablelm"}
#: peft finds no linear layers here, or wraps fused experts.
NOT_FOR_PEFT = {"deepseek_v3", "gpt2", "qwen3_moe"}


@pytest.mark.parametrize("model_type", [name for name in ALWAYS if name not in NOT_FOR_PEFT])
def test_families(model_type: str, save_peft: Save, check: Check) -> None:
    """All linear layers and norms of a block of every family that is served: they are found where peft finds them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    blocks = blocks_of(model)
    linear = list(linear_layers(blocks[0]))
    # peft goes by the ends of names: OPT calls a norm of its blocks like its last one, which is the client's.
    last = architecture_of(model.config).norm
    norms = [name for name, child in blocks[0].named_children() if is_norm(child) and name != last]
    bias: Any = "lora_only" if model_type in OTHER_BIASES else "all"
    config = peft.LoraConfig(target_modules=linear, use_dora=True, bias=bias, modules_to_save=norms)
    folder, expected = save_peft(model, config)
    forms = check(folder, model, expected)
    assert forms.blocks[5].linear.keys() == set(linear_layers(blocks[5])) & set(linear)
    assert forms.blocks[5].norms.keys() == set(norms)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_lora_without_the_biases_that_it_says_it_has(model_with_biases: Any, save_peft: Save, bias: str) -> None:
    folder, _ = save_peft(model_with_biases, peft.LoraConfig(target_modules=["q_proj"], bias=bias))
    weights = folder / "adapter_model.safetensors"
    lacking = "layers.2.self_attn.q_proj.base_layer.bias"
    save_file({name: tensor for name, tensor in load_file(weights).items() if not name.endswith(lacking)}, weights)
    with pytest.raises(AdapterError, match=r"lacks the bias of self_attn\.q_proj in block 2"):
        import_adapter(folder, plain_base(model_with_biases))


def test_lora_in_half_precision_is_read(
    tiny_model: Any, save_peft: Save, load_peft: Callable[..., torch.Tensor], check: Check
) -> None:
    folder, _ = save_peft(tiny_model, peft.LoraConfig(target_modules=["q_proj", "up_proj"]), spread=1.0)
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    check(folder, tiny_model, load_peft(tiny_model, folder))


@pytest.mark.parametrize("alpha", [5, 0])
def test_adalora(tiny_model: Any, save_peft: Save, check: Check, alpha: int) -> None:
    config = peft.AdaLoraConfig(init_r=6, lora_alpha=alpha, total_step=10, target_modules=ALL)
    folder, expected = save_peft(tiny_model, config, ("lora_",), spread=0.3)
    check(folder, tiny_model, expected)


def test_adalora_of_which_some_ranks_are_left(tiny_model: Any, save_peft: Save, check: Check) -> None:
    """A layer has 2 of 6 ranks, another one none."""
    left = {
        f"model.layers.{block}.self_attn.q_proj.lora_E": [True, False, False, True, False, False] for block in range(8)
    }
    left["model.layers.3.self_attn.q_proj.lora_E"] = [False] * 6
    config = peft.AdaLoraConfig(init_r=6, total_step=10, target_modules=["q_proj"], rank_pattern=left)
    folder, expected = save_peft(tiny_model, config, ("lora_",), spread=0.5)
    forms = check(folder, tiny_model, expected)
    assert forms.blocks[2].linear["self_attn.q_proj"].low_rank.down.shape == (2, 64)
    assert not forms.blocks[3].linear


@pytest.mark.parametrize("with_biases", [False, True])
def test_ia3(tiny_model: Any, model_with_biases: Any, save_peft: Save, check: Check, with_biases: bool) -> None:
    model = model_with_biases if with_biases else tiny_model
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    folder, expected = save_peft(model, config)
    forms = check(folder, model, expected)
    assert forms.blocks[0].linear["mlp.down_proj"].scale_in is not None
    assert forms.blocks[0].linear["self_attn.k_proj"].scale_out is not None


def test_ln_tuning(tiny_model: Any, save_peft: Save, check: Check) -> None:
    config = peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"])
    folder, expected = save_peft(tiny_model, config)
    check(folder, tiny_model, expected)


def test_shira(tiny_model: Any, save_peft: Save, check: Check) -> None:
    config = peft.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"])
    folder, expected = save_peft(tiny_model, config)
    forms = check(folder, tiny_model, expected)
    indices = forms.blocks[0].linear["mlp.down_proj"].sparse.indices
    assert (indices.diff() > 0).all() and len(indices) == 2 * (64 + 128)


@pytest.mark.parametrize("projected", [False, True])
def test_prefix_tuning(tiny_model: Any, save_peft: Save, check: Check, projected: bool) -> None:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projected, encoder_hidden_size=16
    )
    folder, expected = save_peft(tiny_model, config, spread=0.5)
    forms = check(folder, tiny_model, expected)
    assert forms.prefix.keys.shape == (8, 2, 5, 16)
    assert json.loads((folder / "adapter_config.json").read_text())["num_attention_heads"] == 2
