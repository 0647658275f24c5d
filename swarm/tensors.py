"""Hidden states <-> bytes on the wire. Every token is a row of its own: a message of several is its rows in turn."""

from __future__ import annotations

import math

import numpy as np
import torch

from .blockwise8 import dequantize, quantize
from .codecs import Codec, row_bytes
from .errors import ProtocolError
from .protocol import TensorMeta

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def lossless_codec(dtype: torch.dtype) -> Codec:
    """The codec that keeps every bit of this dtype. Raises ProtocolError for one that does not travel."""
    for name, known in DTYPES.items():
        if known == dtype:
            return Codec(name)
    raise ProtocolError(f"tensors of {dtype} do not travel; use one of {', '.join(DTYPES)}")


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. The sum tells at a fifth of the cost, unless it overflows by itself."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def encode(tensor: torch.Tensor, codec: Codec) -> tuple[TensorMeta, memoryview]:
    """The wire form of hidden states [tokens, hidden_size].

    A contiguous CPU tensor of the codec's own dtype is not copied, so it must not change until it is sent. Raises
    ProtocolError if the codec does not hold such rows, or values as large as these.
    """
    lossless_codec(tensor.dtype)  # or it is of none that travel
    tokens, hidden_size = tensor.shape
    meta = TensorMeta(shape=(tokens, hidden_size), codec=codec)
    _wire_bytes(meta)  # or the codec does not hold it
    tensor = tensor.detach()
    with torch.inference_mode():
        if codec is Codec.BLOCKWISE8:
            return meta, quantize(tensor.cpu().float().contiguous().numpy()).reshape(-1).data
        encoded = tensor.to(DTYPES[codec])
        if codec is Codec.FLOAT16 and encoded is not tensor and not all_finite(encoded) and all_finite(tensor):
            raise ProtocolError(
                f"hidden states up to {tensor.abs().max().item():g} do not fit float16, which ends at 65504; "
                "use bfloat16 or blockwise8"
            )
        return meta, encoded.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def decode(meta: TensorMeta, data: bytes | bytearray | memoryview, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The hidden states described by `meta`: [tokens, hidden_size] on the CPU, in `dtype` or what the codec holds.

    blockwise8 holds float32. Without a conversion the tensor shares the memory of `data` where that can be written to.
    Values that were NaN or infinite are not finite here either, though perhaps others of their row, too. Raises
    ProtocolError if the sizes differ, or the bytes cannot be of this codec.
    """
    tokens, hidden_size = meta.shape
    wanted, arrived = _wire_bytes(meta), memoryview(data).nbytes
    if arrived != wanted:
        raise ProtocolError(
            f"a tensor of shape {list(meta.shape)} in {meta.codec} takes {wanted} bytes, but {arrived} arrived"
        )
    if meta.codec is Codec.BLOCKWISE8:
        hidden = torch.from_numpy(dequantize(np.frombuffer(data, np.uint8).reshape(tokens, -1), hidden_size))
    else:
        # torch warns of memory that is not to be written to.
        buffer = bytearray(data) if memoryview(data).readonly else data
        hidden = torch.frombuffer(buffer, dtype=DTYPES[meta.codec]).view(tokens, hidden_size)
    return hidden if dtype is None else hidden.to(dtype)


def _wire_bytes(meta: TensorMeta) -> int:
    """Raises ProtocolError for a tensor without values, or with rows that the codec does not hold."""
    tokens, hidden_size = meta.shape
    if tokens == 0 or hidden_size == 0:
        # No torch.empty(shape) for it: beside a zero, the other size of a stranger's shape may overflow.
        raise ProtocolError(f"a tensor of shape {list(meta.shape)} holds nothing")
    return tokens * row_bytes(meta.codec, hidden_size)
