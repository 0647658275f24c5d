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
