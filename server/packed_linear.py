"""Linear layers on a CPU whose weights lie in memory the way oneDNN multiplies them.

The usual product takes a row-major matrix apart at every call; for the few rows of decoding that costs more than the
product itself. Packed once, when the weights load, four rows take about as long as one, sixteen twice as long, and
prompts gain too (docs/experiments.md). Which way is faster depends on processor and library, so that is measured, once
per process, on weights of the model at hand.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from swarm.product_timing import sample_of, seconds

from .frozen_product import frozen_product

#: Rows for which weights are packed; oneDNN uses the same layout for any number.
_PACKED_FOR = 16
#: oneDNN compiles code for every number of rows, and keeps what it compiled for each layer's shape: by default 1,024
#: times, which grew to a gigabyte. So few are kept (compiling anew takes 0.6 ms), in its own cache and in the one that
#: torch has beside it; both look here when they are first used.
_COMPILED = "48"
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, _COMPILED)

#: Small batches should be padded to one of these: there are fewer kinds then, and 1 to 3 rows take longer than 4.
_PADDED = (4, 6, 8, 12, 16, 24, 32)


class PackedLinear(nn.Module):
    """`y = x W^T + b` with a packed W, which no gradient reaches. The packed copy is the only one."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias
        # Not a buffer: what copies or moves a module's buffers cannot treat this layout.
        self.packed = _pack(layer.weight.detach())

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features], unpacked for this one use."""
        return self.packed.to_dense()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight (but for what the layout may leave unused)."""
        return self.packed.numel() * self.packed.element_size()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return frozen_product(input, self)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """input: [..., in_features] -> [..., out_features], without gradients."""
        return packed_product(input, self.packed, self.bias)

    def backward_product(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the input, of that of the output.

        By the routine of the forward product: for hundreds of rows it can take half as long as the usual one, and
        unpacking the weight is a small part of that.
        """
        return packed_product(gradient, self.weight.t())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def packed_product(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What `F.linear` computes. input: [..., in_features], in the weights' dtype; packed: made by `_pack`,
    or plain."""
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
    return output


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
    return packed


def padded_rows(num_rows: int) -> int:
    """How many rows a batch of so many should have."""
    return next((size for size in _PADDED if size >= num_rows), num_rows)


def pack_linear_layers(model: nn.Module) -> bool:
    """Pack the linear layers in `model` where that is possible. False if it is not faster here."""
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and _is_suitable(child)
    ]
    if not layers or not _is_faster([layer for _, _, layer in layers]):
        return False
    for parent, name, layer in layers:
        setattr(parent, name, PackedLinear(layer))
        layer.weight = None  # type: ignore[assignment]  # the list still holds the layer: free its memory now
    return True


def _is_suitable(layer: nn.Linear) -> bool:
    if layer.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if layer.weight.dtype == torch.bfloat16:  # which oneDNN refuses on older processors
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return layer.weight.dtype == torch.float32


_verdicts: dict[tuple[torch.dtype, int], bool] = {}  # by dtype and number of threads, on which it depends


def _is_faster(layers: Sequence[nn.Linear]) -> bool:
    key = layers[0].weight.dtype, torch.get_num_threads()
    if key not in _verdicts:
        _verdicts[key] = _measure(layers)
    return _verdicts[key]


@torch.inference_mode()
def _measure(layers: Sequence[nn.Linear]) -> bool:
    plain = [
        (torch.ones(_PADDED[0], layer.in_features, dtype=layer.weight.dtype), layer.weight)
        for layer in sample_of(layers)
    ]
    packed = [(rows, _pack(weight)) for rows, weight in plain]
    return seconds(packed_product, packed) < seconds(F.linear, plain)
