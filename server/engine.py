"""One thread owns the device: take ready work, run one batch, hand the results back.

Tokens of all sessions that are ready when the device is free form the next batch (continuous batching: Orca, Yu et
al., OSDI'22). The engine knows nothing about peers, streams or messages.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import torch

from swarm.errors import EngineError, SwarmError

from .batch import RowChunk
from .kv_cache import KVCache, RowCache
from .scheduler import Waiting, next_batch
from .settling import Settling
from .span import Span

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowWork:
    """New tokens of one row: `num_tokens` from `position` on; earlier cached tokens from there on are forgotten."""

    cache: RowCache
    position: int
    num_tokens: int


@dataclass(frozen=True)
class StepOutput:
    """hidden: [tokens, hidden_size] on the CPU, in the dtype of the input. Times in seconds."""

    hidden: torch.Tensor
    queue_time: float
    compute_time: float


@dataclass
class StepTask:
    """One step of one session: the tokens of its rows, side by side, through local blocks [start, end)."""

    hidden: torch.Tensor
    rows: Sequence[RowWork]
    start: int
    end: int
    future: Future[StepOutput] = field(default_factory=Future)
    created: float = field(default_factory=time.monotonic)
    queue_time: float = 0.0
    compute_time: float = 0.0
    progress: list[int] = field(default_factory=list)  # tokens done, per row
    output: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.progress = [0] * len(self.rows)

    @property
    def done(self) -> bool:
        return all(done == row.num_tokens for done, row in zip(self.progress, self.rows, strict=True))


@dataclass(frozen=True)
class Load:
    """Rows that the device works on, and rows whose next tokens wait for it."""

    running_rows: int
    waiting_rows: int


@dataclass(frozen=True)
class _Piece:
    """Tokens [done, done + chunk.num_tokens) of one row of a task, as they enter a batch."""

    task: StepTask
    row: int
    first: int  # of these tokens within the task's hidden states
    chunk: RowChunk


class Engine:
    """Runs steps on its own thread, from `start` to `stop`. `submit` may be called from any thread."""

    def __init__(
        self,
        span: Span,
        cache: KVCache,
        max_batch_tokens: int,
        threads: int | None = None,
        on_death: Callable[[], object] = lambda: None,
    ):
        """on_death: called on the engine's thread when that ends though nobody stopped it, which is a bug of ours."""
        self.span = span
        self.cache = cache
        self.max_batch_tokens = max_batch_tokens
        #: batches run, and rows in them: their ratio tells how well sessions are batched together
        self.num_batches = 0
        self.num_batched_rows = 0
        self._running_rows = 0
        self._threads = threads
        self._on_death = on_death
        self._tasks: deque[StepTask] = deque()
        self._settling = Settling()
        self._free_since = 0.0
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after its present batch; work that still waits fails."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def submit(self, task: StepTask) -> Future[StepOutput]:
        """Queue a step. The future fails with a SwarmError; cancelling it drops what has not run yet."""
        with self._wake:
            if self._stopping:
                task.future.set_exception(EngineError("the server is stopping"))
            else:
                self._tasks.append(task)
                for row in task.rows:
                    self._settling.arrived(row.cache, task.created)
                self._wake.notify()
        return task.future

    @property
    def load(self) -> Load:
        """What the engine has to do at this moment. From any thread."""
        with self._wake:
            unfinished = sum(
                done < row.num_tokens
                for task in self._tasks
                if not task.future.done()
                for done, row in zip(task.progress, task.rows, strict=True)
            )
            running = min(self._running_rows, unfinished)
        return Load(running, unfinished - running)

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            while (tasks := self._wait_for_work()) is not None:
                self.step(tasks)
        except Exception:
            logger.exception("the engine's thread ends")
            self._on_death()
        finally:  # nobody shall wait for it in vain
            with self._wake:
                self._stopping = True
            for task in self._tasks:
                _fail(task, EngineError("the server is stopping"))

    def _wait_for_work(self) -> list[StepTask] | None:
        with self._wake:
            while True:
                if self._stopping:
                    return None
                self._tasks = deque(task for task in self._tasks if not task.future.done())
                wait = self._seconds_to_settle() if self._tasks else None
                if wait is not None and wait <= 0.0:
                    return list(self._tasks)
                self._wake.wait(wait)

    def _seconds_to_settle(self) -> float:
        """How long the free device should wait for more rows before it takes what is ready."""
        self._settling.forget(lambda row: row.released)
        ready_since = max(self._free_since, self._tasks[0].created)
        return self._settling.wait_until(ready_since) - time.monotonic()

    def step(self, tasks: list[StepTask]) -> None:
        """Schedule, run and finish one batch."""
        pieces = self._schedule(tasks)
        self._running_rows = len(pieces)
        started = time.monotonic()
        try:
            if pieces:
                self._collect(pieces, self._forward(pieces), started)
        except Exception as error:
            logger.exception("a batch of %d rows failed", len(pieces))
            for piece in pieces:
                _fail(piece.task, EngineError(f"the forward pass failed: {type(error).__name__}: {error}"))
        finally:
            self.cache.let_go(piece.chunk.cache for piece in pieces)
            self._note_finished(pieces)
        for task in tasks:
            if task.done and task.output is not None:
                _finish(task, StepOutput(task.output, task.queue_time, task.compute_time))

    def _note_finished(self, pieces: list[_Piece]) -> None:
        """Before the results leave: their rows may be back at any moment."""
        self._free_since = time.monotonic()
        self._running_rows = 0
        with self._wake:
            self._settling.finished([piece.chunk.cache for piece in pieces if piece.task.done], self._free_since)

    def _schedule(self, tasks: list[StepTask]) -> list[_Piece]:
        candidates: list[tuple[StepTask, int, int]] = []
        waiting: list[Waiting] = []
        for task in tasks:
            first = 0
            for index, row in enumerate(task.rows):
                if task.progress[index] < row.num_tokens:
                    candidates.append((task, index, first + task.progress[index]))
                    waiting.append(Waiting(row.num_tokens - task.progress[index], decode=row.num_tokens == 1))
                first += row.num_tokens
        pieces = []
        taken = next_batch(waiting, self.max_batch_tokens)
        for (task, index, first), num_tokens in zip(candidates, taken, strict=True):
            if num_tokens and (chunk := self._make_room(task, index, num_tokens)) is not None:
                pieces.append(_Piece(task, index, first, chunk))
        return pieces

    def _make_room(self, task: StepTask, index: int, num_tokens: int) -> RowChunk | None:
        """Cache pages for the next tokens of a row, held for this batch. None if its session ended or gets too long."""
        row = task.rows[index]
        position = row.position + task.progress[index]
        try:
            self.cache.truncate(row.cache, position)
            if self.cache.grow(row.cache, position + num_tokens) and self.cache.hold(row.cache):
                return RowChunk(row.cache, position, num_tokens, task.start, task.end)
            _fail(task, EngineError("the session ended while its step was waiting"))
        except SwarmError as error:
            _fail(task, error)
        return None

    def _forward(self, pieces: list[_Piece]) -> torch.Tensor:
        slices = [piece.task.hidden[piece.first : piece.first + piece.chunk.num_tokens] for piece in pieces]
        flat = slices[0] if len(slices) == 1 else torch.cat([part.to(self.span.dtype) for part in slices])
        flat = flat.to(self.span.device, self.span.dtype)
        return self.span.forward(flat, [piece.chunk for piece in pieces], self.cache)

    def _collect(self, pieces: list[_Piece], output: torch.Tensor, started: float) -> None:
        output = output.cpu()
        elapsed = time.monotonic() - started
        self.num_batches += 1
        self.num_batched_rows += len(pieces)
        first = 0
        timed: set[int] = set()
        for piece in pieces:
            task, chunk = piece.task, piece.chunk
            part = output[first : first + chunk.num_tokens].to(task.hidden.dtype)
            first += chunk.num_tokens
            if len(part) == len(task.hidden):
                task.output = part
            else:
                if task.output is None:
                    task.output = torch.empty_like(task.hidden)
                task.output[piece.first : piece.first + chunk.num_tokens] = part
            chunk.cache.length = chunk.position + chunk.num_tokens
            task.progress[piece.row] += chunk.num_tokens
            if id(task) not in timed:
                timed.add(id(task))
                task.queue_time = task.queue_time or started - task.created
                task.compute_time += elapsed


def _finish(task: StepTask, output: StepOutput) -> None:
    _settle(task.future.set_result, output)


def _fail(task: StepTask, error: SwarmError) -> None:
    _settle(task.future.set_exception, error)


def _settle(action: Callable[..., None], value: StepOutput | SwarmError) -> None:
    """Resolve a future that its owner may have cancelled in the same moment."""
    with contextlib.suppress(InvalidStateError):
        action(value)
