"""Small random models of every family that is served, with settings under which each shows what is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.server.loader import load_span

NUM_BLOCKS = 7
#: Odd boundaries: families that alternate kinds of blocks must not get out of step.
SPANS = [BlockSpan(start=0, end=1), BlockSpan(start=1, end=4), BlockSpan(start=4, end=NUM_BLOCKS)]
WINDOW = 8

FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.5},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "_sliding_window_pattern": 3},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
    "smollm3": {"no_rope_layer_interval": 3},
}

#: Which families make which difference to attention, so that the tests below are known to meet it.
WINDOWED = {"gemma2", "gemma3_text", "mistral", "qwen2"}
SOFTCAPPED = {"gemma2"}


def tiny_config(model_type: str, **settings: Any) -> PretrainedConfig:
    defaults = {
        "vocab_size": 101,
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
    return AutoConfig.for_model(model_type, **{**defaults, **FAMILY_SETTINGS.get(model_type, {}), **settings})


def saved_model(config: PretrainedConfig, folder: Path) -> tuple[Any, Checkpoint]:
    """A random model, and its checkpoint. Its weights are large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.3)
    model.save_pretrained(folder)
    return model, open_checkpoint(str(folder))


def spans_of(checkpoint: Checkpoint) -> list[Any]:
    settings = {"dtype": torch.float32, "quantization": "none", "device": torch.device("cpu")}
    return [load_span(checkpoint, span, **settings) for span in SPANS]


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 101, (length,), generator=generator) for length in lengths]
