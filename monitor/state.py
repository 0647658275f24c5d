"""The state of the swarm as JSON, made once for each picture however many ask for it."""

from __future__ import annotations

import asyncio
import secrets

from .documents import Document
from .monitor import Monitor
from .picture import Picture


class StateDocument:
    """Keeps the latest. What is made runs in a thread: of a large swarm it takes tenths of a second."""

    def __init__(self, monitor: Monitor):
        self._monitor = monitor
        self._start = secrets.token_hex(4)  # another monitor's revisions are not ours
        self._made: tuple[Picture, Document] | None = None
        self._making = asyncio.Lock()

    async def latest(self) -> Document:
        async with self._making:
            picture = self._monitor.picture
            if self._made is None or self._made[0] is not picture:
                self._made = (picture, await asyncio.to_thread(self._make))
            return self._made[1]

    def _make(self) -> Document:
        report = self._monitor.report()
        body = report.model_dump_json().encode()
        document = Document(body, "application/json", f"{self._start}-{report.revision}")
        _ = document.compressed  # here rather than in the loop
        return document
