"""Pages belong to one row at a time, none is ever lost, and what was admitted can always grow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from swarm.errors import CacheFull, SessionTooLong
from swarm.server.kv_cache import KVCache, RowCache

CPU = torch.device("cpu")


def cache_of(num_pages: int, page_size: int = 4, num_layers: int = 1) -> KVCache:
    return KVCache(num_layers, num_pages * page_size, page_size, CPU, torch.float32)


def admit_row(cache: KVCache, max_length: int) -> RowCache:
    (row,) = cache.admit(1, max_length)
    return row


class AnyOrder(RuleBasedStateMachine):
    """Sessions come, grow, rewind and go in any order, some of them in the middle of a batch."""

    rows = Bundle("rows")

    @initialize(num_pages=st.integers(1, 24), page_size=st.integers(1, 5))
    def start(self, num_pages: int, page_size: int) -> None:
        self.cache = cache_of(num_pages, page_size)
        self.num_pages, self.page_size = num_pages, page_size
        self.alive: list[RowCache] = []

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def pages_left(self) -> int:
        return self.num_pages - sum(self.pages_for(row.max_length) for row in self.alive)

    @rule(target=rows, num_rows=st.integers(1, 4), max_length=st.integers(1, 40))
    def admit(self, num_rows: int, max_length: int):  # type: ignore[no-untyped-def]
        if num_rows * self.pages_for(max_length) > self.pages_left():
            with pytest.raises(CacheFull) as caught:
                self.cache.admit(num_rows, max_length)
            assert caught.value.tokens_left == self.pages_left() * self.page_size
            return multiple()
        rows = self.cache.admit(num_rows, max_length)
        assert [(row.length, row.max_length) for row in rows] == [(0, max_length)] * num_rows
        self.alive += rows
        return multiple(*rows)

    @rule(row=rows, share=st.floats(0, 1))
    def grow(self, row: RowCache, share: float) -> None:
        length = max(1, round(share * row.max_length))
        assert self.cache.grow(row, length)
        assert len(row.pages) >= self.pages_for(length)
        row.length = max(row.length, length)

    @rule(row=rows)
    def grow_too_far(self, row: RowCache) -> None:
        with pytest.raises(SessionTooLong):
            self.cache.grow(row, row.max_length + 1)

    @rule(row=rows, length=st.integers(0, 40))
    def truncate(self, row: RowCache, length: int) -> None:
        kept, expected = list(row.pages), min(row.length, length)
        self.cache.truncate(row, length)
        assert row.length == expected
        assert row.pages == kept[: self.pages_for(expected)]

    @rule(row=consumes(rows))
    def release(self, row: RowCache) -> None:
        self.cache.release([row])
        self.alive.remove(row)
        self.cache.release([row])
        assert not self.cache.grow(row, 1)
        assert not self.cache.hold(row)
        assert row.pages == []

    @rule(row=consumes(rows))
    def release_in_a_batch(self, row: RowCache) -> None:
        pages = list(row.pages)
        assert self.cache.hold(row)
        self.cache.release([row])
        self.alive.remove(row)
        assert row.pages == pages  # the batch still reads and writes them
        self.cache.let_go([row])
        assert row.pages == []

    @rule()
    def fill(self) -> None:
        """All that is said to be left can really be used."""
        if left := self.cache.tokens_left:
            row = admit_row(self.cache, left)
            assert self.cache.grow(row, left)
            self.alive.append(row)
            self.no_page_is_shared()
            self.cache.release([row])
            self.alive.remove(row)

    @invariant()
    def no_page_is_shared(self) -> None:
        pages = [page for row in self.alive for page in row.pages]
        assert len(set(pages)) == len(pages)
        assert set(pages) <= set(range(self.num_pages))

    @invariant()
    def what_is_left_is_what_nobody_reserved(self) -> None:
        assert self.cache.tokens_left == self.pages_left() * self.page_size

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for row in self.alive:  # admission was a promise
                assert self.cache.grow(row, row.max_length)
            self.no_page_is_shared()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_full_cache_says_what_is_left_and_what_was_wanted() -> None:
    cache = cache_of(num_pages=4)
    admit_row(cache, 5)
    with pytest.raises(CacheFull, match=r"room for 8 more tokens, but the session wants 3 x 4 ") as caught:
        cache.admit(3, 4)
    assert caught.value.tokens_left == cache.tokens_left == 8
    cache.admit(2, 4)
    assert cache.tokens_left == 0


def test_a_refused_session_takes_nothing() -> None:
    cache = cache_of(num_pages=4)
    with pytest.raises(CacheFull):
        cache.admit(2, 12)
    assert cache.tokens_left == 16


def test_rows_that_grow_in_turn_stay_contiguous() -> None:
    cache = cache_of(num_pages=16)
    rows = cache.admit(2, 32)
    for length in range(1, 33):
        assert all(cache.grow(row, length) for row in rows)
        assert all(cache.is_contiguous(row) for row in rows)


def test_where_tokens_are_stored() -> None:
    cache = cache_of(num_pages=6)
    first, second = cache.admit(2, 12)
    cache.grow(first, 4)
    cache.grow(second, 12)  # starts in the middle of pages 1 to 5, at 3
    assert (first.pages, second.pages) == ([0], [3, 4, 5])
    assert cache.slots(second, 2, 6).tolist() == [14, 15, 16, 17]

    cache.release([second])
    (third,) = cache.admit(1, 4)
    cache.grow(third, 4)
    cache.grow(first, 12)
    assert third.pages == [3]
    assert first.pages == [0, 1, 2]

    (scattered,) = cache.admit(1, 8)
    cache.release([first])
    cache.grow(scattered, 4)
    scattered.pages.append(5)
    assert not cache.is_contiguous(scattered)
    assert cache.slots(scattered, 2, 6).tolist() == [2, 3, 20, 21]


def test_a_page_released_in_a_batch_goes_to_nobody_before_the_batch_is_done() -> None:
    cache = cache_of(num_pages=4)
    leaving, staying = cache.admit(2, 8)
    cache.grow(leaving, 8)
    held = set(leaving.pages)
    assert cache.hold(leaving)
    cache.release([leaving])
    assert cache.tokens_left == 8
    cache.grow(staying, 8)
    assert held.isdisjoint(staying.pages)
    newcomer = admit_row(cache, 8)
    cache.let_go([leaving])
    assert cache.grow(newcomer, 8)
    assert set(newcomer.pages) == held


def test_layers_are_stored_apart() -> None:
    cache = cache_of(num_pages=2, num_layers=2)
    key, value = torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 6)  # 2 tokens of 2 heads
    keys, values = cache.storage(0, key, value)
    assert (keys.numel(), values.numel()) == (12 * 2 * 8, 12 * 2 * 6)  # 2 pages of 4 tokens, and one for padding
    assert cache.storage(0, key, value)[0] is keys
    assert cache.storage(1, key, value)[0] is not keys
