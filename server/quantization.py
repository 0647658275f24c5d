"""Quantised weights: bitsandbytes through the transformers loader."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from .attention import KERNEL_VERSION
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


def numerics_tag(dtype: torch.dtype, quantization: Quantization, device: torch.device) -> str:
    """How a server computes. Two servers with equal tags give equal tokens for equal input (in float32).

    Names what changes results: dtype, quantisation, device type, and the versions of the kernels behind them.
    """
    torch_version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    parts = [str(dtype).removeprefix("torch."), quantization, device.type, f"torch{torch_version}", KERNEL_VERSION]
    if quantization != "none":
        parts.append(f"bnb{importlib.metadata.version('bitsandbytes')}")
    return "/".join(parts)
