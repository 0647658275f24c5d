"""blockwise8: how far values move, that rows know nothing of each other, and what no row can hide."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from swarm.blockwise8 import Floats
from swarm.codecs import BLOCK_VALUES, OUTLIERS, Codec, row_bytes
from swarm.errors import ProtocolError
from swarm.protocol import TensorMeta
from swarm.tensors import all_finite, decode, encode

#: Sizes with one block, full blocks, a last one that is not full, and fewer values than outliers.
SIZES = st.sampled_from([1, 3, 5, 63, 64, 65, 128, 200, 576])


#: Rows may hold anything that blockwise8 surely keeps finite.
NUMBERS = st.floats(-float(np.float32(3.3e38)), float(np.float32(3.3e38)), width=32)


@st.composite
def some_rows(draw: st.DrawFn) -> Floats:
    """[1 to 5 rows, hidden_size]: a few values of any size among many that are equal, or small."""
    shape = (draw(st.integers(1, 5)), draw(SIZES))
    small = st.floats(-8, 8, width=32)
    return draw(arrays.arrays(np.float32, shape, elements=NUMBERS | small, fill=small))


def there(rows: Floats) -> bytes:
    meta, data = encode(torch.from_numpy(rows), Codec.BLOCKWISE8)
    assert meta == TensorMeta(shape=rows.shape, codec=Codec.BLOCKWISE8)
    return bytes(data)


def back(data: bytes, shape: tuple[int, ...]) -> Floats:
    hidden = decode(TensorMeta(shape=shape, codec=Codec.BLOCKWISE8), data)
    assert hidden.dtype == torch.float32
    return hidden.numpy()


def error_bounds(rows: Floats) -> npt.NDArray[np.float64]:
    """How far each value may move: what the docstring of `quantize` promises.

    Which of nearly equal values are the outliers is not promised: where it is in doubt, the larger error counts.
    """
    nearly = 1 + 2.0**-7
    magnitudes = np.abs(rows.astype(np.float64))
    ranked = np.pad(np.sort(magnitudes, axis=1), ((0, 0), (OUTLIERS + 1, 0)))
    smallest_outlier, largest_other = ranked[:, -OUTLIERS, None], ranked[:, -OUTLIERS - 1, None]
    outlier = magnitudes * 2.0**-11
    other = np.empty_like(magnitudes)
    for start in range(0, rows.shape[1], BLOCK_VALUES):
        block = slice(start, start + BLOCK_VALUES)
        largest = np.minimum(magnitudes[:, block].max(axis=1, keepdims=True), smallest_outlier * nearly)
        other[:, block] = largest / 254 * (1 + 2.0**-10)
    bound = np.where(magnitudes > largest_other * nearly, outlier, np.maximum(outlier, other))
    bound = np.where(magnitudes * nearly < smallest_outlier, other, bound)
    return bound + np.maximum(ranked[:, -1:] * 2.0**-29, 2.0**-140)


@given(some_rows())
@example(np.zeros((2, 70), np.float32))
@example(np.full((1, 64), 3.3e38, np.float32))
@example(np.full((1, 5), 1e-45, np.float32))
@settings(max_examples=300, deadline=None)
def test_no_value_moves_far(rows: Floats) -> None:
    data = there(rows)
    assert len(data) == len(rows) * row_bytes(Codec.BLOCKWISE8, rows.shape[1])
    moved = np.abs(back(data, rows.shape).astype(np.float64) - rows)
    assert (moved <= error_bounds(rows)).all()


@given(some_rows())
@settings(deadline=None)
def test_a_row_has_the_same_bytes_whatever_is_beside_it(rows: Floats) -> None:
    together = there(rows)
    alone = [there(row[None]) for row in rows]
    assert together == b"".join(alone)
    assert there(rows[::-1].copy()) == b"".join(reversed(alone))
    whole = back(together, rows.shape)
    for row, data in zip(whole, alone, strict=True):
        assert np.array_equal(row[None], back(data, (1, rows.shape[1])))


@pytest.mark.parametrize("exponent", [-100, -30, 17, 100])
def test_large_and_small_rows_keep_the_same_share(exponent: int) -> None:
    """Neither gradients of 1e-9 nor hidden states of 1e5 are beyond float16: a power of two changes nothing else."""
    rows = np.random.default_rng(0).normal(size=(8, 576)).astype(np.float32)
    rows[:, 7] *= 1000
    factor = np.float32(2.0**exponent)
    assert np.array_equal(back(there(rows * factor), rows.shape), back(there(rows), rows.shape) * factor)


def test_zeros_stay_zeros() -> None:
    assert not back(there(np.zeros((3, 100), np.float32)), (3, 100)).any()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 5, 576])
def test_what_is_not_finite_stays_so(bad: float, count: int) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 576)).astype(np.float32)
    good = back(there(rows), rows.shape)
    rows[1, :count] = bad
    arrived = back(there(rows), rows.shape)
    assert not np.isfinite(arrived[1]).any()
    assert not all_finite(torch.from_numpy(arrived))
    assert np.array_equal(arrived[[0, 2]], good[[0, 2]])


@given(st.integers(1, 3), SIZES, st.data())
@settings(deadline=None)
def test_any_bytes_become_a_tensor_or_a_protocol_error(tokens: int, hidden_size: int, data: st.DataObject) -> None:
    wanted = tokens * row_bytes(Codec.BLOCKWISE8, hidden_size)
    junk = data.draw(st.binary(min_size=wanted, max_size=wanted))
    try:
        assert back(junk, (tokens, hidden_size)).shape == (tokens, hidden_size)
    except ProtocolError as error:
        assert "has an outlier at" in str(error)


def test_an_outlier_outside_of_its_row() -> None:
    data = bytearray(there(np.ones((2, 576), np.float32)))
    places = row_bytes(Codec.BLOCKWISE8, 576) + 2 * 9 + 2 * OUTLIERS
    data[places : places + 2] = (576).to_bytes(2, "little")
    with pytest.raises(ProtocolError, match="a blockwise8 row of 576 values has an outlier at 576"):
        back(bytes(data), (2, 576))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_byte_too_few_or_too_many(change: int) -> None:
    data = there(np.ones((2, 576), np.float32)) + b"\0"
    with pytest.raises(ProtocolError, match=rf"\[2, 576\] in blockwise8 takes 1222 bytes, but {1222 + change} arrived"):
        back(data[: 1222 + change], (2, 576))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_takes_and_gives_every_dtype(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 130).to(dtype)
    meta, data = encode(rows, Codec.BLOCKWISE8)
    assert torch.equal(decode(meta, data), decode(*encode(rows.float(), Codec.BLOCKWISE8)))
    arrived = decode(meta, data, dtype)
    assert arrived.dtype == dtype
    assert (arrived.float() - rows.float()).abs().max() <= 0.03


@pytest.mark.gpu
def test_a_cuda_tensor_has_the_same_bytes() -> None:
    rows = torch.randn(5, 576, dtype=torch.bfloat16)
    for codec in Codec:
        assert bytes(encode(rows.cuda(), codec)[1]) == bytes(encode(rows, codec)[1])
