"""Times as whole nanoseconds: their sums do not depend on the order, so chains that are equally fast compare equal."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Integers: TypeAlias = NDArray[np.int64]
Booleans: TypeAlias = NDArray[np.bool_]

#: Later than any chain; sums of some of them still fit into 64 bits.
FAR = 2**60


def nanoseconds(seconds: float) -> int:
    return FAR if seconds == math.inf else round(seconds * 1e9)
