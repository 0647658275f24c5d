"""Keys and values in front of a row's own: do they fit the model's attention?"""

from __future__ import annotations

from typing import Any

import torch

from swarm.errors import AdapterError

from ..base import BaseBlocks
from .building import FormsBuilder


def attention_sizes(base: BaseBlocks) -> tuple[int, int]:
    """(kv_heads, head_dim) of this model."""
    config: Any = base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads), int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def set_prefix(by_block: torch.Tensor, base: BaseBlocks, builder: FormsBuilder, label: str) -> None:
    """by_block: [blocks of the span, 2 (keys, values), kv_heads, tokens, head_dim], float32."""
    _, _, heads, _, head_dim = by_block.shape
    wanted = attention_sizes(base)
    if (heads, head_dim) != wanted:
        raise AdapterError(
            f"the prefix of {label} has {heads} heads of {head_dim}, "
            f"but this model's keys have {wanted[0]} of {wanted[1]}"
        )
    builder.set_prefix(by_block[:, 0], by_block[:, 1])
