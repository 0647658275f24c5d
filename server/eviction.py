"""Who gets the next pages of an overcommitted cache, and who hands theirs back. A pure decision between two batches.

An evicted session is not lost: its client replays it. That costs a prefill, so sessions take turns instead of snatching
single pages from each other, and the others wait in a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EvictionLimits:
    """In seconds, but for the share; see `ServerConfig` for what they mean to an operator."""

    idle_protection: float = 2.0
    turn_time: float = 10.0
    replay_share: float = 0.25
    page_wait_limit: float = 45.0


@dataclass(frozen=True)
class Tenant:
    """One session between two batches. Times in seconds.

    held: its pages. wanted: pages that its waiting step lacks; 0 if it lacks none, or no step waits.
    waited: since it began to wait for pages. step_waited: since this step came, which may be the second that asks for
    them after one that was refused. idle: since its last step ended; 0 while one waits.
    resident: since it took its first page. generating: it went beyond its prompt or replay since then.
    in_step: part of its present step is done, and would be done in vain if it were evicted now.
    """

    held: int
    wanted: int = 0
    waited: float = 0.0
    step_waited: float = 0.0
    idle: float = 0.0
    resident: float = 0.0
    generating: bool = True
    in_step: bool = False


@dataclass(frozen=True)
class Decision:
    """Indices of tenants: whose step gets its pages now, who is evicted for that, and whose step waited too long.

    turn_over: those of the evicted whose turn was over.
    """

    granted: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    turn_over: tuple[int, ...] = ()


def share_pages(free: int, tenants: Sequence[Tenant], limits: EvictionLimits, *, may_end_turn: bool = True) -> Decision:
    """Decide on all steps that lack pages. `free`: pages that nobody holds.

    The line: sessions that hold pages and want more, longest resident first, then those that want to come in, longest
    waiting first. Nobody overtakes, and nobody is evicted unless the one who needs it gets all it wants. Evicted are

    - sessions idle for longer than `idle_protection`, longest idle first;
    - in favour of a resident: others that wait for pages themselves, last come first. Two that wait for each other's
      pages are of no use to anybody;
    - for one that has waited for `turn_time`: sessions that have been resident for as long, longest first (round
      robin). One in a decision, and none unless `may_end_turn`.
    """
    residents = sorted((i for i, t in enumerate(tenants) if t.wanted and t.held), key=lambda i: -tenants[i].resident)
    newcomers = sorted((i for i, t in enumerate(tenants) if t.wanted and not t.held), key=lambda i: -tenants[i].waited)
    granted: list[int] = []
    evicted: list[int] = []
    turn_over: list[int] = []
    for index in (*residents, *newcomers):
        if index in evicted:
            continue
        candidates = list(_of_little_use(index, residents, tenants, limits))
        ending = _turn_over(index, tenants, limits) if may_end_turn and not turn_over else []
        victims: list[int] = []
        lacking = tenants[index].wanted - free
        for victim in (*candidates, *ending):
            if lacking <= 0:
                break
            if victim not in granted and victim not in evicted and victim not in victims:
                victims.append(victim)
                lacking -= tenants[victim].held
        if lacking > 0:
            break
        evicted += victims
        turn_over += [victim for victim in victims if victim not in candidates]
        free += sum(tenants[victim].held for victim in victims) - tenants[index].wanted
        granted.append(index)
    settled = {*granted, *evicted}
    refused = [
        index
        for index in (*residents, *newcomers)
        if index not in settled and tenants[index].step_waited >= limits.page_wait_limit
    ]
    return Decision(tuple(granted), tuple(evicted), tuple(refused), tuple(turn_over))


def _of_little_use(
    index: int, residents: Sequence[int], tenants: Sequence[Tenant], limits: EvictionLimits
) -> Iterator[int]:
    """Whom to evict first for the step of tenant `index`: idle sessions, then later ones that wait themselves."""
    idle = [i for i, t in enumerate(tenants) if t.held and not t.wanted and t.idle > limits.idle_protection]
    yield from sorted(idle, key=lambda i: -tenants[i].idle)
    if index in residents:
        juniors = residents[residents.index(index) + 1 :]
        yield from (i for i in reversed(juniors) if tenants[i].generating)


def _turn_over(index: int, tenants: Sequence[Tenant], limits: EvictionLimits) -> list[int]:
    """Whom to evict after that, longest resident first."""
    if tenants[index].waited < limits.turn_time:
        return []
    over = [
        i for i, t in enumerate(tenants) if t.held and i != index and t.resident >= limits.turn_time and not t.in_step
    ]
    return sorted(over, key=lambda i: -tenants[i].resident)
