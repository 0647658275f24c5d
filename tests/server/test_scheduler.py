"""The next batch: within its budget, watched rows first, prompts never starved, oldest first."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from swarm.server.scheduler import PREFILL_SHARE, Waiting, next_batch

ENTRIES = st.lists(
    st.one_of(
        st.just(Waiting(1, decode=True)),
        st.integers(1, 300).map(lambda num_tokens: Waiting(num_tokens, decode=False)),
    ),
    max_size=40,
)
BUDGETS = st.integers(1, 100)


def decode(number: int) -> list[Waiting]:
    return [Waiting(1, decode=True)] * number


def prompt(num_tokens: int) -> Waiting:
    return Waiting(num_tokens, decode=False)


@given(ENTRIES, BUDGETS)
def test_a_batch_keeps_its_budget_and_takes_no_more_than_waits(waiting: Sequence[Waiting], max_tokens: int) -> None:
    taken = next_batch(waiting, max_tokens)
    assert len(taken) == len(waiting)
    assert sum(taken) <= max_tokens
    assert all(0 <= number <= entry.num_tokens for number, entry in zip(taken, waiting, strict=True))


@given(ENTRIES.filter(bool), BUDGETS)
def test_if_anything_waits_something_is_taken(waiting: Sequence[Waiting], max_tokens: int) -> None:
    assert sum(next_batch(waiting, max_tokens)) > 0


@given(ENTRIES, BUDGETS)
@example([Waiting(1, decode=False), *[Waiting(1, decode=True)] * 20], 16)
def test_the_device_is_not_left_idle(waiting: Sequence[Waiting], max_tokens: int) -> None:
    assert sum(next_batch(waiting, max_tokens)) == min(max_tokens, sum(entry.num_tokens for entry in waiting))


@given(ENTRIES, BUDGETS)
def test_among_rows_of_a_kind_the_oldest_goes_first(waiting: Sequence[Waiting], max_tokens: int) -> None:
    taken = next_batch(waiting, max_tokens)
    for kind in (True, False):
        missed = False
        for number, entry in zip(taken, waiting, strict=True):
            if entry.decode is kind:
                assert not (missed and number), "a younger row was served before an older one was done"
                missed |= number < entry.num_tokens


@given(st.lists(st.integers(1, 300).map(prompt), max_size=10), st.integers(1, 40), st.integers(2, 100))
def test_prompts_get_their_share_and_no_more_while_somebody_watches(
    prompts: list[Waiting], num_decode: int, max_tokens: int
) -> None:
    taken = next_batch([*prompts, *decode(num_decode)], max_tokens)
    reserved = min(max(1, max_tokens // PREFILL_SHARE), sum(entry.num_tokens for entry in prompts))
    of_prompts, of_decode = sum(taken[: len(prompts)]), sum(taken[len(prompts) :])
    assert of_prompts >= reserved
    assert of_decode == min(num_decode, max_tokens - reserved)


@pytest.mark.parametrize(
    ("waiting", "max_tokens", "expected"),
    [
        ([], 8, []),
        ([prompt(100), *decode(2)], 8, [6, 1, 1]),
        ([prompt(100), *decode(20)], 16, [2] + [1] * 14 + [0] * 6),
        ([prompt(3), prompt(100)], 8, [3, 5]),
        ([prompt(100), prompt(3)], 8, [8, 0]),
    ],
)
def test_examples(waiting: Sequence[Waiting], max_tokens: int, expected: list[int]) -> None:
    assert next_batch(waiting, max_tokens) == expected


def rounds_until_served(first: Waiting, others: Sequence[Waiting], max_tokens: int, limit: int) -> int:
    """Batches until `first` is done, while `others` are replaced by new ones of their kind as soon as they are done."""
    queue = [*others, first]  # the newcomer starts behind everybody
    watched = len(queue) - 1
    for number in range(1, limit + 1):
        taken = next_batch(queue, max_tokens)
        left = [
            Waiting(entry.num_tokens - n, entry.decode) if n < entry.num_tokens else None
            for entry, n in zip(queue, taken, strict=True)
        ]
        if left[watched] is None:
            return number
        arriving = [entry for entry, rest in zip(queue, left, strict=True) if rest is None]
        watched = sum(rest is not None for rest in left[:watched])
        queue = [rest for rest in left if rest is not None] + arriving
    return limit + 1


@given(st.integers(1, 200), st.integers(1, 60), st.integers(2, 60))
def test_a_prompt_is_served_beside_endless_decoding(num_tokens: int, num_decode: int, max_tokens: int) -> None:
    limit = -(-num_tokens // max(1, max_tokens // PREFILL_SHARE))
    assert rounds_until_served(prompt(num_tokens), decode(num_decode), max_tokens, limit) <= limit


@given(st.integers(0, 60), st.lists(st.integers(1, 300).map(prompt), max_size=5), st.integers(2, 60))
def test_a_decode_row_is_served_beside_endless_prompts(
    num_decode: int, prompts: list[Waiting], max_tokens: int
) -> None:
    per_round = max_tokens - max(1, max_tokens // PREFILL_SHARE)
    limit = -(-(num_decode + 1) // per_round)
    assert rounds_until_served(decode(1)[0], [*prompts, *decode(num_decode)], max_tokens, limit) <= limit


@given(st.integers(0, 10), st.integers(0, 5))
def test_one_token_at_a_time_starves_nobody(num_decode: int, num_prompts: int) -> None:
    others = [prompt(3)] * num_prompts + decode(num_decode)
    limit = sum(entry.num_tokens for entry in others) + 1
    assert rounds_until_served(decode(1)[0], others, 1, limit) <= limit
    limit = sum(entry.num_tokens for entry in others) + 3 * (1 + len(others))
    assert rounds_until_served(prompt(3), others, 1, limit) <= limit
