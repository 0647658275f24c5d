"""Tensor <-> bytes on the wire."""

from __future__ import annotations

import math

import torch

from .errors import ProtocolError
from .protocol import TensorMeta

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32. Raises ProtocolError for a dtype that does not travel."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ProtocolError(f"tensors of {dtype} do not travel; use one of {', '.join(DTYPES)}")


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. The sum tells at a fifth of the cost, unless it overflows by itself."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def to_bytes(tensor: torch.Tensor) -> tuple[TensorMeta, memoryview]:
    """The wire form of a tensor. A contiguous CPU tensor is not copied, so it must not change until it is sent."""
    meta = TensorMeta(shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return meta, flat.numpy().data


def from_bytes(meta: TensorMeta, data: bytes | bytearray) -> torch.Tensor:
    """The tensor described by `meta`; it shares the memory of `data`. Raises ProtocolError if sizes differ."""
    dtype = DTYPES[meta.dtype]
    wanted = dtype.itemsize
    for size in meta.shape:
        wanted *= size
    if len(data) != wanted:
        raise ProtocolError(
            f"a tensor of shape {list(meta.shape)} in {meta.dtype} takes {wanted} bytes, but {len(data)} arrived"
        )
    if wanted == 0:
        # Not torch.empty(shape): beside a zero, the other sizes of a stranger's shape may overflow.
        raise ProtocolError(f"a tensor of shape {list(meta.shape)} holds nothing")
    return torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=dtype).reshape(meta.shape)
