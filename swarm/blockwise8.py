"""Rows of hidden states in little more than a byte a value.

As in LLM.int8() (Dettmers et al., 2022) a few outliers keep 16 bits and all else becomes int8; as in its optimiser's
sibling (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021) every block of 64 values has an absmax
scale of its own. A row, little-endian:

    scales    float16 [blocks]    what a code of 1 stands for in each block of 64 values
    outliers  float16 [4]         the row's largest values
    places    uint16 [4]          where in the row they belong
    codes     int8 [hidden_size]
    exponent  int8                all of the row is to be multiplied by 2^exponent

The exponent puts the row's largest value into [2^14, 2^15): float16 neither overflows nor runs out of small numbers,
whether hidden states reach 1e5 or gradients 1e-9. A row with NaN or infinity arrives with no finite value at all, so
that nobody takes it for a good one.

A row's bytes depend on nothing but its values: not on its neighbours, nor on the device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.functional import pad

from .codecs import BLOCK_VALUES, OUTLIERS
from .errors import ProtocolError

#: Largest magnitude of a code.
_LARGEST_CODE = 127
#: float16 has fewer than 11 bits below this. It spares zeros a division by zero, too.
_SMALLEST_SCALE = 2.0**-14
#: The power of two under which a row's largest value is put.
_ROW_EXPONENT = 15

# float32: sign, exponent plus 127 in 8 bits, fraction in 23.
_FRACTION_BITS = 23
_EXPONENT_BIAS = 127
_NOT_FINITE = 255
#: Decoding makes 2^-128 of it, which has the bits of minus infinity.
_NOT_FINITE_EXPONENT = -128


def quantize(rows: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, row_bytes] of float32 [rows, hidden_size], on the same device.

    A value is off by at most half its block's scale: absmax of what the block holds beside outliers / 254, or 2^-29 of
    the row's largest value if that is more. Outliers are off by 2^-12 of themselves or 2^-39 of the largest.
    """
    num_rows, hidden_size = rows.shape
    outliers = min(OUTLIERS, hidden_size)
    top, places = _largest(rows, outliers)
    exponent, factor = _exponents(top)
    scaled = rows * factor
    if (exponent == _NOT_FINITE_EXPONENT).any():
        # What int8 makes of NaN differs between processors.
        scaled.masked_fill_(exponent == _NOT_FINITE_EXPONENT, 0.0)
    values = scaled.gather(1, places)
    scaled.scatter_(1, places, 0.0)
    padded = pad(scaled, (0, -hidden_size % BLOCK_VALUES)) if hidden_size % BLOCK_VALUES else scaled
    blocks = padded.unflatten(1, (-1, BLOCK_VALUES))
    scales = (blocks.abs().amax(dim=-1) / _LARGEST_CODE).clamp_(min=_SMALLEST_SCALE).half()
    codes = blocks.div_(scales.float()[:, :, None]).round_().flatten(1)[:, :hidden_size]

    head = torch.cat([scales.view(torch.int16), values.half().view(torch.int16), places.to(torch.int16)], dim=1)
    encoded = rows.new_empty(num_rows, 2 * head.shape[1] + hidden_size + 1, dtype=torch.int8)
    encoded[:, : 2 * head.shape[1]] = head.view(torch.int8)
    encoded[:, 2 * head.shape[1] : -1] = codes
    encoded[:, -1:] = exponent
    return encoded.view(torch.uint8)


def dequantize(encoded: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """float32 [rows, hidden_size] of uint8 [rows, row_bytes].

    Raises ProtocolError if an outlier's place is outside of its row. The result may hold NaN or infinity.
    """
    num_blocks, outliers = -(-hidden_size // BLOCK_VALUES), min(OUTLIERS, hidden_size)
    # clone, because rows of an odd number of bytes are not where 16-bit numbers may lie
    head = encoded[:, : -hidden_size - 1].clone(memory_format=torch.contiguous_format).view(torch.int16)
    scales, values, places = head.split([num_blocks, outliers, outliers], dim=1)
    codes, exponent = encoded[:, -hidden_size - 1 :].view(torch.int8).split([hidden_size, 1], dim=1)
    places = places.long() & 0xFFFF
    if places.amax() >= hidden_size:
        raise ProtocolError(f"a blockwise8 row of {hidden_size} values has an outlier at {int(places.amax())}")

    factor = _power_of_two(exponent.to(torch.int32))
    by_block = scales.view(torch.float16).float() * factor
    rows = codes.float()
    if hidden_size % BLOCK_VALUES:
        rows *= by_block.repeat_interleave(BLOCK_VALUES, dim=1)[:, :hidden_size]
    else:
        rows.unflatten(1, (-1, BLOCK_VALUES)).mul_(by_block[:, :, None])
    return rows.scatter_(1, places, values.view(torch.float16).float() * factor)


def _largest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of the largest magnitudes of each row, roughly, and where they are: both [rows, count], largest first.

    Magnitudes that differ by less than 2^-7 count as equal and the first of them wins: with its place in the lower
    half, each key is unique, so that every device and every number of rows gives the same answer.
    """
    keys = (rows.view(torch.int32) & 0x7FFF0000).bitwise_or_(_places_backwards(rows.shape[1], rows.device))
    top = keys.topk(count, dim=1).values
    return top, (0xFFFF - (top & 0xFFFF)).long()


@lru_cache(maxsize=8)
def _places_backwards(hidden_size: int, device: torch.device) -> torch.Tensor:
    return 0xFFFF - torch.arange(hidden_size, dtype=torch.int32, device=device)


def _exponents(top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row, int32 [rows, 1]: the exponent to send; and 2^-exponent, float32."""
    biased = top[:, :1] >> _FRACTION_BITS
    # Below 2^-112 a row loses small values: 2^126 is as far as a power of two can raise it in one product.
    exponent = (biased - (_EXPONENT_BIAS + _ROW_EXPONENT - 1)).clamp_(min=1 - _EXPONENT_BIAS)
    factor = _power_of_two(-exponent)
    return exponent.masked_fill_(biased == _NOT_FINITE, _NOT_FINITE_EXPONENT), factor


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent of int32 in [-127, 127] as float32, exactly; 0 for -127 and minus infinity for -128."""
    return ((exponent + _EXPONENT_BIAS) << _FRACTION_BITS).view(torch.float32)
