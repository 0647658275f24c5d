"""How the monitor sees a swarm: what anybody can read and ask. A seam, so that tests have a fake swarm behind it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from hivemind.p2p import P2PDaemonError

from swarm.addresses import relay_of
from swarm.data_structures import ModelInfo, ServerInfo
from swarm.dht import Directory, ServerRecord
from swarm.errors import NetworkError
from swarm.node import Node
from swarm.rpc import timed_info

#: Most addresses of one peer that are kept: it may announce any number.
_MAX_ADDRESSES = 8


class Sight(Protocol):
    async def models(self) -> Mapping[str, ModelInfo]:
        """By fingerprint, those that most servers say they serve first. Raises NetworkError."""

    async def servers(self, fingerprint: str) -> Sequence[ServerRecord]:
        """Raises NetworkError."""

    async def ask(self, peer_id: str, timeout: float) -> tuple[float, ServerInfo]:
        """Seconds of a round trip, and what the server says about itself. Raises SwarmError, within `timeout` s."""

    async def addresses(self, peer_ids: Collection[str]) -> Mapping[str, tuple[str, ...]]:
        """Of those of these peers that we are connected to, without peer id. Raises NetworkError."""


class NodeSight:
    """The sight of a node of the swarm."""

    def __init__(self, node: Node):
        self._node = node
        self._directory = Directory(node)

    async def models(self) -> Mapping[str, ModelInfo]:
        return await self._directory.models()

    async def servers(self, fingerprint: str) -> Sequence[ServerRecord]:
        return await self._directory.servers(fingerprint)

    async def ask(self, peer_id: str, timeout: float) -> tuple[float, ServerInfo]:
        round_trip, answer = await timed_info(self._node.p2p, peer_id, timeout)
        return round_trip, answer.info

    async def addresses(self, peer_ids: Collection[str]) -> Mapping[str, tuple[str, ...]]:
        try:
            peers = await self._node.p2p.list_peers()
        except (P2PDaemonError, EOFError, OSError) as error:
            raise NetworkError(f"p2pd does not tell to whom it is connected: {error!r}") from error
        found = dict[str, list[str]]()
        for peer in peers:
            peer_id = str(peer.peer_id)
            if peer_id in peer_ids:
                known = found.setdefault(peer_id, [])
                known += [address for address in map(str, peer.addrs) if address not in known]
        # the straight ways first
        return {
            peer_id: tuple(sorted(known, key=lambda address: relay_of(address) is not None)[:_MAX_ADDRESSES])
            for peer_id, known in found.items()
        }
