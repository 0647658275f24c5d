"""hivemind's connection to p2pd, over which unary calls and their answers go, without a fault that ends it."""

from __future__ import annotations

import asyncio
import contextlib

from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient


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

    async def _write_to_persistent_conn(self, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await super()._write_to_persistent_conn(writer)


async def make_sturdy(p2p: P2P) -> None:
    """Replace the connection of a P2P that has not registered any handlers yet."""
    fragile: ControlClient = p2p._client.control
    p2p._client.control = await SturdyControl.create(
        fragile.daemon_connector,
        fragile.listen_maddr,
        persistent_conn_max_msg_size=fragile.persistent_conn_max_msg_size,
    )
    fragile.close()
