"""How others reach this node: directly, or through relays. Found out by asking peers to call back."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import runtime_pb2
from pydantic import ValidationError

from .addresses import ip_of, relay_of, without_peer_id
from .data_structures import RelayMode
from .dial_back import MAX_ADDRESSES, DialBackAnswer, ReachabilityProtocol
from .errors import NetworkError
from .reservations import Candidate, Reservations
from .ways import WayfindingP2P

logger = logging.getLogger(__name__)

#: Peers that are asked at a time.
_NUM_ASKED = 3
#: Seconds for a peer to answer: others may be before us in its line, and each call takes up to six.
_ANSWER_TIMEOUT = 15.0
_CONNECT_TIMEOUT = 5.0
#: Seconds until peers are asked anew: if none gave an answer, and otherwise.
_ASK_SOON, _ASK_AGAIN = 60.0, 900.0


class Reachability:
    """Decides whether this node needs relays, and keeps them.

    own_addresses: those that this node announces, each with its /p2p/ID. candidates: peers to ask, and to be relays.
    on_change: called when `relays` changes.
    """

    def __init__(
        self,
        p2p: WayfindingP2P,
        mode: RelayMode,
        *,
        own_addresses: Callable[[], Awaitable[list[str]]],
        announced: bool,
        candidates: Callable[[], Sequence[Candidate]],
        on_change: Callable[[], None],
    ):
        """announced: the addresses are those that the operator gave. If nobody can check them, he is believed."""
        self._p2p = p2p
        self._mode = mode
        self._own_addresses = own_addresses
        self._announced = announced
        self._candidates = candidates
        self._reservations = Reservations(p2p, candidates, on_change)
        self._watching: asyncio.Task[None] | None = None
        self._verdict: bool | None = None
        self.relayed = mode == "always"

    @property
    def relays(self) -> dict[str, str]:
        """The address of each relay by its peer id; empty for a node that is reached directly."""
        return self._reservations.relays

    async def find_out(self) -> None:
        """Ask peers, if that is left to them; `relayed` is known then."""
        if self._mode == "auto":
            self._verdict = await self._ask_peers()
            self.relayed = self._verdict is False

    async def start(self, timeout: float) -> None:
        """Find a relay if one is needed. Raises JoinFailed after `timeout` seconds without one."""
        if self.relayed:
            await self._reservations.start(timeout)
        if self._mode == "auto":
            self._watching = asyncio.create_task(self._watch())

    def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self._reservations.stop()

    async def _watch(self) -> None:
        """Ask again now and then: routers restart, and a port may be opened."""
        while True:
            period = _ASK_AGAIN if self._verdict is not None else _ASK_SOON
            await asyncio.sleep(period * random.uniform(0.8, 1.2))
            try:
                verdict = await self._ask_peers()
            except NetworkError as error:
                logger.info("could not ask peers to call back: %s", error)
                continue
            if verdict is None:
                continue
            self._verdict = verdict
            if not verdict and not self.relayed:
                logger.warning("peers cannot call this one back any more: looking for relays")
                self._reservations.start_soon()
            elif verdict and self.relayed:
                logger.warning("peers can call this one back now: giving its relays up")
                self._reservations.stop()
            self.relayed = not verdict

    async def _ask_peers(self) -> bool | None:
        """Whether we can be reached; None: nobody knows."""
        own = [address for address in await self._own_addresses() if relay_of(address) is None]
        if not self._announced and all(distance(ip_of(address)) == 0 for address in own):
            return True  # who listens on loopback alone wants to be reached from there alone
        question = ",".join(str(without_peer_id(address)) for address in own[:MAX_ADDRESSES])
        asked = [self._ask(candidate, question) for candidate in self._candidates()[:_NUM_ASKED]]
        answers = [answer for answer in await asyncio.gather(*asked) if answer is not None]
        for answer in answers:
            logger.info("called back: %s", answer)
        return judge(answers, self._announced)

    async def _ask(self, candidate: Candidate, question: str) -> DialBackAnswer | None:
        peer = PeerID.from_base58(candidate.peer_id)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                await self._p2p._client.connect(peer, [without_peer_id(address) for address in candidate.addresses])
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                stub = ReachabilityProtocol.get_stub(self._p2p, peer)
                response = await stub.rpc_dial_back(runtime_pb2.ExpertUID(uid=question), timeout=_ANSWER_TIMEOUT)
            return DialBackAnswer.model_validate_json(response.serialized_info)
        except (P2PDaemonError, P2PHandlerError, ValidationError, EOFError, OSError) as error:  # time-outs included
            logger.info("peer %s does not say whether it can call us back: %r", candidate.peer_id, error)
            return None


def judge(answers: Sequence[DialBackAnswer], announced: bool) -> bool | None:
    """Whether a node can be reached, by what peers say that tried; None if none did.

    announced: the operator gave the addresses. A peer that sees the node elsewhere can say nothing about those; about
    addresses that the node found out by itself it says that they lead nowhere (they are those behind a NAT).
    Only the farthest peers count: one on this machine or in this house can call back where the world cannot. Of these
    most must have got through. In doubt a node takes relays, for who can reach it directly still does.
    """
    tried = [answer for answer in answers if answer.reached is not None and not (announced and answer.elsewhere)]
    farthest = max((distance(answer.seen_at) for answer in tried), default=0)
    counting = [answer for answer in tried if distance(answer.seen_at) == farthest]
    return 2 * sum(answer.reached is True for answer in counting) > len(counting) if counting else None


def distance(ip: IPv4Address | IPv6Address | str | None) -> int:
    """How far an address is. 0: on this machine. 1: in the same private network. 2: anywhere, also under a name.

    Networks of providers and overlays (100.64.0.0/10) are private, groups of machines (multicast) as well.
    """
    if ip is None:
        return 2
    address = ip_address(str(ip))
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback or address.is_unspecified:  # who dials 0.0.0.0 meets himself
        return 0
    return 2 if address.is_global and not address.is_multicast else 1
