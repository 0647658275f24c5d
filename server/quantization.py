"""Quantised weights: bitsandbytes through the transformers loader."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .config import Quantization
from .local_bitsandbytes import import_bitsandbytes

#: What a layer's sizes must be multiples of for bitsandbytes to repack its NF4 weights for the CPU: (outputs, inputs).
_PACKED = (32, 64)


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any | None:
    """The transformers `BitsAndBytesConfig` of a kind, or None for "none".

    int8 uses no outlier columns (threshold 0): bitsandbytes picks them over all rows of a batch, so that a stranger's
    row could change the result of another.
    """
    if quantization == "none":
        return None
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        # On CUDA it would log a line for every product in bfloat16: it rounds to float16 before it rounds to int8.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


@torch.inference_mode()
def finish_layers(block: nn.Module, dtype: torch.dtype) -> None:
    """Bring the quantised layers of a freshly loaded block into the form in which they run.

    On a CPU int8 layers take fewer steps for the same arithmetic, and bitsandbytes repacks NF4 weights in a layer's
    first forward pass, which is done here, block by block, while there is memory for it.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from .int8_linear import take_fewer_steps
    from .nf4_linear import let_gradients_pass

    for layer in block.modules():
        if isinstance(layer, Linear4bit):
            let_gradients_pass(layer)
        if layer_device(layer) != "cpu":
            continue
        if isinstance(layer, Linear8bitLt):
            take_fewer_steps(layer)
        elif isinstance(layer, Linear4bit):
            if layer.out_features % _PACKED[0] or layer.in_features % _PACKED[1]:
                layer.support_avx512bf16_for_cpu = False  # else its first forward pass fails
            layer(torch.zeros(1, layer.in_features, dtype=dtype))


def layer_device(layer: nn.Module) -> str | None:
    """The type of device of a layer's own weight, if it has one."""
    weight = getattr(layer, "weight", None)
    return weight.device.type if isinstance(weight, torch.Tensor) else None


def unquantized_weights(blocks: nn.Module) -> dict[str, int]:
    """{name within a block: bytes in all blocks} of the matrices that are in no quantised layer.

    bitsandbytes replaces `nn.Linear` only: experts that transformers fuses into one tensor stay as they are.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    left: dict[str, int] = {}
    for path, module in blocks.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                within = f"{path}.{name}".partition(".")[2]
                left[within] = left.get(within, 0) + parameter.nbytes
    return left


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that a module holds, with the scales that bitsandbytes keeps beside its weights."""
    yield from module.parameters()
    yield from module.buffers()
    for layer in module.modules():
        if (state := getattr(layer, "state", None)) is not None:  # of an int8 layer
            yield from (tensor for tensor in (state.CB, state.SCB) if tensor is not None)
        if (state := getattr(layer, "quant_state", None)) is not None:  # of a 4-bit layer
            yield state.absmax
            yield state.code
