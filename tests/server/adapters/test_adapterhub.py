"""Files as AdapterHub's library writes them give what the library computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapterhub_llama import add_bottlenecks, add_loras, add_prefix
from safetensors.torch import save_file

from swarm.server.adapters.importing import read_manifest

Check = Callable[..., Any]
IDS = torch.arange(24).reshape(2, 12)
NAME = "sentiment"

#: `BnConfig` as the library saves it, with all its fields.
BOTTLENECK: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": True,
    "non_linearity": "swish",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": 16,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
SEQ_BN = BOTTLENECK | {"mh_adapter": False, "original_ln_before": True, "non_linearity": "relu"}
ADAPTER_PLUS = SEQ_BN | {
    "original_ln_after": False,
    "residual_before_ln": False,
    "non_linearity": "gelu",
    "scaling": "channel",
    "stochastic_depth": 0.1,
}
#: `LoRAConfig`.
LORA: dict[str, Any] = {
    "alpha": 16,
    "architecture": "lora",
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "dropout": 0.0,
    "dtype": None,
    "init_weights": "lora",
    "init_weights_seed": None,
    "intermediate_lora": False,
    "leave_out": [],
    "output_lora": False,
    "r": 8,
    "selfattn_lora": True,
    "use_dora": False,
    "use_gating": False,
    "vera_b": None,
    "vera_d": None,
}
IA3 = LORA | {
    "alpha": 1,
    "attn_matrices": ["k", "v"],
    "composition_mode": "scale",
    "init_weights": "ia3",
    "intermediate_lora": True,
    "r": 1,
}
#: `PrefixTuningConfig`.
PREFIX: dict[str, Any] = {
    "architecture": "prefix_tuning",
    "bottleneck_size": 24,
    "cross_prefix": True,
    "dropout": 0.0,
    "encoder_prefix": True,
    "flat": False,
    "init_weights_seed": None,
    "leave_out": [],
    "non_linearity": "tanh",
    "prefix_length": 5,
    "shared_gating": True,
    "use_gating": False,
}


def write(folder: Path, config: dict[str, Any], tensors: Mapping[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir()
    whole = {
        "config": config,
        "hidden_size": 64,
        "model_class": "LlamaAdapterModel",
        "model_name": "tiny",
        "model_type": "llama",
        "name": NAME,
        "version": "adapters.1.3.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(whole | changes))
    save_file(dict(tensors), folder / "adapter.safetensors")
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        answer: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return answer


Parts = dict[tuple[int, str], dict[str, torch.Tensor]]


def named(parts: Parts, container: str) -> dict[str, torch.Tensor]:
    return {
        f"model.layers.{block}.{path}.{container}.{NAME}.{parameter}": tensor
        for (block, path), own in parts.items()
        for parameter, tensor in own.items()
    }


def bottleneck_parts(config: dict[str, Any], ranks: Mapping[int, int]) -> Parts:
    """Random ones. ranks: of the blocks that have them."""
    torch.manual_seed(2)
    parts: Parts = {}
    for block, rank in ranks.items():
        for where in ["attention_adapters"] * config["mh_adapter"] + ["output_adapters"]:
            parts[block, where] = {
                "adapter_down.0.weight": torch.randn(rank, 64) * 0.2,
                "adapter_down.0.bias": torch.randn(rank) * 0.2,
                "adapter_up.weight": torch.randn(64, rank) * 0.2,
                "adapter_up.bias": torch.randn(64) * 0.2,
            }
            if isinstance(config["scaling"], str):
                parts[block, where]["scaling"] = torch.randn(1 if config["scaling"] == "learned" else 64)
    return parts


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        (BOTTLENECK, dict.fromkeys(range(8), 4)),
        (BOTTLENECK | {"residual_before_ln": False, "scaling": 2.5}, dict.fromkeys(range(8), 4)),
        (BOTTLENECK | {"leave_out": [1, 4], "scaling": "learned"}, dict.fromkeys([0, 2, 3, 5, 6, 7], 4)),
        (SEQ_BN, dict.fromkeys(range(8), 4)),
        (SEQ_BN | {"reduction_factor": {"3": 2, "default": 100}}, dict.fromkeys(range(8), 1) | {3: 32}),
        (ADAPTER_PLUS, dict.fromkeys(range(8), 4)),
    ],
    ids=["houlsby", "houlsby scaled", "houlsby left out", "pfeiffer", "pfeiffer of several sizes", "adapter+"],
)
def test_bottlenecks(
    tiny_model: Any, tmp_path: Path, check: Check, config: dict[str, Any], ranks: dict[int, int]
) -> None:
    parts = bottleneck_parts(config, ranks)
    folder = write(tmp_path / "adapter", config, named(parts, "adapters"))
    reference = copy.deepcopy(tiny_model)
    add_bottlenecks(reference, config, parts)
    forms = check(folder, tiny_model, logits(reference))
    assert [bool(block.bottlenecks) for block in forms.blocks] == [block in ranks for block in range(8)]
    manifest = read_manifest(folder)
    assert manifest.format == "adapterhub"
    assert manifest.kind == ("double_seq_bn" if config["mh_adapter"] else "seq_bn")


@pytest.mark.parametrize(
    ("config", "version", "alpha"),
    [
        (LORA, "adapters.1.3.0", 16),
        (LORA | {"intermediate_lora": True, "output_lora": True, "attn_matrices": ["k"]}, "adapters.1.3.0", 16),
        (LORA, "adapters.1.0.1", 8),  # the library reads its own earlier files so
        (LORA, "3.2.1", 16),
        (IA3, "adapters.1.3.0", 1),
    ],
    ids=["attention", "everywhere", "before 1.1", "before adapters", "ia3"],
)
def test_loras(
    tiny_model: Any, tmp_path: Path, check: Check, config: dict[str, Any], version: str, alpha: float
) -> None:
    torch.manual_seed(2)
    paths = [f"self_attn.{letter}_proj" for letter in config["attn_matrices"]]
    paths += ["mlp.down_proj"] * config["intermediate_lora"] + ["mlp.up_proj"] * config["output_lora"]
    parts: Parts = {}
    for block in range(8):
        for path in paths:
            layer = tiny_model.model.layers[block].get_submodule(path)
            parts[block, path] = {"lora_B": torch.randn(layer.out_features, config["r"]) * 0.1}
            if config["composition_mode"] == "add":
                parts[block, path]["lora_A"] = torch.randn(config["r"], layer.in_features) * 0.1
            else:
                parts[block, path]["lora_B"] += 1
    folder = write(tmp_path / "adapter", config, named(parts, "loras"), version=version)
    reference = copy.deepcopy(tiny_model)
    add_loras(reference, config | {"alpha": alpha}, parts)
    check(folder, tiny_model, logits(reference))
    assert read_manifest(folder).kind == ("lora" if config["composition_mode"] == "add" else "ia3")


@pytest.mark.parametrize("flat", [True, False])
def test_prefix_tuning(
    tiny_model: Any, tmp_path: Path, check: Check, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library counts a row's positions without the prefix, so the keys must be turned."""
    torch.manual_seed(2)
    width = 8 * 2 * 2 * 16
    inside = f"model.prefix_tuning.prefix_tunings.{NAME}.self_prefix."
    if flat:
        table = torch.randn(5 * width)
        tensors = {f"{inside}control_trans": table}
    else:
        embedding, first, first_bias = torch.randn(5, 64), torch.randn(24, 64) * 0.2, torch.randn(24)
        second, second_bias = torch.randn(width, 24) * 0.2, torch.randn(width)
        table = F.linear(torch.tanh(F.linear(embedding, first, first_bias)), second, second_bias)
        tensors = {
            f"{inside}wte.weight": embedding,
            f"{inside}control_trans.0.weight": first,
            f"{inside}control_trans.0.bias": first_bias,
            f"{inside}control_trans.2.weight": second,
            f"{inside}control_trans.2.bias": second_bias,
        }
    folder = write(tmp_path / "adapter", PREFIX | {"flat": flat}, tensors)
    reference = copy.deepcopy(tiny_model)
    with monkeypatch.context() as patch:
        add_prefix(reference, table.view(5, 16, 2, 16).permute(1, 2, 0, 3), patch)
        expected = logits(reference)
    forms = check(folder, tiny_model, expected)
    assert forms.prefix.num_tokens == 5
    assert read_manifest(folder).kind == "prefix_tuning"
