"""One peer: p2pd, hivemind's P2P and DHTNode, in one asyncio loop of one thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID

from .addresses import (
    binary_maddr,
    check_announce_address,
    check_listen_address,
    check_peer_address,
    is_second_choice,
    peer_id_of,
)
from .control import SturdyControl, make_sturdy
from .data_structures import RelayMode
from .dial_back import DialBack
from .errors import BadAddress, NetworkError, PortInUse
from .identity import Identity
from .join import InitialPeers
from .membership import SwarmKey
from .p2p_daemon import P2PDaemon, join_daemon, node_arguments, socket_root
from .ports import check_ports_are_free
from .private_control import make_private
from .reachability import Reachability
from .records import Complaints, RecordValidator
from .relay_service import RelayService, refuse_to_relay
from .reservations import Candidate
from .ways import WayfindingP2P

logger = logging.getLogger(__name__)

_START_TIMEOUT = 30.0  # seconds for p2pd to start; it takes 0.1 on an idle machine


@dataclass(frozen=True)
class NodeConfig:
    """Settings of one node.

    initial_peers: multiaddresses of live peers, each with its /p2p/ID; empty starts a new swarm.
    host_maddrs: where to listen.
    announce_maddrs: what others shall use instead, without /p2p/ID.
    identity_path: private key file, made if absent; None: a fresh identity that is not kept.
    swarm_key: key file of a private swarm; None: the swarm is open to all.
    listen: False for clients, and for servers behind relays: they accept no connections and store nothing for others.
    relay: whether this node has others reach it through relays; "auto": if peers say that they cannot call it back.
    serve_relay: if it is reached directly, carry connections to those that are not.
    join_timeout: seconds for the first initial peer to answer.
    relay_timeout: seconds for the first relay to be found.
    rejoin_period: meet the initial peers again once in this many seconds, so that one that restarted is found again.
    """

    initial_peers: tuple[str, ...] = ()
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    identity_path: Path | None = None
    swarm_key: Path | None = None
    listen: bool = True
    relay: RelayMode = "never"
    serve_relay: bool = True
    join_timeout: float = 15.0
    relay_timeout: float = 20.0
    rejoin_period: float = 30.0


class Node:
    """A running peer. Make it with `await Node.start(config)`, use it in the same loop, end it with `stop()`.

    The thread that runs the loop must outlive the node: p2pd ends with it.
    """

    peer_id: str
    p2p: WayfindingP2P
    dht: DHTNode
    validator: RecordValidator

    def __init__(self, config: NodeConfig):
        """For `start` only."""
        self.config = config
        self.complaints = Complaints()
        #: Unix time in seconds at which the newest record of this node expires, see `dht`
        self.last_expiration = 0.0
        #: of the private swarm; None: the swarm is open to all
        self.swarm_key: SwarmKey | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="petswarm-", dir=socket_root(), ignore_cleanup_errors=True)
        self._identity: Identity | None = None
        self._daemon: P2PDaemon | None = None
        self._p2p: WayfindingP2P | None = None
        self._initial_peers: InitialPeers | None = None
        self._reachability: Reachability | None = None
        #: called when others reach this node through other relays than before
        self.on_new_relays: Callable[[], None] = lambda: None
        self._rejoining: asyncio.Task[None] | None = None
        self._stopped: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: NodeConfig) -> Node:
        """Start p2pd and join the swarm.

        Raises BadAddress or UsageError for what the user got wrong, PortInUse, JoinFailed, or NetworkError.
        """
        _check(config)
        node = cls(config)
        try:
            await node._start()
        except BaseException:
            await asyncio.shield(node.stop())
            raise
        return node

    async def _start(self) -> None:
        self.swarm_key = None if self.config.swarm_key is None else SwarmKey.load(self.config.swarm_key)
        folder = Path(self._folder.name)
        identity = Identity.load_or_create(self.config.identity_path or folder / "identity")
        identity.lock()
        self._identity = identity
        self.peer_id = identity.peer_id
        self.validator = RecordValidator(identity.private_key, self.complaints)
        control = folder / "p2pd.sock"
        self._daemon = await self._start_daemon(identity, control)
        if self.config.identity_path is None:
            identity.path.unlink()  # p2pd has read it; a killed process shall leave no key behind

        self.p2p = self._p2p = await self._connect_to_daemon(folder, control, self.swarm_key)
        await self._offer_help()
        others = [address for address in self.config.initial_peers if not self._is_me(address)]
        reachability = self._reachability = Reachability(
            self.p2p,
            self.config.relay,
            own_addresses=self._direct_addresses,
            announced=bool(self.config.announce_maddrs),
            candidates=lambda: self._helpers(peers),
            on_change=lambda: self.on_new_relays(),
        )
        peers = self._initial_peers = InitialPeers(self.p2p, others)
        await reachability.find_out()
        self.dht = await DHTNode.create(
            p2p=self.p2p,
            # The same after a restart, so that others recognise us, and not a free choice.
            node_id=DHTID.generate(source=self.peer_id),
            # What others stored at a peer behind a relay would be slow to read, and lost with the relay.
            client_mode=not self.config.listen or reachability.relayed,
            record_validator=self.validator,
            # No caches: a cached record may be older than its server, and strangers may write to caches.
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            cache_size=-1,  # keeps nothing; 0 would mean unbounded
            reuse_get_requests=False,
        )
        await peers.join(self.dht, self.config.join_timeout)
        await reachability.start(self.config.relay_timeout)
        self._rejoining = asyncio.create_task(peers.keep_joined(self.config.rejoin_period))

    async def _connect_to_daemon(self, folder: Path, control: Path, key: SwarmKey | None) -> WayfindingP2P:
        try:
            p2p = await join_daemon(WayfindingP2P, folder, control)
            if key is None:
                await make_sturdy(p2p, SturdyControl)
            else:
                await make_private(p2p, key)
        except Exception as error:
            raise NetworkError(f"could not connect to p2pd: {error!r}") from error
        return p2p

    async def _offer_help(self) -> None:
        """To peers that ask whether they can be reached, or that cannot."""
        if self.config.listen:
            await DialBack(self.p2p).register()
        if self.config.listen and self.config.serve_relay:
            await RelayService(self.p2p, self._relay_address).register()
        else:
            await refuse_to_relay(self.p2p)

    async def _relay_address(self) -> bytes | None:
        """Where others reach this node to have it relay."""
        if self.relayed:
            return None
        data: bytes = binary_maddr(await self.ready_address()).to_bytes()
        return data

    def _helpers(self, peers: InitialPeers) -> Sequence[Candidate]:
        """Peers that may say whether we can be reached, and relay to us: those that the user named, then any."""
        named = [Candidate(peer_id, tuple(addresses)) for peer_id, addresses in peers.addresses.items()]
        known = [str(peer) for peer in self._routing_table()]
        random.shuffle(known)
        return named + [Candidate(peer_id) for peer_id in known if peer_id not in peers.addresses]

    def _is_me(self, address: str) -> bool:
        """Whether a list of initial peers that many nodes share names this very node."""
        return peer_id_of(address) == self.peer_id

    async def _start_daemon(self, identity: Identity, control: Path) -> P2PDaemon:
        config = self.config
        if config.listen:
            check_ports_are_free(config.host_maddrs)
        arguments = node_arguments(control, identity.path, _START_TIMEOUT, config.host_maddrs if config.listen else ())
        if config.listen and config.announce_maddrs:
            arguments.append(f"-announceAddrs={','.join(config.announce_maddrs)}")
        try:
            return await P2PDaemon.start(arguments, _START_TIMEOUT)
        except NetworkError as error:
            if "address already in use" in str(error):
                wanted = ", ".join(config.host_maddrs)
                raise PortInUse(f"cannot listen on {wanted}: another program listens there already") from error
            raise

    @property
    def died(self) -> asyncio.Event:
        """Set when p2pd ended though nobody asked it to; the node is then of no use. See `death_message`."""
        return self._running_daemon().died

    @property
    def death_message(self) -> str:
        return self._running_daemon().death_message

    @property
    def daemon_pid(self) -> int:
        return self._running_daemon().pid

    def _running_daemon(self) -> P2PDaemon:
        if self._daemon is None:
            raise NetworkError("this node was not started")
        return self._daemon

    def check(self) -> None:
        """Raises NetworkError if this node was stopped or its p2pd died."""
        if self._stopped is not None:
            raise NetworkError("this node was stopped")
        if self.died.is_set():
            raise NetworkError(self.death_message)

    def knows_others(self) -> bool:
        """Whether any other peer is in this node's routing table. One that fails to answer once is taken out of it."""
        return bool(self._routing_table())

    def knows(self, peer_id: str) -> bool:
        """Whether this very peer is in it."""
        return any(str(peer) == peer_id for peer in self._routing_table())

    def _routing_table(self) -> Sequence[object]:
        """The ids of the peers in it: peers that listen and store records for others."""
        return list(self.dht.protocol.routing_table.uid_to_peer_id.values()) if hasattr(self, "dht") else []

    @property
    def stores_records(self) -> bool:
        """Whether this node takes part in the DHT, and not only asks others."""
        return not self.dht.protocol.client_mode

    async def rejoin(self) -> None:
        """Meet the initial peers now, as at the start. Raises JoinFailed."""
        self.check()
        if self._initial_peers is not None:
            await self._initial_peers.join(self.dht, self.config.join_timeout)

    @property
    def relayed(self) -> bool:
        """Whether others need a relay to reach this node. It may have none at the moment."""
        return self._reachability is not None and self._reachability.relayed

    @property
    def relays(self) -> tuple[str, ...]:
        """The peer ids of the relays through which others reach this node."""
        return () if self._reachability is None else tuple(self._reachability.relays)

    async def addresses(self) -> list[str]:
        """Where others can reach this node now, each address with its /p2p/ID; none for a client."""
        if self._reachability is not None and self._reachability.relayed:
            relays = self._reachability.relays.values()
            return [f"{relay}/p2p-circuit/p2p/{self.peer_id}" for relay in relays]
        return await self._direct_addresses()

    async def _direct_addresses(self) -> list[str]:
        if not self.config.listen:
            return []
        try:
            return [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]
        except Exception as error:
            raise NetworkError(f"p2pd does not tell our addresses: {error!r}") from error

    async def ready_address(self) -> str:
        """The one address to hand to others: through a relay if others need one, else an announced one, else one of
        this machine's, else a loopback one.

        An address in a reserved range comes last: a swarm cannot be joined through it.
        """
        addresses = await self.addresses()
        if not addresses and self.relayed:
            raise NetworkError("this node has no address: it has lost its relays")
        if not addresses:
            raise NetworkError("this node has no address: it does not listen")
        if self.relayed:
            return addresses[0]
        if self.config.announce_maddrs:
            return f"{self.config.announce_maddrs[0].rstrip('/')}/p2p/{self.peer_id}"
        return min(addresses, key=is_second_choice)

    async def stop(self) -> None:
        """End the node and p2pd, and remove their files. Takes at most a few seconds; harmless when repeated."""
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopped)

    async def _stop(self) -> None:
        if self._rejoining is not None:
            self._rejoining.cancel()
        if self._reachability is not None:
            self._reachability.stop()
        if hasattr(self, "dht"):
            self.dht.is_alive = False  # its handlers need no farewell: p2pd goes now
        if self._daemon is not None:
            await self._daemon.stop()
        if self._p2p is not None:
            with contextlib.suppress(Exception):
                await self._p2p.shutdown()
        if self._identity is not None:
            self._identity.unlock()
        self._folder.cleanup()


def _check(config: NodeConfig) -> None:
    """Raises BadAddress before anything was started."""
    for address in config.initial_peers:
        check_peer_address(address)
    if config.listen and not config.host_maddrs:
        raise BadAddress("there is no address to listen on")
    for address in config.host_maddrs if config.listen else ():
        check_listen_address(address)
    for address in config.announce_maddrs:
        check_announce_address(address)
