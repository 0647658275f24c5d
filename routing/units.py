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


#: Nine hours, longer than anything worth waiting for. Strangers announce rows and seconds whose product does not fit
#: into 64 bits, or whose sums would wrap round: with this, those of a chain stay below `FAR`.
LONGEST = 2**45


def nanoseconds(seconds: float) -> int:
    """`FAR` for what is infinite, at most `LONGEST` for all else."""
    return FAR if seconds == math.inf else min(round(seconds * 1e9), LONGEST)
