import math

from hypothesis import given
from hypothesis import strategies as st

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.routing.cost import (
    HOP_TIME,
    IDLE_SHARE,
    RELAY_TIME,
    ROW_SHARE,
    SHORT_CACHE,
    cache_factor,
    company_time,
    entry_time,
    present_rows,
    span_time,
    step_time,
)


def info(**fields):
    defaults = {"throughput": 10.0, "cache_tokens_left": 1000, "numerics": "fp32", "state": ServerState.ONLINE}
    return ServerInfo(span=BlockSpan(start=0, end=10), **{**defaults, **fields})


def test_the_step_time_passes_through_the_announced_figures():
    measured = info(decode_times=(0.1, 0.16, 0.28))
    for rows, seconds in ((1, 0.1), (2, 0.12), (4, 0.16), (10, 0.22), (16, 0.28), (28, 0.40)):
        assert math.isclose(step_time(measured, rows), seconds)


def test_with_one_figure_each_further_row_costs_its_share():
    for one_figure in (info(throughput=10.0), info(throughput=99.0, decode_times=(0.1,))):
        assert step_time(one_figure, 1) == 0.1
        assert math.isclose(step_time(one_figure, 3), 0.1 * (1 + 2 * ROW_SHARE))


def test_decode_times_count_rather_than_the_throughput():
    assert span_time(info(throughput=1000.0, decode_times=(0.5,)), 10) == 0.5


@given(
    st.lists(st.floats(1e-6, 3600), min_size=0, max_size=3),
    st.floats(1, 200),
    st.floats(1, 200),
)
def test_more_rows_never_take_less_time(times, one, other):
    server = info(decode_times=tuple(times))
    fewer, more = sorted((one, other))
    assert step_time(server, fewer) <= step_time(server, more) * (1 + 1e-12)


def test_the_load_is_the_average_or_else_the_present_one():
    assert present_rows(info(running_rows=2, waiting_rows=3)) == 5
    assert present_rows(info(running_rows=2, waiting_rows=3, busy_rows=0.5)) == 0.5
    assert present_rows(info(busy_rows=0.5, session_rows=8)) == 8 * IDLE_SHARE


def test_a_busy_server_computes_longer_and_lets_wait_longer():
    idle, busy = (info(decode_times=(0.1, 0.16, 0.28), busy_rows=rows) for rows in (0.0, 3.0))
    assert span_time(idle, 5) == 0.05
    assert entry_time(idle) == HOP_TIME
    # half of the batch of three rows, then one of four, which go through the whole span
    assert math.isclose(entry_time(busy) + span_time(busy, 5), HOP_TIME + 0.14 / 2 + 0.16)
    half_busy = info(decode_times=(0.1,), busy_rows=0.5)
    shared = step_time(half_busy, 1.5)
    assert math.isclose(entry_time(half_busy), HOP_TIME + 0.5 * 0.1 / 2 + 0.5 * shared)
    assert math.isclose(span_time(half_busy, 5), 0.5 * shared / 2)


def test_few_blocks_of_a_busy_server_take_as_long_as_all():
    server = info(decode_times=(0.1, 0.16, 0.28), busy_rows=1.0)
    assert span_time(server, 1) == span_time(server, 10) == 0.0
    idle = info(decode_times=(0.1,))
    assert company_time(idle) == 0.0
    assert math.isclose(span_time(idle, 1) * 10, span_time(idle, 10))


def test_rows_that_are_about_to_come_count_like_those_that_are_there():
    idle, busy = (info(decode_times=(0.1, 0.16, 0.28), busy_rows=rows) for rows in (0.0, 3.0))
    assert entry_time(idle, extra_rows=3) == entry_time(busy)
    assert span_time(idle, 5, extra_rows=3) == span_time(busy, 5)


def test_a_relay_costs():
    assert math.isclose(entry_time(info(relayed=True)) - entry_time(info()), RELAY_TIME)


def test_a_cache_that_would_be_nearly_full_counts():
    assert cache_factor(info(cache_tokens_left=200), 100) == 1.0
    assert math.isclose(cache_factor(info(cache_tokens_left=150), 100), 1 + SHORT_CACHE / 2)
    assert math.isclose(cache_factor(info(cache_tokens_left=100), 100), 1 + SHORT_CACHE)
    assert cache_factor(info(cache_tokens_left=0), 0) == 1.0
