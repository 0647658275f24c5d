"""Servers whose connection broke: are they gone, or was it only the connection?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from swarm.errors import SwarmError
from swarm.routing.chain import ChainLink

from .pipeline import Hop


class Suspects:
    """Each is asked for a sign of life, while the session looks for others that can take its place.

    blame: told about every server that gives none. timeout: seconds for it.
    """

    def __init__(self, blame: Callable[[ChainLink, SwarmError], None], timeout: float):
        self._blame = blame
        self._timeout = timeout
        self._checks: dict[str, asyncio.Task[bool]] = {}
        self._running: set[asyncio.Task[bool]] = set()  # forgotten ones too: whoever is gone shall be blamed

    @property
    def peer_ids(self) -> set[str]:
        return set(self._checks)

    def add(self, hop: Hop) -> None:
        check = self._checks[hop.link.peer_id] = asyncio.create_task(self._lives(hop))
        self._running.add(check)
        check.add_done_callback(self._running.discard)

    async def acquit(self) -> bool:
        """Nobody else can do it: suspect them no more. False if that helps nothing, since none of them lives."""
        checks = list(self._checks.values())
        self.forget()
        return any([await check for check in checks])

    def forget(self) -> None:
        self._checks.clear()

    async def _lives(self, hop: Hop) -> bool:
        try:
            await hop.span.probe(self._timeout)
        except SwarmError as error:
            self._blame(hop.link, error)
            return False
        return True
