"""Keys and values in front of a row's own: do they fit the model's attention?"""

from __future__ import annotations

import torch

from swarm.architectures import compresses, head_sizes
from swarm.errors import AdapterError

from ..base import BaseBlocks
from .building import FormsBuilder


def attention_sizes(base: BaseBlocks) -> tuple[int, int]:
    """(kv_heads, head_dim) of this model."""
    sizes = head_sizes(base.config)
    return sizes.kv_heads, sizes.key


def set_prefix(by_block: torch.Tensor, base: BaseBlocks, builder: FormsBuilder, label: str) -> None:
    """by_block: [blocks of the span, 2 (keys, values), kv_heads, tokens, head_dim], float32."""
    if compresses(base.config):
        raise AdapterError(f"{label} has keys and values of its own, but this model's are compressed")
    _, _, heads, _, head_dim = by_block.shape
    wanted = attention_sizes(base)
    if (heads, head_dim) != wanted:
        raise AdapterError(
            f"the prefix of {label} has {heads} heads of {head_dim}, "
            f"but this model's keys have {wanted[0]} of {wanted[1]}"
        )
    builder.set_prefix(by_block[:, 0], by_block[:, 1])
