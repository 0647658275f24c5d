"""Llama with AdapterHub's modules in it, step by step as `adapters` 1.3 computes: the library itself needs another
version of transformers (`models/llama/modeling_llama.py`, `methods/{modeling,prefix_tuning}.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.llama import modeling_llama

Tensors = Mapping[str, torch.Tensor]


def adapter_module(config: Mapping[str, Any], weights: Tensors, hidden: torch.Tensor, input_tensor: Any) -> Any:
    """`Adapter`: pre_forward, forward and post_forward, without a norm. input_tensor: the residual."""
    if config["residual_before_ln"] is True:
        residual = hidden
    if config["original_ln_before"]:
        hidden = hidden + input_tensor
    if not config["residual_before_ln"]:
        residual = hidden
    activation: Callable[..., torch.Tensor] = {"relu": F.relu, "swish": F.silu, "gelu": F.gelu}[config["non_linearity"]]
    down = activation(F.linear(hidden, weights["adapter_down.0.weight"], weights["adapter_down.0.bias"]))
    up = F.linear(down, weights["adapter_up.weight"], weights["adapter_up.bias"])
    scaling = config["scaling"] if isinstance(config["scaling"], float) else weights["scaling"]
    hidden = up * scaling + residual
    return hidden + input_tensor if config["original_ln_after"] else hidden


def add_bottlenecks(model: Any, config: Mapping[str, Any], weights: Mapping[tuple[int, str], Tensors]) -> None:
    """weights: by block and module ("attention_adapters" or "output_adapters"), where there are any."""

    def layer_output(block: int, where: str, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        own = weights.get((block, where))
        return hidden + residual if own is None else adapter_module(config, own, hidden, residual)

    def forward_of(layer: Any, block: int) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            residual = hidden_states
            hidden, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
            hidden = layer_output(block, "attention_adapters", hidden, residual)
            residual = hidden
            hidden = layer.mlp(layer.post_attention_layernorm(hidden))
            return layer_output(block, "output_adapters", hidden, residual)

        return forward

    for block, layer in enumerate(model.model.layers):
        layer.forward = forward_of(layer, block)


def add_loras(model: Any, config: Mapping[str, Any], weights: Mapping[tuple[int, str], Tensors]) -> None:
    """`LoRALinear` with a `LoRA` ("add") or an `IA3` ("scale")."""

    def hook_of(own: Tensors) -> Callable[..., torch.Tensor]:
        def hook(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if config["composition_mode"] == "scale":
                return output * (own["lora_B"].view(1, 1, -1) * config["alpha"])
            return output + args[0] @ own["lora_A"].T @ own["lora_B"].T * (config["alpha"] / config["r"])

        return hook

    for (block, path), own in weights.items():
        model.model.layers[block].get_submodule(path).register_forward_hook(hook_of(own))


def add_prefix(model: Any, key_values: torch.Tensor, monkeypatch: Any) -> None:
    """`PrefixTuningLayer`: in front of keys that are turned already. key_values: [2 * blocks, heads, tokens, size]."""
    model.set_attn_implementation("eager")
    plain = modeling_llama.eager_attention_forward

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        own_keys, own_values = key_values[2 * module.layer_idx : 2 * module.layer_idx + 2]
        rows = len(key)
        key = torch.cat([own_keys.expand(rows, -1, -1, -1), key], dim=2)
        value = torch.cat([own_values.expand(rows, -1, -1, -1), value], dim=2)
        mask = F.pad(attention_mask, (own_keys.shape[1], 0))
        return plain(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)
