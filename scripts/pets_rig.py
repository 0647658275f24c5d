"""Runs queries of many tasks through a span, batch by batch, and times them: what `swarm bench pets` measures with."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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

    elapsed: of its own batches so far.
    """

    done: list[float]
    batches: list[tuple[float, float]] = field(default_factory=list)
    elapsed: float = 0.0

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

    def plan_by_choice(self, queries: Sequence[Query], max_tokens: int) -> tuple[Plan, float]:
        """Each batch chosen among the oldest when the device is free, as the engine does; also the longest choice."""
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
        return plan, slowest

    def run_in_turn(
        self, plans: Mapping[str, Plan], queries: Sequence[Query], *, new_tokens: int = 0, without: Collection[str] = ()
    ) -> dict[str, Timing]:
        """Every plan to its end, a batch of each in turn, so a machine that slows down does so for all alike.

        A batch is all its prompts, then `new_tokens` more tokens of each. without: plans that run without adapters.
        """
        timings = {name: Timing([0.0] * len(queries)) for name in plans}
        todo = {name: list(plan) for name, plan in plans.items()}
        while any(todo.values()):
            name = min((name for name in todo if todo[name]), key=lambda name: -len(todo[name]) / len(plans[name]))
            batch = todo[name].pop(0)
            self._run_batch(timings[name], batch, queries, new_tokens, plain=name in without)
        return timings

    def _run_batch(
        self, timing: Timing, batch: Sequence[int], queries: Sequence[Query], new_tokens: int, *, plain: bool
    ) -> None:
        own = [queries[index] for index in batch]
        rows: list[tuple[int, Any]] = [(query.tokens, None if plain else query.adapter) for query in own]
        passes = self.passes(rows, new_tokens)
        predicted = [self.predicted(rows), *[self.predicted([(1, adapter) for _, adapter in rows])] * new_tokens]
        timing.batches += zip(passes, predicted, strict=True)
        timing.elapsed += sum(passes)
        for index in batch:
            timing.done[index] = timing.elapsed

    def predicted(self, rows: Sequence[tuple[int, Adapter | None]]) -> float:
        """Seconds of a batch with so many new tokens of each row."""
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
