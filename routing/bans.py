"""Servers that failed lately, and are left out of new chains for a while."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Ban:
    until: float  # on the clock
    duration: float


class Bans:
    """ban_time: seconds of the first ban; it doubles with each failure in a row, up to max_ban_time."""

    def __init__(self, ban_time: float, max_ban_time: float, clock: Callable[[], float]):
        self._ban_time = ban_time
        self._max_ban_time = max_ban_time
        self._clock = clock
        self._bans: dict[str, _Ban] = {}

    def failed(self, peer_id: str) -> None:
        """While a peer is banned, further failures only restart the ban: several sessions may notice the same one."""
        now, ban = self._clock(), self._bans.get(peer_id)
        if ban is None:
            duration = self._ban_time
        elif ban.until > now:
            duration = ban.duration
        else:
            duration = 2 * ban.duration
        duration = min(duration, self._max_ban_time)
        # a ban that ended long ago says nothing any more, and the table must not grow for ever
        forgotten = now - self._max_ban_time
        self._bans = {peer: old for peer, old in self._bans.items() if old.until > forgotten}
        self._bans[peer_id] = _Ban(now + duration, duration)

    def succeeded(self, peer_id: str) -> None:
        """End a ban and forget the peer's failures."""
        self._bans.pop(peer_id, None)

    def left(self) -> dict[str, float]:
        """Seconds until each ban ends, by peer id."""
        now = self._clock()
        return {peer_id: ban.until - now for peer_id, ban in self._bans.items() if ban.until > now}
