"""A stranger to a private swarm with software of his own: he shows a tag that he copied, and listens to everybody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hivemind.p2p import PeerID

from swarm import private_control
from swarm.node import Node
from swarm.private_control import GREETING, PrivateControl


class Impostor(PrivateControl):
    """greeted_by: who began to say something; what followed went on to the handlers, whoever it was."""

    greeted_by: list[str]

    def pretend(self, tag: bytes) -> None:
        """Show this tag from now on."""
        self.greeted_by = []
        self._greeting = GREETING + tag

    async def meet(self, peer_id: PeerID) -> None:
        pass

    def _check(self, greeting: bytes, peer_id: PeerID) -> None:
        if greeting.startswith(GREETING):
            self.greeted_by.append(str(peer_id))


@contextmanager
def impostors(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nodes with a swarm key that start meanwhile are impostors."""
    with patch.context() as context:
        context.setattr(private_control, "PrivateControl", Impostor)
        yield


def as_impostor(node: Node) -> Impostor:
    control = node.p2p._client.control
    assert isinstance(control, Impostor)
    return control
