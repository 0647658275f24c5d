"""How fast a peer's own line is, learnt from uploads that a busy machine may have slowed down."""

from __future__ import annotations

from collections import deque

from .codecs import SLOW_LINK

#: Measurements that must agree that a line is slow, and that count together later.
CONFIRMATIONS = 3


class LineRate:
    """The best of the last few measurements, in bytes/s.

    While processes start, an upload between two of one machine has taken ten times as long as a minute later. Chance
    never makes one faster. So a line counts as fast after one measurement, and as slow only after several: until then
    nothing is known of it.
    """

    def __init__(self) -> None:
        self._measured: deque[float] = deque(maxlen=CONFIRMATIONS)

    def add(self, rate: float) -> None:
        self._measured.append(rate)

    @property
    def value(self) -> float | None:
        return max(self._measured) if self.is_settled else None

    @property
    def is_settled(self) -> bool:
        """Whether nothing has to be measured soon."""
        return max(self._measured, default=0.0) >= SLOW_LINK or len(self._measured) == CONFIRMATIONS
