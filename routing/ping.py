"""Smoothed round-trip times of peers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

#: Weight of the newest measurement: one slow answer does not turn a chain around, a lasting change does.
SMOOTHING = 0.3
#: The same of one below the smoothed value: chance makes answers later, never sooner.
FALLING = 0.6
#: Seconds by which round trips vary at least: the answer of a process that has something else to do comes later.
LEAST_NOISE = 0.004


@dataclass(frozen=True, slots=True)
class _Measured:
    round_trip: float
    noise: float
    first: bool  # it rests on one measurement
    at: float


class PingTable:
    """The round trip to each peer in seconds, exponentially smoothed.

    A peer that did not answer is infinitely far for `unreachable_time` seconds, then unknown again; its earlier
    measurements are forgotten, since it may come back from elsewhere.
    """

    def __init__(
        self,
        *,
        smoothing: float = SMOOTHING,
        unreachable_time: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Raises ValueError unless 0 < smoothing <= 1 and unreachable_time >= 0."""
        if not 0 < smoothing <= 1 or not unreachable_time >= 0:
            raise ValueError(f"smoothing {smoothing} must be in (0, 1], unreachable_time {unreachable_time} at least 0")
        self._smoothing = smoothing
        self._unreachable_time = unreachable_time
        self._clock = clock
        self._measured: dict[str, _Measured] = {}

    def add(self, peer_id: str, round_trip: float) -> None:
        """Note a measurement in seconds. Raises ValueError if it is negative or not finite."""
        if not 0 <= round_trip < math.inf:
            raise ValueError(f"a round trip of {round_trip} s is impossible")
        noise = round_trip / 2
        before = self._measured.get(peer_id)
        if before is not None and before.round_trip != math.inf:
            surprise = round_trip - before.round_trip
            weight = self._smoothing if surprise > 0 else max(self._smoothing, FALLING)
            round_trip = before.round_trip + weight * surprise
            noise = abs(surprise) if before.first else before.noise + self._smoothing * (abs(surprise) - before.noise)
        first = before is None or before.round_trip == math.inf
        self._measured[peer_id] = _Measured(round_trip, noise, first, self._clock())

    def add_failure(self, peer_id: str) -> None:
        """Note that a peer did not answer."""
        self._measured[peer_id] = _Measured(math.inf, 0.0, False, self._clock())

    def round_trip(self, peer_id: str) -> float | None:
        """Seconds; `math.inf` if the peer did not answer lately; None if nothing is known."""
        return None if self.age(peer_id) == math.inf else self._measured[peer_id].round_trip

    def age(self, peer_id: str) -> float:
        """Seconds since the last measurement that still counts; `math.inf` if there is none."""
        measured = self._measured.get(peer_id)
        if measured is None:
            return math.inf
        age = self._clock() - measured.at
        return math.inf if measured.round_trip == math.inf and age >= self._unreachable_time else age

    def round_trips(self) -> dict[str, float]:
        """All that is known, by peer id, in seconds."""
        known = {peer_id: self.round_trip(peer_id) for peer_id in self._measured}
        return {peer_id: round_trip for peer_id, round_trip in known.items() if round_trip is not None}

    def noises(self) -> dict[str, float]:
        """By how many seconds the round trip to each peer usually differs from the smoothed one, smoothed as well.

        After a single measurement nobody knows; it is taken for half of it, as in RFC 6298. At least `LEAST_NOISE`.
        """
        return {peer_id: max(LEAST_NOISE, self._measured[peer_id].noise) for peer_id in self.round_trips()}

    def keep_only(self, peer_ids: Collection[str]) -> None:
        """Forget everybody else, so that the table does not outgrow the swarm."""
        self._measured = {peer_id: seen for peer_id, seen in self._measured.items() if peer_id in peer_ids}
