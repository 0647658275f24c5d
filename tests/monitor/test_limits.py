"""How often callers are let through, and for how many callers that is remembered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.monitor.limits import MAX_CALLERS, Rate, TooOften, Turnstile

ENOUGH = Rate(per_minute=1e9, burst=10**9)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def passes(turnstile: Turnstile, address: str = "192.0.2.1") -> bool:
    try:
        with turnstile.admit(address):
            return True
    except TooOften:
        return False


def test_each_caller_has_his_own_share() -> None:
    turnstile = Turnstile(ENOUGH, Rate(per_minute=6, burst=2), clock := Clock())
    assert [passes(turnstile) for _ in range(3)] == [True, True, False]
    assert passes(turnstile, "192.0.2.2")
    clock.now = 9.9
    assert not passes(turnstile)
    clock.now = 10.0
    assert [passes(turnstile) for _ in range(2)] == [True, False]


def test_all_callers_together_have_a_share() -> None:
    turnstile = Turnstile(Rate(per_minute=1, burst=2), ENOUGH, Clock())
    assert [passes(turnstile, f"192.0.2.{number}") for number in range(3)] == [True, True, False]


def test_a_caller_of_ipv6_has_more_than_one_address() -> None:
    turnstile = Turnstile(ENOUGH, Rate(per_minute=1, burst=1), Clock())
    assert passes(turnstile, "2001:db8::1") and not passes(turnstile, "2001:db8::2")
    assert passes(turnstile, "2001:db8:0:1::1")
    assert passes(turnstile, "::ffff:192.0.2.1") and passes(turnstile, "::ffff:192.0.2.2")


def test_one_at_a_time_also_after_a_failure() -> None:
    turnstile = Turnstile(ENOUGH, ENOUGH, Clock())
    with turnstile.admit("192.0.2.1"):
        assert not passes(turnstile, "192.0.2.2")
    with pytest.raises(KeyError), turnstile.admit("192.0.2.1"):
        raise KeyError
    assert passes(turnstile)


def test_being_refused_costs_nothing_and_says_how_long() -> None:
    turnstile = Turnstile(ENOUGH, Rate(per_minute=1, burst=1), clock := Clock())
    assert passes(turnstile)
    for clock.now in (10.0, 20.0, 30.0):
        with pytest.raises(TooOften, match=r"^you have asked too often") as caught, turnstile.admit("192.0.2.1"):
            pass
        assert caught.value.retry_after == pytest.approx(60 - clock.now)
    clock.now = 60.0
    assert passes(turnstile)


def test_the_table_of_callers_is_bounded() -> None:
    turnstile = Turnstile(ENOUGH, Rate(per_minute=1, burst=1), Clock())
    for number in range(3 * MAX_CALLERS):
        passes(turnstile, f"10.0.{number >> 8}.{number & 255}")
    assert len(turnstile._callers) == MAX_CALLERS


@pytest.mark.parametrize(("per_minute", "burst"), [(0, 1), (-1, 1), (1, 0), (float("nan"), 1)])
def test_a_rate_that_would_admit_nobody(per_minute: float, burst: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Rate(per_minute, burst)


@given(st.lists(st.floats(0, 120), max_size=60), st.integers(1, 5), st.floats(1, 60))
def test_never_more_than_the_burst_and_the_rate(pauses: list[float], burst: int, per_minute: float) -> None:
    turnstile = Turnstile(ENOUGH, Rate(per_minute, burst), clock := Clock())
    admitted = list[float]()
    for pause in pauses:
        clock.now += pause
        if passes(turnstile):
            admitted.append(clock.now)
    for first, start in enumerate(admitted):
        for number, end in enumerate(admitted[first:], 1):
            assert number <= burst + (end - start) * per_minute / 60 + 1e-6
