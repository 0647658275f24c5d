"""Steps that wait for pages of an overcommitted cache. Without overcommitment none ever does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from swarm.errors import CacheFull, SessionLost, SwarmError

from .eviction import EvictionLimits, Tenant, share_pages
from .kv_cache import KVCache, SessionCache
from .tasks import StepTask


class PageQueue:
    """Gives each step all its pages before it begins, so that none stops halfway. For the engine's thread alone,
    between batches: no row is held then."""

    def __init__(self, cache: KVCache, limits: EvictionLimits, clock: Callable[[], float] = time.monotonic):
        """clock: seconds, the one of `StepTask.created`."""
        self._cache = cache
        self._limits = limits
        self._clock = clock
        self._entering: list[StepTask] = []  # the last sessions that came in together
        self._replay_cost = 0.0  # device seconds per token of theirs
        self._next_turn = 0.0

    def provide(self, tasks: Sequence[StepTask]) -> tuple[list[StepTask], list[tuple[StepTask, SwarmError]]]:
        """The steps that have all their pages, and those that fail, each with its error. The rest must wait.

        tasks: all steps that are not finished, oldest first. `waits_for_pages` is set on each.
        """
        if self._cache.overcommit == 1.0:
            return list(tasks), []
        failed: list[tuple[StepTask, SwarmError]] = []
        by_session: dict[SessionCache, StepTask] = {}
        wanted: dict[SessionCache, int] = {}
        for task in tasks:
            session = task.rows[0].cache.session
            try:
                wanted[session] = self._pages_wanted(session, task)
            except SwarmError as error:
                failed.append((task, error))
            else:
                by_session[session] = task
                session.generating |= bool(session.num_pages) and any(row.num_tokens == 1 for row in task.rows)
        if any(wanted.values()):
            failed += self._share(by_session, wanted)
        ready = []
        for session, task in by_session.items():
            task.waits_for_pages = bool(wanted[session])
            if not task.waits_for_pages:
                ready.append(task)
        return ready, failed

    def _pages_wanted(self, session: SessionCache, task: StepTask) -> int:
        """Raises what the step gets instead, if it cannot run at all."""
        if session.evicted:
            raise _evicted()
        spare = self._spare(session)
        return sum(
            self._cache.pages_missing(row.cache, row.position + row.num_tokens, spare=spare) for row in task.rows
        )

    def _spare(self, session: SessionCache) -> int:
        """Tokens of room beyond its step for each row of a session that comes in, lest it replays in vain."""
        return 0 if session.num_pages else self._cache.page_size // 2

    def _share(
        self, tasks: dict[SessionCache, StepTask], wanted: dict[SessionCache, int]
    ) -> list[tuple[StepTask, SwarmError]]:
        """Ask the policy and act on it. Sets `wanted` to 0 where pages were taken; returns the steps that failed."""
        now = self._clock()
        self._measure_replays()
        free = self._cache.free_pages  # before the rest: pages that a session gives back meanwhile must not count twice
        sessions = self._cache.sessions()
        for session, task in tasks.items():
            if wanted[session] and session.waiting_since is None:
                session.waiting_since = task.created
        tenants = [
            Tenant(
                held=session.num_pages,
                wanted=wanted.get(session, 0),
                waited=0.0 if session.waiting_since is None else now - session.waiting_since,
                step_waited=now - tasks[session].created if session in tasks else 0.0,
                idle=0.0 if session in tasks else now - session.last_used,
                resident=now - session.entered,
                generating=session.generating,
                in_step=session in tasks and any(tasks[session].progress),
            )
            for session in sessions
        ]
        decision = share_pages(free, tenants, self._limits, may_end_turn=now >= self._next_turn)
        if decision.turn_over:
            tokens = sum(row.length for index in decision.turn_over for row in sessions[index].rows)
            self._next_turn = now + tokens * self._replay_cost / self._limits.replay_share
        newcomers = [tasks[sessions[index]] for index in decision.granted if not tenants[index].held]
        self._entering = newcomers or self._entering
        failed: list[tuple[StepTask, SwarmError]] = []
        for index in decision.evicted:
            self._cache.evict(sessions[index])
            if sessions[index] in tasks:
                failed.append((tasks.pop(sessions[index]), _evicted()))
        for index in decision.granted:
            self._take(sessions[index], tasks[sessions[index]], now)
            wanted[sessions[index]] = 0
        for index in decision.refused:
            task = tasks.pop(sessions[index])
            text = f"no cache became free within {self._limits.page_wait_limit:g} s; go on elsewhere, or later"
            failed.append((task, CacheFull(text, self._cache.tokens_left)))
        return failed

    def _measure_replays(self) -> None:
        """What it costs to bring sessions in, by those who just came. Prompts and replays are alike."""
        if self._entering and all(task.done for task in self._entering):
            tokens = sum(len(task.hidden) for task in self._entering)
            self._replay_cost = max(task.compute_time for task in self._entering) / tokens
            self._entering = []

    def _take(self, session: SessionCache, task: StepTask, now: float) -> None:
        spare = self._spare(session)
        session.waiting_since = None
        if not session.num_pages:
            session.entered = session.last_used = now
            session.generating = False
        for row in task.rows:
            # A session that ended meanwhile takes nothing; the engine finds out when it makes room.
            self._cache.grow(row.cache, min(row.position + row.num_tokens + spare, row.cache.max_length))


def _evicted() -> SessionLost:
    return SessionLost("the session was evicted: others needed its cache; it can be replayed")
