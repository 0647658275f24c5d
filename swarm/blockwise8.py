"""Rows of hidden states in little more than a byte a value.

As in LLM.int8() (Dettmers et al., 2022), a few outliers keep 16 bits and all else becomes int8; as in 8-bit Optimizers
via Block-wise Quantization (Dettmers et al., 2021), every block of 64 values has an absmax scale of its own. A row,
little-endian:

    scales    float16 [blocks]    what a code of 1 stands for in each block of 64 values
    outliers  float16 [4]         the row's largest values
    places    uint16 [4]          where in the row they belong
    codes     int8 [hidden_size]
    exponent  int8                all of the row is to be multiplied by 2^exponent

The exponent puts the row's largest value into [2^14, 2^15): float16 neither overflows nor runs out of small numbers,
whether hidden states reach 1e5 or gradients 1e-9. A row with NaN or infinity arrives with no finite value at all, so
that nobody takes it for a good one.

A row's bytes depend on nothing but its values, whatever batch it is in. In NumPy, because a decode step has one row,
and the same in torch took four times as long for it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .codecs import BLOCK_VALUES, OUTLIERS
from .errors import ProtocolError

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Integers: TypeAlias = npt.NDArray[np.int32]

_LARGEST_CODE = np.float32(127)
#: float16 has fewer than 11 bits below this. It spares blocks of zeros a division by zero, too.
_SMALLEST_SCALE = np.float32(2.0**-14)
#: A row's largest value is put below 2 to this.
_ROW_EXPONENT = 15

# float32: sign, exponent plus 127 in 8 bits, fraction in 23.
_FRACTION_BITS = 23
_EXPONENT_BIAS = 127
_NOT_FINITE = 255
#: In a row's last byte; `_power_of_two` makes minus infinity of it.
_NOT_FINITE_EXPONENT = -128


def quantize(rows: Floats) -> Bytes:
    """[rows, row_bytes] of [rows, hidden_size].

    Outliers are off by at most 2^-11 of themselves, and other values by half of their block's scale: 1/254 of its
    largest (outliers aside, and rounded to float16). Nothing can be told apart below 2^-29 of the row's largest value,
    nor below 2^-140. Values from 3.4e38 on, where float32 ends, may arrive as infinity.
    """
    hidden_size = rows.shape[1]
    blocks = _in_blocks(rows)
    outliers = min(OUTLIERS, hidden_size)
    top, places = _largest(blocks, outliers)
    exponent, factor, bad = _exponents(top)
    if bad.any():
        blocks = np.where(bad[:, :, None], np.float32(0), blocks)
    blocks = blocks * factor[:, :, None]
    flat = blocks.reshape(len(rows), -1)  # a view
    numbers = np.arange(len(rows))[:, None]
    values = flat[numbers, places].astype(np.float16)
    flat[numbers, places] = 0.0
    scales = np.maximum(np.abs(blocks).max(axis=2) / _LARGEST_CODE, _SMALLEST_SCALE).astype(np.float16)
    np.divide(blocks, scales.astype(np.float32)[:, :, None], out=blocks)
    np.rint(blocks, out=blocks)

    head = 2 * scales.shape[1]
    encoded = np.empty((len(rows), head + 4 * outliers + hidden_size + 1), np.uint8)
    into_scales, into_values, into_places, into_codes, into_exponent = _parts(encoded, hidden_size)
    into_scales[:] = scales
    into_values[:] = values
    into_places[:] = places
    into_codes[:] = flat[:, :hidden_size]
    into_exponent[:] = exponent
    return encoded


def dequantize(encoded: Bytes, hidden_size: int) -> Floats:
    """[rows, hidden_size] of [rows, row_bytes]; may hold NaN or infinity.

    Raises ProtocolError if an outlier's place is outside of its row.
    """
    scales, values, places, codes, exponent = _parts(encoded, hidden_size)
    if places.max() >= hidden_size:
        raise ProtocolError(f"a blockwise8 row of {hidden_size} values has an outlier at {places.max()}")
    factor = _power_of_two(exponent.astype(np.int32))
    # Only strangers and rows that are marked make these, and whoever asked looks at what comes out.
    with np.errstate(invalid="ignore", over="ignore"):
        by_block = scales * factor
        rows = codes.astype(np.float32)
        if hidden_size % BLOCK_VALUES:
            rows *= np.repeat(by_block, BLOCK_VALUES, axis=1)[:, :hidden_size]
        else:
            blocks = rows.reshape(len(rows), -1, BLOCK_VALUES)  # a view
            blocks *= by_block[:, :, None]
        rows[np.arange(len(rows))[:, None], places] = values * factor
    return rows


def _parts(
    encoded: Bytes, hidden_size: int
) -> tuple[
    npt.NDArray[np.float16], npt.NDArray[np.float16], npt.NDArray[np.uint16], npt.NDArray[np.int8], npt.NDArray[np.int8]
]:
    """Views of scales, outliers, places, codes and exponents."""
    outliers = 2 * min(OUTLIERS, hidden_size)  # bytes
    codes = encoded.shape[1] - 1 - hidden_size
    return (
        encoded[:, : codes - 2 * outliers].view(np.float16),
        encoded[:, codes - 2 * outliers : codes - outliers].view(np.float16),
        encoded[:, codes - outliers : codes].view(np.uint16),
        encoded[:, codes:-1].view(np.int8),
        encoded[:, -1:].view(np.int8),
    )


def _in_blocks(rows: Floats) -> Floats:
    """[rows, blocks, BLOCK_VALUES], the last block filled up with zeros; a view if it is full."""
    missing = -rows.shape[1] % BLOCK_VALUES
    if missing:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    return rows.reshape(len(rows), -1, BLOCK_VALUES)


def _largest(blocks: Floats, count: int) -> tuple[Integers, Integers]:
    """The bits of the largest magnitudes of each row, the largest last, and their places: both [rows, count].

    Magnitudes that differ by less than 2^-7 count as equal and the first of them wins: with its place in the lower
    half, no two keys are equal, so every way to sort gives the same answer. The largest are in the blocks with the
    largest, which takes a seventh of the time of looking at all values at hidden_size 4,096.
    """
    num_rows, num_blocks, _ = blocks.shape
    keys = blocks.view(np.int32) & 0x7FFF0000
    keys |= _places_backwards(num_blocks)
    if num_blocks > count:
        best = keys.max(axis=2).argpartition(num_blocks - count, axis=1)[:, -count:]
        keys = keys[np.arange(num_rows)[:, None], best]
    keys = keys.reshape(num_rows, -1)
    keys.partition(keys.shape[1] - count, axis=1)
    top = np.sort(keys[:, -count:], axis=1)
    return top, 0xFFFF - (top & 0xFFFF)


@lru_cache(maxsize=8)
def _places_backwards(num_blocks: int) -> Integers:
    return (0xFFFF - np.arange(num_blocks * BLOCK_VALUES, dtype=np.int32)).reshape(num_blocks, BLOCK_VALUES)


def _exponents(top: Integers) -> tuple[Integers, Floats, npt.NDArray[np.bool_]]:
    """Of each row, [rows, 1]: the exponent to send, 2^-exponent, and whether it holds NaN or infinity."""
    biased = top[:, -1:] >> _FRACTION_BITS
    bad = biased == _NOT_FINITE
    # 2^126 is as far as one product can raise a row.
    exponent = np.maximum(biased - (_EXPONENT_BIAS + _ROW_EXPONENT - 1), 1 - _EXPONENT_BIAS)
    factor = _power_of_two(-exponent)
    exponent[bad] = _NOT_FINITE_EXPONENT
    return exponent, factor, bad


def _power_of_two(exponent: Integers) -> Floats:
    """2^exponent for [-126, 127], exactly; 0 for -127 and minus infinity for -128."""
    return ((exponent + _EXPONENT_BIAS) << _FRACTION_BITS).view(np.float32)
