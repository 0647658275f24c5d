"""Whether a free device should wait a moment for rows that are about to come back.

Sessions that decode together leave the device together, and their next tokens arrive a few tenths of a millisecond
apart. A device that starts at once with the first of them splits them into two groups that wait for each other for
ever. So it may wait, `MAX_WAIT` at most, for rows of its last batch whose owners have been quick so far. Where only a
chunk of a prompt would run meanwhile it has more patience, see pace.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Any

#: Longest that ready work waits for others, in seconds.
MAX_WAIT = 0.002

#: Weight of the newest time between a row's result and its next token.
_SMOOTHING = 0.3
#: A row is waited for a little beyond its usual time.
_PATIENCE = 1.5
#: And if it may come in time, though it usually comes a little later: waiting costs 2 ms, a batch that splits costs
#: another forward pass each time, until its parts meet again.
_HOPE = 0.7


class Settling:
    """Learns how long each row takes to come back; says until when to wait. All times in seconds, on one clock."""

    def __init__(self, max_wait: float = MAX_WAIT):
        self._max_wait = max_wait
        self._last_batch: set[Hashable] = set()  # rows of it that did not come back yet
        self._left_at: dict[Hashable, float] = {}  # every row that is away
        self._usual: dict[Hashable, float] = {}  # smoothed time away

    def finished(self, rows: Collection[Hashable], now: float) -> None:
        """A batch is done, and the results of these rows leave."""
        self._last_batch = set(rows)
        self._left_at.update(dict.fromkeys(rows, now))

    def arrived(self, row: Hashable, now: float) -> None:
        """New work of this row came in."""
        self._last_batch.discard(row)
        left_at = self._left_at.pop(row, None)
        if left_at is not None:
            away, usual = now - left_at, self._usual.get(row)
            self._usual[row] = away if usual is None else usual + _SMOOTHING * (away - usual)

    def forget(self, is_gone: Callable[[Any], bool]) -> None:
        """Drop what is known of rows that will not come back."""
        for known in (self._left_at, self._usual):
            for row in [row for row in known if is_gone(row)]:
                del known[row]
        self._last_batch = {row for row in self._last_batch if not is_gone(row)}

    def wait_until(self, ready_since: float, patience: float = 0.0) -> float:
        """When to start with what is ready since `ready_since`; then at once, if nobody is expected within `max_wait`.

        patience: wait up to so long if that brings all rows of the last batch together, but not for only some of them.
        A row that never came back before may do so at any moment: it is waited for once, for `max_wait`.
        """
        soon = ready_since + self._max_wait
        all_back = hoped_for = ready_since
        for row in self._last_batch:
            usual = self._usual.get(row)
            expected = soon if usual is None else self._left_at[row] + _PATIENCE * usual
            all_back = max(all_back, expected)
            if usual is None or self._left_at[row] + _HOPE * usual <= soon:
                hoped_for = max(hoped_for, min(expected, soon))
        return all_back if all_back <= ready_since + patience else hoped_for
