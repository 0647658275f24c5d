"""The attention function that blocks call while they run a flattened batch: reads and writes the paged cache per row.

It is registered with transformers under the name "swarm" and stands in for "sdpa" or "eager", so the model's own code
does everything around it (projections, rotary embeddings, norms of queries and keys). Whoever changes what this file
computes raises `numerics.KERNEL_VERSION`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from .batch import FlatBatch, RowView

NAME = "swarm"


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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Store the new keys and values, then attend each row's new tokens to its whole context.

    query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim], the new tokens of the layer, and
        the padding behind them if the batch has any.
    sliding_window, softcap, s_aux: passed by models that use them (Mistral, Gemma 2, gpt-oss).
    Returns [1, tokens, heads, head_dim], zeros for padding.
    """
    keys, values = flat_batch.cache.storage(module.layer_idx, key, value)  # type: ignore[arg-type]
    keys.index_copy_(2, flat_batch.slots, key[:, :, : flat_batch.num_tokens])
    values.index_copy_(2, flat_batch.slots, value[:, :, : flat_batch.num_tokens])

    outputs = []
    for row in flat_batch.rows:
        row_query = query.narrow(2, row.first, row.num_tokens)
        row_keys, row_values = row.visible(keys, sliding_window), row.visible(values, sliding_window)
        if softcap is not None or s_aux is not None:
            output = _attend_explicitly(row, row_query, row_keys, row_values, scaling, sliding_window, softcap, s_aux)
        elif row.num_tokens == 1:
            output = _attend_one(row_query, row_keys, row_values, scaling)
        else:
            output = _attend(row, row_query, row_keys, row_values, scaling, sliding_window)
        outputs.append(output.transpose(1, 2))
    if flat_batch.padding:
        outputs.append(query.new_zeros(1, flat_batch.padding, *outputs[0].shape[2:]))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _attend_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """One token sees all of its context, so the query heads that share a KV head can stand as its queries."""
    heads, kv_heads = query.shape[1], key.shape[1]
    packed = query.reshape(1, kv_heads, heads // kv_heads, -1)
    output = F.scaled_dot_product_attention(packed, key, value, scale=scaling)
    return output.reshape(1, heads, 1, -1)


def _attend(
    row: RowView, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    if row.num_tokens == row.length and (window is None or row.length <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    mask = row.additive_mask(window, query)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)


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
    scores = scores + row.additive_mask(window, query)
    if sinks is None:
        weights = scores.softmax(dim=-1, dtype=torch.float32)
    else:
        sink_scores = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        weights = torch.cat([scores, sink_scores], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
    return weights.to(value.dtype) @ value


def use_paged_attention(model: torch.nn.Module) -> None:
    """Make every attention module of `model` call `paged_attention`.

    `set_attn_implementation` misses copies of the config that submodules hold, so each one is set.
    """
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = NAME


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Rows know what they may see; the model builds no mask for the flattened batch."""
