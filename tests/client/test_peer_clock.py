"""What is known of another machine's clock."""

from hypothesis import given
from hypothesis import strategies as st

from swarm.client.peer_clock import DRIFT, PeerClock

AHEAD = 10**9
ways = st.integers(0, 10**6)


@given(there=ways, back=ways, later=st.lists(st.tuples(ways, ways)))
def test_what_is_known_only_gets_better_and_no_message_arrives_before_it_was_sent(there, back, later):
    clock = PeerClock.asked(0, there + AHEAD, there + back)
    error = abs(clock.ahead - AHEAD)
    assert error <= (there + back) / 2 + 1
    for way, way_back in later:
        clock.took(100, 100 + way + AHEAD)
        clock.gave(100 + AHEAD, 100 + way_back)
        assert 100 + way + AHEAD - clock.ahead - 100 >= -1
        assert 100 + way_back - (100 + AHEAD - clock.ahead) >= -1
        assert abs(clock.ahead - AHEAD) <= error + DRIFT * 10**6 + 1


def test_clocks_that_drift_apart_are_followed():
    clock = PeerClock()
    for seconds in range(1000):
        now, ahead = seconds * 10**6, round(seconds * 10**6 * DRIFT / 2)
        clock.took(now, now + ahead + 1000)
        clock.gave(now + ahead, now + 1000)
        assert abs(clock.ahead - ahead) <= 1000 + DRIFT * 10**6
