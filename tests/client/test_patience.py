import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.config import ClientConfig
from swarm.client.patience import FIRST, OVERDUE, Patience

seconds = st.floats(1e-3, 1000.0)


@given(shortest=seconds, longest=seconds, steps=st.lists(st.floats(0.0, 1e4)))
def test_patience_stays_within_its_settings_whatever_steps_take(shortest, longest, steps):
    patience = Patience(ClientConfig(min_patience=shortest, max_patience=longest))
    for step in [None, *steps]:
        if step is not None:
            patience.learn(step)
        assert min(shortest, longest) <= patience.before_probe <= longest


@given(usual=st.floats(1e-3, 10.0), before=st.lists(st.floats(0.0, 10.0), max_size=5))
def test_patience_comes_to_be_a_few_usual_steps(usual, before):
    patience = Patience(ClientConfig(min_patience=1e-6, max_patience=1000.0))
    for step in [*before, *[usual] * 100]:
        patience.learn(step)
    assert patience.before_probe == pytest.approx(OVERDUE * usual, rel=1e-3)


@given(steps=st.lists(st.floats(0.0, 10.0), min_size=1), more=st.floats(0.0, 10.0))
def test_longer_steps_never_make_less_patient(steps, more):
    one, other = (Patience(ClientConfig(min_patience=1e-6, max_patience=1000.0)) for _ in range(2))
    for step in steps:
        one.learn(step)
        other.learn(step + more)
    assert one.before_probe <= other.before_probe


def test_one_outlier_does_not_decide():
    patience = Patience(ClientConfig(min_patience=1e-6, max_patience=1000.0))
    for step in (0.1, 0.1, 10.0):
        patience.learn(step)
    assert patience.before_probe < OVERDUE * 3.0


def test_before_the_first_step_patience_is_that_of_a_slow_computer():
    assert Patience(ClientConfig(min_patience=0.1, max_patience=5.0)).before_probe == FIRST
    assert Patience(ClientConfig(min_patience=3.0, max_patience=5.0)).before_probe == 3.0
    assert Patience(ClientConfig(min_patience=0.1, max_patience=0.2)).before_probe == 0.2


@given(st.lists(st.integers(0, 2**24), min_size=2, max_size=2).map(sorted))
def test_a_server_gets_time_for_what_is_on_its_way(sizes):
    patience = Patience(ClientConfig(hang_timeout=0.5))
    assert 0.5 <= patience.hang_timeout(sizes[0]) <= patience.hang_timeout(sizes[1])
    assert patience.hang_timeout(0) == 0.5
