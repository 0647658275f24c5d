"""Small random models of every family that is served, with settings under which each shows what is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from swarm.architectures import TESTED, architecture_of
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.server.loader import load_span

NUM_BLOCKS = 7
#: Odd boundaries: families that alternate kinds of blocks must not get out of step.
SPANS = [BlockSpan(start=0, end=1), BlockSpan(start=1, end=4), BlockSpan(start=4, end=NUM_BLOCKS)]
WINDOW = 8

#: Experts: some are chosen by few tokens, some by none.
MIXTURE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT_ATTENTION = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "head_dim": 4,
}

#: Those that every run of the tests goes through; the others are marked slow.
ALWAYS = [
    "bloom",
    "cohere",
    "deepseek_v3",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "llama4_text",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
]

#: Those with which adapters are tested, block by block.
ADAPTED = list(ALWAYS)

FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.5},
    "deepseek_v3": {
        **MIXTURE,
        **LATENT_ATTENTION,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 3,
    },
    # Its eager attention adds alibi twice.
    "falcon": {
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
        "head_dim": None,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "gemma2": {
        "tie_word_embeddings": False,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 0.5,
    },
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "_sliding_window_pattern": 3},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt_bigcode": {"num_key_value_heads": None},
    "persimmon": {"num_key_value_heads": None},
    "gpt_oss": {
        "sliding_window": WINDOW,
        "num_local_experts": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3},
    "llama4_text": {
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": WINDOW,
        "attn_temperature_tuning": True,
        "floor_scale": 4,
        "attn_scale": 0.5,
    },
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
    "qwen3_moe": {**MIXTURE, "num_experts": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "smollm3": {"no_rope_layer_interval": 3},
    "stablelm": {"qk_layernorm": True},
    "bloom": {"num_key_value_heads": None, "tie_word_embeddings": False, "vocab_size": 2039},
    "opt": {"num_key_value_heads": None, "tie_word_embeddings": False, "vocab_size": 2039},
    "apertus": {"tie_word_embeddings": False, "vocab_size": 2039},
    "gpt2": {"num_key_value_heads": None, "tie_word_embeddings": False},
    # Those that are not always tested.
    "cohere2": {"sliding_window": WINDOW, "logit_scale": 0.5},
    "cwm": {"sliding_window": WINDOW},
    "deepseek_v2": {
        **MIXTURE,
        **LATENT_ATTENTION,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 2,
    },
    "dots1": {
        **MIXTURE,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "sliding_window": WINDOW,
        "max_window_layers": 3,
        "first_k_dense_replace": 2,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_interval": 2,
        "moe_layer_start_index": 1,
        "moe_intermediate_size": 16,
    },
    "exaone4": {"sliding_window": WINDOW},
    "exaone_moe": {**MIXTURE, "num_experts": 8, "sliding_window": WINDOW},
    "flex_olmo": {"num_experts": 6},
    "glm4_moe": {**MIXTURE, "n_routed_experts": 8, "first_k_dense_replace": 2},
    "glm4_moe_lite": {**MIXTURE, **LATENT_ATTENTION, "n_routed_experts": 8},
    "granitemoe": {"num_local_experts": 4, "embedding_multiplier": 3.0},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 16, "embedding_multiplier": 3.0},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": {"sliding_window": WINDOW},
    "olmo3": {"sliding_window": WINDOW},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4},
    "qwen2_moe": {**MIXTURE, "num_experts": 6, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2},
    "solar_open": {**MIXTURE, "n_routed_experts": 8},
    "starcoder2": {"tie_word_embeddings": False, "sliding_window": WINDOW},
    "vaultgemma": {"sliding_window": WINDOW},
    "youtu": LATENT_ATTENTION,
}

#: Other ways in which a family's models are built: settings beside the family's own, after "type/".
VARIANTS: dict[str, dict[str, Any]] = {
    "bloom/odd": {
        "tie_word_embeddings": True,
        "apply_residual_connection_post_layernorm": True,
        "num_attention_heads": 6,
        "hidden_size": 48,
    },
    "deepseek_v3/lite": {"q_lora_rank": None, "n_group": 1},
    "falcon/7b": {"tie_word_embeddings": True, "new_decoder_architecture": False, "num_kv_heads": 4},
    "falcon/rw": {
        "tie_word_embeddings": True,
        "new_decoder_architecture": False,
        "num_kv_heads": 4,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "gpt2/mistral": {"tie_word_embeddings": True, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox/serial": {"use_parallel_residual": False},
    "hunyuan_v1_dense/alpha": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 50.0}
    },
    "opt/350m": {"tie_word_embeddings": True, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "phimoe/window": {"sliding_window": WINDOW},
    "qwen2_moe/windows": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
    "stablelm/parallel": {"use_parallel_residual": True},
}


class Draw(NamedTuple):
    """How random weights are drawn: large enough for attention to be far from uniform, and for greedy texts of many
    different tokens that change without any block, which tests/test_families.py checks.

    biases: their size, relative to that of matrices. Large ones drown the text where norms subtract the mean.
    """

    seed: int = 0
    std: float = 0.3
    biases: float = 0.3


DRAWS: dict[str, Draw] = {
    "apertus": Draw(3, 0.3, 0.05),
    "bloom": Draw(4, 0.5, 0.05),
    "cwm": Draw(2),
    "deepseek_v3/lite": Draw(std=0.1),
    "exaone4": Draw(0, 0.5, 0.1),
    "falcon": Draw(1, 0.8, 0.05),
    "falcon/7b": Draw(),
    "falcon/rw": Draw(),
    "gemma2": Draw(5),
    "gpt2": Draw(4, 0.3, 0.05),
    "gpt_bigcode": Draw(4),
    "gpt_neox": Draw(3, 0.5, 0.1),
    "granitemoe": Draw(std=0.15),
    "granitemoeshared": Draw(std=0.15),
    "jais2": Draw(3, 0.5, 0.1),
    "mixtral": Draw(2),
    "nanochat": Draw(3),
    "olmo2": Draw(6, 0.5, 0.1),
    "olmoe": Draw(0, 0.5, 0.1),
    "opt": Draw(0, 0.3, 0.05),
    "persimmon": Draw(0, 0.5, 0.1),
    "phi": Draw(3, 0.5, 0.1),
    "smollm3": Draw(10),
    "starcoder2": Draw(4),
    "youtu": Draw(3),
}

#: Which families make which difference to attention, so that the tests below are known to meet it.
WINDOWED = {"gemma2", "gemma3_text", "mistral", "qwen2"}


def tiny_config(variant: str, **settings: Any) -> PretrainedConfig:
    """variant: a model type, or a key of `VARIANTS`."""
    model_type = variant.partition("/")[0]
    defaults = {
        "vocab_size": 251,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
    }
    chosen = {**defaults, **FAMILY_SETTINGS.get(model_type, {}), **VARIANTS.get(variant, {}), **settings}
    return AutoConfig.for_model(model_type, **{name: value for name, value in chosen.items() if value is not None})


def saved_model(config: PretrainedConfig, folder: Path, draw: Draw | None = None) -> tuple[Any, Checkpoint]:
    """A random model and its checkpoint. draw: by default that of its family."""
    draw = draw or DRAWS.get(config.model_type, Draw())
    torch.manual_seed(draw.seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=draw.std * draw.biases)
            else:  # norms that start as all ones (or zeros) would hide one that was not loaded
                parameter.normal_(mean=float(parameter.dim() == 1), std=draw.std)
    model.save_pretrained(folder)
    return model, open_checkpoint(str(folder))


def families() -> list[Any]:
    """Every family as a parameter of a test; those that are not in `ALWAYS` are marked slow."""
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in sorted(TESTED)]


def variants(*, always: bool = False) -> list[Any]:
    """The same, with all variants. always: for a test that is so quick that all run every time."""
    return [*(sorted(TESTED) if always else families()), *VARIANTS]


def blocks_of(model: Any) -> nn.ModuleList:
    """Of a causal model of plain transformers, or of its base model."""
    architecture = architecture_of(model.config)
    if not isinstance(model, architecture.base_class):
        model = model.get_submodule(architecture.base_prefix.rstrip("."))
    blocks = getattr(model, architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def spans_of(checkpoint: Checkpoint) -> list[Any]:
    settings = {"dtype": torch.float32, "quantization": "none", "device": torch.device("cpu")}
    return [load_span(checkpoint, span, **settings) for span in SPANS]


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 101, (length,), generator=generator) for length in lengths]
