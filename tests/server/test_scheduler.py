"""The next batch: within its budgets, watched rows first, nobody starved, oldest first where that matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from swarm.server.scheduler import BULK_SHARE, TAIL_SHARE, Kind, Waiting, next_batch

ENTRIES = st.lists(
    st.one_of(
        st.just(Waiting(1, Kind.DECODE)),
        st.builds(Waiting, st.integers(1, 300), st.just(Kind.PREFILL)),
    ),
    max_size=40,
)
BUDGETS = st.integers(1, 100)


def decode(number: int) -> list[Waiting]:
    return [Waiting(1, Kind.DECODE)] * number


def prompt(num_tokens: int) -> Waiting:
    return Waiting(num_tokens, Kind.PREFILL)


@given(ENTRIES, BUDGETS, BUDGETS)
def test_a_batch_keeps_its_budgets_and_takes_no_more_than_waits(
    waiting: Sequence[Waiting], max_tokens: int, bulk_tokens: int
) -> None:
    taken = next_batch(waiting, max_tokens, bulk_tokens)
    assert len(taken) == len(waiting)
    assert sum(taken) <= max_tokens
    assert all(0 <= number <= entry.num_tokens for number, entry in zip(taken, waiting, strict=True))
    in_bulk = sum(number for number, entry in zip(taken, waiting, strict=True) if entry.kind is not Kind.DECODE)
    assert in_bulk <= bulk_tokens + bulk_tokens // TAIL_SHARE


@given(ENTRIES.filter(bool), BUDGETS, BUDGETS)
def test_if_anything_waits_something_is_taken(waiting: Sequence[Waiting], max_tokens: int, bulk_tokens: int) -> None:
    assert sum(next_batch(waiting, max_tokens, bulk_tokens)) > 0


@given(ENTRIES, BUDGETS)
@example([Waiting(1, Kind.PREFILL), *[Waiting(1, Kind.DECODE)] * 20], 16)
def test_where_nobody_is_held_up_the_device_is_not_left_idle(waiting: Sequence[Waiting], max_tokens: int) -> None:
    taken = next_batch(waiting, max_tokens, max_tokens)
    assert sum(taken) == min(max_tokens, sum(entry.num_tokens for entry in waiting))


@given(ENTRIES, BUDGETS, BUDGETS)
def test_among_rows_that_decode_the_oldest_goes_first(
    waiting: Sequence[Waiting], max_tokens: int, bulk_tokens: int
) -> None:
    taken = next_batch(waiting, max_tokens, bulk_tokens)
    missed = False
    for number, entry in zip(taken, waiting, strict=True):
        if entry.kind is Kind.DECODE:
            assert not (missed and number), "a younger row was served before an older one was done"
            missed |= number < entry.num_tokens


@given(st.lists(st.integers(1, 300).map(prompt), min_size=1, max_size=10), st.integers(2, 100), BUDGETS)
def test_half_is_the_oldest_prompts_and_the_rest_the_shortest_ones(
    prompts: list[Waiting], max_tokens: int, bulk_tokens: int
) -> None:
    taken = next_batch(prompts, max_tokens, bulk_tokens)
    assert taken[0] >= min(prompts[0].num_tokens, -(-min(bulk_tokens, max_tokens) // 2))
    younger = sorted(zip(prompts[1:], taken[1:], strict=True), key=lambda pair: pair[0].num_tokens)
    for (entry, number), (_, next_number) in pairwise(younger):
        assert next_number == 0 or number == entry.num_tokens, (
            "a longer prompt was served before a shorter one was done"
        )


@given(st.lists(st.integers(1, 300).map(prompt), max_size=10), st.integers(1, 40), st.integers(2, 100), BUDGETS)
def test_prompts_get_their_share_and_no_more_when_decode_rows_would_fill_the_batch(
    prompts: list[Waiting], num_decode: int, max_tokens: int, bulk_tokens: int
) -> None:
    taken = next_batch([*prompts, *decode(num_decode)], max_tokens, bulk_tokens)
    reserved = min(max(1, max_tokens // BULK_SHARE), bulk_tokens, sum(entry.num_tokens for entry in prompts))
    of_prompts, of_decode = sum(taken[: len(prompts)]), sum(taken[len(prompts) :])
    assert of_prompts >= reserved
    assert of_decode == min(num_decode, max_tokens - reserved)


@pytest.mark.parametrize(
    ("waiting", "max_tokens", "bulk_tokens", "expected"),
    [
        ([], 8, 8, []),
        ([prompt(100), *decode(2)], 8, 8, [6, 1, 1]),
        ([prompt(100), *decode(2)], 64, 8, [8, 1, 1]),
        ([prompt(100), *decode(20)], 16, 16, [2] + [1] * 14 + [0] * 6),
        ([prompt(3), prompt(100)], 8, 8, [3, 5]),
        ([prompt(100), prompt(3)], 8, 8, [5, 3]),
        ([prompt(100), prompt(90), prompt(3)], 16, 16, [8, 5, 3]),
        ([prompt(45), *decode(2)], 64, 40, [45, 1, 1]),  # 5 left behind would cost a batch of their own
        ([prompt(46), *decode(2)], 64, 40, [40, 1, 1]),
    ],
)
def test_examples(waiting: Sequence[Waiting], max_tokens: int, bulk_tokens: int, expected: list[int]) -> None:
    assert next_batch(waiting, max_tokens, bulk_tokens) == expected


def rounds_until_served(
    watched: Waiting, others: Sequence[Waiting], max_tokens: int, bulk_tokens: int, limit: int
) -> int:
    """Batches until `watched` is done, while `others` are replaced by new ones of their kind as soon as they are done.
    It starts behind all others.
    """
    queue = [*others, watched]
    position = len(queue) - 1
    for number in range(1, limit + 1):
        taken = next_batch(queue, max_tokens, bulk_tokens)
        if taken[position] == queue[position].num_tokens:
            return number
        left = [(entry, entry.num_tokens - n) for entry, n in zip(queue, taken, strict=True)]
        position -= sum(rest == 0 for _, rest in left[:position])
        arriving = [entry for entry, rest in left if rest == 0]
        queue = [replace(entry, num_tokens=rest) for entry, rest in left if rest] + arriving
    return limit + 1


@given(st.integers(1, 200), st.integers(1, 60), st.integers(2, 60), BUDGETS)
def test_a_prompt_is_served_beside_endless_decoding(
    num_tokens: int, num_decode: int, max_tokens: int, bulk_tokens: int
) -> None:
    per_round = min(max(1, max_tokens // BULK_SHARE), bulk_tokens)
    limit = -(-num_tokens // per_round)
    assert rounds_until_served(prompt(num_tokens), decode(num_decode), max_tokens, bulk_tokens, limit) <= limit


@given(st.integers(1, 200), st.lists(st.integers(1, 200), max_size=4), st.integers(2, 60))
def test_a_prompt_is_served_beside_endless_others(num_tokens: int, others: list[int], max_tokens: int) -> None:
    """Those before it are done in time, and the oldest has half of every batch."""
    limit = sum(-(-size // -(-max_tokens // 2)) for size in (*others, num_tokens))
    assert rounds_until_served(prompt(num_tokens), [*map(prompt, others)], max_tokens, max_tokens, limit) <= limit


@given(st.integers(0, 60), st.lists(st.integers(1, 300).map(prompt), max_size=5), st.integers(2, 60), BUDGETS)
def test_a_decode_row_is_served_beside_endless_prompts(
    num_decode: int, prompts: list[Waiting], max_tokens: int, bulk_tokens: int
) -> None:
    per_round = max_tokens - max(1, max_tokens // BULK_SHARE)
    limit = -(-(num_decode + 1) // per_round)
    others = [*prompts, *decode(num_decode)]
    assert rounds_until_served(decode(1)[0], others, max_tokens, bulk_tokens, limit) <= limit


@given(st.integers(1, 60), st.integers(2, 30), st.lists(st.integers(1, 300).map(prompt), max_size=3))
def test_a_row_without_a_deadline_is_served_beside_endless_rows_that_have_one(
    num_rows: int, max_tokens: int, prompts: list[Waiting]
) -> None:
    hurried = [Waiting(1, Kind.DECODE, deadline=float(number)) for number in range(num_rows)]
    assert rounds_until_served(Waiting(1, Kind.DECODE), [*prompts, *hurried], max_tokens, max_tokens, limit=200) <= 200


def test_half_of_the_room_of_rows_that_decode_goes_by_their_deadlines() -> None:
    waiting = [*decode(6), Waiting(1, Kind.DECODE, deadline=2.0), Waiting(1, Kind.DECODE, deadline=1.0)]
    assert next_batch(waiting, 3, 3) == [1, 1, 0, 0, 0, 0, 0, 1]


@given(st.integers(0, 10), st.integers(0, 5))
def test_one_token_at_a_time_starves_nobody(num_decode: int, num_prompts: int) -> None:
    others = [prompt(3)] * num_prompts + decode(num_decode)
    limit = sum(entry.num_tokens for entry in others) + 1
    assert rounds_until_served(decode(1)[0], others, 1, 1, limit) <= limit
    limit = sum(entry.num_tokens for entry in others) + 3 * (1 + len(others))
    assert rounds_until_served(prompt(3), others, 1, 1, limit) <= limit
