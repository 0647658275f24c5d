"""A line is slow only when that was measured more than once."""

from swarm.codecs import SLOW_LINK
from swarm.line_rate import CONFIRMATIONS, LineRate


def measured(*rates: float) -> LineRate:
    line = LineRate()
    for rate in rates:
        line.add(rate)
    return line


def test_a_line_is_fast_at_once_and_slow_after_several_measurements() -> None:
    assert measured().value is None
    assert not measured().is_settled
    assert measured(SLOW_LINK).value == SLOW_LINK
    slow = [1e6] * CONFIRMATIONS
    assert measured(*slow[1:]).value is None
    assert measured(*slow).value == 1e6
    assert measured(*slow).is_settled


def test_one_busy_moment_makes_no_line_slow_and_one_that_became_slow_is_found_out() -> None:
    fast, busy = 1e9, [1e6] * (CONFIRMATIONS - 1)
    assert measured(*busy, fast).value == fast
    assert measured(fast, *busy).value == fast
    assert measured(fast, *busy, 2e6).value == 2e6
