"""What the engine has to do with passes for training: those that wait, and the one that runs, piece by piece."""

from __future__ import annotations

import threading
import time

import torch

from swarm.errors import SwarmError

from .passes import PIECE_TOKENS, PassTask, RunningPass, why_pass_failed
from .recovery import is_out_of_memory
from .span import Span
from .training import PassQueue, PieceTimes


class PassRunner:
    """One pass at a time, so less memory is needed. `add` and `is_running` may be used from any thread."""

    def __init__(self, span: Span):
        self.times = PieceTimes(time.monotonic())
        self._span = span
        self._queue = PassQueue()
        self._running: RunningPass | None = None
        self._lock = threading.Lock()

    def add(self, task: PassTask) -> None:
        with self._lock:
            if not self._has_work:
                self.times.rested(task.created)
            self._queue.add(task)

    @property
    def has_work(self) -> bool:
        with self._lock:
            return self._has_work

    @property
    def _has_work(self) -> bool:
        return self._running is not None or len(self._queue) > 0

    @property
    def is_running(self) -> bool:
        return self._running is not None

    def may_begin(self, seconds_left: float | None, now: float) -> bool:
        """Whether the next piece would be done in time; see `PieceTimes.may_begin`."""
        return self.times.may_begin(self._piece_tokens, seconds_left, now)

    def passed_over(self, now: float) -> bool:
        """A batch of sessions ran. True if the next piece is overdue after it."""
        if not self.has_work:
            return False
        self.times.passed_over()
        return self.times.is_overdue(self._piece_tokens, now)

    def run_piece(self) -> bool:
        """Run one piece of a pass. False if none is left that was not cancelled.

        Raises torch.AcceleratorError if the device is lost.
        """
        if (running := self._next()) is None:
            return False
        num_tokens, started = running.piece_tokens, time.monotonic()
        try:
            if running.advance():
                self._running = None
                running.finish()
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                raise
            self._running = running.in_smaller_pieces() if is_out_of_memory(error) else None
            if self._running is None:
                running.task.fail(why_pass_failed(error))
        now = time.monotonic()
        self.times.observe(num_tokens, now - started, now)
        return True

    def fail_all(self, error: SwarmError) -> None:
        with self._lock:
            tasks = self._queue.clear()
        if self._running is not None:
            tasks.append(self._running.task)
        for task in tasks:
            task.fail(error)

    def _next(self) -> RunningPass | None:
        with self._lock:
            if self._running is not None and self._running.task.future.done():  # cancelled
                self._running.close()
                self._running = None
            if self._running is None and (task := self._queue.take()) is not None:
                self._running = RunningPass(task, self._span)
            return self._running

    @property
    def _piece_tokens(self) -> int:
        """Of the next piece; of a pass that did not begin, what is usual."""
        return PIECE_TOKENS if self._running is None else self._running.piece_tokens
