"""Plans for all that waits: every query once, within the limit, and ours never dearer than any other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.server.adapters.plans import (
    FIXED_QUERIES,
    STRATEGIES,
    Plan,
    by_adapter,
    fixed,
    ignoring_adapters,
    joint,
    total_time,
    two_pass,
)
from swarm.server.adapters.scheduling import AdapterTime, Query, batch_time

FORMS = ("low rank", "sparse", "bias", "bottleneck", "mask")


class MadeCosts:
    """At random: base seconds, and for each token a time that grows beyond some number of them."""

    def __init__(self, chance: random.Random, num_adapters: int = 64):
        self.base = chance.choice([0.0, 0.01, 0.05])
        self.per_token = chance.choice([1e-5, 1e-4, 1e-3])
        self.knee = chance.choice([64, 256, 10**6])
        self.row_time = chance.choice([0.0, 1e-4])
        self.steep = chance.choice([1.0, 1.5, 3.0])
        self.adapters = [
            AdapterTime(
                {chance.choice(FORMS): chance.choice([0.0, 1e-3, 5e-3])},
                chance.choice([0.0, 1e-4, 1e-3, 5e-3]),
                chance.choice([0.0, 1e-6, 1e-5]),
                chance.choice([0.0, 0.0, 1e-3, 5e-3]),
                4,
            )
            for _ in range(num_adapters)
        ]

    def shared_time(self, tokens: int) -> float:
        return self.base + self.per_token * (min(tokens, self.knee) + self.steep * max(0, tokens - self.knee))

    def adapter_time(self, adapter: object) -> AdapterTime:
        assert isinstance(adapter, int)
        return self.adapters[adapter]


def made_queries(chance: random.Random, most: int = 128) -> list[Query]:
    number, num_adapters = chance.choice([1, 3, 10, 40, most]), chance.choice([1, 3, 16, 64])
    mean, deviation = chance.choice([1, 32, 32]), chance.choice([1, 2, 4, 8, 30])
    return [
        Query(
            max(1, int(chance.gauss(mean, deviation))),
            chance.choice([None, *range(num_adapters)]),
            None,
            chance.random(),
        )
        for _ in range(min(number, most))
    ]


def check(plan: Plan, queries: Sequence[Query], limit: int) -> None:
    assert sorted(itertools.chain(*plan)) == list(range(len(queries)))
    for batch in plan:
        assert batch
        assert sum(queries[index].tokens for index in batch) <= limit or len(batch) == 1


@pytest.mark.parametrize("seed", range(8))
def test_ours_is_as_cheap_as_the_best_of_all(seed: int) -> None:
    for case in range(200):
        chance = random.Random(1000 * seed + case)
        costs, queries, limit = MadeCosts(chance), made_queries(chance), chance.choice([64, 256, 1024])
        times = {}
        for name, strategy in STRATEGIES.items():
            plan = strategy(queries, costs, limit)
            check(plan, queries, limit)
            times[name] = total_time(plan, queries, costs)
        ours = times.pop("joint")
        assert ours <= 1.03 * min(times.values())


def partitions(items: list[int]) -> list[Plan]:
    if not items:
        return [[]]
    first, *rest = items
    found: list[Plan] = []
    for plan in partitions(rest):
        found.append([[first], *plan])
        found += [[*plan[:place], [first, *plan[place]], *plan[place + 1 :]] for place in range(len(plan))]
    return found


def test_ours_is_close_to_the_best_there_is() -> None:
    worst = []
    for case in range(150):
        chance = random.Random(case)
        costs = MadeCosts(chance, num_adapters=3)
        queries = [Query(chance.randint(1, 60), chance.choice([None, 0, 1, 2])) for _ in range(6)]
        limit = chance.choice([64, 128])
        best = min(
            total_time(plan, queries, costs)
            for plan in partitions(list(range(6)))
            if all(sum(queries[index].tokens for index in batch) <= limit or len(batch) == 1 for batch in plan)
        )
        worst.append(total_time(joint(queries, costs, limit), queries, costs) / best)
    assert sum(ratio <= 1.03 for ratio in worst) >= 0.95 * len(worst)
    assert max(worst) <= 1.4


def test_what_each_strategy_does() -> None:
    costs = MadeCosts(random.Random(0))
    queries = [Query(10, number % 3, None, float(number)) for number in range(70)]
    assert fixed(queries, costs, 1000) == [list(range(32)), list(range(32, 64)), list(range(64, 70))]
    assert FIXED_QUERIES == 32
    assert ignoring_adapters(queries, costs, 500) == [list(range(50)), list(range(50, 70))]
    assert [{queries[index].adapter for index in batch} for batch in by_adapter(queries, costs, 1000)] == [
        {0},
        {1},
        {2},
    ]
    assert len(by_adapter(queries, costs, 200)) == 6


def test_the_two_passes_see_one_part_of_the_costs_each() -> None:
    """Alpha dearer for more tokens, and dearer than beta: the second pass keeps apart what alone it would keep apart,
    though with beta in sight one batch is better."""

    class Costs(MadeCosts):
        def shared_time(self, tokens: int) -> float:
            return 1.0 if tokens <= 10 else 2.1

    costs = Costs(random.Random(0), 2)
    costs.adapters = [AdapterTime({"low rank": 1.0}), AdapterTime({"low rank": 1.0})]
    queries = [Query(10, 0), Query(10, 1)]
    assert len(two_pass(queries, costs, 100)) == 2
    assert joint(queries, costs, 100) == [[0, 1]]
    # The first pass puts queries of an adapter together whatever alpha says to it.
    same = [Query(10, 0), Query(10, 0)]
    assert two_pass(same, costs, 100) == [[0, 1]]


def test_batches_are_ordered_for_the_least_mean_wait() -> None:
    chance = random.Random(3)
    costs, queries = MadeCosts(chance), made_queries(chance)
    plan = joint(queries, costs, 100)
    per_query = [batch_time((queries[index] for index in batch), costs) / len(batch) for batch in plan]
    assert per_query == sorted(per_query)


@settings(max_examples=100)
@given(st.integers(0, 10**6))
def test_deadlines_and_overdue_queries_go_first(seed: int) -> None:
    chance = random.Random(seed)
    costs, limit = MadeCosts(chance), chance.choice([64, 256])
    queries = [
        Query(query.tokens, query.adapter, chance.choice([None, None, 1e6 + chance.random()]), query.arrived)
        for query in made_queries(chance, 40)
    ]
    plan = joint(queries, costs, limit, now=1.0)
    check(plan, queries, limit)
    dated = [index for index, query in enumerate(queries) if query.deadline is not None]
    if dated:
        last = max(place for place, batch in enumerate(plan) if set(dated) & set(batch))
        assert all(set(dated) & set(batch) for batch in plan[: last + 1])
        assert min(dated, key=lambda index: queries[index].deadline or 0.0) in plan[0]

    oldest = min(range(len(queries)), key=lambda index: queries[index].arrived)
    plan = joint(queries, costs, limit, now=1.0, max_wait=1.0 - queries[oldest].arrived)
    check(plan, queries, limit)
    assert oldest in plan[0]
