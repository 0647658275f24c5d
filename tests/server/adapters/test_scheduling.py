"""The next batch among queries with adapters: within its limits, deadlines and bounded waits kept, cheap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.adapters.scheduling import AdapterTime, Query, Tally, batch_time, choose

FORMS = ("low rank", "sparse", "bias")


@dataclass(frozen=True)
class MadeCosts:
    """base seconds and per_token for each token up to `knee`, `steep` times as much for each beyond."""

    base: float = 0.01
    per_token: float = 1e-4
    knee: int = 10**6
    steep: float = 1.0
    adapters: Mapping[Any, AdapterTime] = field(default_factory=dict)
    row_time: float = 0.0

    def shared_time(self, tokens: int) -> float:
        return self.base + self.per_token * (min(tokens, self.knee) + self.steep * max(0, tokens - self.knee))

    def adapter_time(self, adapter: Any) -> AdapterTime:
        return self.adapters.get(adapter, AdapterTime())


SECONDS = st.sampled_from([0.0, 1e-4, 1e-3, 5e-3])
ADAPTER_TIMES = st.builds(
    AdapterTime,
    st.dictionaries(st.sampled_from(FORMS), SECONDS, max_size=2),
    SECONDS,
    st.sampled_from([0.0, 1e-6, 1e-5]),
    SECONDS,
    st.sampled_from([0, 4]),
)
COSTS = st.builds(
    MadeCosts,
    st.sampled_from([0.0, 0.005, 0.05]),
    st.sampled_from([1e-5, 1e-4, 1e-3]),
    st.sampled_from([32, 100, 10**6]),
    st.sampled_from([1.0, 1.5, 3.0]),
    st.dictionaries(st.integers(0, 7), ADAPTER_TIMES, min_size=8),
)
TIMES = st.floats(0, 2)
QUERIES = st.lists(
    st.builds(
        Query,
        st.integers(1, 80),
        st.one_of(st.none(), st.integers(0, 7)),
        st.one_of(st.none(), st.floats(0, 4)),
        TIMES,
    ),
    max_size=40,
)
LIMITS = st.integers(1, 300)
NOW = 2.0


@given(QUERIES, COSTS, LIMITS, st.booleans())
def test_a_batch_keeps_its_limit(queries: Sequence[Query], costs: MadeCosts, limit: int, divisible: bool) -> None:
    chosen = choose(queries, costs, limit, NOW, divisible=divisible)
    assert bool(chosen) == bool(queries)
    assert len(set(chosen)) == len(chosen) and all(0 <= index < len(queries) for index in chosen)
    whole = chosen[:-1] if divisible else chosen
    assert sum(queries[index].tokens for index in whole) <= limit or len(chosen) == 1


@given(QUERIES.filter(bool), COSTS, LIMITS)
def test_the_one_that_waited_too_long_goes_next(queries: Sequence[Query], costs: MadeCosts, limit: int) -> None:
    oldest = min(range(len(queries)), key=lambda index: queries[index].arrived)
    chosen = choose(queries, costs, limit, NOW, max_wait=NOW - queries[oldest].arrived)
    assert chosen[0] == oldest


def test_nobody_waits_for_ever() -> None:
    """Every batch is followed by new queries of the cheapest adapter, which fill the next one by themselves."""
    costs = MadeCosts(adapters={"dear": AdapterTime(once=1.0)})
    waiting = [Query(30, "dear", None, 0.0)]
    now = 0.0
    while any(query.adapter == "dear" for query in waiting):
        waiting += [Query(10, "cheap", None, now) for _ in range(20)]
        taken = choose(waiting, costs, 100, now, max_wait=0.5)
        waiting = [query for index, query in enumerate(waiting) if index not in taken]
        now += 0.05
    assert 0.5 <= now < 0.65


def test_under_overload_half_of_a_batch_still_goes_by_cost() -> None:
    late = [Query(10, number, None, 0.0) for number in range(20)]
    fresh = [Query(10, "cheap", None, 9.0) for _ in range(20)]
    costs = MadeCosts(adapters={number: AdapterTime(once=0.01) for number in range(20)})
    chosen = choose([*fresh, *late], costs, 100, 9.0, max_wait=1.0)
    assert chosen[:5] == [20, 21, 22, 23, 24]
    assert sorted(chosen[5:]) == [0, 1, 2, 3, 4]


@given(QUERIES, COSTS, LIMITS)
def test_the_earliest_deadline_goes_first(queries: Sequence[Query], costs: MadeCosts, limit: int) -> None:
    """Who stays behind had no room, and nobody with a later deadline, or with none, goes before an earlier one."""
    chosen = choose(queries, costs, limit, NOW, max_wait=float("inf"))

    def rank(index: int) -> float:
        deadline = queries[index].deadline
        return deadline if deadline is not None and deadline > NOW else float("inf")

    ranks = [rank(index) for index in chosen]
    assert ranks == sorted(ranks)
    for index in set(range(len(queries))) - set(chosen):
        before = sum(queries[other].tokens for other in chosen if rank(other) <= rank(index))
        if rank(index) < float("inf"):
            assert before + queries[index].tokens > limit


def test_a_deadline_that_passed_makes_nobody_else_late() -> None:
    queries = [Query(60, None, NOW - 1), Query(60, None, NOW + 1)]
    assert choose(queries, MadeCosts(), 100, NOW, max_wait=10) == [1]


def test_queries_of_one_adapter_go_together() -> None:
    costs = MadeCosts(adapters={name: AdapterTime({"low rank": 0.001}, 0.01, 0.0) for name in "abc"})
    queries = [Query(10, name, None, 1.0) for name in "abcabcabc"]
    chosen = choose(queries, costs, 60, NOW, max_wait=10)
    assert sorted(queries[index].adapter for index in chosen) in (list("aaabbb"), list("aaaccc"), list("bbbccc"))


def test_an_adapter_whose_form_is_in_the_batch_anyway_goes_first() -> None:
    costs = MadeCosts(
        adapters={
            "a": AdapterTime({"sparse": 0.01}, 0.001),
            "b": AdapterTime({"low rank": 0.01}, 0.002),
            "decodes": AdapterTime({"low rank": 0.01}, 0.002),
        }
    )
    queries = [Query(50, "a", None, 1.0), Query(50, "b", None, 1.0)]
    assert choose(queries, costs, 50, NOW, max_wait=10) == [0]
    assert choose(queries, costs, 50, NOW, max_wait=10, present=[Query(1, "decodes")]) == [1]


def test_an_adapter_is_not_split_where_that_costs_more_than_a_fuller_batch_saves() -> None:
    queries = [Query(30, "a", None, 1.0), *[Query(30, "b", None, 1.0)] * 3]
    for once, expected in ((1e-6, 3), (0.1, 1)):
        costs = MadeCosts(adapters={"b": AdapterTime(once=once)})
        assert len(choose(queries, costs, 100, NOW, max_wait=10)) == expected


def test_large_batches_that_are_slow_are_not_made() -> None:
    queries = [Query(10, None, None, 1.0)] * 20
    assert len(choose(queries, MadeCosts(base=0.0001, knee=50, steep=5.0), 200, NOW, max_wait=10)) == 5
    assert len(choose(queries, MadeCosts(base=0.0001), 200, NOW, max_wait=10)) == 20


def test_what_may_be_taken_in_part_fills_the_batch() -> None:
    queries = [Query(60, None, None, 1.0)] * 3
    assert len(choose(queries, MadeCosts(), 100, NOW)) == 1
    assert len(choose(queries, MadeCosts(), 100, NOW, divisible=True)) == 2


def test_the_time_of_a_batch() -> None:
    costs = MadeCosts(
        base=1.0,
        per_token=0.1,
        adapters={
            "a": AdapterTime({"low rank": 0.5}, 0.25, 0.01),
            "b": AdapterTime({"low rank": 0.75, "bias": 2.0}, 0.125, 0.0),
            "c": AdapterTime({}, 0.0, 0.0, 0.5, 4),
        },
    )
    assert batch_time([], costs) == 0
    assert batch_time([Query(10)], costs) == pytest.approx(2.0)
    assert batch_time([Query(10, "a")], costs) == pytest.approx(2.0 + 0.5 + 0.25 + 0.1)
    both = [Query(5, "a"), Query(5, "a"), Query(10, "b")]
    assert batch_time(both, costs) == pytest.approx(3.0 + 0.75 + 2.0 + 0.25 + 0.1 + 0.125)
    assert batch_time([Query(2, "c"), Query(2, "c")], costs) == pytest.approx(1.4)
    assert batch_time([Query(2, "c"), Query(2, "c"), Query(1, "c")], costs) == pytest.approx(2.0)
    assert batch_time([Query(5), Query(5)], replace(costs, row_time=3.0)) == pytest.approx(8.0)
    assert Tally(costs, both).seconds == Tally(costs, both[::-1]).seconds
