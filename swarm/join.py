"""Meeting the initial peers: all at once, one success is enough, and each failure has a reason in words."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import defaultdict
from collections.abc import Sequence

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.utils.multiaddr import Multiaddr

from .addresses import peer_id_of, without_peer_id
from .errors import JoinFailed, PeerRefused

logger = logging.getLogger(__name__)

_LATER_PEERS = 0.3  # seconds that the other initial peers get once one has answered
_NEIGHBOURS = 3.0  # seconds to find our neighbours in the DHT
_PING_AGAIN = 0.3  # seconds between pings to a peer that took the connection but does not answer
_REFUSALS = 3  # a peer that starts at this moment does not know yet whom it accepts
_MAX_SHOWN = 5


class InitialPeers:
    """The peers through which a node enters its swarm. addresses: checked ones, each with its /p2p/ID."""

    def __init__(self, p2p: P2P, dht: DHTNode, addresses: Sequence[str]):
        self._p2p = p2p
        self._dht = dht
        self._addresses: defaultdict[str, list[str]] = defaultdict(list)
        for address in addresses:
            self._addresses[peer_id_of(address)].append(address)
        self._reasons: dict[str, str] = {}
        self._refusals: dict[str, str] = {}  # of peers that answer, in whole sentences

    async def join(self, timeout: float) -> None:
        """Meet the initial peers, then the neighbours in the DHT. Raises JoinFailed after `timeout` seconds at most."""
        if not self._addresses:
            return
        start = time.monotonic()
        meetings = {asyncio.create_task(self._meet(peer_id)) for peer_id in self._addresses}
        try:
            waiting = meetings
            while waiting and not any(task.done() and task.result() for task in meetings):
                left = timeout - (time.monotonic() - start)
                done, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
            if not any(task.done() and task.result() for task in meetings):
                raise JoinFailed(self._explain(timeout, timed_out=bool(waiting)))
            if waiting:
                await asyncio.wait(waiting, timeout=_LATER_PEERS)
        finally:
            for task in meetings:
                task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_NEIGHBOURS):
                await self._dht.find_nearest_nodes([self._dht.node_id])

    async def keep_joined(self, period: float) -> None:
        """Meet the initial peers again and again: one that restarted knows nobody until somebody calls."""
        while True:
            await asyncio.sleep(period)
            meetings = [asyncio.create_task(self._meet(peer_id)) for peer_id in self._addresses]
            try:
                if meetings:
                    await asyncio.wait(meetings, timeout=period)
            finally:
                for task in meetings:
                    task.cancel()

    async def _meet(self, peer_id: str) -> bool:
        """Connect to a peer, and have each enter the other's routing table. False if it cannot; `_reasons` says why."""
        peer = PeerID.from_base58(peer_id)
        maddrs: list[Multiaddr] = [without_peer_id(address) for address in self._addresses[peer_id]]
        self._reasons[peer_id] = "no answer"
        self._refusals.pop(peer_id, None)
        refusals = 0
        try:
            await self._p2p._client.connect(peer, maddrs)
            self._reasons[peer_id] = "it takes connections but does not answer as a peer of a swarm"
            while await self._dht.protocol.call_ping(peer, validate=True) is None:
                try:
                    await self._p2p._client.control.meet(peer)  # hivemind does not say why it got no answer
                except PeerRefused as error:
                    self._refusals[peer_id] = str(error)
                    refusals += 1
                    if refusals == _REFUSALS:
                        return False
                except TimeoutError:
                    pass
                await asyncio.sleep(_PING_AGAIN)
        except P2PDaemonError as error:
            self._reasons[peer_id] = _dial_reason(str(error))
        except ValidationError as error:
            self._reasons[peer_id] = str(error)
        except (OSError, EOFError) as error:
            self._reasons[peer_id] = f"p2pd failed: {error!r}"
        else:
            self._dht.blacklist.register_success(peer)
            return True
        return False

    def _explain(self, timeout: float, *, timed_out: bool) -> str:
        if self._refusals:  # who is reached and refuses us tells more than who is not reached
            return next(iter(self._refusals.values()))
        number = sum(map(len, self._addresses.values()))
        who = "the initial peer did not answer" if number == 1 else f"none of the {number} initial peers answered"
        lines = [
            f"{address} ({self._reasons.get(peer_id, 'no answer')})"
            for peer_id, addresses in self._addresses.items()
            for address in addresses
        ]
        shown = ", ".join(lines[:_MAX_SHOWN])
        if len(lines) > _MAX_SHOWN:
            shown += f" and {len(lines) - _MAX_SHOWN} more"
        within = f" within {timeout:g} s" if timed_out else ""
        return (
            f"{who}{within}: {shown}; check that the peer runs, that the address is the one that it printed, "
            f"and that no firewall stands between"
        )


def _dial_reason(message: str) -> str:
    """The part of libp2p's words that helps a person."""
    other = re.search(r"remote key matches (\w+)", message)
    if other:
        return f"another peer answers there: {other[1]}"
    for words, reason in (
        ("connection refused", "connection refused"),
        ("dial to self", "that is this peer itself"),
        ("no such host", "its host name is unknown"),
        ("no addresses", "its host name leads nowhere"),
        ("no route to host", "no route to host"),
        ("network is unreachable", "its network is unreachable"),
        ("deadline exceeded", "no answer"),
        ("i/o timeout", "no answer"),
        ("failed to negotiate", "what answers there is not a peer"),
    ):
        if words in message:
            return reason
    return " ".join(message.split())[:200]
