"""Peers ask each other whether they can be reached, by being called back.

The peer that is asked dials with a new libp2p node of its own, made for that one call: over a connection that exists it
would reach anyone. The handshake proves that it is the caller who answers.

Whoever dials where a stranger says can be misused, to scan ports or to flood a third party. Therefore:

- only the ip address is dialled that the caller's own connection comes from, as our kernel sees it (a TCP connection
  cannot come from a forged one), and no caller that comes through a relay is called back; names are resolved first, and
  what they resolve to must be that address;
- MAX_DIALLED ports at most, one call at a time; MAX_WAITING callers wait, the others are told to ask later;
- a peer may ask once in PEER_PAUSE seconds, an address IP_BURST times in IP_PERIOD, for peer ids cost nothing;
- the answer is whether a libp2p peer *with the caller's id* was met. What else listens there is not told.

So all that one can learn is about one's own address, slowly, and about one's own peers. A call takes one process for a
fraction of a second, DIAL_TIMEOUT seconds at most.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated

from hivemind.p2p import P2P, P2PContext, P2PDaemonError, PeerID, ServicerBase
from hivemind.proto import runtime_pb2
from hivemind.utils.multiaddr import Multiaddr
from pydantic import Field

from .addresses import binary_maddr, check_announce_address, ip_of, relay_of
from .data_structures import Frozen
from .errors import BadAddress, NetworkError
from .fresh_peer import fresh_peer

logger = logging.getLogger(__name__)

MAX_DIALLED = 4
MAX_ADDRESSES = 16
MAX_WAITING = 4
MAX_QUESTION_BYTES = 2048
PEER_PAUSE = 20.0
IP_BURST, IP_PERIOD = 8, 60.0
DIAL_TIMEOUT = 6.0
#: Seconds to resolve a name.
_RESOLVE_TIMEOUT = 2.0
_MAX_REMEMBERED = 4096


class DialBackAnswer(Frozen):
    """seen_at: the ip address that the caller's connection comes from; None: through a relay, or not looked up.

    reached: whether the caller was met at one of its addresses; None: that was not tried.
    elsewhere: not tried either, for none of its addresses is where it comes from. reason: for people.
    """

    seen_at: IPv4Address | IPv6Address | None
    reached: bool | None
    elsewhere: bool = False
    reason: Annotated[str, Field(max_length=200)] = ""


class ReachabilityProtocol(ServicerBase):
    async def rpc_dial_back(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        """Can you reach me? request.uid: addresses without peer id, with commas between. A `DialBackAnswer` as JSON."""
        raise NotImplementedError


class DialBack:
    """Answers that question for one node."""

    def __init__(self, p2p: P2P):
        self._p2p = p2p
        self._dialling = asyncio.Lock()
        self._waiting = 0
        self._asked: dict[str, deque[float]] = {}

    async def register(self) -> None:
        await ReachabilityProtocol().add_p2p_handlers(self._p2p, wrapper=self)

    async def rpc_dial_back(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        answer = await self._answer(context.remote_id, request.uid)
        return runtime_pb2.ExpertInfo(serialized_info=answer.model_dump_json().encode())

    async def _answer(self, caller: PeerID, question: str) -> DialBackAnswer:
        if not self._may_ask(f"peer {caller}", 1, PEER_PAUSE):
            return DialBackAnswer(seen_at=None, reached=None, reason="you asked a moment ago")
        ip = await self._ip_of(caller)
        if ip is None:
            return DialBackAnswer(seen_at=None, reached=None, reason="your connection comes through a relay")
        if len(question) > MAX_QUESTION_BYTES:
            return DialBackAnswer(seen_at=ip, reached=None, reason="too many addresses")
        if not self._may_ask(f"ip {ip}", IP_BURST, IP_PERIOD):
            return DialBackAnswer(seen_at=ip, reached=None, reason="your neighbours asked a moment ago")
        if self._waiting >= MAX_WAITING:
            return DialBackAnswer(seen_at=ip, reached=None, reason="others are being called back")
        self._waiting += 1
        try:
            async with self._dialling:
                targets = await _targets(question.split(",")[:MAX_ADDRESSES], ip)
                if not targets:
                    reason = "none of your addresses is where you come from"
                    return DialBackAnswer(seen_at=ip, reached=False, elsewhere=True, reason=reason)
                reached = await _dial(caller, targets[:MAX_DIALLED])
                return DialBackAnswer(seen_at=ip, reached=reached, reason="" if reached else "nobody answered as you")
        except NetworkError as error:
            logger.warning("could not call a peer back: %s", error)
            return DialBackAnswer(seen_at=ip, reached=None, reason="p2pd did not start")
        finally:
            self._waiting -= 1

    async def _ip_of(self, caller: PeerID) -> IPv4Address | IPv6Address | None:
        """Where the caller's direct connection comes from, as our own kernel saw it."""
        for peer in await self._p2p.list_peers():
            if peer.peer_id == caller:
                for address in map(str, peer.addrs):
                    if relay_of(address) is None and (ip := ip_of(address)) is not None:
                        return ip_address(ip)
        return None

    def _may_ask(self, who: str, burst: int, period: float) -> bool:
        now = time.monotonic()
        if who not in self._asked and len(self._asked) >= _MAX_REMEMBERED:
            longest = max(PEER_PAUSE, IP_PERIOD)
            self._asked = {name: times for name, times in self._asked.items() if now - times[-1] < longest}
            if len(self._asked) >= _MAX_REMEMBERED:
                return False
        times = self._asked.setdefault(who, deque(maxlen=burst))
        if len(times) == burst and now - times[0] < period:
            return False
        times.append(now)
        return True


async def _targets(addresses: list[str], ip: IPv4Address | IPv6Address) -> list[Multiaddr]:
    """Those of a stranger's addresses that lead to this ip address, with the ip in the place of a name."""
    return [
        binary_maddr(target) for address in addresses for target in await resolved(address) if ip_of(target) == str(ip)
    ]


async def resolved(address: str) -> list[str]:
    """A stranger's address with ip addresses in the place of a name; none if it is no direct address of a peer."""
    try:
        check_announce_address(address)
    except BadAddress:
        return []
    _, protocol, host, *rest = address.rstrip("/").split("/")
    if not rest or rest[0] not in ("tcp", "udp"):
        return []
    ips = {ip_of(address)} if protocol in ("ip4", "ip6") else await _resolve(host)
    return [f"/ip{ip_address(ip).version}/{ip}/{'/'.join(rest)}" for ip in sorted(filter(None, ips))]


async def _resolve(host: str) -> set[str]:
    try:
        async with asyncio.timeout(_RESOLVE_TIMEOUT):
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:  # time-outs included
        return set()
    return {str(entry[4][0]) for entry in found}


async def _dial(peer: PeerID, targets: list[Multiaddr]) -> bool:
    """Whether a new node meets this peer at one of these addresses. Raises NetworkError if there is no such node."""
    async with fresh_peer() as p2p:
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                await p2p._client.connect(peer, targets)
            return True
        except (P2PDaemonError, EOFError, OSError) as error:  # time-outs included
            logger.info("could not call %s back: %r", peer, error)
            return False
