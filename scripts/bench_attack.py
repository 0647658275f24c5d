"""A server that a session uses is killed at a random moment, and what that does to the session's tokens."""

from __future__ import annotations

import math
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from swarm.client.inference_session import InferenceSession

    from .local_swarm import LocalSwarm, ServerProcess

#: Seconds for a session to open its chain, so that there is a server to hit.
CHAIN_TIMEOUT = 60.0


class Way(StrEnum):
    """SIGKILL: a power cut; connections break. SIGSTOP: a machine that hangs; connections stand."""

    KILL = "SIGKILL"
    STOP = "SIGSTOP"


class Attack:
    """One blow against a server that a session uses.

    at: when it fell, by `time.perf_counter`. hop: on which server of the chain, from 0; None before.
    """

    def __init__(self, swarm: LocalSwarm, session: InferenceSession, way: Way, rng: random.Random):
        self.at = math.inf
        self.hop: int | None = None
        self._swarm, self._session, self._way, self._random = swarm, session, way, rng
        self._victim: ServerProcess | None = None
        self._thread: threading.Thread | None = None

    def start(self, within: float) -> None:
        """At a random moment in so many seconds from now, as soon as the session has a chain."""
        self._thread = threading.Thread(target=self._strike, args=(self._random.uniform(0, within),), daemon=True)
        self._thread.start()

    def end(self) -> ServerProcess | None:
        """Whom it hit."""
        if self._thread is not None:
            self._thread.join()
        return self._victim

    def _strike(self, delay: float) -> None:
        time.sleep(delay)
        deadline = time.monotonic() + CHAIN_TIMEOUT
        while not self._session.chain:
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)
        chain = self._session.chain
        hop = self._random.randrange(len(chain))
        victim = self._swarm.by_peer_id(chain[hop].peer_id)
        os.kill(victim.pid, signal.SIGKILL if self._way is Way.KILL else signal.SIGSTOP)
        self.at, self.hop, self._victim = time.perf_counter(), hop, victim


class Stamps:
    """A streamer: when each token comes."""

    def __init__(self, calm_tokens: int, when_calm: Callable[[], None]):
        """when_calm: called after so many tokens before which nothing happens."""
        self._stamps: list[float] = []
        self._calm_tokens, self._when_calm = calm_tokens, when_calm

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with each new token."""
        self._stamps.append(time.perf_counter())
        if len(self._stamps) == 1 + self._calm_tokens:
            self._when_calm()

    def end(self) -> None:
        pass

    @property
    def usual_gap(self) -> float:
        """Seconds between two tokens, the median so far."""
        return statistics.median(later - earlier for earlier, later in pairwise(self._stamps[1:]))

    def longest_delay(self, since: float, usual_first: float) -> float:
        """Of the tokens that came after `since`: by how many seconds the slowest was slower than usual."""
        delays = [self._stamps[1] - self._stamps[0] - usual_first] if self._stamps[1] > since else []
        usual = self.usual_gap
        delays += [later - earlier - usual for earlier, later in pairwise(self._stamps[1:]) if later > since]
        return max(delays, default=0.0)
