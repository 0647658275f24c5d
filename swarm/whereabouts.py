"""Where a peer lives, by what this node and its neighbours have learned from the swarm."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable

from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from .addresses import check_announce_address
from .errors import BadAddress

logger = logging.getLogger(__name__)

_MAX_ADDRESSES = 32


async def addresses_of(p2p: P2P, peer: PeerID, timeout: float) -> list[str]:
    """Where a peer can be dialled directly, without its /p2p/ID: where we are connected to it comes first.

    What neighbours say is only as true as they are. Empty if nobody knows anything; timeout: seconds for them to say.
    """
    known: list[Iterable[Multiaddr]] = [one.addrs for one in await p2p.list_peers() if one.peer_id == peer]
    with contextlib.suppress(TimeoutError, OSError, EOFError, P2PDaemonError):
        async with asyncio.timeout(timeout):
            known.append(await _ask_neighbours(p2p, peer, timeout))
    texts = dict.fromkeys(str(address) for addresses in known for address in addresses)
    return [text for text in texts if _is_direct(text)][:_MAX_ADDRESSES]


async def connected_addresses(p2p: P2P) -> list[str]:
    """Where the peers live that this node is connected to."""
    return [str(address) for peer in await p2p.list_peers() for address in peer.addrs]


async def _ask_neighbours(p2p: P2P, peer: PeerID, timeout: float) -> list[Multiaddr]:
    """libp2p's own look-up, which hivemind does not offer."""
    reader, writer = await p2p._client.control.daemon_connector.open_connection()
    try:
        question = p2pd_pb2.DHTRequest(
            type=p2pd_pb2.DHTRequest.FIND_PEER, peer=peer.to_bytes(), timeout=max(1, round(timeout))
        )
        await write_pbmsg(writer, p2pd_pb2.Request(type=p2pd_pb2.Request.DHT, dht=question))
        answer = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, answer)
    finally:
        writer.close()
    found = []
    for address in answer.dht.peer.addrs:
        try:
            found.append(Multiaddr(address))
        except Exception as error:  # whatever the library makes of a stranger's bytes
            logger.debug("an address of %s cannot be read: %r", peer, error)
    return found


def _is_direct(address: str) -> bool:
    try:
        check_announce_address(address)
    except BadAddress:
        return False
    return True
