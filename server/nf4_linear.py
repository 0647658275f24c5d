"""bitsandbytes' 4-bit layer, with gradients to its input in the form in which it runs on a CPU, too.

There the library repacks the weights for its inference kernel, which has no backward pass; and a layer that was not
repacked would compute other outputs than in inference.
"""

from __future__ import annotations

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from .frozen_product import frozen_product

#: Outputs that the library's packed format keeps together, as `_convert_weight_packed_for_cpu` writes it.
_TOGETHER = 32


class FrozenLinear4bit(Linear4bit):
    """`Linear4bit` whose forward pass is the same with gradients and without."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] -> [..., out_features], the same dtype."""
        return frozen_product(x, self)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(input)
        return output

    def backward_product(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient @ self._dequantized().to(gradient.dtype)

    def _dequantized(self) -> torch.Tensor:
        """[out_features, in_features]"""
        state = self.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            return _unpack(self.weight.data, state.code, state.absmax, state.blocksize)
        weight: torch.Tensor = dequantize_4bit(self.weight.data, state)
        return weight


def let_gradients_pass(layer: Linear4bit) -> None:
    """Turn a 4-bit layer into a `FrozenLinear4bit`; its tensors stay."""
    layer.__class__ = FrozenLinear4bit


def _unpack(packed: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> torch.Tensor:
    """What the packed weights stand for: float32 [out_features, in_features].

    packed: uint8 [out_features, in_features / 2]. code: the 16 values. absmax: [in_features / blocksize, out_features].
    """
    outputs, half = packed.shape
    pairs = packed.reshape(-1, _TOGETHER)
    indices = torch.cat([pairs & 0xF, pairs >> 4], dim=1)
    indices = indices.reshape(outputs // _TOGETHER, half, _TOGETHER, 2).transpose(1, 2).reshape(outputs, 2 * half)
    scales = absmax.float().t().repeat_interleave(blocksize, dim=1)
    return code.float()[indices.int()] * scales
