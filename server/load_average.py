"""How busy a server is, on average over the last seconds: what a moment shows is mostly chance."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from .engine import Load

#: Seconds between two looks, and over which looks are averaged.
PERIOD = 0.25
WINDOW = 2.0


class LoadAverage:
    """Running and waiting rows together, exponentially smoothed."""

    def __init__(self, load: Callable[[], Load]):
        self._load = load
        self.rows = 0.0

    def look(self, elapsed: float) -> None:
        """Take the present load into account; the last look was `elapsed` seconds ago."""
        load = self._load()
        weight = 1 - math.exp(-elapsed / WINDOW)
        self.rows += weight * (load.running_rows + load.waiting_rows - self.rows)

    async def keep_looking(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        before = loop.time()
        while True:
            await asyncio.sleep(PERIOD)
            now = loop.time()
            self.look(now - before)
            before = now
