"""Linear layers that multiply one to four rows in float32 on a CPU: what the head does for every token.

Such a product reads every weight once and computes little, so the memory should set its pace. The library's own routine
for it (sgemv) may stay at half of that. The same product as a batch of small matrix products, each of `_BLOCK` outputs,
takes another routine, which comes near the memory's pace where the first does not, and uses several threads. Which one
is faster depends on processor and library, so that is measured, once per process, on weights of the model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from swarm.product_timing import sample_of, seconds

#: More rows than this and the library's own product is at least as fast.
MAX_ROWS = 4

_BLOCK = 64  # outputs in one small product; 16 to 192 are alike


class FewRowsLinear(nn.Linear):
    """`nn.Linear` whose forward pass takes the blockwise product for few rows. Gradients take the library's own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        needs_grad = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if input.numel() > MAX_ROWS * self.in_features or needs_grad or not _is_suitable(self):
            return super().forward(input)
        return blockwise_linear(input, self.weight, self.bias)


def blockwise_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What `F.linear` computes, as a batch of small products.

    input: [..., in_features]; weight: [out_features, in_features], contiguous, out_features a multiple of `_BLOCK`.
    """
    outputs, inputs = weight.shape
    flat = input.reshape(-1, inputs).contiguous()
    rows = flat.shape[0]
    # Every small product has the same right side. The strides decide about the speed: for a single row, too, they must
    # say that rows are `inputs` apart (a transposed right side); any others that fit a single row are six times slower.
    same = flat.as_strided((outputs // _BLOCK, inputs, rows), (0, 1, inputs))
    product = torch.bmm(weight.view(-1, _BLOCK, inputs), same)
    output = product.view(outputs, rows).t().reshape(*input.shape[:-1], outputs)
    return output if bias is None else output + bias


def speed_up_few_rows(model: nn.Module) -> bool:
    """Let the linear layers in `model` take the blockwise product where that is possible. False if it is not faster."""
    layers = [module for module in model.modules() if type(module) is nn.Linear and _is_suitable(module)]
    if not layers or not _is_faster(layers):
        return False
    for layer in layers:
        layer.__class__ = FewRowsLinear
    return True


def _is_suitable(layer: nn.Linear) -> bool:
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and layer.out_features % _BLOCK == 0
    )


_verdicts: dict[int, bool] = {}  # by the number of threads, on which it depends


def _is_faster(layers: Sequence[nn.Linear]) -> bool:
    threads = torch.get_num_threads()
    if threads not in _verdicts:
        _verdicts[threads] = _measure(layers)
    return _verdicts[threads]


@torch.inference_mode()
def _measure(layers: Sequence[nn.Linear]) -> bool:
    sample = [(torch.ones(1, layer.in_features), layer.weight) for layer in sample_of(layers)]
    best = {product: seconds(product, sample) for product in (F.linear, blockwise_linear)}
    return best[blockwise_linear] < best[F.linear]
