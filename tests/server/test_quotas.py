"""What one peer may take of a server: never more than its limits, in order, and nothing is left of who is gone.

Most of it runs in virtual time: a loop whose clock jumps to the next timer, so that minutes pass in milliseconds, and
waiting for what never comes is an error.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import QuotaExceeded, from_wire, to_wire
from swarm.server.config import ServerConfig
from swarm.server.quotas import Hold, PeerQuotas, QuotaLimits

T = TypeVar("T")
#: Seconds; what a request may come later than its bucket allows, as timers are no finer.
TIMER = 1e-3


class _Selector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everybody waits for what will never come")
        self.now += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Selector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def in_virtual_time(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def make_quotas(limits: QuotaLimits) -> PeerQuotas:
    return PeerQuotas(limits, asyncio.get_running_loop().time)


@dataclass
class Arrival:
    """at: when it asks. size: bytes. keep: seconds that it holds them. patience: seconds until it is cancelled."""

    peer: str
    at: float
    size: int
    keep: float
    patience: float | None


MAX_BYTES = 100
TIMES = st.integers(0, 40).map(lambda eighths: eighths / 8)  # exact, and often equal
ARRIVALS = st.lists(
    st.builds(
        Arrival,
        peer=st.sampled_from("AB"),
        at=TIMES,
        size=st.integers(0, 130),
        keep=TIMES,
        patience=st.none() | TIMES,
    ),
    max_size=25,
).map(lambda arrivals: sorted(arrivals, key=lambda arrival: arrival.at))


async def play(arrivals: list[Arrival], take: Callable[[Arrival], Awaitable[Any]]) -> list[Arrival]:
    """Calls `take` for each at its time, and stops it when its patience ends; the others must get to their end.

    Returns the order in which they came: of equal times, the loop decides.
    """
    order: list[Arrival] = []

    async def one(arrival: Arrival) -> None:
        await asyncio.sleep(arrival.at)
        order.append(arrival)
        try:
            async with asyncio.timeout(arrival.patience):
                await take(arrival)
        except TimeoutError:
            assert arrival.patience is not None

    await asyncio.gather(*(one(arrival) for arrival in arrivals))
    return order


def assert_in_order(some: list[Arrival], order: list[Arrival]) -> None:
    """Of each peer; peers do not wait for each other."""
    for peer in "AB":
        places = [place for one in some if one.peer == peer for place, other in enumerate(order) if one is other]
        assert places == sorted(places)


@given(arrivals=ARRIVALS)
@settings(max_examples=300, deadline=None)
def test_bytes_in_flight_stay_within_the_limit_and_all_get_through_in_order(arrivals: list[Arrival]) -> None:
    held: dict[str, list[int]] = {"A": [], "B": []}
    begun: list[Arrival] = []

    async def main() -> None:
        quotas = make_quotas(QuotaLimits(max_bytes_in_flight=MAX_BYTES))

        async def take(arrival: Arrival) -> None:
            with await quotas.bytes(arrival.peer, arrival.size):
                begun.append(arrival)
                sizes = held[arrival.peer]
                sizes.append(arrival.size)
                try:
                    assert sum(sizes) <= MAX_BYTES or sum(sizes) == max(sizes)  # a larger one is alone
                    await asyncio.sleep(arrival.keep)
                finally:
                    sizes.remove(arrival.size)

        assert_in_order(begun, await play(arrivals, take))
        assert not quotas._peers

    in_virtual_time(main)


def test_bytes_are_waited_for_no_longer_than_it_takes_to_free_them() -> None:
    async def main() -> list[tuple[str, float]]:
        quotas = make_quotas(QuotaLimits(max_bytes_in_flight=10))
        begun: list[tuple[str, float]] = []

        async def take(name: str, size: int, keep: float) -> None:
            with await quotas.bytes("peer", size):
                begun.append((name, asyncio.get_running_loop().time()))
                await asyncio.sleep(keep)

        await asyncio.gather(
            take("first", 6, 2.0), take("beside", 4, 1.0), take("more than the limit", 11, 1.0), take("behind", 1, 0.0)
        )
        with await quotas.bytes("other", 10):  # somebody else's bytes are no matter
            await take("after", 10, 0.0)
        return begun

    assert in_virtual_time(main) == [
        ("first", 0.0),
        ("beside", 0.0),
        ("more than the limit", 2.0),  # alone
        ("behind", 3.0),  # though it would have fitted before
        ("after", 3.0),
    ]


async def test_a_cancelled_head_of_the_line_lets_the_next_pass() -> None:
    quotas = PeerQuotas(QuotaLimits(max_bytes_in_flight=10))
    first = await quotas.bytes("peer", 9)
    large, small = (asyncio.create_task(quotas.bytes("peer", size)) for size in (10, 1))
    await asyncio.sleep(0)
    assert not small.done()
    large.cancel()
    second = await asyncio.wait_for(small, 10)  # nobody released anything
    first.release()
    second.release()
    assert not quotas._peers


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_who_is_cancelled_in_the_moment_that_room_comes_leaves_it_to_the_next(cancel_first: bool) -> None:
    quotas = PeerQuotas(QuotaLimits(max_bytes_in_flight=10))
    hold = await quotas.bytes("peer", 10)
    head, following = (asyncio.create_task(quotas.bytes("peer", 10)) for _ in range(2))
    await asyncio.sleep(0)
    for act in (head.cancel, hold.release) if cancel_first else (hold.release, head.cancel):
        act()
    (await asyncio.wait_for(following, 10)).release()
    assert head.cancelled() and not quotas._peers


LIMITS = st.builds(
    QuotaLimits, requests_per_second=st.sampled_from([0.5, 4.0, 30.0, 1000.0]), request_burst=st.integers(1, 12)
)


@given(arrivals=ARRIVALS, limits=LIMITS)
@settings(max_examples=300, deadline=None)
def test_requests_of_any_window_are_bounded_and_none_waits_longer_than_that_needs(
    arrivals: list[Arrival], limits: QuotaLimits
) -> None:
    allowed: list[tuple[Arrival, float]] = []
    rate, burst = limits.requests_per_second, limits.request_burst

    async def main() -> None:
        quotas = make_quotas(limits)

        async def take(arrival: Arrival) -> None:
            await quotas.request(arrival.peer)
            allowed.append((arrival, asyncio.get_running_loop().time()))

        assert_in_order([arrival for arrival, _ in allowed], await play(arrivals, take))
        await asyncio.sleep(burst / rate + TIMER)
        assert len(quotas) == 0 and not quotas._peers and not quotas._resting

    in_virtual_time(main)
    for peer in "AB":
        mine = [(arrival, moment) for arrival, moment in allowed if arrival.peer == peer]
        times = [moment for _, moment in mine]
        for first, start in enumerate(times):
            for last in range(first, len(times)):
                assert last - first + 1 <= burst + rate * (times[last] - start) + 1e-6
        for index, (arrival, moment) in enumerate(mine):
            # It came at once, or right behind another, or when a token came: some window that ends here is full.
            behind = index > 0 and moment - times[index - 1] <= TIMER
            full = any(
                index - first + 1 >= burst + rate * (moment - TIMER - start) - 1e-6
                for first, start in enumerate(times[: index + 1])
            )
            assert moment == arrival.at or behind or full


def test_a_cancelled_request_takes_no_token() -> None:
    async def main() -> float:
        quotas = make_quotas(QuotaLimits(requests_per_second=1.0, request_burst=1))
        await quotas.request("peer")
        waiting = [asyncio.create_task(quotas.request("peer")) for _ in range(50)]
        await asyncio.sleep(0.5)
        for task in waiting[:-1]:
            task.cancel()
        await waiting[-1]
        return asyncio.get_running_loop().time()

    assert in_virtual_time(main) == pytest.approx(1.0, abs=TIMER)


def test_a_newcomer_takes_no_token_that_another_waits_for() -> None:
    async def main() -> None:
        now = 0.0
        quotas = PeerQuotas(QuotaLimits(requests_per_second=1.0, request_burst=1), lambda: now)
        await quotas.request("peer")
        early = asyncio.create_task(quotas.request("peer"))
        await asyncio.sleep(0)
        now = 1.0  # its token is there, but its timer did not run yet
        late = asyncio.create_task(quotas.request("peer"))
        await early
        assert not late.done()
        now = 2.0
        await late

    in_virtual_time(main)


def test_the_rate_is_reached() -> None:
    """Also where tokens come faster than timers are."""
    limits = QuotaLimits(requests_per_second=5_000.0, request_burst=100)

    async def main() -> float:
        quotas = make_quotas(limits)
        for _ in range(10_100):
            await quotas.request("peer")
        return asyncio.get_running_loop().time()

    assert in_virtual_time(main) == pytest.approx(2.0, abs=2 * TIMER)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_the_rate_is_bounded_by_real_clocks(run: Callable[[Coroutine[Any, Any, float]], float]) -> None:
    async def main() -> float:
        quotas = PeerQuotas(QuotaLimits(requests_per_second=1_000.0, request_burst=10))
        started = time.monotonic()
        await asyncio.gather(*(quotas.request("peer") for _ in range(110)))
        return time.monotonic() - started

    assert run(main()) >= 0.1 - 1e-6


CHANGES = st.lists(st.tuples(st.sampled_from("ABC"), st.booleans(), st.integers(0, 10)), max_size=60)


@pytest.mark.parametrize("kind", ["session", "stream"])
@given(changes=CHANGES)
@settings(max_examples=100, deadline=None)
def test_sessions_and_streams_are_refused_beyond_the_limit_and_only_then(
    kind: str, changes: list[tuple[str, bool, int]]
) -> None:
    other_kind = {"session": "max_streams", "stream": "max_sessions"}[kind]
    quotas = PeerQuotas(QuotaLimits(**{f"max_{kind}s": 3, other_kind: 1}))
    open_one: Callable[[str], Hold] = getattr(quotas, kind)
    held: dict[str, list[Hold]] = {"A": [], "B": [], "C": []}
    for peer, opens, index in changes:
        mine = held[peer]
        if not opens and mine:
            hold = mine.pop(index % len(mine))
            hold.release()
            hold.release()  # does no harm
        elif opens and len(mine) == 3:
            with pytest.raises(QuotaExceeded, match=f"3 {kind}s open.*close some, or go on elsewhere"):
                open_one(peer)
        elif opens:
            mine.append(open_one(peer))
    assert len(quotas) == sum(bool(mine) for mine in held.values())


def test_nothing_is_kept_of_a_hundred_thousand_strangers() -> None:
    """Ten at a time, each of whom makes a request; and one in a hundred goes while it waits."""
    limits = QuotaLimits(max_bytes_in_flight=10, requests_per_second=100.0, request_burst=100)

    async def main() -> int:
        quotas = make_quotas(limits)
        present: deque[tuple[Hold, ...]] = deque()
        remembered = 0
        for number in range(100_000):
            peer = f"stranger {number}"
            await quotas.request(peer)
            present.append((quotas.stream(peer), quotas.session(peer), await quotas.bytes(peer, 10)))
            if number % 100 == 0:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.001):
                        await quotas.bytes(peer, 1)
            if number % 10 == 0:
                await asyncio.sleep(0.001)
            if len(present) > 10:
                for hold in present.popleft():
                    hold.release()
            remembered = max(remembered, len(quotas._peers) + len(quotas._resting))
        for holds in present:
            for hold in holds:
                hold.release()
        await asyncio.sleep(0.01)
        assert len(quotas) == 0 and not quotas._resting
        return remembered

    assert in_virtual_time(main) <= 300  # a bucket is full again 10 ms after its one request


def test_a_peer_does_not_get_a_fresh_bucket_by_leaving() -> None:
    async def main() -> float:
        quotas = make_quotas(QuotaLimits(requests_per_second=1.0, request_burst=2))
        for _ in range(4):
            with quotas.stream("peer"):
                await quotas.request("peer")
        return asyncio.get_running_loop().time()

    assert in_virtual_time(main) == pytest.approx(2.0, abs=TIMER)


def test_the_error_crosses_the_network() -> None:
    error = from_wire(*to_wire(QuotaExceeded("enough")))
    assert type(error) is QuotaExceeded and str(error) == "enough"


def test_settings_of_a_server_become_limits() -> None:
    assert ServerConfig(model="m").quota_limits == QuotaLimits()
    config = ServerConfig(
        model="m",
        max_sessions_per_peer=1,
        max_streams_per_peer=2,
        max_kept_bytes_per_peer="4MiB",  # type: ignore[arg-type]  # parsed there
        max_bytes_in_flight_per_peer="3MiB",  # type: ignore[arg-type]  # parsed there
        requests_per_second_per_peer=4.5,
        request_burst_per_peer=5,
    )
    assert config.quota_limits == QuotaLimits(1, 2, 3 * 2**20, 4 * 2**20, 4.5, 5)
