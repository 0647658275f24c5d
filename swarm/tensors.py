"""Tensor <-> bytes on the wire."""

from __future__ import annotations

import math

import torch

from .errors import ProtocolError
from .protocol import Codec, TensorMeta

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def lossless_codec(dtype: torch.dtype) -> Codec:
    """The codec that keeps every bit of this type. Raises ProtocolError for a dtype that does not travel."""
    for name, known in DTYPES.items():
        if known == dtype:
            return Codec(name)
    raise ProtocolError(f"tensors of {dtype} do not travel; use one of {', '.join(DTYPES)}")


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. The sum tells at a fifth of the cost, unless it overflows by itself."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def row_bytes(codec: Codec, hidden_size: int) -> int:
    return DTYPES[codec.value].itemsize * hidden_size


def encode(tensor: torch.Tensor, codec: Codec) -> tuple[TensorMeta, memoryview]:
    """The wire form of a tensor. A contiguous CPU tensor is not copied, so it must not change until it is sent."""
    meta = TensorMeta(shape=tuple(tensor.shape), codec=codec)
    flat = tensor.detach().to(DTYPES[codec.value]).cpu().contiguous().reshape(-1).view(torch.uint8)
    return meta, flat.numpy().data


def decode(meta: TensorMeta, data: bytes | bytearray | memoryview, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor described by `meta`; it shares the memory of `data`. Raises ProtocolError if sizes differ."""
    stored = DTYPES[meta.codec.value]
    wanted = stored.itemsize
    for size in meta.shape:
        wanted *= size
    if len(data) != wanted:
        raise ProtocolError(
            f"a tensor of shape {list(meta.shape)} in {meta.codec} takes {wanted} bytes, but {len(data)} arrived"
        )
    if wanted == 0:
        raise ProtocolError(f"a tensor of shape {list(meta.shape)} holds nothing")
    tensor = torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=stored)
    return tensor.reshape(meta.shape).to(dtype or stored)


def choose_codec(rate: float | None, lossless: Codec) -> Codec:
    return lossless
