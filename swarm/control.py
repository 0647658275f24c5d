"""hivemind's connection to p2pd, over which unary calls and their answers go, without a fault that ends it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TypeVar

from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient

from .errors import PeerRefused

#: What members of a private swarm ask each other first, see `private_control`.
MEMBER_QUESTION = "petswarm/member/1"
#: Seconds for its answer.
MEETING_TIMEOUT = 10.0


class SturdyControl(ControlClient):
    """Outlives an answer that comes in the moment in which its call is cancelled.

    A cancelled call stays in hivemind's list until its task runs again. If its answer is read before, hivemind's only
    reader ends with InvalidStateError, unnoticed: from then on no ping, no reading of records and no call by others is
    ever answered. Such an answer has been read in full, so that one can go on with the next.

    When p2pd ends, so do the tasks here: hivemind's would leave errors that nobody looks at, and that asyncio prints
    when it comes upon them. `P2PDaemon` tells of a p2pd that dies.
    """

    async def _read_from_persistent_conn(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                return await super()._read_from_persistent_conn(reader)
            except asyncio.InvalidStateError:
                continue
            except ConnectionError:
                return

    def may_be_served(self, peer_id: PeerID) -> bool:
        """Whether a peer may ask for what takes room here: in a private swarm, a member that we have met."""
        return True

    async def meet(self, peer_id: PeerID) -> None:
        """Find out why a peer does not answer. Raises PeerRefused if it is for want of a swarm key, or TimeoutError."""
        try:
            async with asyncio.timeout(MEETING_TIMEOUT):
                await self.call_unary_handler(peer_id, MEMBER_QUESTION, b"")
        except P2PHandlerError as error:
            raise PeerRefused(
                f"peer {peer_id} answers, but its swarm is private: give its key with --swarm-key FILE (swarm_key=... "
                f"in Python)"
            ) from error
        except P2PDaemonError:  # it does not know the question: no private swarm
            pass

    async def _write_to_persistent_conn(self, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await super()._write_to_persistent_conn(writer)


Control = TypeVar("Control", bound=SturdyControl)


async def make_sturdy(p2p: P2P, kind: type[Control]) -> Control:
    """Replace the connection of a P2P that has not registered any handlers yet by one of this kind."""
    fragile: ControlClient = p2p._client.control
    sturdy: Control = await kind.create(
        fragile.daemon_connector,
        fragile.listen_maddr,
        persistent_conn_max_msg_size=fragile.persistent_conn_max_msg_size,
    )
    p2p._client.control = sturdy
    fragile.close()
    return sturdy
