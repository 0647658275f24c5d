"""Who is about to open a session here: so that clients who choose at the same time do not all choose the same server.

What a server announces says nothing about those who chose it a moment ago and are on their way. Each client that is
about to open a session asks all servers that come into question first, and joins a line in each. Whoever asks is told
who stands before him, and who of the line did open a session. `swarm.routing.sharing` says what a client makes of it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from swarm.data_structures import MAX_OPENINGS, OpeningAnswer, ServerInfo
from swarm.protocol import OPENING_QUESTION

#: Seconds from the question to the session, at most; who takes longer has gone elsewhere or nowhere.
PATIENCE = 3.0


@dataclass
class _Asked:
    key: str
    at: float
    opened: bool = False


class Openings:
    """One server's line. A peer has one place in it: whoever asks again goes to its end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._line: dict[str, _Asked] = {}  # by peer, first come first

    def answer(self, question: str, peer_id: str, info: ServerInfo) -> ServerInfo | OpeningAnswer:
        """What `rpc_info` answers: with his place in the line for a peer who asks for one, else just the info."""
        match = re.fullmatch(rf"{OPENING_QUESTION}([0-9a-f]{{16}})", question)
        if match is None:
            return info
        self._forget_old()
        self._line.pop(peer_id, None)
        before = tuple(asked.key for asked in self._line.values() if not asked.opened)
        opened = tuple(asked.key for asked in self._line.values() if asked.opened)
        if len(self._line) < MAX_OPENINGS:
            self._line[peer_id] = _Asked(match[1], self._clock())
        return OpeningAnswer(info=info, before=before, opened=opened)

    def opened(self, peer_id: str) -> None:
        """This peer opened a session here."""
        if (asked := self._line.get(peer_id)) is not None:
            asked.opened = True

    def _forget_old(self) -> None:
        oldest = self._clock() - PATIENCE
        self._line = {peer_id: asked for peer_id, asked in self._line.items() if asked.at > oldest}
