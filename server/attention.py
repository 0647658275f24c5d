"""The attention function that blocks call while they run a flattened batch: reads and writes the paged cache per row.

It is registered with transformers under the name "swarm" and stands in for "sdpa" or "eager", so the model's own code
does everything around it (projections, rotary embeddings, norms of queries and keys). Whoever changes what this file
computes raises `numerics.KERNEL_VERSION`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from .batch import FlatBatch, Reach, RowView, WholeRows
from .decode_batch import DecodeBatch

NAME = "swarm"
#: The same with the very bits of plain transformers' "sdpa".
NAME_LIKE_PLAIN = "swarm_like_plain"

#: Gives what is added to the scores of a context's keys: `(number of keys, tensor like it) -> [heads, 1, keys]`.
KeyBias = Callable[[int, torch.Tensor], torch.Tensor]

_running: ContextVar[FlatBatch | DecodeBatch | WholeRows] = ContextVar("running batch")


@contextlib.contextmanager
def running(batch: FlatBatch | DecodeBatch | WholeRows) -> Iterator[None]:
    """The batch that blocks run, for as long: not all families hand a model's arguments down to their attention."""
    token = _running.set(batch)
    try:
        yield
    finally:
        _running.reset(token)


def running_batch() -> FlatBatch | DecodeBatch | WholeRows:
    return _running.get()


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    key_bias: KeyBias | None = None,
    like_plain: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Store the new keys and values, then attend each row's new tokens to its whole context.

    query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim], the new tokens of the layer, and
        the padding behind them if the batch has any. Values may be of another size.
    sliding_window, softcap, s_aux: passed by models that use them (Mistral, Gemma 2, gpt-oss).
    key_bias: of families whose attention is written here (`families`).
    like_plain: see `use_paged_attention`.
    Returns [1, tokens, heads, value's head_dim], zeros for padding.

    Of whole rows nothing is stored, and gradients pass.
    """
    flat_batch = running_batch()
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if (scaled := getattr(module, "scaled_queries", None)) is not None:  # see `families`
        query = scaled(query)
    if sliding_window is None:
        sliding_window = getattr(module, "masked_window", None)  # see `families`
    reach = Reach(sliding_window, _chunk_of(module))
    variant = Variant(scaling, reach, softcap, s_aux, key_bias, like_plain)
    if isinstance(flat_batch, WholeRows):
        return _attend_whole(flat_batch, module.layer_idx, query, key, value, variant), None  # type: ignore[arg-type]
    keys, values = flat_batch.cache.storage(module.layer_idx, key, value)  # type: ignore[arg-type]
    keys.index_copy_(2, flat_batch.slots, key[:, :, : flat_batch.num_tokens])
    values.index_copy_(2, flat_batch.slots, value[:, :, : flat_batch.num_tokens])
    if isinstance(flat_batch, DecodeBatch):
        return _attend_together(flat_batch, query, keys, values, variant), None
    outputs = [_attend_row(row, query, keys, values, variant).transpose(1, 2) for row in flat_batch.rows]
    if flat_batch.padding:
        outputs.append(query.new_zeros(1, flat_batch.padding, *outputs[0].shape[2:]))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


class Variant(NamedTuple):
    """What models do differently in attention. sinks: a learned score for each head, beside those of the context.

    like_plain: see `use_paged_attention`.
    """

    scaling: float
    reach: Reach
    softcap: float | None
    sinks: torch.Tensor | None
    key_bias: KeyBias | None
    like_plain: bool

    @property
    def is_explicit(self) -> bool:
        """The fused kernels lack this."""
        return self.softcap is not None or self.sinks is not None

    def with_bias(self, mask: torch.Tensor, num_keys: int) -> torch.Tensor:
        """mask: [..., keys], the last ones of a context of `num_keys`. Returns it with the bias, if there is one:
        [heads, ..., keys]."""
        if self.key_bias is None:
            return mask
        return mask + self.key_bias(num_keys, mask)[..., num_keys - mask.shape[-1] :]


def _chunk_of(module: torch.nn.Module) -> int | None:
    """Llama 4 says in its masks alone that a layer sees chunks."""
    config: Any = getattr(module, "config", None)
    size = getattr(config, "attention_chunk_size", None)
    if size is None or config.layer_types[module.layer_idx] != "chunked_attention":
        return None
    return int(size)


def _attend_whole(
    batch: WholeRows, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, variant: Variant
) -> torch.Tensor:
    """Every row to itself and what stands in front of it; neighbours that are alike in one call. Returns [1, tokens,
    heads, head_dim]."""
    outputs = []
    for first, rows, length, prefix in batch.groups:
        q, k, v = (
            # [1, heads, rows * length, head_dim] -> [rows, heads, length, head_dim]
            tensor[0, :, first : first + rows * length].unflatten(1, (rows, length)).transpose(0, 1)
            for tensor in (query, key, value)
        )
        if prefix is not None:
            k, v = (
                torch.cat([kept[layer].to(own).expand(rows, -1, -1, -1), own], dim=2)
                for kept, own in ((prefix.keys, k), (prefix.values, v))
            )
        context = k.shape[2]
        is_plain = prefix is None and variant.reach.is_all(context) and variant.key_bias is None
        mask = None
        if not is_plain or variant.is_explicit:
            mask = variant.with_bias(batch.mask(length, context, variant.reach, query), context)
        if variant.is_explicit:
            assert mask is not None
            output = _attend_explicitly(q, k, v, mask, variant)
        else:
            output = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=variant.scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


def _attend_row(
    row: RowView, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, variant: Variant
) -> torch.Tensor:
    """query: of the whole batch. Returns [1, heads, the row's tokens, head_dim]."""
    query = query.narrow(2, row.first, row.num_tokens)
    key, value = row.visible(keys, variant.reach), row.visible(values, variant.reach)
    if variant.is_explicit:
        mask = variant.with_bias(row.additive_mask(variant.reach, query), row.length)
        return _attend_explicitly(query, key, value, mask, variant)
    if row.num_tokens == 1 and variant.key_bias is None:
        if variant.like_plain:
            grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(query, key, value, scale=variant.scaling, enable_gqa=grouped)
        # One token sees all of its context, so the query heads that share a KV head can stand as its queries.
        packed = query.reshape(1, key.shape[1], -1, query.shape[3])
        output = F.scaled_dot_product_attention(packed, key, value, scale=variant.scaling)
        return output.reshape(1, query.shape[1], 1, value.shape[3])
    if variant.like_plain and row.num_tokens < row.length:
        key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    whole = row.num_tokens == row.length and variant.reach.is_all(row.length) and variant.key_bias is None
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if whole else variant.with_bias(row.additive_mask(variant.reach, query), row.length),
        is_causal=whole,
        scale=variant.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_together(
    batch: DecodeBatch, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, variant: Variant
) -> torch.Tensor:
    """One new token of every row. query: [1, heads, rows, head_dim]; returns [1, rows, heads, head_dim]."""
    key, value = batch.gather(keys, variant.reach), batch.gather(values, variant.reach)
    visible = batch.visible(variant.reach)[:, None, None, :]
    query = query[0].transpose(0, 1)[:, :, None]  # [rows, heads, 1, head_dim]
    if variant.is_explicit or variant.key_bias is not None:
        mask = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, float("-inf"))
        mask = variant.with_bias(mask, batch.capacity)
        output = _attend_explicitly(query, key, value, mask, variant)
    else:
        packed = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        output = F.scaled_dot_product_attention(packed, key, value, attn_mask=visible, scale=variant.scaling)
    return output.reshape(1, len(query), -1, value.shape[3])


def _attend_explicitly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, variant: Variant
) -> torch.Tensor:
    """Attention with soft-capped scores or a learned sink beside the context.

    query: [rows, heads, tokens, head_dim]; key, value: [rows, kv_heads, context, head_dim]; mask: added to the scores.
    """
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    scores = query @ key.transpose(-1, -2) * variant.scaling
    if variant.softcap is not None:
        scores = torch.tanh(scores / variant.softcap) * variant.softcap
    scores = scores + mask
    if variant.sinks is None:
        weights = scores.softmax(dim=-1, dtype=torch.float32)
    else:
        sink_scores = variant.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        weights = torch.cat([scores, sink_scores], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
    return weights.to(value.dtype) @ value


def _repeat(key: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values of every KV head, once for each of its query heads."""
    return key.repeat_interleave(heads // key.shape[1], dim=1)


def use_paged_attention(model: torch.nn.Module, *, like_plain: bool = False) -> None:
    """Make every attention module of `model` call `paged_attention`.

    No mask function is registered beside it: the model then builds no mask. Rows know what they may see.
    like_plain: make the calls that plain transformers makes. Others are faster but change the last bits, and layers
        that round their input to int8 turn those into visible differences.
    """
    name = NAME_LIKE_PLAIN if like_plain else NAME
    AttentionInterface.register(name, partial(paged_attention, like_plain=like_plain))
    # `set_attn_implementation` misses copies of the config that submodules hold, so each one is set.
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = name
