"""A free device waits for rows that are about to come back, for those only, and never longer than it may."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.settling import MAX_WAIT, Settling

MS = 1e-3


def away(settling: Settling, row: str, seconds: float, at: float = 0.0) -> None:
    """The row was in a batch that ended at `at`, and came back after so many seconds."""
    settling.finished([row], at)
    settling.arrived(row, at + seconds)


def test_nobody_is_expected_before_the_first_batch() -> None:
    assert Settling().wait_until(5.0) == 5.0


def test_a_quick_row_is_waited_for_until_it_is_there() -> None:
    settling = Settling()
    for row in "ab":
        away(settling, row, 0.8 * MS)
    settling.finished(["a", "b"], 10.0)
    settling.arrived("a", 10.0 + 0.5 * MS)
    until = settling.wait_until(10.0 + 0.5 * MS)
    assert 10.0 + 0.8 * MS < until < 10.0 + 1.5 * MS
    settling.arrived("b", 10.0 + 0.9 * MS)
    assert settling.wait_until(10.0 + 0.5 * MS) == 10.0 + 0.5 * MS


def test_a_row_that_may_just_come_in_time_is_waited_for_to_the_end() -> None:
    """Else a batch that once split would stay split: its rows come back at the same time as others again and again."""
    settling = Settling()
    away(settling, "hopeful", 2.5 * MS)
    settling.finished(["hopeful"], 10.0)
    assert settling.wait_until(10.0) == pytest.approx(10.0 + MAX_WAIT)
    away(settling, "hopeless", 3.5 * MS, at=20.0)
    settling.finished(["hopeless"], 30.0)
    assert settling.wait_until(30.0) == 30.0


def test_a_slow_row_is_not_waited_for_though_it_came_back_after_later_batches() -> None:
    settling = Settling()
    settling.finished(["slow"], 0.0)
    settling.finished(["quick"], 0.02)
    settling.arrived("slow", 0.05)
    settling.finished(["slow", "quick"], 1.0)
    settling.arrived("quick", 1.0)
    assert settling.wait_until(1.0) == 1.0


def test_an_unknown_row_is_waited_for_once_and_not_for_ever() -> None:
    settling = Settling()
    settling.finished(["new"], 1.0)
    assert settling.wait_until(1.001) == pytest.approx(1.001 + MAX_WAIT)


def test_who_has_patience_waits_until_all_are_there_or_not_at_all() -> None:
    settling = Settling()
    away(settling, "a", 20 * MS)
    away(settling, "b", 30 * MS)
    settling.finished(["a", "b"], 10.0)
    assert settling.wait_until(10.0) == 10.0
    assert settling.wait_until(10.0, patience=40 * MS) == 10.0
    assert settling.wait_until(10.0, patience=50 * MS) == pytest.approx(10.0 + 45 * MS)


def test_rows_of_earlier_batches_are_not_waited_for() -> None:
    settling = Settling()
    away(settling, "a", 0.5 * MS)
    settling.finished(["a"], 1.0)
    settling.finished(["b"], 1.0001)
    settling.arrived("b", 1.0002)
    assert settling.wait_until(1.0002) == 1.0002


def test_a_row_that_becomes_slow_is_given_up_and_one_that_becomes_quick_is_waited_for() -> None:
    settling = Settling()
    for number in range(20):
        away(settling, "a", 0.5 * MS, at=float(number))
    for number in range(20, 40):
        away(settling, "a", 30 * MS, at=float(number))
    settling.finished(["a"], 50.0)
    assert settling.wait_until(50.0) == 50.0
    for number in range(60, 80):
        away(settling, "a", 0.5 * MS, at=float(number))
    settling.finished(["a"], 90.0)
    assert settling.wait_until(90.0) > 90.0


def test_rows_that_are_gone_are_forgotten() -> None:
    settling = Settling()
    settling.finished(["a", "b"], 1.0)
    settling.forget(lambda row: row == "a")
    settling.arrived("b", 1.0001)
    assert settling.wait_until(1.0001) == 1.0001
    settling.forget(lambda row: True)
    assert not settling._usual
    assert not settling._left_at


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.booleans(), st.floats(0, 0.1, allow_nan=False)), min_size=1, max_size=60
    )
)
def test_the_wait_is_bounded_whatever_happened(events: list[tuple[str, bool, float]]) -> None:
    settling, now = Settling(), 0.0
    for row, finishes, passed in events:
        now += passed
        if finishes:
            settling.finished([row], now)
        else:
            settling.arrived(row, now)
        assert now <= settling.wait_until(now) <= now + MAX_WAIT + 1e-9
