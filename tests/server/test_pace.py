"""Prompts beside rows that decode: on a simulated device, nobody's tokens stall and the prompt is not starved."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.server.pace import MIN_CHUNK, BatchTimes, Pace
from swarm.server.scheduler import Kind, Waiting, next_batch

MAX_TOKENS = 1024
MAX_STALL = 3.0
PROMPT = "prompt"


@dataclass
class Device:
    """Seconds that a batch takes: fixed, for each token, and for each pair of a prompt's token and its context."""

    fixed: float = 0.030
    per_token: float = 0.002
    per_pair: float = 1e-6
    noise: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def seconds(self, num_decode: int, chunk: int, context: int) -> float:
        exact = self.fixed + self.per_token * (num_decode + chunk) + self.per_pair * chunk * (context + chunk / 2)
        return exact * self.random.uniform(1 - self.noise, 1 + self.noise)


@dataclass
class Run:
    stall: float  # the largest gap of any row while the prompt was there, relative to its median gap before
    first_token: float  # seconds from the prompt's arrival to its end


def simulate(
    device: Device, away: Sequence[float], prompt: int, max_stall: float = MAX_STALL, quiet: float = 3.0
) -> Run:
    """Rows that come back so many seconds after each result, and after `quiet` seconds a prompt of so many tokens.

    Events as in the engine: the free device takes what is ready, but waits up to 2 ms for who is almost there, and with
    a prompt for all together, as long as it has patience.
    """
    pace = Pace(max_stall)
    now, done, ended = 0.0, 0, None
    back = dict.fromkeys(range(len(away)), 0.0)
    last: dict[int, float] = {}
    before: dict[int, list[float]] = {row: [] for row in back}
    beside: dict[int, list[float]] = {row: [] for row in back}
    while ended is None:
        ready_at = min([*back.values(), *([max(now, quiet)] if now >= quiet or not back else [])], default=quiet)
        now = max(now, ready_at if now < quiet or not away else min(ready_at, max(now, quiet)))
        together = max(back.values(), default=now)
        if now >= quiet and together <= now + pace.patience():
            now = max(now, together)
        now = max([now, *(at for at in back.values() if now < at <= now + 0.002)])
        present = [row for row, at in back.items() if at <= now]
        for row in present:
            pace.arrived(row, True, back[row])
        left = prompt - done if now >= quiet else 0
        if not present and not left:
            continue
        waiting = [Waiting(1, Kind.DECODE)] * len(present) + ([Waiting(left, Kind.PREFILL)] if left else [])
        chunk = 0
        if left:
            budget = pace.bulk_tokens(present, MAX_TOKENS, now)
            chunk = next_batch(waiting, MAX_TOKENS, budget)[-1]
        started, now = now, now + device.seconds(len(present), chunk, done)
        done += chunk
        pace.finished([*present, *([PROMPT] if done == prompt else [])], chunk, bool(present), started, now)
        for row in present:
            if row in last and last[row] > 0.5:
                (before if now <= quiet else beside)[row].append(now - last[row])
            last[row], back[row] = now, now + away[row]
        if done == prompt:
            ended = now
    stalls = [max([*beside[row], ended - last[row]]) / statistics.median(before[row]) for row in back]
    return Run(max(stalls, default=0.0), ended - quiet)


QUICK = (0.001,) * 4  # clients that only echo
CLIENTS = (0.015, 0.020, 0.025, 0.030)  # with a head to compute
FAR = (0.080, 0.100, 0.150, 0.200)


@pytest.mark.parametrize("away", [QUICK, CLIENTS, FAR, QUICK[:1], QUICK * 4], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_nobody_stalls_and_the_prompt_is_soon_done(away: Sequence[float], noise: float) -> None:
    alone = simulate(Device(noise=noise), (), 2000)
    beside = simulate(Device(noise=noise), away, 2000)
    assert beside.stall <= MAX_STALL * (1 + noise)
    # Rows that are back at once leave 1 - 1 / (SAFETY * MAX_STALL) of the time to the prompt: 1.57 times, at best.
    assert beside.first_token <= 1.65 * alone.first_token


def test_without_a_limit_the_prompt_is_as_fast_as_alone_and_everybody_stalls() -> None:
    alone = simulate(Device(), (), 2000)
    beside = simulate(Device(), QUICK, 2000, max_stall=0)
    assert beside.stall > 20
    assert beside.first_token <= 1.05 * alone.first_token


@settings(max_examples=500)
@given(
    st.lists(st.floats(0, 0.3), min_size=1, max_size=6),
    st.integers(1, 3000),
    st.floats(0.005, 0.1),
    st.floats(0.0001, 0.003),
    st.sampled_from([2.0, 3.0, 5.0]),
)
def test_on_any_device_the_stall_is_kept_unless_chunks_cannot_be_smaller(
    away: list[float], prompt: int, fixed: float, per_token: float, max_stall: float
) -> None:
    device = Device(fixed, per_token, per_pair=0.0)
    run = simulate(device, away, prompt, max_stall)
    smallest = device.seconds(len(away), MIN_CHUNK * 9 // 8 + 1, 0)  # with the end of a prompt, see scheduler.py
    # A row that arrives in the middle of a smallest batch waits for that, and for one of its own.
    usual = device.seconds(1, 0, 0) + min(away)
    # The rest is for what is learnt only as it happens: the cost of a token, and how long rows are away. Often 1.3
    # would do; a search for the worst device found 1.93: one row is back at once, another away for two batches.
    assert run.stall <= 2.2 * max(max_stall, (max(away) + 2 * smallest) / usual)


def test_nobody_watches_so_the_whole_batch_is_the_prompts() -> None:
    assert Pace(MAX_STALL).bulk_tokens((), MAX_TOKENS, 0.0) == MAX_TOKENS


def decoding(pace: Pace, row: str, gap: float, number: int = 20) -> float:
    """A row that decodes alone, its tokens so many seconds apart, half of them away. Returns when its last one left."""
    for index in range(number):
        pace.arrived(row, True, index * gap - gap / 2)
        pace.finished([row], 0, True, index * gap - gap / 2, index * gap)
    return (number - 1) * gap


def learned(per_token: float = 0.002) -> Pace:
    pace = Pace(MAX_STALL)
    pace.finished([], 1000, False, -10.0, 1000 * per_token - 10.0)
    return pace


def test_a_row_that_went_away_is_waited_for_until_its_token_would_be_late() -> None:
    pace = learned()
    left_at = decoding(pace, "a", gap=0.1)
    assert pace.bulk_tokens((), MAX_TOKENS, left_at + 0.01) < 60
    assert pace.bulk_tokens((), MAX_TOKENS, left_at + 0.31) == MAX_TOKENS


def test_a_row_that_comes_back_from_a_pause_is_not_late_by_that() -> None:
    pace = learned()
    left_at = decoding(pace, "a", gap=0.1)
    pace.arrived("a", True, left_at + 60.0)
    assert 50 < pace.bulk_tokens({"a"}, MAX_TOKENS, left_at + 60.0) < 100


def test_a_row_that_waits_with_a_prompt_of_its_own_does_not_slow_it() -> None:
    pace = learned()
    left_at = decoding(pace, "a", gap=0.1)
    pace.arrived("a", False, left_at + 0.05)
    assert pace.bulk_tokens((), MAX_TOKENS, left_at + 0.05) == MAX_TOKENS


def test_the_slowest_gap_does_not_decide_for_a_quick_row() -> None:
    pace = learned()
    decoding(pace, "slow", gap=1.0)
    left_at = decoding(pace, "quick", gap=0.1)
    pace.forget(lambda row: row == "slow")
    assert pace.bulk_tokens((), MAX_TOKENS, left_at) < 60


def test_gaps_with_a_prompt_between_teach_nothing() -> None:
    pace = learned()
    left_at = decoding(pace, "a", gap=0.1)
    before = pace.bulk_tokens((), MAX_TOKENS, left_at)
    for index in range(1, 20):
        pace.arrived("a", True, left_at + index - 0.9)
        pace.finished(["a"], 50, True, left_at + index - 0.15, left_at + index)
    assert pace.bulk_tokens((), MAX_TOKENS, left_at + 19) == pytest.approx(before, abs=2)


def test_rows_that_are_gone_are_forgotten() -> None:
    pace = learned()
    left_at = decoding(pace, "a", gap=0.1)
    pace.forget(lambda row: True)
    assert pace.bulk_tokens((), MAX_TOKENS, left_at) == MAX_TOKENS
    assert not pace._rows


def test_one_small_chunk_is_not_enough_to_plan_a_large_one() -> None:
    times = BatchTimes()
    times.observe(0, True, 0.05)
    assert times.tokens_within(1.0) == 0
    times.observe(8, True, 0.0501)  # so it took next to nothing, it seems
    assert times.tokens_within(1.0) == 16


@given(st.lists(st.tuples(st.integers(0, 2000), st.booleans(), st.floats(0, 100)), max_size=40), st.floats(-10, 100))
def test_a_budget_is_always_usable(batches: list[tuple[int, bool, float]], passed: float) -> None:
    pace, now = Pace(MAX_STALL), 0.0
    for bulk_tokens, any_decode, seconds in batches:
        now += seconds
        pace.finished(["row"], bulk_tokens, any_decode, now - seconds, now)
    assert MIN_CHUNK <= pace.bulk_tokens({"row"}, MAX_TOKENS, now + passed) <= MAX_TOKENS
