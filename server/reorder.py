"""Rows of a session that become copies of others of its rows, as beam search asks for after every token."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from swarm.errors import EngineError, SessionLost, SwarmError

from .kv_cache import KVCache, RowCache
from .recovery import is_out_of_memory

logger = logging.getLogger(__name__)


def reorder_rows(cache: KVCache, rows: Sequence[RowCache], sources: Sequence[int], keep: Sequence[int]) -> None:
    """rows[i] becomes a copy of the first keep[i] tokens of what rows[sources[i]] was.

    Only what differs between the two is copied, and a row takes no more pages than keep[i] tokens need: a step that
    waited for pages was given enough for itself, not for what it is about to forget.
    For the engine's thread, between batches. Raises EngineError if the session ended meanwhile, SessionLost if copying
    failed, as it does without memory: some layers may be reordered then and others not, so the session is evicted.
    """
    try:
        _reorder(cache, rows, sources, keep)
        return
    except SwarmError:
        raise
    except Exception as error:  # kept as text alone: with its traceback it would hold the memory that others need
        if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
            raise  # the device is lost to this process
        reason = f"{type(error).__name__}: {error}"
        logger.warning("could not reorder %d rows", len(rows), exc_info=not is_out_of_memory(error))
    cache.evict(rows[0].session)
    raise SessionLost(f"the rows could not be reordered: {reason:.500}; the session can be replayed")


def _reorder(cache: KVCache, rows: Sequence[RowCache], sources: Sequence[int], keep: Sequence[int]) -> None:
    try:
        if not all([cache.hold(row) for row in rows]):  # it may end at any moment, and others take its pages
            raise EngineError("the session ended while its rows were reordered")
        moves = [
            _Move(cache, row, rows[source], tokens)
            for row, source, tokens in zip(rows, sources, keep, strict=True)
            if rows[source] is not row
        ]
        _copy(cache, moves)
    finally:
        cache.let_go(rows)


def _copy(cache: KVCache, moves: Sequence[_Move]) -> None:
    # Room first, and nothing given back until all is copied: a row that is overwritten may be another's source.
    if not all([cache.grow(move.row, move.length) for move in moves]):
        raise EngineError("the session ended while its rows were reordered")
    targets = [_slots(cache, move.row, move.first, move.length) for move in moves]
    if sum(map(len, targets)):
        cache.copy_slots(torch.cat([move.slots for move in moves]), torch.cat(targets))
    for move in moves:
        if move.row.length > move.length:
            cache.truncate(move.row, move.length)
        move.row.length = move.length
        move.row.stamps = move.stamps


class _Move:
    """What `row` lacks of the first `keep` tokens of `source`, noted before anything changes."""

    def __init__(self, cache: KVCache, row: RowCache, source: RowCache, keep: int):
        self.row = row
        self.length = min(source.length, keep)
        self.stamps = source.stamps.copy()
        common = min(row.length, self.length)
        different = np.flatnonzero(row.stamps[:common] != source.stamps[:common])
        #: from here on the two rows hold different tokens
        self.first = int(different[0]) if len(different) else common
        self.slots = _slots(cache, source, self.first, self.length)


def _slots(cache: KVCache, row: RowCache, start: int, end: int) -> torch.Tensor:
    return cache.slots(row, start, end) if start < end else torch.empty(0, dtype=torch.int64)
