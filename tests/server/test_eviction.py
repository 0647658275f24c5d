"""Who is evicted for whom: the rules one by one, what holds in every situation, and that nobody starves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.server.eviction import Decision, EvictionLimits, Tenant, share_pages

LIMITS = EvictionLimits(idle_protection=2.0, turn_time=10.0, page_wait_limit=30.0)


def test_free_pages_go_to_those_who_wait_in_the_order_of_the_line() -> None:
    newest, oldest = Tenant(held=0, wanted=2, waited=1.0), Tenant(held=0, wanted=2, waited=3.0)
    young, senior = Tenant(held=1, wanted=1, resident=4.0), Tenant(held=1, wanted=1, resident=5.0)
    assert share_pages(6, [newest, oldest, young, senior], LIMITS) == Decision(granted=(3, 2, 1, 0))
    assert share_pages(5, [newest, oldest, young, senior], LIMITS) == Decision(granted=(3, 2, 1))


def test_nobody_overtakes() -> None:
    large, small = Tenant(held=0, wanted=5, waited=2.0), Tenant(held=0, wanted=1, waited=1.0)
    assert share_pages(4, [large, small], LIMITS) == Decision()


def test_the_longest_idle_is_evicted_first() -> None:
    tenants = [Tenant(held=2, idle=3.0), Tenant(held=2, idle=9.0), Tenant(held=0, wanted=2), Tenant(held=2, idle=5.0)]
    assert share_pages(0, tenants, LIMITS) == Decision(granted=(2,), evicted=(1,))
    tenants[2] = replace(tenants[2], wanted=3)
    assert share_pages(0, tenants, LIMITS) == Decision(granted=(2,), evicted=(1, 3))


def test_who_stepped_recently_is_protected() -> None:
    tenants = [Tenant(held=2, idle=1.9, resident=9.0), Tenant(held=0, wanted=2)]
    assert share_pages(0, tenants, LIMITS) == Decision()


def test_nobody_is_evicted_in_vain() -> None:
    tenants = [Tenant(held=2, idle=100.0), Tenant(held=0, wanted=3)]
    assert share_pages(0, tenants, LIMITS) == Decision()


def test_of_two_that_wait_for_each_other_the_later_one_yields() -> None:
    senior, junior = Tenant(held=3, wanted=1, resident=5.0), Tenant(held=2, wanted=1, resident=4.0)
    running = Tenant(held=2, resident=1.0)
    assert share_pages(0, [junior, senior, running], LIMITS) == Decision(granted=(1,), evicted=(0,))


def test_one_that_replays_does_not_yield_halfway() -> None:
    tenants = [Tenant(held=3, wanted=1, resident=5.0), Tenant(held=2, wanted=1, resident=4.0, generating=False)]
    assert share_pages(0, tenants, LIMITS) == Decision()


def test_after_a_turn_the_longest_resident_makes_room() -> None:
    residents = [Tenant(held=2, resident=12.0), Tenant(held=2, resident=30.0), Tenant(held=9, resident=9.0)]
    waiting = Tenant(held=0, wanted=2, waited=10.0)
    assert share_pages(0, [*residents, waiting], LIMITS) == Decision(granted=(3,), evicted=(1,), turn_over=(1,))
    assert share_pages(0, [*residents, waiting], LIMITS, may_end_turn=False) == Decision()
    both = share_pages(0, [*residents, waiting, replace(waiting, waited=11.0)], LIMITS)
    assert both == Decision(granted=(4,), evicted=(1,), turn_over=(1,))  # the other's turn comes next
    assert share_pages(0, [*residents, replace(waiting, waited=9.9)], LIMITS) == Decision()
    assert share_pages(0, [*residents, replace(waiting, wanted=5)], LIMITS) == Decision()


def test_a_step_that_is_half_done_is_not_wasted() -> None:
    """Else two long prompts could evict each other for ever."""
    reading = Tenant(held=4, resident=60.0, generating=False, in_step=True)
    waiting = Tenant(held=0, wanted=2, waited=60.0)
    assert share_pages(0, [reading, waiting], LIMITS).evicted == ()
    assert share_pages(0, [replace(reading, in_step=False), waiting], LIMITS).evicted == (0,)


def test_who_waited_too_long_is_refused() -> None:
    waiting = [Tenant(held=0, wanted=2, waited=40.0, step_waited=seconds) for seconds in (30.0, 29.0)]
    assert share_pages(0, [Tenant(held=4, resident=1.0), *waiting], LIMITS) == Decision(refused=(1,))


seconds = st.floats(0.0, 60.0)
tenants = st.builds(
    Tenant,
    held=st.integers(0, 8),
    wanted=st.integers(0, 8),
    waited=seconds,
    step_waited=seconds,
    idle=seconds,
    resident=seconds,
    generating=st.booleans(),
)


@given(free=st.integers(0, 16), tenants=st.lists(tenants, max_size=12))
def test_every_decision_keeps_the_rules(free: int, tenants: list[Tenant]) -> None:
    decision = share_pages(free, tenants, LIMITS)
    granted, evicted, refused = map(set, (decision.granted, decision.evicted, decision.refused))
    assert len(granted) + len(evicted) + len(refused) == sum(
        map(len, (decision.granted, decision.evicted, decision.refused))
    )
    assert not (granted & evicted or granted & refused or evicted & refused)
    assert sum(tenants[i].wanted for i in granted) <= free + sum(tenants[i].held for i in evicted)
    assert all(tenants[i].wanted for i in granted | refused)
    assert all(tenants[i].step_waited >= LIMITS.page_wait_limit for i in refused)
    if sum(tenant.wanted for tenant in tenants) <= free:
        assert not evicted
    if evicted:
        assert granted
    for victim in (tenants[i] for i in evicted):
        assert victim.held
        idle = not victim.wanted and victim.idle > LIMITS.idle_protection
        yields = victim.wanted and victim.generating and any(tenants[i].held for i in granted)
        turn_over = victim.resident >= LIMITS.turn_time and any(tenants[i].waited >= LIMITS.turn_time for i in granted)
        assert idle or yields or turn_over


class Session:
    """One that generates `size` pages of tokens, a page in a second, and replays all after an eviction."""

    def __init__(self, size: int):
        self.size = size  # pages in the end
        self.done = 0  # pages generated
        self.held = 0
        self.since = 0  # of its waiting or residence
        self.replays = 0

    @property
    def wanted(self) -> int:
        return min(self.done + 1 + (self.held == 0), self.size) - self.held if self.held <= self.done else 0


@settings(max_examples=100, deadline=None)
@given(num_pages=st.integers(4, 40), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=24))
def test_whatever_is_admitted_finishes_and_few_replays_are_needed(num_pages: int, sizes: list[int]) -> None:
    """All are active all the time. A step fills a page and takes a second."""
    limits = EvictionLimits(idle_protection=2.0, turn_time=5.0, page_wait_limit=1e9)
    sessions = [Session(size) for size in sizes]
    alive, waiting_since, entered = list(sessions), {s: 0 for s in sessions}, {s: 0 for s in sessions}
    longest_wait = 0
    for now in range(10_000):
        if not alive:
            break
        free = num_pages - sum(session.held for session in alive)
        decision = share_pages(
            free,
            [
                Tenant(
                    held=session.held,
                    wanted=session.wanted,
                    waited=float(now - waiting_since[session]),
                    resident=float(now - entered[session]),
                )
                for session in alive
            ],
            limits,
        )
        for index in decision.evicted:
            alive[index].held = 0
            alive[index].replays += 1
            waiting_since[alive[index]] = now
        for index in decision.granted:
            session = alive[index]
            if session.held == 0:
                entered[session] = now
            session.held += session.wanted
            longest_wait = max(longest_wait, now - waiting_since[session])
        for session in alive:
            if session.held > session.done:
                session.done += 1
                waiting_since[session] = now + 1
        alive = [session for session in alive if session.done < session.size]
    assert not alive
    assert longest_wait <= limits.turn_time * (2 + sum(sizes) / num_pages)
    assert sum(session.replays for session in sessions) <= sum(sizes)


@pytest.mark.parametrize("wanted", [1, 4])
def test_a_session_of_the_whole_cache_gets_it_in_the_end(wanted: int) -> None:
    tenants = [Tenant(held=1, resident=20.0) for _ in range(4)] + [Tenant(held=0, wanted=wanted, waited=10.0)]
    decision = share_pages(0, tenants, LIMITS)
    assert decision.granted == (4,)
    assert len(decision.evicted) == wanted
