"""int8 weights under activations that stay as they are, for the CPU.

bitsandbytes quantises the weights as they load. Its multiplication rounds the activations to int8 too, row by row: a
difference of 1e-7 in a row (another kernel, or a prefill instead of decode steps) then moves some values to the next
int8 step, and after a few blocks the logits differ visibly. Plain transformers with it disagrees with itself between a
prefill and the same tokens one by one. With weights alone in int8, a replay after a fail-over gives the same tokens, as
in float32. Without AVX-512 it is also five times as fast as bitsandbytes' multiplication. On CUDA, bitsandbytes' own
kernels stay: there, unpacking would cost bandwidth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Int8Linear(nn.Module):
    """y = x W^T + b, W in int8 with one scale per output."""

    def __init__(self, quantized: Any):
        """quantized: a freshly loaded `bitsandbytes.nn.Linear8bitLt`; its tensors are shared."""
        super().__init__()
        self.in_features: int = quantized.in_features
        self.out_features: int = quantized.out_features
        self.bias = quantized.bias
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("weight", quantized.weight.data)  # int8 [out_features, in_features]
        self.register_buffer("scale", quantized.weight.SCB.float() / 127.0)  # float32 [out_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] -> [..., out_features], the same dtype."""
        # Scaled before, not after: in float16 the sums of unscaled products would overflow.
        weight = self.weight * self.scale.to(x.dtype)[:, None]
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def keep_activations(model: nn.Module) -> None:
    """Put an Int8Linear in the place of every int8 layer of bitsandbytes."""
    from bitsandbytes.nn import Linear8bitLt

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear8bitLt):
                setattr(parent, name, Int8Linear(child))
