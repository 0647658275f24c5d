"""How far another machine's clock is ahead of ours: neither is set by anybody, and only differences matter."""

from __future__ import annotations

import math

#: Two clocks drift apart by less than this share of the time.
DRIFT = 1e-4


class PeerClock:
    """All times in microseconds, `sent` and `arrived` by the clock of whoever did it.

    The first estimate is NTP's (RFC 5905, section 8), off by at most half a round trip. As nothing arrives before it
    was sent, every message after that may narrow it down.
    """

    def __init__(self, ahead: float = 0.0):
        self._ahead = ahead
        self._low, self._high, self._narrowed_at = -math.inf, math.inf, 0

    @classmethod
    def asked(cls, sent: int, answered: int, arrived: int) -> PeerClock:
        """After a question of ours that was answered at once."""
        return cls(answered - (sent + arrived) / 2)

    @property
    def ahead(self) -> int:
        return round(self._ahead)

    def took(self, sent: int, arrived: int) -> None:
        """A message of ours, or of somebody whose time was made ours, arrived there."""
        self._narrow(sent, high=arrived - sent)

    def gave(self, sent: int, arrived: int) -> None:
        """A message from there arrived here."""
        self._narrow(arrived, low=sent - arrived)

    def _narrow(self, now: int, low: float = -math.inf, high: float = math.inf) -> None:
        drift = DRIFT * max(0, now - self._narrowed_at)
        self._narrowed_at = now
        self._low, self._high = max(self._low - drift, low), min(self._high + drift, high)
        self._ahead = min(max(self._ahead, self._low), self._high)
