"""What one step of one row costs in seconds: on the way between two peers, and inside a server.

The time of a chain is the sum, over its servers in order, of

    edge_time     one way from the peer before (the client, for the first): half of a measured, smoothed round trip;
                  `UNKNOWN_ROUND_TRIP` where nobody measured it, `SAME_PEER_TIME` from a peer to itself
  + entry_time    what a server spends on a step whatever its blocks: `HOP_TIME`, the rest of the batch that it works
                  on when the step arrives, `company_time`, and `RELAY_TIME` if it is behind a relay
  + span_time     the blocks that are used: their share of a decode step through the whole span, as far as the step has
                  a batch for itself

A step that shares its batch leaves when the batch is done: it takes as long as the whole span, however few blocks it
uses itself (`company_time`).

and of the edge from the last server back to the client. A server whose cache this session would nearly fill counts as
up to `SHORT_CACHE` slower (`cache_factor`), which is no prediction but a preference.

The load is what a server itself measured over the last seconds (`ServerInfo.busy_rows`). Rows of sessions that rest
count as `IDLE_SHARE` of a row: they will be back.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swarm.data_structures import DECODE_ROWS, ServerState

if TYPE_CHECKING:
    from swarm.data_structures import ServerInfo
    from swarm.dht import ServerRecord

    from .snapshot import Snapshot

#: Seconds of round trip between peers that nobody measured. About the distance across a continent: a near server
#: that was measured wins over an unknown one, and an unknown one still wins over a server overseas.
UNKNOWN_ROUND_TRIP = 0.1

#: Tokens/s assumed of a server that announces less, zero (not measured yet) included. Ten seconds a token is slower
#: than anything worth using, so such a server is taken only where nobody else holds the blocks.
SLOWEST_THROUGHPUT = 0.1

#: Seconds that a server spends on a step beyond network and compute: reading it, queueing it, and a further cut of
#: its batch when other sessions use other blocks. Keeps a chain from hopping about for differences below noise.
HOP_TIME = 0.002

#: Seconds added for each hop to a server behind a relay: the relay shares its line among many and may drop connections.
RELAY_TIME = 0.05

#: Seconds charged for going on at the peer where the hidden states are already. Within a chain that never happens, but
#: a part that is rebuilt may meet the peer before or after it: a hop for nothing, and no new peer to trust. So it is
#: taken only where nobody else holds the blocks.
SAME_PEER_TIME = 30.0

#: What each further row adds to a batch, as a share of the step of one row, where a server announced one figure only.
#: Measured for SmolLM2's blocks on a CPU: 0.08.
ROW_SHARE = 0.1

#: How much of a busy row a session's row counts that was not at work lately.
IDLE_SHARE = 0.25

#: How much slower a server counts that has no room for anybody after this session.
SHORT_CACHE = 0.1


def edge_time(snapshot: Snapshot, from_peer: str | None, to_peer: str | None) -> float:
    """Seconds that hidden states travel one way; None is the client. Infinite if the client cannot reach the peer.

    Half of the round trip, which is the same both ways: the client measured its own, servers announce theirs.
    """
    if from_peer == to_peer:
        return 0.0 if from_peer is None else SAME_PEER_TIME
    if from_peer is None or to_peer is None:
        return snapshot.pings.get(from_peer or to_peer or "", UNKNOWN_ROUND_TRIP) / 2
    one, other = snapshot.get(from_peer), snapshot.get(to_peer)
    return UNKNOWN_ROUND_TRIP / 2 if one is None or other is None else server_edge_time(one, other)


def server_edge_time(one: ServerRecord, other: ServerRecord) -> float:
    """Seconds that hidden states travel between two different servers, if either announced their round trip.

    The same both ways. If both announced it, the shorter one: chance only ever makes an answer later.
    """
    theirs = one.info.next_pings.get(other.peer_id), other.info.next_pings.get(one.peer_id)
    return min((round_trip for round_trip in theirs if round_trip is not None), default=UNKNOWN_ROUND_TRIP) / 2


def effective_throughput(server: ServerInfo) -> float:
    """Tokens/s to count on: what the server announces, at least `SLOWEST_THROUGHPUT`."""
    return max(server.throughput, SLOWEST_THROUGHPUT)


def counted_throughputs(servers: Sequence[ServerInfo]) -> list[float]:
    """Tokens/s to count on of each of these. A server that loads blocks and does not know yet how fast they will run
    counts like the median of the others: as next to nothing it would look like a place where nobody is."""
    known = [effective_throughput(one) for one in servers if one.throughput > 0]
    usual = statistics.median(known) if known else SLOWEST_THROUGHPUT
    return [
        usual if one.throughput == 0 and one.state is ServerState.JOINING else effective_throughput(one)
        for one in servers
    ]


def present_rows(server: ServerInfo) -> float:
    """How many rows keep a server busy, on average. Not an integer."""
    busy = server.busy_rows if server.busy_rows is not None else server.running_rows + server.waiting_rows
    return max(busy, IDLE_SHARE * server.session_rows)


def step_time(server: ServerInfo, num_rows: float) -> float:
    """Seconds of a decode step of `num_rows` >= 1 rows through the whole span.

    Between the announced figures it is interpolated, beyond them extrapolated; it never falls with more rows.
    """
    times = server.decode_times or (1 / effective_throughput(server),)
    time, rows, per_row = times[0], DECODE_ROWS[0], ROW_SHARE * times[0]
    for more_rows, longer in zip(DECODE_ROWS[1:], times[1:], strict=False):
        per_row = max(0.0, longer - time) / (more_rows - rows)
        if num_rows <= more_rows:
            break
        time, rows = max(time, longer), more_rows
    return time + per_row * (num_rows - rows)


def entry_time(server: ServerInfo, extra_rows: float = 0.0) -> float:
    """Seconds that a step spends in a server beside its own computation.

    The step joins the next batch. While one row is at work for a share of the time, a batch is in progress with that
    probability; on average half of it is left. extra_rows: of sessions that others are about to open.
    """
    rows = present_rows(server) + extra_rows
    queue_time = min(1.0, rows) * step_time(server, max(1.0, rows)) / 2
    return HOP_TIME + queue_time + company_time(server, extra_rows) + (RELAY_TIME if server.relayed else 0.0)


def company_time(server: ServerInfo, extra_rows: float = 0.0) -> float:
    """Seconds of a batch with rows of others, who use the whole span as far as we know, times how likely that is."""
    rows = present_rows(server) + extra_rows
    return min(1.0, rows) * step_time(server, 1 + rows)


def span_time(server: ServerInfo, num_blocks_used: int, extra_rows: float = 0.0) -> float:
    """Seconds that the server computes on one more row in so many of its blocks, times how likely it is alone then."""
    rows = present_rows(server) + extra_rows
    return max(0.0, 1.0 - rows) * num_blocks_used / len(server.span) * step_time(server, 1 + rows)


def cache_factor(server: ServerInfo, cache_tokens: int) -> float:
    """By how much slower a server counts because a session of so many tokens leaves it less room than that again."""
    left = server.cache_tokens_left - cache_tokens
    return 1.0 if left >= cache_tokens else 1.0 + SHORT_CACHE * (1 - max(0, left) / cache_tokens)
