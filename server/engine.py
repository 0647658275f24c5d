"""One thread owns the device: take ready work, run one batch, hand the results back.

Tokens of all sessions that are ready when the device is free form the next batch (continuous batching: Orca, Yu et
al., OSDI'22). The engine knows nothing about peers, streams or messages.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from swarm.errors import EngineError, ProtocolError, SwarmError
from swarm.tensors import all_finite

from .adapters.scheduling import Costs, Query, Unmeasured, choose
from .batch import RowChunk
from .config import DEFAULT_MAX_STALL
from .eviction import EvictionLimits
from .kv_cache import KVCache
from .pace import Pace
from .page_queue import PageQueue
from .pass_runner import PassRunner
from .passes import PassOutput, PassTask
from .recovery import Outcome, run_batch
from .reorder import reorder_rows
from .scheduler import Kind, Waiting, next_batch
from .settling import Settling
from .span import Span
from .tally import Tally
from .tasks import Piece, StepOutput, StepTask

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: While all steps wait for pages, look again once in this many seconds, lest a turn ends unnoticed.
LOOK_AGAIN = 0.1
#: While training waits for rows that decode, look again once in this many seconds.
LOOK_AGAIN_FOR_TRAINING = 0.005


@dataclass(frozen=True)
class Load:
    """Rows that the device works on, and rows whose next tokens wait for it. A running pass counts as one row."""

    running_rows: int
    waiting_rows: int


class Engine:
    """Runs steps on its own thread, from `start` to `stop`. `submit` may be called from any thread."""

    def __init__(
        self,
        span: Span,
        cache: KVCache,
        max_batch_tokens: int,
        threads: int | None = None,
        on_death: Callable[[], object] = lambda: None,
        limits: EvictionLimits | None = None,
        max_stall: float = DEFAULT_MAX_STALL,
        adapter_costs: Costs | None = None,
        tally: Tally | None = None,
    ):
        """max_stall: see `ServerConfig`. limits: of an overcommitted cache. adapter_costs: what batches with adapters
        take here; without it, the order of prompts follows their deadlines and lengths alone. tally: counts what is
        done, among what was done before.

        on_death: called on the engine's thread when that ends though nobody stopped it, which is a bug of ours.
        """
        self.span = span
        self.cache = cache
        self.max_batch_tokens = max_batch_tokens
        #: batches run, and rows in them: their ratio tells how well sessions are batched together
        self.num_batches = 0
        self.num_batched_rows = 0
        self._tally = Tally() if tally is None else tally
        self._running_rows = 0
        self._threads = threads
        self._on_death = on_death
        self._adapter_costs = adapter_costs or Unmeasured()
        self._tasks: deque[StepTask] = deque()
        self._errands: deque[Callable[[], None]] = deque()
        self._settling = Settling()
        self._pages = PageQueue(cache, limits or EvictionLimits())
        self._look_again = 0.0
        cache.on_release, cache.on_evict = self._on_release, self._on_evict
        self._pace = Pace(max_stall)
        self._pass_runner = PassRunner(span)
        self._free_since = 0.0
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after its present batch, and wait for that; work that still waits fails."""
        self.ask_to_stop()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def ask_to_stop(self) -> None:
        """The same without waiting, see `is_running`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def submit(self, task: StepTask) -> Future[StepOutput]:
        """Queue a step. The future fails with a SwarmError; cancelling it drops what has not run yet."""
        with self._wake:
            if self._stopping:
                task.future.set_exception(EngineError("the server is stopping"))
            else:
                self._tasks.append(task)
                for row in task.rows:
                    self._settling.arrived(row.cache, task.created)
                    self._pace.arrived(row.cache, task.kind(row) is Kind.DECODE, task.created)
                self._wake.notify()
        return task.future

    def run_between(self, action: Callable[[], Result]) -> Future[Result]:
        """Run something on the engine's thread, between two batches. The future has what it returns or raises."""
        future: Future[Result] = Future()
        with self._wake:
            if self._stopping:
                future.set_exception(EngineError("the server is stopping"))
            else:
                self._errands.append(partial(_resolve, future, action))
                self._wake.notify()
        return future

    def submit_pass(self, task: PassTask) -> Future[PassOutput]:
        """Queue a pass for training. The future fails with a SwarmError; cancelling it drops what has not run yet."""
        with self._wake:
            if self._stopping:
                task.fail(EngineError("the server is stopping"))
            else:
                self._pass_runner.add(task)
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
            passes = int(self._pass_runner.is_running)
        return Load(running + passes, unfinished - running)

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            while (tasks := self._wait_for_work()) is not None:
                if self._errands:
                    self._errands.popleft()()
                elif not tasks:
                    self._train()
                elif ready := self._with_pages(tasks):
                    self.step(ready)
                    if self._pass_runner.passed_over(time.monotonic()):  # steps go before training, but not for ever
                        self._train()
        except Exception:
            logger.exception("the engine's thread ends")
            self._on_death()
        finally:  # nobody shall wait for it in vain
            with self._wake:
                self._stopping = True
            for errand in self._errands:  # mostly of somebody who waits; they only tidy up now
                errand()
            for task in self._tasks:
                task.fail(EngineError("the server is stopping"))
            self._pass_runner.fail_all(EngineError("the server is stopping"))

    def _wait_for_work(self) -> list[StepTask] | None:
        """Steps for the next batch; none where a piece of training may run instead. None if the engine stops."""
        with self._wake:
            while True:
                if self._stopping:
                    return None
                if self._errands:
                    return []
                self._tasks = deque(task for task in self._tasks if not task.future.done())
                wait = self._seconds_to_wait()
                if wait is not None and wait <= 0.0:
                    return list(self._tasks)
                if self._pass_runner.has_work and self._no_step_is_near():
                    if self._may_train():
                        return []
                    wait = min(wait or LOOK_AGAIN_FOR_TRAINING, LOOK_AGAIN_FOR_TRAINING)
                self._wake.wait(wait)

    def _seconds_to_wait(self) -> float | None:
        """Until there is something to do. None: until somebody brings it."""
        first = next((task for task in self._tasks if not task.waits_for_pages), None)
        if first is not None:
            return self._seconds_to_settle(first)
        return self._look_again - time.monotonic() if self._tasks else None

    def _seconds_to_settle(self, first: StepTask) -> float:
        """How long the free device should wait for more rows before it takes what is ready."""
        self._settling.forget(lambda row: row.released)
        ready_since = max(self._free_since, first.created)
        prompt_waits = any(task.kind(row) is not Kind.DECODE for task in self._tasks for row in task.rows)
        patience = self._pace.patience() if prompt_waits else 0.0
        return self._settling.wait_until(ready_since, patience) - time.monotonic()

    def _no_step_is_near(self) -> bool:
        """Steps that are here wait for pages, not for others to come."""
        return all(task.waits_for_pages for task in self._tasks)

    def _may_train(self) -> bool:
        """Whether the next piece of training would be done before a row that decodes needs the device."""
        now = time.monotonic()
        self._pace.forget(lambda row: row.released)
        return self._pass_runner.may_begin(self._pace.seconds_left((), now), now)

    def _train(self) -> None:
        started = time.monotonic()
        if self._pass_runner.run_piece():
            self._tally.training_time += time.monotonic() - started
            with self._wake:
                self._free_since = time.monotonic()
                self._pace.disturbed(self._free_since)

    def _with_pages(self, tasks: list[StepTask]) -> list[StepTask]:
        """Those that can run; the others wait for pages of an overcommitted cache, or fail."""
        self._look_again = time.monotonic() + LOOK_AGAIN
        ready, failed = self._pages.provide(tasks)
        for task, error in failed:
            task.fail(error)
        return ready

    def _on_release(self) -> None:
        with self._wake:
            self._look_again = 0.0
            self._wake.notify()

    def _on_evict(self) -> None:
        self._tally.evictions += 1

    def step(self, tasks: list[StepTask]) -> None:
        """Schedule, run and finish one batch."""
        pieces = self._schedule([task for task in tasks if self._in_order(task)])
        self._running_rows = len(pieces)
        started = time.monotonic()
        try:
            if pieces:
                self._collect(run_batch(pieces, self._forward), started)
        finally:
            self.cache.let_go(piece.chunk.cache for piece in pieces)
            self._note_finished(pieces, started)
        for task in tasks:
            if task.done:
                task.finish()

    def _in_order(self, task: StepTask) -> bool:
        """Do the reordering that a step asks for, once. False if that failed, and the step with it."""
        session, reorder = task.rows[0].cache.session, task.reorder
        if reorder is not None and reorder.number > session.reorder_number:
            positions = {row.cache: row.position for row in task.rows}  # of all rows: the session checked it
            try:
                reorder_rows(self.cache, session.rows, reorder.sources, [positions[row] for row in session.rows])
            except SwarmError as error:
                task.fail(error)
                return False
            session.reorder_number = reorder.number
        return True

    def _note_finished(self, pieces: list[Piece], started: float) -> None:
        """Before the results leave: their rows may be back at any moment."""
        self._free_since = time.monotonic()
        self._tally.step_time += self._free_since - started
        self._running_rows = 0
        leaving = [piece.chunk.cache for piece in pieces if piece.task.done]
        bulk_tokens = sum(piece.chunk.num_tokens for piece in pieces if piece.kind is not Kind.DECODE)
        any_decode = any(piece.kind is Kind.DECODE for piece in pieces)
        with self._wake:
            self._settling.finished(leaving, self._free_since)
            if pieces:
                self._pace.finished(leaving, bulk_tokens, any_decode, started, self._free_since)

    def _schedule(self, tasks: list[StepTask]) -> list[Piece]:
        candidates: list[tuple[StepTask, int, int]] = []
        waiting: list[Waiting] = []
        now = time.monotonic()
        for task in tasks:
            first = 0
            # One that has passed counts no more: it would make others late.
            deadline = math.inf if task.deadline is None or task.deadline <= now else task.deadline
            for index, row in enumerate(task.rows):
                if task.progress[index] < row.num_tokens:
                    candidates.append((task, index, first + task.progress[index]))
                    left = row.num_tokens - task.progress[index]
                    waiting.append(Waiting(left, task.kind(row), deadline))
                first += row.num_tokens
        pieces = []
        for (task, index, first), num_tokens in zip(candidates, self._share_batch(candidates, waiting), strict=True):
            if num_tokens and (chunk := self._make_room(task, index, num_tokens)) is not None:
                pieces.append(Piece(task, index, first, chunk))
        return pieces

    def _share_batch(self, candidates: list[tuple[StepTask, int, int]], waiting: list[Waiting]) -> list[int]:
        """How many tokens of each candidate go into the next batch."""
        decoding = {
            task.rows[index].cache
            for (task, index, _), entry in zip(candidates, waiting, strict=True)
            if entry.kind is Kind.DECODE
        }
        bulk_tokens = self.max_batch_tokens
        with self._wake:
            self._pace.forget(lambda row: row.released)
            if len(decoding) < len(waiting):
                bulk_tokens = self._pace.bulk_tokens(decoding, self.max_batch_tokens, time.monotonic())
        chosen = self._choose_prompts(candidates, waiting, min(bulk_tokens, self.max_batch_tokens - len(decoding)))
        return next_batch(waiting, self.max_batch_tokens, bulk_tokens, chosen)

    def _choose_prompts(
        self, candidates: list[tuple[StepTask, int, int]], waiting: list[Waiting], max_tokens: int
    ) -> list[int] | None:
        """Which prompts go next where that matters for adapters or deadlines; None where it does not."""
        rows = [task.rows[index].cache for task, index, _ in candidates]
        prompts = [number for number, entry in enumerate(waiting) if entry.kind is not Kind.DECODE]
        if len(prompts) < 2 or not any(
            rows[number].adapter is not None or candidates[number][0].deadline is not None for number in prompts
        ):
            return None
        queries = [
            Query(entry.num_tokens, row.adapter, task.deadline, task.created)
            for (task, _, _), entry, row in zip(candidates, waiting, rows, strict=True)
        ]
        chosen = choose(
            [queries[number] for number in prompts],
            self._adapter_costs,
            max(1, max_tokens),
            time.monotonic(),
            present=[query for query, entry in zip(queries, waiting, strict=True) if entry.kind is Kind.DECODE],
            divisible=True,
        )
        return [prompts[number] for number in chosen]

    def _make_room(self, task: StepTask, index: int, num_tokens: int) -> RowChunk | None:
        """Cache pages for the next tokens of a row, held for this batch. None if its session ended or gets too long."""
        row = task.rows[index]
        position = row.position + task.progress[index]
        try:
            if position > row.cache.length:
                raise ProtocolError(f"row {index} goes on at {position}, but only {row.cache.length} tokens are cached")
            if position < row.cache.length:
                self.cache.truncate(row.cache, position)
            if self.cache.grow(row.cache, position + num_tokens) and self.cache.hold(row.cache):
                return RowChunk(row.cache, position, num_tokens, task.start, task.end)
            task.fail(EngineError("the session ended while its step was waiting"))
        except SwarmError as error:
            task.fail(error)
        return None

    def _forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        slices = [piece.task.hidden[piece.first : piece.first + piece.chunk.num_tokens] for piece in pieces]
        flat = slices[0] if len(slices) == 1 else torch.cat([part.to(self.span.dtype) for part in slices])
        flat = flat.to(self.span.device, self.span.dtype)
        return self.span.forward(flat, [piece.chunk for piece in pieces], self.cache).cpu()

    def _collect(self, outcomes: Sequence[Outcome], started: float) -> None:
        elapsed = time.monotonic() - started
        self.num_batches += 1
        self.num_batched_rows += len(outcomes)
        self._tally.batch_rows.observe(len(outcomes))
        for piece, result in outcomes:
            if isinstance(result, EngineError):
                piece.task.fail(result)
        timed: set[int] = set()
        for piece, result in outcomes:
            task, chunk = piece.task, piece.chunk
            if isinstance(result, EngineError) or task.future.done():
                continue
            part = result.to(task.dtype)
            if part.dtype != result.dtype and not all_finite(part):
                name = str(part.dtype).removeprefix("torch.")
                task.fail(
                    EngineError(f"the blocks' output overflows {name}, which this session asked for; use float32")
                )
                continue
            if len(part) == len(task.hidden):
                task.output = part
            else:
                if task.output is None:
                    task.output = torch.empty_like(task.hidden, dtype=task.dtype)
                task.output[piece.first : piece.first + chunk.num_tokens] = part
            self.cache.written(chunk.cache, chunk.position, chunk.num_tokens)
            task.progress[piece.row] += chunk.num_tokens
            if piece.kind is Kind.DECODE:
                self._tally.decode_tokens += 1
            else:
                self._tally.prefill_tokens += chunk.num_tokens
            if id(task) not in timed:
                timed.add(id(task))
                task.queue_time = task.queue_time or started - task.created
                task.compute_time += elapsed


def _resolve(future: Future[Result], action: Callable[[], Result]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)
