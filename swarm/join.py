"""Meeting the initial peers: all at once, one success is enough, and each failure names the step at which it came."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from enum import StrEnum

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import get_dht_time
from hivemind.utils.multiaddr import Multiaddr

from .addresses import peer_id_of, relay_of, without_peer_id
from .errors import JoinFailed, PeerRefused
from .ways import WayfindingP2P

logger = logging.getLogger(__name__)

#: Seconds by which the clocks of two peers may differ. With the usual announcements, which live for 60 s and are
#: renewed every 20 s, a record is then never taken for expired too early.
MAX_CLOCK_SKEW = 15.0

_LATER_PEERS = 0.3  # seconds that the other initial peers get once one has answered
_NEIGHBOURS = 3.0  # seconds to find our neighbours in the DHT
_PING_AGAIN = 0.3  # seconds between pings to a peer that took the connection but does not answer
_REFUSALS = 3  # a peer that starts at this moment does not know yet whom it accepts
_MAX_SHOWN = 5


class Step(StrEnum):
    """Of joining, in their order."""

    ADDRESS = "address"
    RELAY = "relay"
    DIAL = "dial"
    HANDSHAKE = "handshake"
    DHT = "DHT"


_ADVICE = {
    Step.ADDRESS: "check how the host's name is spelt, or give its ip address",
    Step.RELAY: "check that the relay runs, which is the first peer in the address, or join through another peer",
    Step.DIAL: "check that the peer runs, that the address is the one that it printed, and that no firewall stands "
    "between",
    Step.HANDSHAKE: "give the address that the peer printed when it started last; with --identity-path it keeps its id",
    Step.DHT: "check that this is a peer of a swarm and that the clocks of both machines are right, try again, or join "
    "through another peer",
}


class _NotMet(Exception):
    """A meeting failed for good, at this step and for this reason."""

    def __init__(self, step: Step, reason: str):
        super().__init__(reason)
        self.step = step


class InitialPeers:
    """The peers through which a node enters its swarm. An address that leads through a relay stands for that relay: the
    peer behind it takes no part in the DHT.

    addresses: those of each peer, by its id.
    """

    def __init__(self, p2p: WayfindingP2P, addresses: Sequence[str]):
        """addresses: checked ones, each with its /p2p/ID."""
        self._p2p = p2p
        self._dht: DHTNode
        self.addresses: defaultdict[str, list[str]] = defaultdict(list)
        self._given: defaultdict[str, list[str]] = defaultdict(list)
        for address in addresses:
            relay = relay_of(address)
            peer_id = peer_id_of(relay or address)
            self.addresses[peer_id].append(relay or address)
            self._given[peer_id].append(address)
            if relay is not None:
                p2p.learn_relays(peer_id_of(address), [peer_id])
        self._reasons: dict[str, tuple[Step, str]] = {}
        self._refusals: dict[str, str] = {}  # of peers that answer, in whole sentences

    async def join(self, dht: DHTNode, timeout: float) -> None:
        """Meet the initial peers, then the neighbours in the DHT. Raises JoinFailed after `timeout` seconds at most."""
        self._dht = dht
        if not self.addresses:
            return
        start = time.monotonic()
        meetings = {asyncio.create_task(self._meet(peer_id)) for peer_id in self.addresses}
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
            meetings = [asyncio.create_task(self._meet(peer_id)) for peer_id in self.addresses]
            try:
                if meetings:
                    await asyncio.wait(meetings, timeout=period)
            finally:
                for task in meetings:
                    task.cancel()

    async def _meet(self, peer_id: str) -> bool:
        """Connect to a peer, and have each enter the other's routing table. False if it cannot; `_reasons` says why."""
        peer = PeerID.from_base58(peer_id)
        maddrs: list[Multiaddr] = [without_peer_id(address) for address in self.addresses[peer_id]]
        self._reasons[peer_id] = Step.DIAL, "no answer"
        self._refusals.pop(peer_id, None)
        refusals = 0
        try:
            await self._p2p._client.connect(peer, maddrs)
            self._reasons[peer_id] = Step.DHT, "it takes connections but does not answer as a peer of a swarm"
            while not await self._enter(peer):
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
            self._reasons[peer_id] = dial_reason(str(error))
        except _NotMet as error:
            self._reasons[peer_id] = error.step, str(error)
        except (OSError, EOFError) as error:
            self._reasons[peer_id] = Step.DIAL, f"p2pd failed: {error!r}"
        else:
            self._dht.blacklist.register_success(peer)
            return True
        return False

    async def _enter(self, peer: PeerID) -> bool:
        """Have each enter the other's routing table; False if the peer does not answer.

        hivemind's own ping would refuse peers whose clocks differ by more than three seconds. Raises _NotMet.
        """
        protocol = self._dht.protocol
        asked_at = get_dht_time()
        try:
            request = dht_pb2.PingRequest(peer=protocol.node_info, validate=True)
            response = await protocol.get_stub(peer).rpc_ping(request, timeout=protocol.wait_timeout)
            node_id = DHTID.from_bytes(response.peer.node_id) if response.peer.node_id else None
        except Exception as error:  # whatever a stranger answers
            logger.info("peer %s does not answer as a peer of a swarm: %r", peer, error)
            return False
        if node_id is None:
            return False
        ahead = max(response.dht_time - get_dht_time(), 0.0)
        behind = max(asked_at - response.dht_time, 0.0)
        if max(ahead, behind) > MAX_CLOCK_SKEW:
            where = f"{ahead:.0f} s ahead of" if ahead else f"{behind:.0f} s behind"
            raise _NotMet(Step.DHT, f"its clock is {where} ours, and at most {MAX_CLOCK_SKEW:g} s are allowed")
        if not protocol.client_mode and not response.available:
            raise _NotMet(Step.DHT, "it cannot send us requests over our connection")
        await protocol.update_routing_table(node_id, peer, responded=True)
        return True

    def _explain(self, timeout: float, *, timed_out: bool) -> str:
        if self._refusals:  # who is reached and refuses us tells more than who is not reached
            return f"could not join at the step {Step.DHT}: {next(iter(self._refusals.values()))}"
        failures = [
            (address, *self._reason(peer_id, address)) for peer_id, given in self._given.items() for address in given
        ]
        # The peer that was nearest to being met is worth the most attention.
        step = max((step for _, step, _ in failures), key=list(Step).index)
        number = len(failures)
        who = "the initial peer did not answer" if number == 1 else f"none of the {number} initial peers answered"
        within = f" within {timeout:g} s" if timed_out else ""
        shown = ", ".join(f"{address} ({step}: {reason})" for address, step, reason in failures[:_MAX_SHOWN])
        if number > _MAX_SHOWN:
            shown += f" and {number - _MAX_SHOWN} more"
        return f"could not join at the step {step}: {who}{within}: {shown}; {_ADVICE[step]}"

    def _reason(self, peer_id: str, address: str) -> tuple[Step, str]:
        step, reason = self._reasons.get(peer_id, (Step.DIAL, "no answer"))
        return (Step.RELAY, f"the relay on the way: {step}, {reason}") if relay_of(address) else (step, reason)


def dial_reason(message: str) -> tuple[Step, str]:
    """Where libp2p failed to connect, and the part of its words that helps a person."""
    other = re.search(r"remote key matches (\w+)", message)
    if other:
        return Step.HANDSHAKE, f"another peer answers there: {other[1]}"
    for words, step, reason in (
        ("connection refused", Step.DIAL, "connection refused"),
        ("dial to self", Step.ADDRESS, "that is this peer itself"),
        ("no such host", Step.ADDRESS, "its host name is unknown"),
        ("no addresses", Step.ADDRESS, "its host name leads nowhere"),
        ("no route to host", Step.DIAL, "no route to host"),
        ("network is unreachable", Step.DIAL, "its network is unreachable"),
        ("failed to negotiate", Step.HANDSHAKE, "what answers there is not a peer"),
        ("dial backoff", Step.DIAL, "no answer a moment ago"),
        ("deadline exceeded", Step.DIAL, "no answer"),
        ("i/o timeout", Step.DIAL, "no answer"),
    ):
        if words in message:
            return step, reason
    return Step.DIAL, " ".join(message.split())[:200]
