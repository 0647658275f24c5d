"""Plans for all that waits at once: ours, PetS' and simpler ones to compare with. Pure decisions, by predicted times.

A plan is a list of batches, each a list of indices into `queries`. A batch has at most max_tokens; a longer query is a
batch of its own, which the engine cuts. The engine itself asks for one batch after the other: `scheduling.choose`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Protocol

from .scheduling import Costs, Query, Tally, batch_time, choose

Plan = list[list[int]]

#: Queries in a batch of `fixed`, as in PetS' own comparison.
FIXED_QUERIES = 32


def total_time(plan: Plan, queries: Sequence[Query], costs: Costs) -> float:
    """Predicted seconds of all batches, one after the other."""
    return sum(batch_time((queries[index] for index in batch), costs) for batch in plan)


def fixed(queries: Sequence[Query], costs: Costs, max_tokens: int) -> Plan:
    """As they arrived, FIXED_QUERIES in a batch. Looks at no costs."""
    return _fill(_by_arrival(queries), queries, max_tokens, FIXED_QUERIES)


def by_adapter(queries: Sequence[Query], costs: Costs, max_tokens: int) -> Plan:
    """No two adapters in a batch. Looks at no costs."""
    return [batch for group in _groups(queries).values() for batch in _fill(group, queries, max_tokens)]


def ignoring_adapters(queries: Sequence[Query], costs: Costs, max_tokens: int) -> Plan:
    """As they arrived, every batch as full as it gets. Looks at no costs."""
    return _fill(_by_arrival(queries), queries, max_tokens)


def two_pass(queries: Sequence[Query], costs: Costs, max_tokens: int) -> Plan:
    """PetS' coordinated batching (section 5.2): two dynamic programmes, each over queries sorted by length.

    The first cuts the queries of each adapter into mini-batches such that the sum of beta is least; the second puts
    neighbouring mini-batches together such that the sum of alpha is least. Follows the authors' published scheduler.
    Where that counts the samples of a padded batch, this counts tokens; the limit is ours.
    """
    mini: Plan = []
    for group in _groups(queries).values():
        ordered = sorted(group, key=lambda index: queries[index].tokens)
        mini += _best_cuts(ordered, lambda index: queries[index].tokens, max_tokens, lambda: _TaskOnly(queries, costs))
    sizes = [sum(queries[index].tokens for index in batch) for batch in mini]
    order = sorted(range(len(mini)), key=lambda number: max(queries[index].tokens for index in mini[number]))
    macro = _best_cuts(order, lambda number: sizes[number], max_tokens, lambda: _SharedOnly(sizes, costs))
    return [[index for number in numbers for index in mini[number]] for numbers in macro]


def joint(
    queries: Sequence[Query],
    costs: Costs,
    max_tokens: int,
    now: float = 0.0,
    max_wait: float = float("inf"),
) -> Plan:
    """Ours: the least predicted time over alpha and beta at once, then the order of batches for the least mean wait.

    Several ways to line the queries up are each cut where that costs least, the other strategies' plans are tried as
    well, and batches that are cheaper as one are merged. Then the order of batches with the least mean wait. Where
    queries have deadlines or waited for `max_wait` seconds, batches by `choose` go before all others until none of
    them is left, so such a plan may take longer.
    """

    def is_urgent(query: Query) -> bool:
        return (query.deadline is not None and query.deadline > now) or now - query.arrived >= max_wait

    left = list(range(len(queries)))
    urgent: Plan = []
    while any(is_urgent(queries[index]) for index in left):
        batch = [left[i] for i in choose([queries[i] for i in left], costs, max_tokens, now, max_wait=max_wait)]
        urgent.append(batch)
        now += batch_time((queries[index] for index in batch), costs)
        taken = set(batch)
        left = [index for index in left if index not in taken]
    rest = [queries[index] for index in left]
    plan = _quickest_first(_cheapest(rest, costs, max_tokens), rest, costs)
    return urgent + [[left[index] for index in batch] for batch in plan]


STRATEGIES: Mapping[str, Callable[[Sequence[Query], Costs, int], Plan]] = {
    "fixed": fixed,
    "by adapter": by_adapter,
    "ignoring adapters": ignoring_adapters,
    "two-pass": two_pass,
    "joint": joint,
}


def _by_arrival(queries: Sequence[Query]) -> list[int]:
    return sorted(range(len(queries)), key=lambda index: queries[index].arrived)


def _groups(queries: Sequence[Query]) -> dict[Hashable, list[int]]:
    """The queries of each adapter, as they arrived."""
    groups: dict[Hashable, list[int]] = {}
    for index in _by_arrival(queries):
        groups.setdefault(queries[index].adapter, []).append(index)
    return groups


def _fill(order: Iterable[int], queries: Sequence[Query], max_tokens: int, max_queries: int | None = None) -> Plan:
    plan: Plan = []
    tokens = 0
    for index in order:
        size = queries[index].tokens
        if not plan or tokens + size > max_tokens or len(plan[-1]) == max_queries:
            plan.append([])
            tokens = 0
        plan[-1].append(index)
        tokens += size
    return plan


class _Growing(Protocol):
    """A batch whose cost is known as items join it."""

    def add(self, item: int) -> float:
        """The cost with the item."""


class _TaskOnly:
    """Beta alone: the adapters' part."""

    def __init__(self, queries: Sequence[Query], costs: Costs):
        self._queries = queries
        self._tally = Tally(costs)

    def add(self, item: int) -> float:
        self._tally.add(self._queries[item])
        return self._tally.task_seconds


class _SharedOnly:
    """Alpha alone, of mini-batches of such sizes."""

    def __init__(self, sizes: Sequence[int], costs: Costs):
        self._sizes = sizes
        self._costs = costs
        self._tokens = 0

    def add(self, item: int) -> float:
        self._tokens += self._sizes[item]
        return self._costs.shared_time(self._tokens)


class _Whole:
    """Both."""

    def __init__(self, queries: Sequence[Query], costs: Costs):
        self._queries = queries
        self._tally = Tally(costs)

    def add(self, item: int) -> float:
        self._tally.add(self._queries[item])
        return self._tally.seconds


def _best_cuts(
    order: Sequence[int], size_of: Callable[[int], int], max_tokens: int, new_batch: Callable[[], _Growing]
) -> list[list[int]]:
    """Where to cut a line of items such that the sum of the batches' costs is least; of equals the larger batches."""
    least = [0.0] + [float("inf")] * len(order)
    start_of = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        batch, tokens = new_batch(), 0
        for start in range(end - 1, -1, -1):
            tokens += size_of(order[start])
            if tokens > max_tokens and start < end - 1:
                break
            cost = least[start] + batch.add(order[start])
            if cost <= least[end]:
                least[end], start_of[end] = cost, start
    batches = []
    end = len(order)
    while end:
        batches.append(list(order[start_of[end] : end]))
        end = start_of[end]
    return batches[::-1]


def _cheapest(queries: Sequence[Query], costs: Costs, max_tokens: int) -> Plan:
    groups = _groups(queries)
    sizes = {adapter: sum(queries[index].tokens for index in group) for adapter, group in groups.items()}

    def forms(adapter: Hashable | None) -> str:
        return "" if adapter is None else " ".join(sorted(costs.adapter_time(adapter).launches))

    by_length = sorted(range(len(queries)), key=lambda index: queries[index].tokens)
    by_form = sorted(groups, key=lambda adapter: (forms(adapter), sizes[adapter]))
    lines = [
        _by_arrival(queries),
        by_length,
        [index for adapter in by_form for index in sorted(groups[adapter], key=lambda i: queries[i].tokens)],
    ]
    plans = [
        _best_cuts(line, lambda index: queries[index].tokens, max_tokens, lambda: _Whole(queries, costs))
        for line in lines
    ]
    plans += [make(queries, costs, max_tokens) for make in (fixed, by_adapter, ignoring_adapters, two_pass)]
    plans += [_packed(queries, list(groups.values()), max_tokens), _chosen(queries, costs, max_tokens)]
    return _merged(min(plans, key=lambda plan: total_time(plan, queries, costs)), queries, costs, max_tokens)


def _packed(queries: Sequence[Query], groups: Sequence[Sequence[int]], max_tokens: int) -> Plan:
    """As few batches as first-fit in decreasing order needs, of adapters as a whole where one fits into a batch."""
    parts: Plan = []
    for group in groups:
        parts += _fill(sorted(group, key=lambda index: -queries[index].tokens), queries, max_tokens)
    sizes = [sum(queries[index].tokens for index in part) for part in parts]
    plan: Plan = []
    room: list[int] = []
    for number in sorted(range(len(parts)), key=lambda number: -sizes[number]):
        for place, left in enumerate(room):
            if sizes[number] <= left:
                plan[place] += parts[number]
                room[place] -= sizes[number]
                break
        else:
            plan.append(list(parts[number]))
            room.append(max_tokens - sizes[number])
    return plan


def _chosen(queries: Sequence[Query], costs: Costs, max_tokens: int) -> Plan:
    """Batches by `choose` until nothing waits."""
    left = list(range(len(queries)))
    plan: Plan = []
    while left:
        chosen = set(
            choose([queries[index] for index in left], costs, max_tokens, float("-inf"), max_wait=float("inf"))
        )
        plan.append([index for place, index in enumerate(left) if place in chosen])
        left = [index for place, index in enumerate(left) if place not in chosen]
    return plan


def _merged(plan: Plan, queries: Sequence[Query], costs: Costs, max_tokens: int) -> Plan:
    """Batches that are cheaper as one than as two, put together; small ones first."""
    batches = sorted(plan, key=lambda batch: sum(queries[index].tokens for index in batch))
    merged: Plan = []
    for batch in batches:
        tokens, seconds = sum(queries[i].tokens for i in batch), batch_time((queries[i] for i in batch), costs)
        for number, other in enumerate(merged):
            both = [queries[index] for index in other + batch]
            if tokens + sum(queries[index].tokens for index in other) > max_tokens:
                continue
            if batch_time(both, costs) < seconds + batch_time((queries[index] for index in other), costs):
                merged[number] = other + batch
                break
        else:
            merged.append(batch)
    return merged


def _quickest_first(plan: Plan, queries: Sequence[Query], costs: Costs) -> Plan:
    """The order with the least mean time until a query is done (Smith's rule): least time per query first."""
    return sorted(plan, key=lambda batch: batch_time((queries[index] for index in batch), costs) / len(batch))
