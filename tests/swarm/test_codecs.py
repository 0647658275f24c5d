"""What a row takes on the wire, and when it is worth the work to make it smaller."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.codecs import SLOW_LINK, Codec, choose_codec, row_bytes
from swarm.errors import ProtocolError

#: A message beside its tensor.
FRAMING = 100  # bytes


@pytest.mark.parametrize(("codec", "size"), {"float32": 4, "bfloat16": 2, "float16": 2}.items())
def test_a_dtype_takes_its_bytes(codec: str, size: int) -> None:
    assert row_bytes(Codec(codec), 576) == size * 576


@given(st.integers(64, 1024).map(lambda blocks: 64 * blocks))
def test_blockwise8_takes_half_of_float16(hidden_size: int) -> None:
    assert row_bytes(Codec.BLOCKWISE8, hidden_size) + FRAMING <= 0.53 * row_bytes(Codec.FLOAT16, hidden_size)


def test_blockwise8_for_one_row_of_smollm2() -> None:
    assert row_bytes(Codec.BLOCKWISE8, 576) + FRAMING <= 0.62 * row_bytes(Codec.FLOAT16, 576)


def test_a_row_too_long_for_blockwise8() -> None:
    with pytest.raises(ProtocolError, match="at most 65536 values a row, not 65537; use float16 or bfloat16"):
        row_bytes(Codec.BLOCKWISE8, 2**16 + 1)


@pytest.mark.parametrize("lossless", [Codec.FLOAT32, Codec.BFLOAT16, Codec.FLOAT16])
def test_only_links_that_are_known_to_be_slow_are_compressed(lossless: Codec) -> None:
    megabit = 1e6 / 8
    assert choose_codec(100 * megabit, lossless) is Codec.BLOCKWISE8
    assert choose_codec(25 * megabit, lossless) is Codec.BLOCKWISE8
    assert choose_codec(1000 * megabit, lossless) is lossless
    assert choose_codec(SLOW_LINK, lossless) is lossless
    assert choose_codec(None, lossless) is lossless
