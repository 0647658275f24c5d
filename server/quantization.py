"""Quantised weights: bitsandbytes through the transformers loader."""

from __future__ import annotations

from typing import Any

import torch

from .config import Quantization


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any | None:
    """The transformers `BitsAndBytesConfig` of a kind, or None for "none".

    int8 uses no outlier columns (threshold 0): bitsandbytes picks them over all rows of a batch, so that a stranger's
    row could change the result of another.
    """
    if quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
