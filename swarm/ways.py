"""The ways to peers that are reached through relays: who carries connections to whom.

libp2p finds the addresses of peers that listen by itself. Of a peer behind a relay it only knows the relay's name, from
the record that the peer signed; no address of a stranger's choice is ever dialled here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from .addresses import binary_maddr, is_peer_id

logger = logging.getLogger(__name__)

#: Seconds to reach a relay, and the peer through it.
_TIMEOUT = 8.0
#: For so many seconds after a way was found it is taken for open.
_FRESH = 10.0
#: Peers whose relays are remembered; a record may come from anyone.
_MAX_PEERS = 16_384


class WayfindingP2P(P2P):
    """hivemind's P2P, which connects through a peer's relays before it calls that peer."""

    def __init__(self) -> None:
        super().__init__()
        self._relays: dict[str, tuple[str, ...]] = {}
        self._open_until: dict[str, float] = {}

    def learn_relays(self, peer_id: str, relays: Sequence[str]) -> None:
        """From now on this peer is reached through these relays, the first that works; none: directly. What a stranger
        calls a relay and is no id of a peer does not count."""
        relays = tuple(filter(is_peer_id, relays))
        if not relays or str(self.peer_id) in relays:  # to those that we relay to we have the straightest way
            self._relays.pop(peer_id, None)
            self._open_until.pop(peer_id, None)
        elif peer_id in self._relays or len(self._relays) < _MAX_PEERS:
            self._relays[peer_id] = relays

    async def open_direct_stream(self, peer: PeerID, kind: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream over whatever connection there is, or that libp2p finds by itself."""
        _, reader, writer = await self._client.stream_open(peer, (kind,))
        return reader, writer

    async def call_binary_stream_handler(
        self, peer_id: PeerID, handler_name: str
    ) -> tuple[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter]:
        return await self._by_its_way(peer_id, super().call_binary_stream_handler, peer_id, handler_name)

    async def _call_unary_protobuf_handler(self, peer_id: PeerID, *arguments: Any) -> Any:
        return await self._by_its_way(peer_id, super()._call_unary_protobuf_handler, peer_id, *arguments)

    async def _by_its_way(self, peer: PeerID, call: Any, *arguments: Any) -> Any:
        name = str(peer)
        if name not in self._relays:
            return await call(*arguments)
        was_open = self._open_until.get(name, 0.0) > time.monotonic()
        if not was_open:
            await self._open_way(peer)
        try:
            return await call(*arguments)
        except P2PDaemonError:
            self._open_until.pop(name, None)
            if not was_open:
                raise
        # Its relay went lately; there may be another.
        await self._open_way(peer)
        return await call(*arguments)

    async def _open_way(self, peer: PeerID) -> None:
        """Connect through one of its relays. If none works the call that follows fails in its own words."""
        name = str(peer)
        for relay in self._relays.get(name, ()):
            try:
                async with asyncio.timeout(_TIMEOUT):
                    await self._client.connect(PeerID.from_base58(relay), [])
                    await self._client.connect(peer, [binary_maddr(f"/p2p/{relay}/p2p-circuit")])
            except (P2PDaemonError, EOFError, OSError) as error:  # time-outs included
                logger.info("no way to %s through relay %s: %r", name, relay, error)
            else:
                self._open_until[name] = time.monotonic() + _FRESH
                return
