import math

import pytest

from swarm.routing.ping import LEAST_NOISE, PingTable


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def table(clock):
    return PingTable(smoothing=0.25, unreachable_time=30.0, clock=clock)


def test_measurements_are_smoothed(table):
    table.add("A", 0.1)
    assert table.round_trip("A") == 0.1
    table.add("A", 0.5)
    assert table.round_trip("A") == pytest.approx(0.2)
    for _ in range(50):
        table.add("A", 0.5)
    assert table.round_trip("A") == pytest.approx(0.5, rel=1e-3)


def test_a_sooner_answer_counts_more_than_a_later_one(table):
    for round_trip in (0.2, 0.1):
        table.add("A", round_trip)
    assert table.round_trip("A") == pytest.approx(0.14)


def test_noise_is_how_far_measurements_are_from_what_was_expected(table):
    table.add("A", 0.2)
    assert table.noises() == {"A": 0.1}  # nobody knows after one
    table.add("A", 0.24)
    assert table.noises()["A"] == pytest.approx(0.04)
    for _ in range(50):
        table.add("A", 0.21)
    assert table.noises() == {"A": LEAST_NOISE}
    table.add("A", 0.41)
    assert table.noises()["A"] == pytest.approx(0.25 * 0.2, rel=0.1)
    table.add_failure("B")
    assert table.noises()["B"] == LEAST_NOISE


def test_nothing_is_known_of_others(table):
    assert table.round_trip("A") is None
    assert table.age("A") == math.inf
    assert table.round_trips() == {}


def test_age_is_that_of_the_last_measurement(table, clock):
    table.add("A", 0.1)
    clock.now += 7
    assert table.age("A") == 7
    table.add("A", 0.1)
    assert table.age("A") == 0


def test_an_unreachable_peer_is_far_for_a_bounded_time_and_then_unknown(table, clock):
    table.add("A", 0.1)
    table.add_failure("A")
    clock.now += 29.9
    assert table.round_trip("A") == math.inf
    assert table.round_trips() == {"A": math.inf}
    assert table.age("A") == pytest.approx(29.9)
    clock.now += 0.1
    assert table.round_trip("A") is None
    assert table.round_trips() == {}
    assert table.age("A") == math.inf


def test_an_answer_after_a_failure_starts_anew(table):
    table.add("A", 5.0)
    table.add_failure("A")
    table.add("A", 0.1)
    assert table.round_trip("A") == 0.1


def test_keep_only(table):
    table.add("A", 0.1)
    table.add("B", 0.2)
    table.keep_only({"B", "C"})
    assert table.round_trips() == {"B": 0.2}


@pytest.mark.parametrize("round_trip", [-1.0, math.inf, math.nan])
def test_impossible_round_trips(table, round_trip):
    with pytest.raises(ValueError, match="impossible"):
        table.add("A", round_trip)


@pytest.mark.parametrize("wrong", [{"smoothing": 0.0}, {"smoothing": 1.1}, {"unreachable_time": -1.0}])
def test_impossible_settings(wrong):
    with pytest.raises(ValueError, match="must be"):
        PingTable(**wrong)
