"""Which pass for training runs next on the device, and when one may at all: sessions go before.

Nobody watches a pass, so pieces of it fill the time in which no session has work. A piece cannot be interrupted;
whether it may begin follows from the deadlines of rows that decode (see `pace`), and from how long pieces took before.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from .passes import PassTask

#: A pass that got nothing in so many batches of sessions, or in so many seconds, gets one piece whoever waits.
PATIENCE_BATCHES = 16
PATIENCE_SECONDS = 1.0
#: But not before it waited so many times as long as it will take: else rows of thousands of tokens, of which a piece
#: takes seconds, would leave sessions less of the device than passes.
PATIENCE_PIECES = 3
#: Weight of the newest piece in the smoothed time.
_SMOOTHING = 0.3


class PassQueue:
    """Passes that wait, of every peer its own in turn: one that sends many does not hold up another."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[PassTask]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(tasks) for tasks in self._waiting.values())

    def add(self, task: PassTask) -> None:
        """Those of this peer that were cancelled go now: their tensors count in no quota any more, so a peer that sends
        pass after pass and gives each of them up would fill the memory."""
        line = deque(other for other in self._waiting.get(task.owner, ()) if not other.future.done())
        line.append(task)
        self._waiting[task.owner] = line  # in the place that it had

    def take(self) -> PassTask | None:
        """The next one, of the peer whose turn it is; those that were cancelled are dropped, and cost it no turn."""
        while self._waiting:
            owner, tasks = self._waiting.popitem(last=False)
            while tasks and tasks[0].future.done():
                tasks.popleft()
            if tasks:
                task = tasks.popleft()
                if tasks:
                    self._waiting[owner] = tasks  # at the end of the line
                return task
        return None

    def clear(self) -> list[PassTask]:
        tasks = [task for line in self._waiting.values() for task in line]
        self._waiting.clear()
        return tasks


class PieceTimes:
    """What pieces took, per token. All times in seconds."""

    def __init__(self, now: float) -> None:
        self._per_token: float | None = None
        self._last_piece = now
        self._batches_since = 0

    def observe(self, num_tokens: int, seconds: float, now: float) -> None:
        per_token = seconds / max(num_tokens, 1)
        old = self._per_token
        self._per_token = per_token if old is None else old + _SMOOTHING * (per_token - old)
        self.rested(now)

    def rested(self, now: float) -> None:
        """A piece ran, or none waits: patience begins anew."""
        self._last_piece, self._batches_since = now, 0

    def passed_over(self) -> None:
        """A batch of sessions ran while a pass waited."""
        self._batches_since += 1

    def is_overdue(self, num_tokens: int, now: float) -> bool:
        """num_tokens: of the piece that waits."""
        waited = now - self._last_piece
        if waited < PATIENCE_PIECES * num_tokens * (self._per_token or 0.0):
            return False
        return self._batches_since >= PATIENCE_BATCHES or waited >= PATIENCE_SECONDS

    def may_begin(self, num_tokens: int, seconds_left: float | None, now: float) -> bool:
        """seconds_left: until a row that decodes needs the device; None: nobody decodes."""
        if seconds_left is None or self.is_overdue(num_tokens, now):
            return True
        return self._per_token is not None and num_tokens * self._per_token <= seconds_left
