"""One forward or backward pass for training, as the engine runs it: whole sequences, no cache, in pieces.

A piece is one block for some of the sequences, so that sessions that decode need not wait for a whole pass. Nothing is
kept when a pass is done, and no parameter has a gradient.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from swarm.errors import EngineError, SwarmError
from swarm.tensors import all_finite

from .batch import WholeRows
from .recovery import is_out_of_memory
from .span import Span
from .tasks import settle

if TYPE_CHECKING:
    from .adapters.applied import Adapter

logger = logging.getLogger(__name__)

#: Sequences are run together up to so many tokens; more would hold up sessions for longer, and save little.
PIECE_TOKENS = 512


@dataclass(frozen=True)
class PassOutput:
    """hidden: [tokens, hidden_size] on the CPU, in the dtype of the pass's hidden states: the output, or the gradient
    of the input. prompts: the gradient of the deep prompts, in their shape. Times in seconds."""

    hidden: torch.Tensor
    prompts: torch.Tensor | None
    queue_time: float
    compute_time: float


@dataclass
class PassTask:
    """Sequences of `lengths` tokens, side by side in `hidden`, through local blocks [start, end).

    owner: the peer it is for. prompts: [blocks, prompt tokens, hidden_size], deep prompts.
    adapters: one entry for each sequence; None: no sequence has one.
    gradient: of the output; with it, the pass is a backward one.
    """

    owner: str
    hidden: torch.Tensor
    lengths: Sequence[int]
    start: int
    end: int
    prompts: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    adapters: Sequence[Adapter | None] | None = None
    future: Future[PassOutput] = field(default_factory=Future)
    created: float = field(default_factory=time.monotonic)

    def fail(self, error: SwarmError) -> None:
        settle(self.future.set_exception, error)


class RunningPass:
    """A pass that has begun. To be used from one thread."""

    def __init__(self, task: PassTask, span: Span, most_tokens: int = PIECE_TOKENS):
        """most_tokens: of sequences that run together."""
        self.task = task
        self._span = span
        self._queue_time = time.monotonic() - task.created
        self._compute_time = 0.0
        self._output = torch.empty_like(task.hidden)
        #: the gradient so far, in float32: each piece adds to it
        self._prompts: torch.Tensor | None = None
        if task.prompts is not None and task.gradient is not None:
            self._prompts = torch.zeros_like(task.prompts, dtype=torch.float32)
        self._groups = _groups(task.lengths, most_tokens)
        self._pieces = self._all_pieces()
        #: tokens of the piece that comes next
        self.piece_tokens = sum(self._groups[0])

    def advance(self) -> bool:
        """Run the next piece; True if it was the last one. Raises whatever the blocks raise, EngineError for NaN."""
        started = time.monotonic()
        done = next(self._pieces, self) is self
        self._compute_time += time.monotonic() - started
        return done

    def close(self) -> None:
        """Give up a pass that is not done. Its activations would stay until the next garbage collection otherwise:
        what computes them refers to this object, and this to that."""
        self._pieces.close()

    def in_smaller_pieces(self) -> RunningPass | None:
        """The same from its beginning, in pieces of half the size, as memory ran out. None if that is not possible."""
        largest = max(self._groups, key=sum)
        return RunningPass(self.task, self._span, sum(largest) // 2) if len(largest) > 1 else None

    def finish(self) -> None:
        """Raises EngineError if the gradient of the prompts overflows on the way."""
        prompts = None if self._prompts is None else self._from_device(self._prompts, self.task.hidden.dtype)
        output = PassOutput(self._output, prompts, self._queue_time, self._compute_time)
        settle(self.task.future.set_result, output)

    def _all_pieces(self) -> Generator[None]:
        """Yields between pieces."""
        first = done = 0
        for lengths in self._groups:
            rows = slice(first, first + sum(lengths))
            self.piece_tokens = sum(lengths)
            if first:
                yield
            adapters = self.task.adapters
            own = None if adapters is None else adapters[done : done + len(lengths)]
            batch = WholeRows(lengths, self._span.device, own)
            done += len(lengths)
            if self.task.gradient is None:
                yield from self._forward(batch, rows)
            else:
                yield from self._backward(batch, rows, self.task.gradient[rows])
            first = rows.stop

    def _forward(self, batch: WholeRows, rows: slice) -> Generator[None]:
        hidden = self._to_device(self.task.hidden[rows])
        for block in range(self.task.start, self.task.end):
            with torch.inference_mode():
                hidden = self._span.run_whole(batch.add_prompts(hidden, self._prompts_of(block)), batch, block)
            if block + 1 < self.task.end:
                yield
        self._output[rows] = self._from_device(hidden, self.task.hidden.dtype)

    def _backward(self, batch: WholeRows, rows: slice, output_gradient: torch.Tensor) -> Generator[None]:
        """Activations are computed once more, kept for as long as this takes, and given up block by block."""
        hidden = self._to_device(self.task.hidden[rows])
        kept: list[tuple[list[torch.Tensor], torch.Tensor]] = []
        for block in range(self.task.start, self.task.end):
            inputs = [hidden.detach().requires_grad_()]
            if (prompts := self._prompts_of(block)) is not None:
                inputs.append(prompts.detach().requires_grad_())
            with torch.enable_grad():
                output = self._span.run_whole(batch.add_prompts(inputs[0], *inputs[1:]), batch, block)
            kept.append((inputs, output))
            hidden = output.detach()
            yield
        gradient = self._to_device(output_gradient)
        while kept:
            inputs, output = kept.pop()
            gradient, *of_prompts = torch.autograd.grad(output, inputs, gradient)
            if self._prompts is not None:
                self._prompts[len(kept)] += self._from_device(of_prompts[0], torch.float32)
            del inputs, output
            if kept:
                yield
        self._output[rows] = self._from_device(gradient, self.task.hidden.dtype)

    def _prompts_of(self, block: int) -> torch.Tensor | None:
        prompts = self.task.prompts
        return None if prompts is None else self._to_device(prompts[block - self.task.start])

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._span.device, self._span.dtype)

    @staticmethod
    def _from_device(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Raises EngineError for NaN or infinity."""
        arrived = tensor.to("cpu", dtype)
        if not all_finite(arrived):
            here, travelling = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
            raise EngineError(
                f"the pass gave NaN or infinity: its input is too large, or {here} on this server or {travelling} on "
                "the way overflows; use float32"
            )
        return arrived


def why_pass_failed(error: Exception) -> SwarmError:
    """What the owner of a pass is told of an exception in it."""
    if isinstance(error, SwarmError):
        return error.with_traceback(None)  # which would keep the activations for as long as the error is kept
    if is_out_of_memory(error):
        return EngineError("no memory is left for the activations of one sequence of this pass; use shorter ones")
    logger.warning("a pass for training failed", exc_info=error)
    return EngineError(f"the pass failed: {type(error).__name__}: {error}")


def _groups(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Consecutive sequences of at most `most_tokens` tokens together; a longer one is alone."""
    groups: list[list[int]] = [[]]
    for length in lengths:
        if groups[-1] and sum(groups[-1]) + length > most_tokens:
            groups.append([])
        groups[-1].append(length)
    return groups
