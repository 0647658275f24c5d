"""What is handed to the engine and back: steps of sessions, and the pieces of them that enter a batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace

import torch

from swarm.errors import SwarmError
from swarm.protocol import Reorder

from .batch import RowChunk
from .kv_cache import RowCache
from .scheduler import Kind


@dataclass(frozen=True)
class RowWork:
    """New tokens of one row: `num_tokens` from `position` on; earlier cached tokens from there on are forgotten."""

    cache: RowCache
    position: int
    num_tokens: int


@dataclass(frozen=True)
class StepOutput:
    """hidden: [tokens, hidden_size] on the CPU, in the task's dtype. Times in seconds."""

    hidden: torch.Tensor
    queue_time: float
    compute_time: float


@dataclass
class StepTask:
    """One step of one session: the tokens of its rows, side by side, through local blocks [start, end).

    reorder: of the session's rows, before anything else, unless an earlier try of this step did it.
    output_dtype: in which the output shall travel, unless that is the input's.
    deadline: when the client would like to have it, in seconds of `time.monotonic`; None: no hurry.
    """

    hidden: torch.Tensor
    rows: Sequence[RowWork]
    start: int
    end: int
    reorder: Reorder | None = None
    output_dtype: torch.dtype | None = None
    deadline: float | None = None
    future: Future[StepOutput] = field(default_factory=Future)
    created: float = field(default_factory=time.monotonic)
    queue_time: float = 0.0
    compute_time: float = 0.0
    progress: list[int] = field(default_factory=list)  # tokens done, per row
    output: torch.Tensor | None = None
    waits_for_pages: bool = False

    def __post_init__(self) -> None:
        self.progress = [0] * len(self.rows)

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return self.hidden.dtype if self.output_dtype is None else self.output_dtype

    @property
    def done(self) -> bool:
        return all(done == row.num_tokens for done, row in zip(self.progress, self.rows, strict=True))

    @staticmethod
    def kind(row: RowWork) -> Kind:
        return Kind.DECODE if row.num_tokens == 1 else Kind.PREFILL

    def finish(self) -> None:
        assert self.output is not None
        settle(self.future.set_result, StepOutput(self.output, self.queue_time, self.compute_time))

    def fail(self, error: SwarmError) -> None:
        settle(self.future.set_exception, error)


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one row of a task, as they enter a batch."""

    task: StepTask
    row: int
    first: int  # of these tokens within the task's hidden states
    chunk: RowChunk

    @property
    def kind(self) -> Kind:
        return self.task.kind(self.task.rows[self.row])

    def halves(self) -> tuple[Piece, Piece]:
        """The first and the second half of at least two tokens, to be run in this order."""
        chunk, size = self.chunk, self.chunk.num_tokens // 2
        later = replace(chunk, position=chunk.position + size, num_tokens=chunk.num_tokens - size)
        return replace(self, chunk=replace(chunk, num_tokens=size)), replace(self, first=self.first + size, chunk=later)


def settle(action: Callable[..., None], value: object) -> None:
    """Resolve a future that its owner may have cancelled in the same moment."""
    with contextlib.suppress(InvalidStateError):
        action(value)
