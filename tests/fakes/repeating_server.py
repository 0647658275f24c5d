"""A server whose pushes come again when they are long done with: `python -m repeating_server -- MODEL FLAGS...` with
the flags of `run-server`. When the server after it was replaced, the last step that went to the lost one is pushed to
the new one too, after `LATER` newer ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from swarm.protocol import StepRequest
from swarm.scripts import main as front_door
from swarm.server import session_stream
from swarm.server.pushes import PushLink

LATER = 3


class RepeatingLink(PushLink):
    """Remembers the last step of every session, over all its links."""

    _latest: ClassVar[WeakKeyDictionary[Any, tuple[StepRequest, bytes]]] = WeakKeyDictionary()

    def __init__(self, p2p: Any, target: Any, on_failure: Callable[[int, str], None], *more: Any):
        super().__init__(p2p, target, on_failure, *more)
        self._session = on_failure.__self__  # type: ignore[attr-defined]
        self._old = self._latest.get(self._session)
        self._sent = 0

    async def send(self, request: StepRequest, payload: bytes | memoryview) -> None:
        self._latest[self._session] = (request, bytes(payload))
        self._sent += 1
        await super().send(request, payload)
        if self._old is not None and self._sent == LATER:
            await super().send(*self._old)


if __name__ == "__main__":
    session_stream.PushLink = RepeatingLink  # type: ignore[misc]
    front_door.main(["run-server", *sys.argv[2:]])
