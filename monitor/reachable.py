"""Can a peer be reached by somebody who comes anew, and if not, at which step does it fail, and why?

A connection that exists would hide that there is no way to make another, so a new libp2p node of its own dials.

Whoever may ask could have this machine dial others, to scan them. Therefore:

- only servers of the swarm and peers in this node's routing table are looked for, one at a time;
- only addresses are dialled that the swarm told, MAX_DIALLED at most. Strangers say where they live; so addresses of
  this machine or of private networks are dialled only if peers that this node is connected to live there, too;
- answers do not tell the addresses, unless the operator allowed that.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable
from typing import NoReturn

from hivemind.dht.protocol import DHTProtocol
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2

from swarm.addresses import EXAMPLE_PEER, binary_maddr, ip_of, is_peer_id, peer_id_of
from swarm.control import SturdyControl
from swarm.data_structures import ServerInfo
from swarm.dial_back import DIAL_TIMEOUT, MAX_DIALLED, resolved
from swarm.errors import PeerRefused, PeerTimeout, PeerUnreachable, ProtocolError, SwarmError, UsageError
from swarm.fresh_peer import fresh_peer
from swarm.join import Step, dial_reason
from swarm.node import Node
from swarm.reachability import distance
from swarm.rpc import ping
from swarm.whereabouts import addresses_of, connected_addresses

from .hiding import hide_addresses
from .picture import Picture
from .report import ReachabilityReport, ReachabilityStep, Way

logger = logging.getLogger(__name__)

_FIND_TIMEOUT = 5.0  # seconds
_ANSWER_TIMEOUT = 5.0
_TIME_LIMIT = 45.0  # for one check: relays, and the names of their addresses, add up
_LINE_TIMEOUT = 30.0  # for checks that others asked for before
_MAX_RELAYS = 2  # of one peer that are tried
_MAX_REASON = 400  # letters; some of the words come from strangers

_ADVICE: dict[ReachabilityStep, str] = {
    "find": "check that it runs and has joined this swarm; who left is forgotten after a while",
    "relay": "check that it and its relay still run; it looks for another relay by itself, which is any peer that can "
    "be reached directly, such as `swarm run-bootstrap`",
    "dial": "check that it runs, that no firewall stands between, and that the addresses are right that it announces "
    "(--announce-maddrs, --port)",
    "handshake": "its address may belong to another machine or process by now; start it anew so that it announces the "
    "right one, with --identity-path if it is to keep its id",
    "answer": "look at its log, and start it anew if it hangs; all peers of a swarm need compatible versions and the "
    "same swarm key",
}


class _Failed(Exception):
    def __init__(self, step: ReachabilityStep, reason: str):
        super().__init__(reason)
        self.step: ReachabilityStep = step


class Reachability:
    """Checks one peer at a time, others wait. For the loop of its node. show_addresses: in reasons."""

    def __init__(self, node: Node, *, show_addresses: bool = False):
        self._node = node
        self._show_addresses = show_addresses
        self._one = asyncio.Lock()

    async def check(self, picture: Picture, peer_id: str) -> ReachabilityReport:
        """Takes `_TIME_LIMIT` seconds at most, once those before it in the line are done.

        Raises UsageError for what is no id of another peer, SwarmError if others took all of the time or this machine
        cannot dial (NetworkError).
        """
        if not is_peer_id(peer_id):
            raise UsageError(
                f"{peer_id!r:.80} is not the id of a peer: it should look like {peer_id_of(EXAMPLE_PEER)} and be "
                "complete"
            )
        if peer_id == self._node.peer_id:
            raise UsageError(f"{peer_id} is this monitor itself: ask for another peer")
        info = _info_of(picture, peer_id)
        if info is None and not self._node.knows(peer_id):
            reason = "it is neither a server of this swarm nor a peer that keeps records for it, as far as we know"
            return self._failure(peer_id, _Failed("find", reason))
        try:
            async with asyncio.timeout(_LINE_TIMEOUT):
                await self._one.acquire()
        except TimeoutError:
            raise SwarmError("other peers are being checked: try again in a few seconds") from None
        try:
            async with asyncio.timeout(_TIME_LIMIT), fresh_peer(self._node.swarm_key) as dialler:
                way = await self._meet(dialler, picture, peer_id, info)
                round_trip = await _answer_time(dialler, peer_id, is_server=info is not None)
        except _Failed as failure:
            return self._failure(peer_id, failure)
        except TimeoutError:
            return self._failure(peer_id, _Failed("dial", f"no way to it was found within {_TIME_LIMIT:g} s"))
        finally:
            self._one.release()
        return ReachabilityReport(
            peer_id=peer_id, reachable=True, way=way, round_trip=round_trip, step=None, reason=None
        )

    def _failure(self, peer_id: str, failure: _Failed) -> ReachabilityReport:
        said = str(failure) if self._show_addresses else hide_addresses(str(failure))
        return ReachabilityReport(
            peer_id=peer_id,
            reachable=False,
            way=None,
            round_trip=None,
            step=failure.step,
            reason=f"{said[:_MAX_REASON]}; {_ADVICE[failure.step]}",
        )

    async def _meet(self, dialler: P2P, picture: Picture, peer_id: str, info: ServerInfo | None) -> Way:
        """Connect to the peer the way that it announces. Raises _Failed."""
        if info is None or not (info.relayed or info.relays):
            await _connect(dialler, peer_id, await self._find(picture, peer_id))
            return "direct"
        if not info.relays:
            raise _Failed("relay", "it is reached through relays only, and has none at the moment")
        failures = []
        for relay in info.relays[:_MAX_RELAYS]:
            try:
                await self._meet_through(dialler, picture, peer_id, relay)
                return "relay"
            except _Failed as failure:
                failures.append(failure)
        raise next((failure for failure in failures if failure.step != "relay"), failures[0])

    async def _meet_through(self, dialler: P2P, picture: Picture, peer_id: str, relay: str) -> None:
        name = f"its relay ...{relay[-6:]}"
        if not is_peer_id(relay):
            raise _Failed("relay", f"{name} is no peer")
        try:
            await _connect(dialler, relay, await self._find(picture, relay))
        except _Failed as failure:
            raise _Failed("relay", f"{name} cannot be reached: {failure}") from failure
        try:
            await _connect(dialler, peer_id, [f"/p2p/{relay}/p2p-circuit"])
        except _Failed as failure:
            words = str(failure.__cause__)
            if "NO_RESERVATION" in words:
                raise _Failed("relay", f"{name} does not carry connections to it any more") from failure
            if "CONNECTION_FAILED" in words:
                raise _Failed("dial", f"{name} does not reach it either") from failure
            if "PERMISSION_DENIED" in words or "RESOURCE_LIMIT_EXCEEDED" in words:
                raise _Failed("relay", f"{name} refuses to carry a connection to it") from failure
            raise _Failed(failure.step, f"through {name}: {failure}") from failure

    async def _find(self, picture: Picture, peer_id: str) -> list[str]:
        """Where to dial a peer. Raises _Failed."""
        peer, p2p = PeerID.from_base58(peer_id), self._node.p2p
        known = await addresses_of(p2p, peer, _FIND_TIMEOUT)
        known += [address for address in picture.addresses.get(peer_id, ()) if address not in known]
        if not known:
            known = await self._find_by_connecting(peer)
        found = await asyncio.gather(*map(resolved, known[: 2 * MAX_DIALLED]))  # names of theirs may take long each
        targets = dict.fromkeys(itertools.chain.from_iterable(found))
        allowed = _allowed(targets, await connected_addresses(p2p))
        if not allowed:
            raise _Failed("find", f"it cannot be dialled from here at any of its addresses: {', '.join(known)}")
        return allowed[:MAX_DIALLED]

    async def _find_by_connecting(self, peer: PeerID) -> list[str]:
        """libp2p remembers addresses of peers that are gone, but uses them for connecting alone. Raises _Failed."""
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                await self._node.p2p._client.connect(peer, [])
        except (P2PDaemonError, EOFError, OSError) as error:  # time-outs included
            if "routing: not found" in str(error) or "no addresses" in str(error):
                raise _Failed("find", "nobody that we asked knows an address of it") from error
            _fail_to_dial(error)
        found = await addresses_of(self._node.p2p, peer, _FIND_TIMEOUT)
        if not found:
            raise _Failed("find", "nobody that we asked knows an address of it")
        return found


def _info_of(picture: Picture, peer_id: str) -> ServerInfo | None:
    """What a server of any model announces; None if there is no such server."""
    records = (model.snapshot.get(peer_id) for model in picture.models)
    return next((record.info for record in records if record is not None), None)


def _allowed(targets: Iterable[str], connected: Iterable[str]) -> list[str]:
    """Public addresses, and others if peers that we are connected to live as near."""
    near = {distance(ip_of(address)) for address in connected} | {distance(None)}
    return [target for target in targets if distance(ip_of(target)) in near]


async def _connect(dialler: P2P, peer_id: str, addresses: list[str]) -> None:
    """Raises _Failed."""
    try:
        async with asyncio.timeout(DIAL_TIMEOUT):
            await dialler._client.connect(PeerID.from_base58(peer_id), list(map(binary_maddr, addresses)))
    except (P2PDaemonError, EOFError, OSError) as error:  # time-outs included
        _fail_to_dial(error)


def _fail_to_dial(error: Exception) -> NoReturn:
    """Raises _Failed, in words that tell at which step."""
    logger.info("a peer could not be dialled: %r", error)
    if isinstance(error, TimeoutError):
        raise _Failed("dial", f"no answer within {DIAL_TIMEOUT:g} s") from error
    step, reason = dial_reason(str(error))
    names: dict[Step, ReachabilityStep] = {Step.ADDRESS: "find", Step.HANDSHAKE: "handshake"}
    raise _Failed(names.get(step, "dial"), reason) from error


async def _answer_time(dialler: P2P, peer_id: str, *, is_server: bool) -> float:
    """Seconds of a round trip to a peer that took our connection. Raises _Failed."""
    ask = ping if is_server else _ping_dht
    try:
        await ask(dialler, peer_id, _ANSWER_TIMEOUT)  # the first question takes longer
        return await ask(dialler, peer_id, _ANSWER_TIMEOUT)
    except PeerTimeout as error:
        raise _Failed(
            "answer",
            f"it takes connections but did not answer within {_ANSWER_TIMEOUT:g} s: it hangs or has too much to do",
        ) from error
    except PeerRefused as error:
        raise _Failed("answer", await _refusal(dialler, peer_id, error)) from error
    except ProtocolError as error:
        raise _Failed("answer", f"what it answers makes no sense to this version: {error}") from error
    except PeerUnreachable as error:
        what = "as a server" if is_server else "as a peer of a swarm"
        if "protocols not supported" in str(error):
            raise _Failed("answer", f"it takes connections but does not answer {what}") from error
        raise _Failed("answer", f"it took the connection but broke it: {error}") from error


async def _refusal(dialler: P2P, peer_id: str, error: PeerRefused) -> str:
    """Why a peer does not want to talk to us: usually for want of a swarm key."""
    control = dialler._client.control
    assert isinstance(control, SturdyControl)
    try:
        await control.meet(PeerID.from_base58(peer_id))
    except PeerRefused as refusal:
        return str(refusal)
    except (P2PDaemonError, EOFError, OSError) as trouble:  # time-outs included
        logger.info("peer %s does not say why it refuses: %r", peer_id, trouble)
    return f"it refused to answer: {error}"


async def _ping_dht(dialler: P2P, peer_id: str, timeout: float) -> float:
    """The same of a peer that is no server. Raises PeerError."""
    started = time.perf_counter()
    # hivemind's own way to a stub is for a node that takes part in the DHT
    stub = super(DHTProtocol, DHTProtocol).get_stub(dialler, PeerID.from_base58(peer_id))
    try:
        async with asyncio.timeout(timeout):
            await stub.rpc_ping(dht_pb2.PingRequest())
    except TimeoutError as error:
        raise PeerTimeout(f"peer {peer_id} did not answer within {timeout:g} s") from error
    except P2PHandlerError as error:
        raise PeerRefused(f"peer {peer_id} could not answer: {error}") from error
    except (P2PDaemonError, OSError, EOFError) as error:
        raise PeerUnreachable(f"peer {peer_id} cannot be reached: {error}") from error
    return time.perf_counter() - started
