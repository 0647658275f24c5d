"""How often and how long a step is tried again."""

from __future__ import annotations

import asyncio
import time
from typing import NoReturn

from swarm.errors import CacheFull, MessageTooLarge, MissingBlocks, QuotaExceeded, RoutingError, SwarmError

from .config import ClientConfig


class Retries:
    """How often and how long one step may be tried again.

    Its time runs from the first failure on: a server that hangs takes all of `request_timeout` to fail.
    """

    def __init__(self, config: ClientConfig):
        self._config = config
        self._started: float | None = None
        self._failures = 0
        self._delay = config.retry_delay

    async def after(self, error: SwarmError, *, wait: bool) -> None:
        """Count a failure; sleep before the next try if `wait`. Raises an error like `error` when tries are used up."""
        self._failures += 1
        delay = self._delay if wait else 0.0
        if self._failures > self._config.max_retries or self._elapsed() + delay > self._config.retry_time:
            self._give_up(error)
        if wait:
            self._delay = min(2 * self._delay, self._config.max_retry_delay)
            await asyncio.sleep(delay)

    def uncounted(self, error: SwarmError) -> None:
        """Before another try at once. It costs only time: raises like `after` when that is used up."""
        if self._elapsed() > self._config.retry_time:
            self._give_up(error)

    def _elapsed(self) -> float:
        now = time.monotonic()
        if self._started is None:
            self._started = now
        return now - self._started

    def _give_up(self, error: SwarmError) -> NoReturn:
        text = f"{error} (gave up after {self._elapsed():.1f} s and {self._failures} attempts)"
        if isinstance(error, MissingBlocks):
            raise MissingBlocks(text, error.blocks) from error
        if isinstance(error, CacheFull):
            raise CacheFull(text, error.tokens_left) from error
        keeps_type = isinstance(error, RoutingError | QuotaExceeded | MessageTooLarge)
        raise (type(error) if keeps_type else RoutingError)(text) from error
