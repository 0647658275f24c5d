"""Runs queries of many tasks through a span, batch by batch, and times them: what `swarm bench pets` measures with."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from swarm.server.adapters.applied import Adapter
    from swarm.server.adapters.plans import Plan
    from swarm.server.adapters.scheduling import Costs, Query
    from swarm.server.kv_cache import KVCache, RowCache
    from swarm.server.span import Span

#: Tokens of a page: rows are short here.
_PAGE = 8
#: Queries among which the next batch is chosen.
_WINDOW = 128
MEAN_LENGTH = 32
LONGEST = 128


def made_queries(number: int, adapters: Sequence[Adapter], deviation: float, seed: int) -> list[Query]:
    """PetS' workload: each query is of a random task, its length N(32, deviation) cut to [1, 128]; all wait at once."""
    from swarm.server.adapters.scheduling import Query

    chance = random.Random(seed)
    return [
        Query(min(LONGEST, max(1, round(chance.gauss(MEAN_LENGTH, deviation)))), chance.choice(adapters))
        for _ in range(number)
    ]


@dataclass
class Timing:
    """Seconds. done: of each query, since the start. batches: (measured, predicted) of each forward pass.

    slowest_choice: of a batch, where they were chosen one by one.
    """

    done: list[float]
    batches: list[tuple[float, float]] = field(default_factory=list)
    slowest_choice: float = 0.0

    @property
    def total(self) -> float:
        return max(self.done)

    def quantile(self, share: float) -> float:
        """The time after which that share of the queries is done."""
        ordered = sorted(self.done)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def errors(self) -> list[float]:
        """Of the predictions, relative to what was measured."""
        return [abs(predicted - measured) / measured for measured, predicted in self.batches]


class Rig:
    """A span, and what its batches are predicted to take."""

    def __init__(self, span: Span, costs: Costs):
        self.span = span
        self.costs = costs
        self._cache: KVCache | None = None

    def run(self, plan: Plan, queries: Sequence[Query], *, new_tokens: int = 0, plain: bool = False) -> Timing:
        """Batch after batch: all prompts of one, then `new_tokens` more tokens of each. plain: without adapters."""
        timing = Timing([0.0] * len(queries))
        elapsed = 0.0
        for batch in plan:
            own = [queries[index] for index in batch]
            rows = [(query.tokens, None if plain else query.adapter) for query in own]
            passes = self.passes(rows, new_tokens)  # type: ignore[arg-type]
            predicted = [
                self._predicted([(tokens, adapter) for tokens, (_, adapter) in zip(lengths, rows, strict=True)])
                for lengths in [[query.tokens for query in own], *[[1] * len(own)] * new_tokens]
            ]
            timing.batches += zip(passes, predicted, strict=True)
            elapsed += sum(passes)
            for index in batch:
                timing.done[index] = elapsed
        return timing

    def run_by_choice(self, queries: Sequence[Query], max_tokens: int, *, new_tokens: int = 0) -> Timing:
        """The same where each batch is chosen among the oldest when the device is free, as the engine does."""
        from swarm.server.adapters.scheduling import choose

        left = list(range(len(queries)))
        plan: Plan = []
        slowest = 0.0
        while left:
            started = time.perf_counter()
            window = left[:_WINDOW]
            chosen = choose([queries[index] for index in window], self.costs, max_tokens, 0.0)
            slowest = max(slowest, time.perf_counter() - started)
            plan.append([window[place] for place in chosen])
            taken = set(plan[-1])
            left = [index for index in left if index not in taken]
        timing = self.run(plan, queries, new_tokens=new_tokens)
        timing.slowest_choice = slowest
        return timing

    def _predicted(self, rows: Sequence[tuple[int, object]]) -> float:
        from swarm.server.adapters.scheduling import Query, batch_time

        return batch_time([Query(tokens, adapter) for tokens, adapter in rows], self.costs)

    def passes(self, rows: Sequence[tuple[int, Adapter | None]], new_tokens: int = 0) -> list[float]:
        """Seconds of a batch with a prompt of so many tokens in each row, and of each decode step after it."""
        lengths = [tokens for tokens, _ in rows]
        with self._rows(lengths, [adapter for _, adapter in rows], new_tokens) as admitted:
            return [admitted.step(lengths), *(admitted.step([1] * len(rows)) for _ in range(new_tokens))]

    def decode_step(self, adapters: Sequence[Adapter | None], context: int, steps: int) -> float:
        """Seconds of one step with a row of each: the median of so many."""
        rows = [(context, adapter) for adapter in adapters]
        return statistics.median(self.passes(rows, steps + 1)[2:])

    def stalls(self, forms: Sequence[object], adapters: Sequence[Adapter | None], context: int) -> tuple[float, float]:
        """Decode steps of some rows while others' adapters come in and are used: the usual and the longest gap."""
        from swarm.server.adapters.applied import Adapter

        usual = self.decode_step(adapters, context, 8)
        gaps: list[float] = []
        for new in forms:
            started = time.perf_counter()
            added = self.span.adapters.add(new)  # type: ignore[arg-type]
            assert isinstance(added, Adapter)
            loaded = time.perf_counter() - started
            with self._rows([context] * (len(adapters) + 1), [*adapters, added], 1) as rows:
                rows.prepare(context)
                gaps.append(loaded + rows.step([1] * (len(adapters) + 1)))
            self.span.adapters.remove(added)
        return usual, max(gaps)

    def _rows(self, lengths: Sequence[int], adapters: Sequence[Adapter | None], new_tokens: int) -> _Rows:
        """In a cache that is kept from batch to batch, as a server's is."""
        from swarm.server.kv_cache import KVCache

        wanted = sum(-(-(length + new_tokens) // _PAGE) * _PAGE for length in lengths)
        if self._cache is None or self._cache.num_pages * _PAGE < wanted:
            self._cache = KVCache(len(self.span.blocks), 2 * wanted, _PAGE, self.span.device, self.span.dtype)
        return _Rows(self.span, self._cache, lengths, adapters, new_tokens)


class _Rows:
    """Rows of a cache, from their prompts on."""

    def __init__(
        self,
        span: Span,
        cache: KVCache,
        lengths: Sequence[int],
        adapters: Sequence[Adapter | None],
        new_tokens: int,
    ):
        self._span = span
        self._cache = cache
        self._rows: list[RowCache] = list(itertools.chain(*(cache.admit(1, length + new_tokens) for length in lengths)))
        for row, adapter in zip(self._rows, adapters, strict=True):
            row.adapter = adapter
        self._chance = torch.Generator().manual_seed(0)

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._cache.release(self._rows)

    def prepare(self, context: int) -> None:
        """Pretend that so many tokens are cached."""
        for row in self._rows:
            self._cache.grow(row, context)
            row.length = context

    def step(self, lengths: Sequence[int]) -> float:
        """Seconds of a batch with so many new tokens of each row."""
        from swarm.server.batch import RowChunk

        span = self._span
        hidden = torch.randn(sum(lengths), span.hidden_size, generator=self._chance).to(span.device, span.dtype)
        started = time.perf_counter()
        chunks = []
        for row, length in zip(self._rows, lengths, strict=True):
            self._cache.grow(row, row.length + length)
            chunks.append(RowChunk(row, row.length, length, 0, len(span.blocks)))
        span.forward(hidden, chunks, self._cache).cpu()
        for row, length in zip(self._rows, lengths, strict=True):
            self._cache.written(row, row.length, length)
        return time.perf_counter() - started
