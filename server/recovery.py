"""One batch, whatever happens in it: who is to blame fails, everybody else gets the right answer.

Running tokens again is harmless: they write the same keys and values into the same slots of the cache, and a row's
length moves on only when its results are there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from swarm.errors import EngineError
from swarm.tensors import all_finite

from .tasks import Piece

logger = logging.getLogger(__name__)

#: [tokens, hidden_size] on the CPU for pieces side by side.
Forward = Callable[[Sequence[Piece]], torch.Tensor]
Outcome = tuple[Piece, torch.Tensor | EngineError]

#: How torch says it where it has no type of its own: the CPU's allocator, and cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def run_batch(pieces: Sequence[Piece], forward: Forward) -> list[Outcome]:
    """What became of every piece: its part of the output, or why its task fails.

    Out of memory, the batch is run in halves, in the end token by token: then a piece comes back as several. Failing
    otherwise, it is run once more session by session, so that one bad session is no other's misfortune.
    """
    try:
        return _parts(pieces, forward(pieces))
    except torch.AcceleratorError as error:
        if not is_out_of_memory(error):
            raise  # the device is lost to this process: a server that went on would fail everybody from now on
        reason, out_of_memory = f"{type(error).__name__}: {error}", True
    except Exception as error:  # kept as text alone: with its traceback it would hold the memory that we need
        reason = f"{type(error).__name__}: {error}"
        out_of_memory = is_out_of_memory(error)
        logger.warning("a batch of %d rows failed", len(pieces), exc_info=not out_of_memory)
    if out_of_memory:
        return _run_in_halves(pieces, forward, reason)
    tasks = {id(piece.task): piece.task for piece in pieces}
    if len(tasks) == 1:
        return [(piece, EngineError(f"the forward pass failed: {reason}")) for piece in pieces]
    outcomes = []
    for task in tasks.values():
        outcomes += run_batch([piece for piece in pieces if piece.task is task], forward)
    return outcomes


def _run_in_halves(pieces: Sequence[Piece], forward: Forward, reason: str) -> list[Outcome]:
    if len(pieces) > 1:
        middle = len(pieces) // 2
        return run_batch(pieces[:middle], forward) + run_batch(pieces[middle:], forward)
    (piece,) = pieces
    if piece.chunk.num_tokens == 1:
        return [(piece, EngineError(f"no memory is left to compute even one token of this session: {reason:.200}"))]
    first, second = piece.halves()
    outcomes = run_batch([first], forward)
    if any(isinstance(result, EngineError) for _, result in outcomes):
        return outcomes  # the second half attends to the first
    return outcomes + run_batch([second], forward)


def _parts(pieces: Sequence[Piece], output: torch.Tensor) -> list[Outcome]:
    parts = output.split([piece.chunk.num_tokens for piece in pieces])
    if all_finite(output):
        return list(zip(pieces, parts, strict=True))
    error = EngineError(
        f"the blocks gave NaN or infinity for this session; if it is not the input, {output.dtype} overflows (or, with "
        "int8 weights, float16, in which activations are rounded): use a server with --dtype bfloat16 or float32"
    )
    return [(piece, part if all_finite(part) else error) for piece, part in zip(pieces, parts, strict=True)]


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
