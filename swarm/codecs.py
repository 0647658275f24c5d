"""How hidden states travel: the codecs, and the bytes that a row takes in each."""

from __future__ import annotations

from enum import StrEnum

from .errors import ProtocolError


class Codec(StrEnum):
    """The first three are torch dtypes of the same name; blockwise8 is in `blockwise8.py`."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    BLOCKWISE8 = "blockwise8"


#: Values of a blockwise8 row that share a scale.
BLOCK_VALUES = 64
#: Values of a blockwise8 row that are kept in float16.
OUTLIERS = 4
#: Outliers name their place in two bytes.
MAX_BLOCKWISE8_ROW = 2**16

_VALUE_BYTES = {Codec.FLOAT32: 4, Codec.BFLOAT16: 2, Codec.FLOAT16: 2}


def row_bytes(codec: Codec, hidden_size: int) -> int:
    """Bytes of one token's hidden states. All tokens take the same, and none depends on its neighbours.

    Raises ProtocolError if the codec does not hold rows as long as this.
    """
    if codec is not Codec.BLOCKWISE8:
        return _VALUE_BYTES[codec] * hidden_size
    if hidden_size > MAX_BLOCKWISE8_ROW:
        raise ProtocolError(
            f"{codec} holds at most {MAX_BLOCKWISE8_ROW} values a row, not {hidden_size}; use float16 or bfloat16"
        )
    blocks, outliers = -(-hidden_size // BLOCK_VALUES), min(OUTLIERS, hidden_size)
    return 2 * blocks + 4 * outliers + hidden_size + 1


#: A link counts as slow below this, in bytes/s (128 Mbit/s, so that 100 Mbit/s does).
#:
#: Encoding and decoding one row as blockwise8 took 0.09 ms at hidden_size 4,096 and saves 3,951 of float16's 8,192
#: bytes: it pays below 44 MB/s. At 576 it took 0.075 ms and saves 541 bytes, or 1,693 of float32: it pays below 7 and
#: 22 MB/s. Rows of a prompt cost 0.003 to 0.025 ms and pay below 160 MB/s and more (`swarm bench wire`). As it is not
#: lossless it should buy something, too: at this rate a row of 4,096 gains 0.16 ms, and 1,024 of them 0.23 s.
SLOW_LINK = 16e6


def choose_codec(rate: float | None, lossless: Codec) -> Codec:
    """How hidden states should travel over a link of so many bytes/s; None: nobody has measured it.

    lossless: the codec of the model's own dtype, for links that are not slow.
    """
    return Codec.BLOCKWISE8 if rate is not None and rate < SLOW_LINK else lossless
