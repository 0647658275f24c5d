"""When bytes come out of a line: never early, never out of order, never faster than its rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.scripts.link_line import BITS, Line, Link

RATES = st.none() | st.floats(1e3, 1e10)
DELAYS = st.floats(0, 1)
#: (seconds since the one before, bytes)
SENDS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 2**20)), min_size=1, max_size=30)


@given(RATES, DELAYS, SENDS)
def test_a_line_keeps_order_delay_and_rate(rate, delay, sends):
    line, now, arrivals = Line(Link(rate, delay)), 0.0, []
    for gap, size in sends:
        now += gap
        arrivals.append((now, size, line.arrival(now, size)))
    assert [arrival for *_, arrival in arrivals] == sorted(arrival for *_, arrival in arrivals)
    for first, (entered, _, _) in enumerate(arrivals):
        sent = 0
        for _, size, arrival in arrivals[first:]:
            sent += size
            # Everything from `first` on passed the transmitter after `first` entered.
            earliest = entered + delay + (sent * BITS / rate if rate else 0.0)
            assert arrival >= earliest * (1 - 1e-12)


@given(RATES, DELAYS, st.integers(1, 2**20))
def test_an_idle_line_adds_nothing_else(rate, delay, size):
    line = Line(Link(rate, delay))
    line.arrival(1.0, 1000)
    now = 100.0
    assert line.arrival(now, size) == pytest.approx(now + delay + (size * BITS / rate if rate else 0.0))


@given(RATES.filter(lambda rate: rate is not None), DELAYS)
def test_the_window_fills_the_line_and_is_bounded(rate, delay):
    under_way = rate / BITS * delay
    assert under_way <= Link(rate, delay).window <= under_way + rate / BITS * 0.02 + 2**18


@pytest.mark.parametrize("link", [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (None, -0.1), (None, float("nan"))])
def test_links_that_cannot_be(link):
    with pytest.raises(ValueError, match="give"):
        Link(*link)


def test_names():
    assert str(Link(1e8, 0.05)) == "100 Mbit/s, 100 ms"
    assert str(Link(None, 0.05)) == "100 ms"
