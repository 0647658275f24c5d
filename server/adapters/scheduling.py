"""Which waiting queries form the next batch, when each may need an adapter: a pure decision, by predicted times.

A batch costs the base model's time for its tokens (PetS calls it alpha) and the adapters' own time (beta). A form of
adapter costs something once per batch, whoever uses it; every adapter costs something once per batch; and every token
of it. So queries of one adapter, and adapters of one form, are cheaper together, while the base model wants batches of
a good size. PetS (Zhou et al., USENIX ATC'22, section 5.2) decides the two one after the other: first beta alone,
then alpha alone. `choose` looks at their sum, as does `plans.joint`.

Batches are flattened, so nothing is padded: only the number of tokens counts, not the longest query.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

#: Seconds that a query may be passed over for others; then its turn comes.
MAX_WAIT = 0.5


@dataclass(frozen=True)
class Query:
    """A prompt or a row's next token. adapter: None for the base model.

    deadline, arrived: seconds of one clock. deadline: when it should be done, None for no matter when.
    """

    tokens: int
    adapter: Hashable | None = None
    deadline: float | None = None
    arrived: float = 0.0


@dataclass(frozen=True)
class AdapterTime:
    """What an adapter adds to a batch, in seconds.

    launches: by form, once for all adapters of that form; the largest counts. once: for itself, with however many
    tokens. per_token: for each of its tokens. apart: once more where it has more than `most_together` tokens, so that
    it gets operations of its own.
    """

    launches: Mapping[str, float] = field(default_factory=dict)
    once: float = 0.0
    per_token: float = 0.0
    apart: float = 0.0
    most_together: int = 0


#: How many times as many batches as needed are considered, where large batches might be slow.
_FINER = (1, 2, 3, 4, 6, 8, 12, 16)


class Costs(Protocol):
    """Predicted times of one span on one device."""

    @property
    def row_time(self) -> float:
        """Seconds of the base model for each row of a batch, whose attention is its own: the same in any batch."""

    def shared_time(self, tokens: int) -> float:
        """Seconds of the base model for all else in a batch of so many tokens; more for more."""

    def adapter_time(self, adapter: Hashable) -> AdapterTime:
        """What an adapter adds."""


class Unmeasured:
    """Costs of a server that did not measure them: all that counts is the number of tokens."""

    row_time = 0.0

    def shared_time(self, tokens: int) -> float:
        return float(tokens)

    def adapter_time(self, adapter: Hashable) -> AdapterTime:
        return AdapterTime()


class Tally:
    """The predicted time of a batch, as queries join it."""

    def __init__(self, costs: Costs, queries: Iterable[Query] = ()):
        self.tokens = 0
        self.num_queries = 0
        self.task_seconds = 0.0  # of the adapters alone
        self._costs = costs
        self._tokens_of: dict[Hashable, int] = {}
        self._launches: dict[str, float] = {}
        for query in queries:
            self.add(query)

    @property
    def seconds(self) -> float:
        if not self.num_queries:
            return 0.0
        return self._costs.shared_time(self.tokens) + self._costs.row_time * self.num_queries + self.task_seconds

    def has(self, adapter: Hashable | None) -> bool:
        return adapter is None or adapter in self._tokens_of

    def task_seconds_with(self, adapter: Hashable | None, tokens: int) -> float:
        """What so many tokens would add to the adapters' part."""
        if adapter is None:
            return 0.0
        time = self._costs.adapter_time(adapter)
        before = self._tokens_of.get(adapter, 0)
        added = time.per_token * tokens
        if before <= time.most_together < before + tokens:
            added += time.apart
        if not before:
            added += time.once
            for form, launch in time.launches.items():
                added += max(0.0, launch - self._launches.get(form, 0.0))
        return added

    def add(self, query: Query) -> None:
        self.task_seconds += self.task_seconds_with(query.adapter, query.tokens)
        self.tokens += query.tokens
        self.num_queries += 1
        if query.adapter is None:
            return
        if query.adapter not in self._tokens_of:
            for form, launch in self._costs.adapter_time(query.adapter).launches.items():
                self._launches[form] = max(launch, self._launches.get(form, 0.0))
        self._tokens_of[query.adapter] = self._tokens_of.get(query.adapter, 0) + query.tokens


def batch_time(queries: Iterable[Query], costs: Costs) -> float:
    """Predicted seconds of one batch."""
    return Tally(costs, queries).seconds


def choose(
    waiting: Sequence[Query],
    costs: Costs,
    max_tokens: int,
    now: float,
    *,
    present: Sequence[Query] = (),
    max_wait: float = MAX_WAIT,
    divisible: bool = False,
) -> list[int]:
    """The next batch: indices into `waiting`, in the order in which they should be considered.

    max_tokens: of these; the first is taken even if it has more. present: what is in the batch anyway, such as rows
    that decode. divisible: a query may be taken in part, so the last one need not fit.

    First queries that have waited for `max_wait`, oldest first: the oldest in any case, others up to half of the batch
    (under a load that makes everybody wait too long, the other half still goes by cost). Then the earliest deadline
    among what fits; a deadline that has passed counts no more, lest it makes others late. The rest by cost: those that
    add the least time per token, adapters as a whole where they fit, up to the size at which the base model is fastest.
    """
    filling = _Filling(waiting, costs, max_tokens, present, divisible)
    overdue = (index for index, query in enumerate(waiting) if now - query.arrived >= max_wait)
    for index in sorted(overdue, key=lambda index: waiting[index].arrived):
        if not filling.chosen or 2 * (filling.tokens + waiting[index].tokens) <= max_tokens:
            filling.take(index)
    dated = ((query.deadline, index) for index, query in enumerate(waiting) if query.deadline is not None)
    for deadline, index in sorted(dated):
        if deadline > now and not filling.is_taken[index] and filling.has_room(waiting[index].tokens):
            filling.take(index)
    filling.fill_by_cost()
    return filling.chosen


class _Filling:
    """The next batch while it is filled."""

    def __init__(
        self, waiting: Sequence[Query], costs: Costs, max_tokens: int, present: Sequence[Query], divisible: bool
    ):
        self.chosen: list[int] = []
        self.is_taken = [False] * len(waiting)
        self.tokens = 0  # of those chosen
        self._waiting = waiting
        self._costs = costs
        self._max_tokens = max_tokens
        self._divisible = divisible
        self._tally = Tally(costs, present)
        self._present_tokens = self._tally.tokens

    def has_room(self, tokens: int) -> bool:
        if not self.chosen or self.tokens + tokens <= self._max_tokens:
            return True
        return self._divisible and self.tokens < self._max_tokens

    def take(self, index: int) -> None:
        self.chosen.append(index)
        self.is_taken[index] = True
        self.tokens += self._waiting[index].tokens
        self._tally.add(self._waiting[index])

    def fill_by_cost(self) -> None:
        groups: dict[Hashable, list[int]] = {}
        for index, query in enumerate(self._waiting):
            if not self.is_taken[index]:
                groups.setdefault(query.adapter, []).append(index)
        sizes = {adapter: sum(self._waiting[i].tokens for i in group) for adapter, group in groups.items()}
        best_size, per_token = self._best_size(self.tokens + sum(sizes.values()), len(groups))

        def added_per_token(adapter: Hashable | None) -> float:
            return self._tally.task_seconds_with(adapter, sizes[adapter]) / max(1, sizes[adapter])

        # What a group adds depends on what is in the batch before it: first one group, then the others beside it.
        order = sorted(groups, key=added_per_token)
        if order and not self._tally.num_queries:
            self._take_group(groups.pop(order.pop(0)), best_size, per_token)
            order.sort(key=added_per_token)
        for adapter in order:
            if sizes[adapter] <= best_size - self.tokens or self._paid_again(adapter) == 0.0:
                self._take_group(groups.pop(adapter), best_size, per_token)
        for adapter in order:  # not as a whole, so what they cost once is paid again in another batch
            if adapter in groups and self._worth_splitting(adapter, best_size - self.tokens, per_token):
                self._take_group(groups[adapter], best_size, per_token)

    def _best_size(self, tokens: int, num_groups: int) -> tuple[int, float]:
        """How many tokens to put into each batch until all are done, and what the base model then takes for a token.

        As few batches as possible, unless so large ones are slower than several smaller ones.
        """
        fewest = max(1, -(-tokens // self._max_tokens))
        beside = self._costs.shared_time(self._present_tokens) if self._present_tokens else 0.0
        best, size = float("inf"), self._max_tokens
        for times in _FINER:
            batches = fewest * times
            if times > 1 and batches > max(num_groups, len(self._waiting)):
                break
            each = -(-tokens // batches)
            total = batches * (self._costs.shared_time(self._present_tokens + each) - beside)
            if total < best:
                best, size = total, each if times > 1 else self._max_tokens
        return size, best / max(1, tokens)

    def _take_group(self, group: Sequence[int], best_size: int, per_token: float) -> None:
        """Its shortest queries first, as many as fit."""
        for index in sorted(group, key=lambda index: self._waiting[index].tokens):
            query = self._waiting[index]
            fits = self.tokens + query.tokens // 2 <= best_size  # rather too many than too few by half of one
            if not self.has_room(query.tokens) or (self.chosen and not fits and not self._saves(query, per_token)):
                return
            self.take(index)

    def _worth_splitting(self, adapter: Hashable | None, room: int, per_token: float) -> bool:
        """Whether a fuller batch saves more than an adapter in two batches costs."""
        shared, before = self._costs.shared_time, self._tally.tokens
        saved = per_token * room - (shared(before + room) - shared(before))
        return room > 0 and saved >= self._paid_again(adapter)

    def _paid_again(self, adapter: Hashable | None) -> float:
        """What an adapter costs once in this batch, and again in another one with the rest of its queries."""
        if adapter is None or self._tally.has(adapter):
            return 0.0
        return self._tally.task_seconds_with(adapter, 0) + self._costs.adapter_time(adapter).apart

    def _saves(self, query: Query, per_token: float) -> bool:
        """Whether one more query of an adapter that is here anyway is cheaper now than in another batch.

        per_token: what the base model takes for a token there.
        """
        if query.adapter is None or not self._tally.has(query.adapter):
            return False
        shared = self._costs.shared_time
        time = self._costs.adapter_time(query.adapter)
        later = per_token * query.tokens + time.once + time.apart
        return shared(self._tally.tokens + query.tokens) - shared(self._tally.tokens) < later
