"""One peer: p2pd, hivemind's P2P and DHTNode, in one asyncio loop of one thread; with a sync face for the client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import logging
import tempfile
import threading
import weakref
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P
from hivemind.utils.multiaddr import Multiaddr

from .addresses import check_announce_address, check_listen_address, check_peer_address, peer_id_of
from .control import SturdyControl, make_sturdy
from .errors import BadAddress, NetworkError, PortInUse
from .identity import Identity
from .join import InitialPeers
from .membership import SwarmKey
from .p2p_daemon import P2PDaemon
from .ports import check_ports_are_free
from .private_control import make_private
from .records import Complaints, RecordValidator

logger = logging.getLogger(__name__)

#: Neither private nor public (see the special-purpose address registry of IANA), but found in containers and sandboxes.
_RESERVED = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.2.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4")
)

_START_TIMEOUT = 30.0  # seconds for p2pd to start; it takes 0.1 on an idle machine

Result = TypeVar("Result")


@dataclass(frozen=True)
class NodeConfig:
    """Settings of one node.

    initial_peers: multiaddresses of live peers, each with its /p2p/ID; empty starts a new swarm.
    host_maddrs: where to listen.
    announce_maddrs: what others shall use instead, without /p2p/ID.
    identity_path: private key file, made if absent; None: a fresh identity that is not kept.
    swarm_key: key file of a private swarm; None: the swarm is open to all.
    listen: False for clients, which accept no connections and store nothing for others.
    join_timeout: seconds for the first initial peer to answer.
    rejoin_period: meet the initial peers again once in this many seconds, so that one that restarted is found again.
    """

    initial_peers: tuple[str, ...] = ()
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    identity_path: Path | None = None
    swarm_key: Path | None = None
    listen: bool = True
    join_timeout: float = 15.0
    rejoin_period: float = 30.0


class Node:
    """A running peer. Make it with `await Node.start(config)`, use it in the same loop, end it with `stop()`.

    The thread that runs the loop must outlive the node: p2pd ends with it.
    """

    peer_id: str
    p2p: P2P
    dht: DHTNode
    validator: RecordValidator

    def __init__(self, config: NodeConfig):
        """For `start` only."""
        self.config = config
        self.complaints = Complaints()
        self._folder = tempfile.TemporaryDirectory(prefix="petswarm-", dir=_socket_root(), ignore_cleanup_errors=True)
        self._identity: Identity | None = None
        self._daemon: P2PDaemon | None = None
        self._p2p: P2P | None = None
        self._initial_peers: InitialPeers | None = None
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
        key = None if self.config.swarm_key is None else SwarmKey.load(self.config.swarm_key)
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

        # P2P puts the socket for incoming streams at a class-wide prefix; ours lies in the private folder.
        p2p_class: type[P2P] = type("P2PInFolder", (P2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/"})
        try:
            self.p2p = self._p2p = await p2p_class.replicate(Multiaddr(f"/unix{control}"))
            if key is None:
                await make_sturdy(self.p2p, SturdyControl)
            else:
                await make_private(self.p2p, key)
        except Exception as error:
            raise NetworkError(f"could not connect to p2pd: {error!r}") from error
        self.dht = await DHTNode.create(
            p2p=self.p2p,
            # The same after a restart, so that others recognise us, and not a free choice.
            node_id=DHTID.generate(source=self.peer_id),
            client_mode=not self.config.listen,
            record_validator=self.validator,
            # No caches: a cached record may be older than its server, and strangers may write to caches.
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            cache_size=-1,  # keeps nothing; 0 would mean unbounded
            reuse_get_requests=False,
        )
        others = [address for address in self.config.initial_peers if not self._is_me(address)]
        peers = self._initial_peers = InitialPeers(self.p2p, self.dht, others)
        await peers.join(self.config.join_timeout)
        self._rejoining = asyncio.create_task(peers.keep_joined(self.config.rejoin_period))

    def _is_me(self, address: str) -> bool:
        """Whether a list of initial peers that many nodes share names this very node."""
        return peer_id_of(address) == self.peer_id

    async def _start_daemon(self, identity: Identity, control: Path) -> P2PDaemon:
        arguments = {
            "listen": f"/unix{control}",
            "id": str(identity.path),
            "dhtServer" if self.config.listen else "dhtClient": "1",
            "idleTimeout": f"{_START_TIMEOUT:g}s",
            "connManager": "1",
            "tls": "1",
            # Talk to nobody but those that we are told to.
            "natPortMap": "0",
            "autonat": "0",
            "b": "0",
            "relay": "0",
            "relayService": "0",
            "relayDiscovery": "0",
            "autoRelay": "0",
        }
        if self.config.listen:
            check_ports_are_free(self.config.host_maddrs)
            arguments["hostAddrs"] = ",".join(self.config.host_maddrs)
            if self.config.announce_maddrs:
                arguments["announceAddrs"] = ",".join(self.config.announce_maddrs)
        else:
            arguments["noListenAddrs"] = "1"
        try:
            return await P2PDaemon.start([f"-{name}={value}" for name, value in arguments.items()], _START_TIMEOUT)
        except NetworkError as error:
            if "address already in use" in str(error):
                wanted = ", ".join(self.config.host_maddrs)
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
        return bool(self.dht.protocol.routing_table.uid_to_peer_id)

    async def rejoin(self) -> None:
        """Meet the initial peers now, as at the start. Raises JoinFailed."""
        self.check()
        if self._initial_peers is not None:
            await self._initial_peers.join(self.config.join_timeout)

    async def addresses(self) -> list[str]:
        """Where others can reach this node now, each address with its /p2p/ID; none for a client."""
        if not self.config.listen:
            return []
        try:
            return [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]
        except Exception as error:
            raise NetworkError(f"p2pd does not tell our addresses: {error!r}") from error

    async def ready_address(self) -> str:
        """The one address to hand to others: an announced one, else one of this machine's, else a loopback one.

        An address in a reserved range comes last: a swarm cannot be joined through it.
        """
        addresses = await self.addresses()
        if not addresses:
            raise NetworkError("this node has no address: it does not listen")
        if self.config.announce_maddrs:
            return f"{self.config.announce_maddrs[0].rstrip('/')}/p2p/{self.peer_id}"
        return min(addresses, key=_is_second_choice)

    async def stop(self) -> None:
        """End the node and p2pd, and remove their files. Takes at most a few seconds; harmless when repeated."""
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopped)

    async def _stop(self) -> None:
        if self._rejoining is not None:
            self._rejoining.cancel()
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


class NodeThread:
    """A node in a thread of its own, for callers without an event loop.

    p2pd ends when `stop` is called, when this object is collected, and when the process exits.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread, node: Node):
        """For `start` only."""
        self.loop = loop
        self.node = node
        self._finalizer = weakref.finalize(self, _end_thread, loop, thread, node)

    @classmethod
    def start(cls, config: NodeConfig) -> NodeThread:
        """Raises what `Node.start` raises."""
        started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, Node]] = concurrent.futures.Future()
        thread = threading.Thread(target=_run_thread, args=(config, started), name="petswarm-node", daemon=True)
        thread.start()
        loop, node = started.result()
        return cls(loop, thread, node)

    def run(self, coroutine: Coroutine[Any, Any, Result], timeout: float | None = None) -> Result:
        """The coroutine's result, computed in the node's loop. Not to be called from that loop itself.

        timeout: seconds. Raises TimeoutError (the coroutine is cancelled), or what the coroutine raises.
        """
        if not self._finalizer.alive:
            coroutine.close()
            raise NetworkError("this node was stopped")
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()  # also on Ctrl-C; without effect if the coroutine itself raised
            raise

    def stop(self) -> None:
        """End the node and its thread; harmless when repeated."""
        self._finalizer()


def _run_thread(config: NodeConfig, started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, Node]]) -> None:
    """Run a loop with a node in it until somebody stops the loop."""
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        try:
            node = loop.run_until_complete(Node.start(config))
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result((loop, node))
        loop.run_forever()
    finally:
        _cancel_everything(loop)
        loop.close()


def _cancel_everything(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=2.0))
    loop.run_until_complete(loop.shutdown_asyncgens())


def _end_thread(loop: asyncio.AbstractEventLoop, thread: threading.Thread, node: Node) -> None:
    """Stop the node, then its loop. Called once, from any thread: also from the loop's own by garbage collection."""

    async def stop() -> None:
        try:
            await node.stop()
        finally:
            loop.stop()

    with contextlib.suppress(RuntimeError):  # the loop is closed already
        asyncio.run_coroutine_threadsafe(stop(), loop)
    if thread is not threading.current_thread():
        thread.join(timeout=10.0)


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


def _is_second_choice(address: str) -> tuple[bool, bool, bool]:
    _, _, host, *_ = address.split("/")
    ip = ipaddress.ip_address(host)
    # Who is joined through a reserved address never hears of the other peers: libp2p passes theirs on only to callers
    # on loopback, private and public addresses.
    return any(ip in network for network in _RESERVED), ip.is_loopback, "/tcp/" not in address


def _socket_root() -> str | None:
    """A folder whose name leaves room for a socket's: the kernel allows 107 bytes for the whole path."""
    return None if len(tempfile.gettempdir()) < 60 else "/tmp"
