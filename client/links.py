"""How hidden states travel over each link of a chain: compressed where the link is slow."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from swarm.codecs import Codec, choose_codec
from swarm.data_structures import ServerInfo
from swarm.errors import SwarmError
from swarm.line_rate import LineRate

from .config import ClientConfig

#: The client's own line is measured with uploads to so many servers, up to 1 MiB each.
MAX_UPLOADS = 2
MEASURING_PERIOD = 3600.0  # seconds
UNSETTLED_PERIOD = 2.0


class Announcements(Protocol):
    """What servers say of themselves: the router, or a fake."""

    def info(self, peer_id: str) -> ServerInfo | None: ...


class Links:
    """Knows how fast the client's own line is, and asks the servers' announcements about theirs."""

    def __init__(self, announcements: Announcements, config: ClientConfig):
        self._announcements = announcements
        self._config = config
        #: from us to servers
        self.own_rate = LineRate()

    async def measure(self, peer_ids: Sequence[str], upload_rate: Callable[[str], Awaitable[float]]) -> None:
        """Learn how fast our line is. upload_rate: bytes/s to a server; raises SwarmError."""
        rates = []
        for peer_id in random.sample(peer_ids, min(MAX_UPLOADS, len(peer_ids))):  # in turn: they share our line
            try:
                rates.append(await upload_rate(peer_id))
            except (SwarmError, TimeoutError):
                continue  # it may leave, and others are left
        if rates:
            self.own_rate.add(max(rates))

    def input_codec(self, peer_id: str, lossless: Codec) -> Codec:
        """For what we send to a server."""
        return self._codec([self.own_rate.value, self._rate(peer_id)], lossless)

    def output_codecs(self, peer_ids: Sequence[str], lossless: Codec) -> list[Codec]:
        """For the outputs of each server of a chain, which go to us and, but for the last, to the next one."""
        rates = [self._rate(peer_id) for peer_id in peer_ids]
        own = self.own_rate.value
        return [self._codec([own, *rates[index : index + 2]], lossless) for index in range(len(peer_ids))]

    def _rate(self, peer_id: str) -> float | None:
        info = self._announcements.info(peer_id)
        return None if info is None else info.network_rate

    def _codec(self, rates: Sequence[float | None], lossless: Codec) -> Codec:
        if self._config.compression == "none":
            return lossless
        if self._config.compression == "blockwise8":
            return Codec.BLOCKWISE8
        return choose_codec(min((rate for rate in rates if rate is not None), default=None), lossless)


async def keep_measuring(
    links: Links, peers: Callable[[], Sequence[str]], upload_rate: Callable[[str], Awaitable[float]]
) -> None:
    """Measure our line now, soon again until it is known, and then now and then."""
    while True:
        await links.measure(peers(), upload_rate)
        await asyncio.sleep(MEASURING_PERIOD if links.own_rate.is_settled else UNSETTLED_PERIOD)
