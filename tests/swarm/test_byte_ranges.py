from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from swarm.byte_ranges import ByteRange, bridged, cut, missing, nbytes, union

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def places(ranges: list[ByteRange]) -> set[int]:
    return {place for start, end in ranges for place in range(start, end)}


def is_tidy(ranges: list[ByteRange]) -> bool:
    """Sorted, none empty, none touching another."""
    return all(start < end for start, end in ranges) and all(before[1] < after[0] for before, after in pairwise(ranges))


@given(ranges)
def test_a_union_has_the_same_bytes(some: list[ByteRange]) -> None:
    assert places(union(some)) == places(some)
    assert is_tidy(union(some))
    assert nbytes(union(some)) == len(places(some))


@given(ranges, ranges)
def test_what_is_missing(wanted: list[ByteRange], present: list[ByteRange]) -> None:
    assert places(missing(wanted, present)) == places(wanted) - places(present)
    assert is_tidy(missing(wanted, present))


@given(ranges, st.integers(0, 30))
def test_bridges_cost_no_more_than_allowed_and_take_small_gaps_first(some: list[ByteRange], slack: int) -> None:
    before = union(some)
    after = bridged(before, slack)
    assert is_tidy(after)
    assert places(after) >= places(before)
    assert nbytes(after) - nbytes(before) <= slack
    left = [later[0] - earlier[1] for earlier, later in pairwise(after)]
    spent = nbytes(after) - nbytes(before)
    assert all(gap > slack - spent for gap in left)


@given(ranges, st.integers(1, 20))
def test_pieces_are_the_same_bytes_once(some: list[ByteRange], size: int) -> None:
    pieces = cut(union(some), size)
    assert all(0 < end - start <= size for start, end in pieces)
    assert union(pieces) == union(some)
    assert nbytes(pieces) == nbytes(union(some))
