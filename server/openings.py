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
#: Places in the line that one peer may have at a time; a further one costs him his oldest.
MAX_PER_PEER = 16


@dataclass
class _Place:
    key: str
    peer_id: str
    at: float
    opened: bool = False


class Openings:
    """One server's line. Who did open a session stays in it as such, until his patience would have ended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._line: list[_Place] = []  # first come first

    def answer(self, question: str, peer_id: str, info: ServerInfo) -> ServerInfo | OpeningAnswer:
        """What `rpc_info` answers: with his place in the line for a peer who asks for one, else just the info."""
        match = re.fullmatch(rf"{OPENING_QUESTION}([0-9a-f]{{16}})", question)
        if match is None:
            return info
        oldest = self._clock() - PATIENCE
        self._line = [place for place in self._line if place.at > oldest and place.key != match[1]]
        own = [place for place in self._line if place.peer_id == peer_id]
        if len(own) >= MAX_PER_PEER:
            self._line.remove(own[0])
        answer = OpeningAnswer(
            info=info,
            before=tuple(place.key for place in self._line if not place.opened and place.peer_id != peer_id),
            opened=tuple(place.key for place in self._line if place.opened),
        )
        if len(self._line) < MAX_OPENINGS:
            self._line.append(_Place(match[1], peer_id, self._clock()))
        return answer

    def opened(self, peer_id: str) -> None:
        """This peer opened a session here: most likely the one that he asked for last."""
        for place in reversed(self._line):
            if place.peer_id == peer_id and not place.opened:
                place.opened = True
                return
