"""What a link is, and when a byte that enters it comes out: the pure part of the link proxy."""

from __future__ import annotations

from dataclasses import dataclass

BITS = 8  # in a byte
MEGABIT = 1e6  # bits

#: Besides what is on its way, a connection may keep the line busy for this many seconds ahead, as a router's queue
#: does, and in any case with this many bytes.
QUEUE_TIME = 0.02
QUEUE_BYTES = 256 * 2**10
#: Bytes that a connection may have on a line without a rate limit.
UNLIMITED_WINDOW = 32 * 2**20


@dataclass(frozen=True)
class Link:
    """A link with the same rate and delay each way. rate_bits_per_s: None for no limit."""

    rate_bits_per_s: float | None = None
    one_way_delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.rate_bits_per_s is not None and not self.rate_bits_per_s > 0:
            raise ValueError(f"a link of {self.rate_bits_per_s} bit/s carries nothing; give a rate above 0, or None")
        if not self.one_way_delay_s >= 0:
            raise ValueError(f"a delay of {self.one_way_delay_s} s; give 0 or more")

    @property
    def window(self) -> int:
        """Bytes that one connection may have on one line: what is under way at the full rate, and a queue."""
        if self.rate_bits_per_s is None:
            return UNLIMITED_WINDOW
        return QUEUE_BYTES + int(self.rate_bits_per_s / BITS * (self.one_way_delay_s + QUEUE_TIME))

    def __str__(self) -> str:
        delay = f"{2000 * self.one_way_delay_s:g} ms"
        return delay if self.rate_bits_per_s is None else f"{self.rate_bits_per_s / MEGABIT:g} Mbit/s, {delay}"


class Line:
    """One direction of a link: a transmitter that sends one byte after the other, then a delay."""

    def __init__(self, link: Link):
        self._link = link
        self._free_at = float("-inf")

    def arrival(self, now: float, size: int) -> float:
        """When the last of `size` bytes that enter now comes out. Seconds on the caller's clock, which must not go
        back; what entered later never comes out earlier."""
        started = max(now, self._free_at)
        rate = self._link.rate_bits_per_s
        self._free_at = started if rate is None else started + size * BITS / rate
        return self._free_at + self._link.one_way_delay_s
