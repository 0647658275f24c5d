"""What the demo is compared with: the whole model in plain transformers, in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from swarm.server.quantization import quantization_config

if TYPE_CHECKING:
    from swarm.server.config import Quantization


def load_reference(source: str, quantization: Quantization) -> Any:
    """The model of a folder or hub id in float32, its weights quantised as the servers do it."""
    quantized = quantization_config(quantization, torch.float32)
    options = {} if quantized is None else {"quantization_config": quantized, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()


def answer_tokens(model: Any, prompt: list[int], limits: dict[str, int], streamer: Any = None) -> list[int]:
    """Greedy tokens after the prompt, from a plain model or one over the swarm. limits: keywords of `generate`."""
    input_ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, streamer=streamer, **limits
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens
