"""The attention function that blocks call while they run a flattened batch: reads and writes the paged cache per row.

It is registered with transformers under the name "swarm" and stands in for "sdpa" or "eager", so the model's own code
does everything around it (projections, rotary embeddings, norms of queries and keys). Whoever changes what this file
computes raises `numerics.KERNEL_VERSION`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from .batch import FlatBatch, RowView

NAME = "swarm"
#: The same with the very bits of plain transformers' "sdpa".
NAME_LIKE_PLAIN = "swarm_like_plain"


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    flat_batch: FlatBatch,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    like_plain: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Store the new keys and values, then attend each row's new tokens to its whole context.

    query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim], the layer's new tokens.
    sliding_window, softcap, s_aux: passed by models that use them (Mistral, Gemma 2, gpt-oss).
    like_plain: see `use_paged_attention`.
    Returns [1, tokens, heads, head_dim].
    """
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys, values = flat_batch.cache.storage(module.layer_idx, new_keys, new_values)  # type: ignore[arg-type]
    keys.index_copy_(0, flat_batch.slots, new_keys)
    values.index_copy_(0, flat_batch.slots, new_values)

    outputs = []
    for row in flat_batch.rows:
        row_query = query[:, :, row.first : row.first + row.num_tokens]
        # [1, kv_heads, length, head_dim]; a view, not a copy, where the row's pages lie side by side
        row_keys = keys[row.context].transpose(0, 1)[None]
        row_values = values[row.context].transpose(0, 1)[None]
        if softcap is None and s_aux is None:
            output = _attend(row, row_query, row_keys, row_values, scaling, sliding_window, like_plain)
        else:
            output = _attend_explicitly(row, row_query, row_keys, row_values, scaling, sliding_window, softcap, s_aux)
        outputs.append(output.transpose(1, 2))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _attend(
    row: RowView,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    like_plain: bool,
) -> torch.Tensor:
    heads, kv_heads = query.shape[1], key.shape[1]
    if row.num_tokens == 1:
        if window is not None and row.length > window:
            key, value = key[:, :, -window:], value[:, :, -window:]
        if like_plain:
            return F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=heads != kv_heads)
        # One token sees all of its context, so the query heads that share a KV head can stand as its queries.
        packed = query.reshape(1, kv_heads, heads // kv_heads, -1)
        output = F.scaled_dot_product_attention(packed, key, value, scale=scaling)
        return output.reshape(1, heads, 1, -1)
    if heads != kv_heads:
        key = key.repeat_interleave(heads // kv_heads, dim=1)
        value = value.repeat_interleave(heads // kv_heads, dim=1)
    if row.num_tokens == row.length and (window is None or row.length <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask = row.causal_mask(window, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _attend_explicitly(
    row: RowView,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with what the fused kernels lack: soft-capped scores, and a learned sink beside the context."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~row.causal_mask(window, query.device), float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1, dtype=torch.float32)
    else:
        sink_scores = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        weights = torch.cat([scores, sink_scores], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
    return weights.to(value.dtype) @ value


def use_paged_attention(model: torch.nn.Module, *, like_plain: bool = False) -> None:
    """Make every attention module of `model` call `paged_attention`.

    like_plain: decode with the call that plain transformers makes. Packing the query heads of a KV head is faster, but
        changes the last bits, and layers that round their input to int8 turn those into visible differences.
    """
    name = NAME_LIKE_PLAIN if like_plain else NAME
    AttentionInterface.register(name, partial(paged_attention, like_plain=True) if like_plain else paged_attention)
    AttentionMaskInterface.register(name, _no_mask)
    # `set_attn_implementation` misses copies of the config that submodules hold, so each one is set.
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = name


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Rows know what they may see; the model builds no mask for the flattened batch."""
