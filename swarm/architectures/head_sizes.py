"""The keys and values of a token, as servers store them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class HeadSizes(NamedTuple):
    """kv_heads: for how many heads keys and values are stored. key, value: numbers of each head."""

    kv_heads: int
    key: int
    value: int


def head_sizes(config: PretrainedConfig) -> HeadSizes:
    """Of a block; unfolded to heads where the model compresses them."""
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    if compresses(config):
        return HeadSizes(heads, text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim)
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return HeadSizes(1, size, size)
    names = "num_kv_heads", "num_key_value_heads"  # the first is Falcon's own
    kv_heads = next((found for name in names if (found := getattr(text, name, None))), heads)
    return HeadSizes(kv_heads, size, size)


def compresses(config: PretrainedConfig) -> bool:
    """Whether the model makes keys and values from something smaller (multi-head latent attention)."""
    return bool(getattr(config.get_text_config(), "kv_lora_rank", None))
