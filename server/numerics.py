"""How a server computes, as a tag that others can compare."""

from __future__ import annotations

import importlib.metadata

import torch

from .config import Quantization

#: Changes when attention.py or packed_linear.py computes differently.
KERNEL_VERSION = "paged3"

#: Changes when quantised layers compute differently (quantization.py, int8_linear.py).
QUANTIZED_VERSION = "plain1"


def numerics_tag(dtype: torch.dtype, quantization: Quantization, device: torch.device) -> str:
    """Two servers with equal tags give equal tokens for equal input (in float32), but for ties within the last bits:
    which product a linear layer takes is measured at loading (packed_linear.py).

    Names what changes results: dtype, quantisation, device type, and the versions of the kernels behind them.
    """
    torch_version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    parts = [str(dtype).removeprefix("torch."), quantization, device.type, f"torch{torch_version}", KERNEL_VERSION]
    if quantization != "none":
        parts += [f"bnb{importlib.metadata.version('bitsandbytes')}", QUANTIZED_VERSION]
    return "/".join(parts)
