"""A libp2p node for one call: it has no connections yet, so what it reaches, anybody reaches who comes anew."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from hivemind.p2p import P2P

from .control import SturdyControl, make_sturdy
from .membership import SwarmKey
from .p2p_daemon import P2PDaemon, join_daemon, socket_root
from .private_control import make_private

_START_TIMEOUT = 10.0  # seconds for p2pd to start


@asynccontextmanager
async def fresh_peer(key: SwarmKey | None = None) -> AsyncIterator[P2P]:
    """A node with an id of its own, which listens nowhere and takes part in no DHT. It costs a process.

    key: of the private swarm whose members it is to ask. Raises NetworkError if p2pd does not start.
    """
    with tempfile.TemporaryDirectory(prefix="petswarm-", dir=socket_root(), ignore_cleanup_errors=True) as folder:
        control = Path(folder) / "p2pd.sock"
        arguments = [f"-listen=/unix{control}", "-noListenAddrs=1", f"-idleTimeout={_START_TIMEOUT:g}s"]
        daemon = await P2PDaemon.start(arguments, _START_TIMEOUT)
        try:
            p2p = await join_daemon(P2P, Path(folder), control)
            try:
                if key is None:
                    await make_sturdy(p2p, SturdyControl)
                else:
                    await make_private(p2p, key)
                yield p2p
            finally:
                await p2p.shutdown()
        finally:
            await daemon.stop()
