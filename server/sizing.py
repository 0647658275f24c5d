"""How many blocks and how much KV cache a memory holds: predicted from the configuration, before a weight is read.

Pure: works for any model that transformers knows, whether or not its blocks can be served here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ByteSize
from torch import nn

from swarm.architectures import FAMILIES, block_config, head_sizes, one_block_of_each_kind
from swarm.errors import UsageError

from .config import Quantization

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Cache that a server reserves before it counts its blocks, in tokens: what its weights would take if the cache were a
#: fifth of the whole, within these bounds.
MIN_CACHE_TOKENS, USUAL_CACHE_TOKENS = 2048, 16_384
_CACHE_PER_WEIGHTS = 1 / 4
#: What is left beside the blocks goes to the cache by half, up to this many tokens.
_CACHE_PER_LEFT = 1 / 2
MAX_CACHE_TOKENS = 2**18

#: bitsandbytes' NF4: half a byte a weight, a float32 maximum for every 64, and a float32 table of 16 for each layer.
_NF4_GROUP = 64
_NF4_TABLE_BYTES = 64


@dataclass(frozen=True)
class BlockSize:
    """Bytes of one block: its weights, and the keys and values of one token. And what a server needs once, beside all
    its blocks: while it loads them, and later for the activations of its largest batch."""

    weights: int
    cache_per_token: int
    loading: int
    activations: int


@dataclass(frozen=True)
class Plan:
    num_blocks: int
    cache_tokens: int


def block_size(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    quantization: Quantization,
    device: torch.device,
    max_batch_tokens: int,
) -> BlockSize:
    """The size of a block of this model; of its largest, where they differ."""
    blocks = [_block_on_meta(config, index) for index in one_block_of_each_kind(config)]
    return BlockSize(
        weights=max(_weight_bytes(block, dtype, quantization) for block in blocks),
        cache_per_token=cache_bytes(config, dtype),
        loading=max(_loading_bytes(block, dtype, quantization, device) for block in blocks),
        activations=max_batch_tokens * max(_activation_bytes(block, config, dtype) for block in blocks),
    )


def cache_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in one block, as our cache stores them: all of the context, in `dtype`,
    also where a sliding window sees only its end; unfolded to heads where the model compresses them (MLA)."""
    sizes = head_sizes(config)
    return sizes.kv_heads * (sizes.key + sizes.value) * dtype.itemsize


def plan(memory: int, size: BlockSize, label: str, *, fewest: int, most: int, cache_tokens: int | None = None) -> Plan:
    """As many of `fewest` to `most` blocks as `memory` bytes hold beside their cache, and the cache's tokens.

    cache_tokens: reserved as given; None: derived from what the memory leaves.
    Raises UsageError, which calls a block of the model `label`, if not even the fewest fit.
    """
    room = memory - size.activations  # nothing is in the cache while weights are loaded
    loadable = (memory - size.loading) // size.weights
    for tokens in _reservations(size) if cache_tokens is None else [cache_tokens]:
        num_blocks = min(most, loadable, room // (size.weights + tokens * size.cache_per_token))
        if num_blocks >= fewest:
            break
    else:
        raise UsageError(_too_little(memory, size, label, fewest, tokens))
    if cache_tokens is None:
        left = room - num_blocks * size.weights
        extra = int(left * _CACHE_PER_LEFT) // (num_blocks * size.cache_per_token)
        tokens = max(tokens, min(extra, MAX_CACHE_TOKENS))
    return Plan(num_blocks, tokens)


def _reservations(size: BlockSize) -> list[int]:
    """The cache to reserve in tokens, and the least to do with."""
    share = int(size.weights * _CACHE_PER_WEIGHTS) // size.cache_per_token
    return [min(max(share, MIN_CACHE_TOKENS), USUAL_CACHE_TOKENS), MIN_CACHE_TOKENS]


def _too_little(memory: int, size: BlockSize, label: str, fewest: int, tokens: int) -> str:
    many = "one block" if fewest == 1 else f"{fewest} blocks"
    takes = "takes" if fewest == 1 else "take"
    cache = fewest * tokens * size.cache_per_token
    beside = max(cache + size.activations, size.loading)
    return (
        f"{many} of {label} {takes} {_shown(fewest * size.weights)}, and {_shown(beside)} to load and run with a "
        f"cache of {tokens} tokens, but {_shown(memory)} of memory are available; free memory or raise --max-memory, "
        "or serve fewer blocks, with fewer --cache-tokens, or smaller ones with --quantization"
    )


def _shown(num_bytes: int) -> str:
    return ByteSize(num_bytes).human_readable(decimal=True)


def _block_on_meta(config: PretrainedConfig, index: int) -> nn.Module:
    """Block `index` of the model, without memory for its weights."""
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(block_config(config, index))
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]


def _weight_bytes(block: nn.Module, dtype: torch.dtype, quantization: Quantization) -> int:
    """Bytes of a block's weights. bitsandbytes quantises the weights of linear layers and nothing else: biases, norms
    and the fused experts of mixtures stay in `dtype`."""
    linear = [module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear)]
    others = sum(parameter.numel() for parameter in block.parameters()) - sum(linear)
    buffers = sum(buffer.nbytes for buffer in block.buffers())
    outputs = sum(module.out_features for module in block.modules() if isinstance(module, nn.Linear))
    in_dtype = others * dtype.itemsize + buffers
    if quantization == "none":
        return in_dtype + sum(linear) * dtype.itemsize
    if quantization == "int8":  # a float32 scale for each output
        return in_dtype + sum(linear) + 4 * outputs
    return in_dtype + sum(-(-n // 2) + 4 * -(-n // _NF4_GROUP) + _NF4_TABLE_BYTES for n in linear)


def _loading_bytes(block: nn.Module, dtype: torch.dtype, quantization: Quantization, device: torch.device) -> int:
    """Bytes needed beside finished weights while they are quantised. On a CPU bitsandbytes takes float32 copies, about
    as large as two blocks; on CUDA the weight at hand waits in `dtype`. Other weights load straight into place."""
    if quantization == "none":
        return 0
    if device.type == "cpu":
        return 2 * _weight_bytes(block, dtype, "none")
    return max(parameter.numel() for parameter in block.parameters()) * dtype.itemsize


def _activation_bytes(block: nn.Module, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's values while a block works on it, generously: its hidden states eight times in float32
    (residual, norms, queries, keys, values, attention's output), the widest layer's four times in `dtype`, a mask over
    a long context, and its scores for every head where the fused kernels cannot be used. And for each expert that the
    token passes, what goes into and comes out of its products, twice in `dtype`."""
    text = config.get_text_config()
    widest = max(size for parameter in block.parameters() for size in parameter.shape[-2:])
    context = min(getattr(text, "max_position_embeddings", None) or USUAL_CACHE_TOKENS, USUAL_CACHE_TOKENS)
    explicit = getattr(text, "attn_logit_softcapping", None) is not None
    scores = context * dtype.itemsize * (1 + 4 * text.num_attention_heads * explicit)
    fused = [parameter.shape for parameter in block.parameters() if parameter.dim() == 3]  # [experts, ..., ...]
    routed = sum(2 * _experts_of_token(text, shape[0]) * (shape[1] + shape[2]) * dtype.itemsize for shape in fused)
    return int(8 * text.hidden_size * 4 + 4 * widest * dtype.itemsize + scores + routed)


def _experts_of_token(config: Any, num_experts: int) -> int:
    """How many experts a token is handed to."""
    if (family := FAMILIES.get(config.model_type)) is not None and family.every_expert:
        return num_experts
    names = "num_experts_per_tok", "moe_k"  # the second is ERNIE's own
    return next((int(found) for name in names if (found := getattr(config, name, None))), num_experts)
