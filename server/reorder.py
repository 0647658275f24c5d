"""Rows of a session that become copies of others of its rows, as beam search asks for after every token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from swarm.errors import EngineError

from .kv_cache import KVCache, RowCache


def reorder_rows(cache: KVCache, rows: Sequence[RowCache], sources: Sequence[int]) -> None:
    """rows[i] becomes a copy of what rows[sources[i]] was; only what differs between the two is copied.

    For the engine's thread, between batches. Raises EngineError if the session ended meanwhile.
    """
    moves = [
        _Move(cache, row, rows[source]) for row, source in zip(rows, sources, strict=True) if rows[source] is not row
    ]
    # Room first, and nothing given back until all is copied: a row that is overwritten may be another's source.
    for move in moves:
        if not cache.grow(move.row, max(move.length, move.row.length)):
            raise EngineError("the session ended while its rows were reordered")
    targets = [_slots(cache, move.row, move.first, move.length) for move in moves]
    if sum(map(len, targets)):
        cache.copy_slots(torch.cat([move.slots for move in moves]), torch.cat(targets))
    for move in moves:
        cache.truncate(move.row, move.length)
        move.row.length = move.length
        move.row.stamps = move.stamps


class _Move:
    """What `row` lacks of `source`, noted before anything changes."""

    def __init__(self, cache: KVCache, row: RowCache, source: RowCache):
        self.row = row
        self.length = source.length
        self.stamps = source.stamps.copy()
        common = min(row.length, source.length)
        different = np.flatnonzero(row.stamps[:common] != source.stamps[:common])
        #: from here on the two rows hold different tokens
        self.first = int(different[0]) if len(different) else common
        self.slots = _slots(cache, source, self.first, self.length)


def _slots(cache: KVCache, row: RowCache, start: int, end: int) -> torch.Tensor:
    return cache.slots(row, start, end) if start < end else torch.empty(0, dtype=torch.int64)
