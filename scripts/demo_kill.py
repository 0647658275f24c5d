"""The demo's accident: SIGKILL to a server of the chain at a random moment of an answer."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING

from swarm.data_structures import BlockSpan

from .demo_layout import choose_victim
from .demo_report import KillReport, links_of
from .demo_screen import Screen
from .local_swarm import LocalSwarm

if TYPE_CHECKING:
    from swarm.client.inference_session import InferenceSession

#: The server dies after a random number of tokens from this range, both ends included.
KILL_AFTER = (4, 24)

#: An answer must be at least this long, so that the server dies in time.
ENOUGH_TOKENS = KILL_AFTER[1] + 8


class Accident:
    """Kills one server once the answer has so many tokens, and some way into the step that follows."""

    def __init__(self, swarm: LocalSwarm, session: InferenceSession, screen: Screen, step_seconds: float):
        """step_seconds: about how long one token takes."""
        self.report: KillReport | None = None
        self._swarm = swarm
        self._session = session
        self._screen = screen
        self._rng = random.Random()
        self._after_tokens = self._rng.randint(*KILL_AFTER)
        self._delay = self._rng.uniform(0.0, step_seconds)
        self._thread = threading.Thread(target=self._kill, daemon=True)

    def on_token(self, count: int) -> None:
        """To be called after each token of the answer."""
        if count == self._after_tokens:
            self._thread.start()
        elif count == self._after_tokens + 2:
            self._thread.join()  # a quick model must not be done before its server is dead

    def _kill(self) -> None:
        time.sleep(self._delay)
        chain = self._session.chain
        held = {server.peer_id: BlockSpan.parse(server.spec.blocks) for server in self._swarm.servers}
        victim = choose_victim(chain, held, self._rng)
        if victim is None:
            return
        server = self._swarm.by_peer_id(victim.peer_id)
        server.kill()
        self.report = KillReport(
            peer_id=victim.peer_id,
            pid=server.pid,
            blocks=server.spec.blocks,
            after_tokens=self._after_tokens,
            chain=links_of(chain),
            exit_code=server.process.returncode,
        )
        self._screen.interrupt(f"SIGKILL: server {server.spec.blocks}")
