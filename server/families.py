"""What some model families need on a server beyond the data of swarm/architectures: functions of a few lines.

Where a family's attention does not go through transformers' `AttentionInterface`, or computes something from how many
tokens stand before, which a flattened batch does not tell, a block that was loaded is changed here.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from swarm.architectures import Architecture

from .attention import paged_attention, running_batch

#: What attention modules return: hidden states, and no weights.
Output = tuple[torch.Tensor, None]


class AddsNothing(nn.Module):
    """Stands for what a base model adds to its embeddings: the client has done that."""

    nothing: torch.Tensor

    def __init__(self, device: torch.device):
        super().__init__()
        self.register_buffer("nothing", torch.zeros((), device=device), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.nothing


def silence_surroundings(model: Any, architecture: Architecture, device: torch.device) -> None:
    """Let everything around the blocks of a base model do nothing: final norm, and what happens to the embeddings."""
    for name in (architecture.norm, *architecture.applied):
        if getattr(model, name) is not None:  # not every model of a family has all of them
            setattr(model, name, nn.Identity())
    for name in architecture.added:
        setattr(model, name, AddsNothing(device))


@contextlib.contextmanager
def plain_linear_layers(architecture: Architecture) -> Iterator[None]:
    """Blocks that are made meanwhile have torch's linear layers, which can be packed and quantised, for their own."""
    name = architecture.family.linear
    if name is None:
        yield
        return
    module = sys.modules[architecture.base_class.__module__]
    own = getattr(module, name)
    setattr(module, name, nn.Linear)
    try:
        yield
    finally:
        setattr(module, name, own)


def prepare_block(block: nn.Module, number: int, config: Any) -> None:
    """Make a loaded block run on the flattened batch. number: of the block in the model. config: of the model."""
    if (prepare := _PREPARE.get(config.model_type)) is not None:
        prepare(block, number, config)


# --- alibi: a bias that grows with a key's position ------------------------------------------------------------------


def _bloom(block: Any, number: int, config: Any) -> None:
    def bias(num_keys: int, like: torch.Tensor) -> torch.Tensor:
        slopes = _alibi_slopes(config.n_head, like.device)[:, None, None]
        return (slopes * torch.arange(num_keys, device=like.device)).to(like.dtype)

    def forward(
        self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        output, _ = paged_attention(
            self, query, key, value, None, scaling=self.inv_norm_factor, key_bias=bias, like_plain=True
        )
        return residual + self.dense(output.flatten(2)), None

    block.self_attention.forward = MethodType(forward, block.self_attention)


def _alibi_slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    """How steep the bias of each head is, [heads], float32 (Press et al., ICLR 2022, section 3)."""
    power = 2 ** math.floor(math.log2(num_heads))
    numbers = torch.arange(1, 1 + power, device=device, dtype=torch.int32)
    slopes = torch.pow(torch.full((), 2.0 ** -(2.0 ** (3 - math.log2(power))), device=device), numbers)
    if power == num_heads:
        return slopes
    between = torch.arange(1, 1 + 2 * (num_heads - power), 2, device=device, dtype=torch.int32)
    more = torch.pow(torch.full((), 2.0 ** -(2.0 ** (2 - math.log2(power))), device=device), between)
    return torch.cat([slopes, more])


def _falcon(block: Any, number: int, config: Any) -> None:
    """Keys and values are stored once for all the heads that share them, which Falcon's own code multiplies first."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb, build_alibi_tensor

    def bias(num_keys: int, like: torch.Tensor) -> torch.Tensor:
        whole = torch.ones(1, num_keys, dtype=torch.int64, device=like.device)
        return build_alibi_tensor(whole, config.num_attention_heads, like.dtype) * block.self_attention.inv_norm_factor

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        fused = self.query_key_value(hidden_states)
        if self.new_decoder_architecture:  # [1, tokens, KV heads, query heads of each + 2, head_dim]
            fused = fused.unflatten(2, (self.num_kv_heads, -1, self.head_dim))
            query, key, value = fused[:, :, :, :-2].flatten(2, 3), fused[:, :, :, -2], fused[:, :, :, -1]
        else:
            query, key, value = self._split_heads(fused)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if not config.alibi:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        output, _ = paged_attention(
            self, query, key, value, None, scaling=self.inv_norm_factor, key_bias=bias if config.alibi else None
        )
        return self.dense(output.flatten(2)), None

    block.self_attention.forward = MethodType(forward, block.self_attention)


# --- what depends on the number of a block, or of tokens before ------------------------------------------------------


def _gpt2(block: Any, number: int, config: Any) -> None:
    """Its Conv1D is a linear layer with a transposed weight, which neither packing nor adapters know."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(block.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv1D):  # not where it is quantised: that makes it linear already
                inputs, outputs = layer.weight.shape
                linear = nn.Linear(inputs, outputs, device="meta")
                linear.weight = nn.Parameter(layer.weight.detach().T.contiguous())
                linear.bias = layer.bias
                setattr(parent, name, linear)
    if config.scale_attn_by_inverse_layer_idx:  # it was made as the first block of a model
        block.attn.scaling /= number + 1


def _llama4(block: Any, number: int, config: Any) -> None:
    """Queries grow with their position where there are no rotary embeddings."""
    attention = block.self_attn
    if not attention.attn_temperature_tuning or attention.use_rope:
        return
    attention.attn_temperature_tuning = False

    def scaled(query: torch.Tensor) -> torch.Tensor:
        positions = running_batch().position_ids[:, None, :, None].float()
        scale = torch.log1p(torch.floor((positions + 1.0) / config.floor_scale)) * config.attn_scale + 1.0
        return (query * scale).to(query.dtype)

    # Not a hook of the projection: that layer may be packed or quantised later, and runs on its own while it is.
    attention.scaled_queries = scaled


def _window_in_masks(block: Any, number: int, config: Any) -> None:
    """Only the masks of its base model know the window, and here there are none."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None or kinds[number] == "sliding_attention":
        block.self_attn.masked_window = config.sliding_window


_PREPARE: dict[str, Callable[[Any, int, Any], None]] = {
    "bloom": _bloom,
    "falcon": _falcon,
    "gpt2": _gpt2,
    "llama4_text": _llama4,
    "phimoe": _window_in_masks,
    "qwen2_moe": _window_in_masks,
}
