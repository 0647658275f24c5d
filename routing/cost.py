"""What one step of one row costs in seconds: on the way between two peers, and inside a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .snapshot import Snapshot

if TYPE_CHECKING:
    from swarm.data_structures import ServerInfo
    from swarm.dht import ServerRecord

#: Seconds of round trip between peers that nobody measured. About the distance across a continent: a near server
#: that was measured wins over an unknown one, and an unknown one still wins over a server overseas.
UNKNOWN_ROUND_TRIP = 0.1

#: Tokens/s assumed of a server that announces less, zero (not measured yet) included. Ten seconds a token is slower
#: than anything worth using, so such a server is taken only where nobody else holds the blocks.
SLOWEST_THROUGHPUT = 0.1

#: Seconds that a server spends on a step beyond network and compute: reading it, queueing it, and a further cut of
#: its batch when other sessions use other blocks. Keeps a chain from hopping about for differences below noise.
HOP_TIME = 0.002


def edge_time(snapshot: Snapshot, from_peer: str | None, to_peer: str | None) -> float:
    """Seconds that hidden states travel one way; None is the client. Infinite if the client cannot reach the peer.

    Half of the round trip, which is the same both ways: the client measured its own, servers announce theirs.
    """
    if from_peer == to_peer:
        return 0.0
    if from_peer is None or to_peer is None:
        return snapshot.pings.get(from_peer or to_peer or "", UNKNOWN_ROUND_TRIP) / 2
    one, other = snapshot.get(from_peer), snapshot.get(to_peer)
    return UNKNOWN_ROUND_TRIP / 2 if one is None or other is None else server_edge_time(one, other)


def server_edge_time(one: ServerRecord, other: ServerRecord) -> float:
    """Seconds that hidden states travel between two different servers, if either announced their round trip."""
    round_trip = one.info.next_pings.get(other.peer_id)
    if round_trip is None:
        round_trip = other.info.next_pings.get(one.peer_id, UNKNOWN_ROUND_TRIP)
    return round_trip / 2


def effective_throughput(server: ServerInfo) -> float:
    """Tokens/s to count on: what the server announces, at least `SLOWEST_THROUGHPUT`."""
    return max(server.throughput, SLOWEST_THROUGHPUT)


def span_time(server: ServerInfo, num_blocks_used: int) -> float:
    """Seconds that the server computes on one token of one row in so many of its blocks."""
    return num_blocks_used / len(server.span) / effective_throughput(server)
