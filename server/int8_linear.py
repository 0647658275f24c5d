"""bitsandbytes' int8 layer in fewer steps, for the CPU: bit for bit the same result.

The arithmetic is that of LLM.int8() (Dettmers et al., NeurIPS'22) without outlier columns: each row of activations and
each output's weights are rounded to int8 with one scale (its largest magnitude), multiplied exactly, and scaled back. A
row's result depends on nothing but the row. For a few rows bitsandbytes spends most of its time between its own calls
(a custom autograd function, five registered operators, two sets of checks), which is what this leaves out.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear8bitLt

from .frozen_product import frozen_product

_INVERSE_OF_127_SQUARED = 6.200124e-05  # as bitsandbytes writes it

_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def _multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 [rows, inputs] and [outputs, inputs] -> int32 [rows, outputs], exact: any way gives the same numbers."""
    if _HAS_AVX512:
        return torch._int_mm(rows, weight.t())
    # torch's own product is scalar code there; bitsandbytes knows better.
    return torch.ops.bitsandbytes.int8_linear_matmul.default(rows, weight)


class FewStepsInt8Linear(Linear8bitLt):
    """`Linear8bitLt` without its detours. Gradients pass as if nothing had been rounded, as in the library."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: [..., in_features] -> [..., out_features], the same dtype."""
        return frozen_product(input, self)

    def backward_product(self, gradient: torch.Tensor) -> torch.Tensor:
        weight = self.state.CB.to(gradient.dtype).mul_(self.state.SCB.unsqueeze(1).mul(1.0 / 127.0))
        return gradient @ weight

    def product(self, input: torch.Tensor) -> torch.Tensor:
        # bitsandbytes rounds to float16 first, whatever the dtype.
        rows = input.reshape(-1, self.in_features).to(torch.float16)
        largest = rows.abs().amax(dim=1, keepdim=True).float()
        rounded = (rows * (127.0 / largest)).round_().to(torch.int8)
        product = _multiply(rounded, self.state.CB)
        output = (product * (largest * self.state.SCB)).mul_(_INVERSE_OF_127_SQUARED)
        if self.bias is not None:
            output += self.bias
        return output.to(input.dtype).view(*input.shape[:-1], self.out_features)


def take_fewer_steps(layer: Linear8bitLt) -> None:
    """Turn an int8 layer into a `FewStepsInt8Linear`; its tensors stay."""
    if layer.weight.CB is not None:  # it has not run yet
        layer.init_8bit_state()
    layer.__class__ = FewStepsInt8Linear
