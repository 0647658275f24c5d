"""How many tokens of prompts may join the next batch while others watch their own tokens come.

Every row that decodes has a deadline for its next token: `max_stall` times its usual gap after its last one. A batch
takes as much of the prompts as keeps all deadlines, by what batches took so far. A row that is away, at its client,
comes back in the middle of the batch and then needs another one: it leaves only half of its time to this one. So a
prompt rather waits for rows that will be back in less time than such a batch costs before its first token.

Prefill in chunks beside decode rows is Sarathi-Serve's (Agrawal et al., OSDI'24), where the operator sets a budget of
tokens; here it follows from measured times.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from typing import Any

#: Tokens of prompts in every batch, whatever is held up, so that prompts are not starved.
MIN_CHUNK = 16
#: Of the time until a deadline, the part that is planned with: batches do not always take what they took before.
SAFETY = 0.92
#: A row's usual gap is the median of so many.
_NUM_GAPS = 15
#: Weight of the newest batch in the smoothed times.
_SMOOTHING = 0.3


class BatchTimes:
    """What a batch takes: some seconds for decode rows and all that is fixed, and some for each token of prompts."""

    def __init__(self) -> None:
        self.base: float | None = None
        self._bulk_tokens = 0.0  # of recent batches, older ones count less
        self._bulk_seconds = 0.0

    @property
    def per_token(self) -> float | None:
        return self._bulk_seconds / self._bulk_tokens if self._bulk_tokens else None

    def observe(self, bulk_tokens: int, any_decode: bool, seconds: float) -> None:
        if bulk_tokens == 0:
            self.base = seconds if self.base is None else self.base + _SMOOTHING * (seconds - self.base)
        elif self.base is not None or not any_decode:
            beyond = max(0.0, seconds - (self.base or 0.0))
            self._bulk_tokens += bulk_tokens - _SMOOTHING * self._bulk_tokens
            self._bulk_seconds += beyond - _SMOOTHING * self._bulk_seconds
        elif self.per_token is not None:
            self.base = max(0.0, seconds - self.per_token * bulk_tokens)

    def tokens_within(self, seconds: float) -> int:
        """How many tokens of prompts fit into a batch of so many seconds; no more than experience tells."""
        if self.base is None or self.per_token is None:
            return 0
        return int(min((seconds - self.base) / max(self.per_token, 1e-9), 2 * self._bulk_tokens))


@dataclass
class _Row:
    """A row that was in a batch. arrived_at: None while it is away."""

    left_at: float
    arrived_at: float | None = None
    decodes: bool = True
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_GAPS))


class Pace:
    """Learns what batches take and how fast each row decodes. All times in seconds, on one clock."""

    def __init__(self, max_stall: float):
        """max_stall: see `ServerConfig.max_stall`."""
        self._max_stall = max_stall
        self._times = BatchTimes()
        self._rows: dict[Hashable, _Row] = {}
        self._bulk_at = float("-inf")  # when the last batch with tokens of prompts ended

    def arrived(self, row: Hashable, decodes: bool, now: float) -> None:
        """New work of this row came in. decodes: one token, that is."""
        if (known := self._rows.get(row)) is not None:
            known.arrived_at, known.decodes = now, decodes

    def finished(
        self, rows: Collection[Hashable], bulk_tokens: int, any_decode: bool, started: float, now: float
    ) -> None:
        """A batch with so many tokens of prompts ended, and the results of these rows leave."""
        self._times.observe(bulk_tokens, any_decode, now - started)
        for row in rows:
            known = self._rows.setdefault(row, _Row(now))
            if known.decodes and bulk_tokens == 0 and self._bulk_at <= known.left_at < now:
                known.gaps.append(now - known.left_at)
            known.left_at, known.arrived_at = now, None
        if bulk_tokens:
            self._bulk_at = now

    def disturbed(self, now: float) -> None:
        """Work that is no part of a batch held the device up until now: gaps across it are not the usual ones."""
        self._bulk_at = now

    def forget(self, is_gone: Callable[[Any], bool]) -> None:
        """Drop what is known of rows that will not come back."""
        self._rows = {row: known for row, known in self._rows.items() if not is_gone(row)}

    def bulk_tokens(self, present: Collection[Hashable], max_tokens: int, now: float) -> int:
        """How many tokens of prompts the next batch may hold. present: rows that decode in it."""
        left = self.seconds_left(present, now)
        if left is None:
            return max_tokens
        return min(max_tokens, max(MIN_CHUNK, self._times.tokens_within(left)))

    def patience(self) -> float:
        """How long a prompt should wait for rows that are coming: a batch without them costs as much time by itself."""
        return self._times.base or 0.0 if self._max_stall else 0.0

    def seconds_left(self, present: Collection[Hashable], now: float) -> float | None:
        """How long the next batch may take. None if nobody decodes, or stalls do not matter."""
        if not self._max_stall:
            return None
        lefts = []
        usual = self._usual_gap()
        for row, known in self._rows.items():
            gap = statistics.median(known.gaps) if known.gaps else usual
            stall = SAFETY * self._max_stall * gap
            deadline = known.left_at + stall
            if row in present:
                if known.arrived_at is not None:  # that it was away for long is not held against this batch
                    deadline = max(deadline, known.arrived_at + stall - gap)
                lefts.append(deadline - now)
            elif known.decodes and deadline > now:  # else it makes a pause, or waits with a prompt itself
                lefts.append((deadline - now) / 2)
        return min(lefts, default=None)

    def _usual_gap(self) -> float:
        """Of a row that did not decode undisturbed yet: that of others, or what a batch without prompts takes."""
        gaps = [gap for known in self._rows.values() for gap in known.gaps]
        return statistics.median(gaps) if gaps else self._times.base or 0.0
