"""Prefix tuning of AdapterHub's library (`methods/prefix_tuning.py`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from swarm.architectures import num_blocks
from swarm.errors import AdapterError

from ..base import BaseBlocks
from .adapterhub_settings import PrefixMethodSettings, Settings, activation_of
from .building import FormsBuilder
from .files import AdapterFiles
from .prefixes import attention_sizes, set_prefix

#: What the library calls the prefixes of a decoder's own attention.
_LOCATION = "self_prefix"


def import_prefix(
    files: AdapterFiles, settings: Settings, method: PrefixMethodSettings, base: BaseBlocks, builder: FormsBuilder
) -> None:
    config: Any = base.config
    label, tokens, total = files.label, method.prefix_length, num_blocks(config)
    if method.leave_out:
        raise AdapterError(f"{label} has no prefix in the blocks {method.leave_out}: it must have one in all or none")
    if getattr(config, "sliding_window", None) is not None:
        raise AdapterError(f"{label}: a row sees AdapterHub's prefixes beyond the sliding window that this model has")
    heads, head_dim = attention_sizes(base)
    width = total * 2 * heads * head_dim
    builder.reserve(tokens * width * base.dtype.itemsize * len(base.span) // total)
    inside = f"prefix_tuning.prefix_tunings.{settings.name}.{_LOCATION}."
    names = {name.removeprefix(base.architecture.base_prefix).removeprefix(inside): name for name in files.tensors}
    if method.flat:
        _expect(names, {"control_trans"}, label)
        table = files.floats(names["control_trans"], [tokens * width])
    else:
        wanted = {"wte.weight", "control_trans.0.weight", "control_trans.0.bias"}
        _expect(names, wanted | {"control_trans.2.weight", "control_trans.2.bias"}, label)
        hidden, inner = settings.hidden_size, method.bottleneck_size
        activation = activation_of(method.non_linearity, settings, label)
        table = files.floats(names["wte.weight"], [tokens, hidden])
        table = F.linear(
            table,
            files.floats(names["control_trans.0.weight"], [inner, hidden]),
            files.floats(names["control_trans.0.bias"], [inner]),
        )
        table = table if activation == "identity" else getattr(F, activation)(table)
        table = F.linear(
            table,
            files.floats(names["control_trans.2.weight"], [width, inner]),
            files.floats(names["control_trans.2.bias"], [width]),
        )
    by_layer = table.view(tokens, total, 2, heads, head_dim).permute(1, 2, 3, 0, 4).clone()
    by_layer[:, 0] = _turned(by_layer[:, 0], config)
    set_prefix(by_layer[base.span.start : base.span.end], base, builder, label)


def _turned(keys: torch.Tensor, config: Any) -> torch.Tensor:
    """Keys that give with rows beginning at position `tokens` what these give with rows beginning at 0.

    The library counts a row's positions without the prefix. Rotary embeddings turn a query by its position, so moving
    all positions on by some number is undone by turning the prefix's keys, which were not turned, by that number.
    keys: [blocks, heads, tokens, head_dim].
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

    rotary = LlamaRotaryEmbedding(config)  # Mistral's is the same
    position = torch.tensor([[keys.shape[2]]])
    cos, sin = (part[0] / rotary.attention_scaling for part in rotary(keys, position))
    turned: torch.Tensor = keys * cos + rotate_half(keys) * sin
    return turned


def _expect(names: dict[str, str], wanted: set[str], label: str) -> None:
    if odd := names.keys() ^ wanted:
        parameter = min(odd)
        problem = f"lacks {parameter}" if parameter in wanted else f"has a tensor that nothing explains: {parameter}"
        raise AdapterError(f"{label} {problem}")
