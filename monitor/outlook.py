"""Predictions about a model: its fastest chain, and what is left of it when a server leaves. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from swarm.data_structures import BlockSpan, ServerInfo
from swarm.routing.chain import Chain, chain_time, find_chain
from swarm.routing.cost import edge_time, entry_time, present_rows, span_time

from .picture import ModelPicture
from .report import ChainReport, Departure, HopReport

#: Cache that a server must have free to count: a short session's.
SESSION_TOKENS = 128

#: Blocks that all searches for the departures of one model's servers go through together, at most: a second or two
#: with thousands of servers. Strangers may announce a model of any size. 125 servers of a model with 80 blocks.
MOST_SEARCHED = 10_000


def best_chain(model: ModelPicture, without: str | None = None) -> Chain | None:
    """The fastest chain of serving servers for a short session of one row; None if some block has none with room.

    without: this server shall not be part of it.
    """
    whole = BlockSpan(start=0, end=model.model.num_blocks)
    exclude = () if without is None else (without,)
    return find_chain(model.served, whole, cache_tokens=SESSION_TOKENS, exclude=exclude)


def describe_chain(model: ModelPicture, chain: Chain) -> ChainReport:
    """What each hop is predicted to take. The way back from the last server counts to it."""
    snapshot, hops, at = model.served, list[HopReport](), None
    for number, link in enumerate(chain):
        record = snapshot.get(link.peer_id)
        assert record is not None
        seconds = edge_time(snapshot, at, link.peer_id) + entry_time(record.info)
        seconds += span_time(record.info, len(link.span))
        if number == len(chain) - 1:
            seconds += edge_time(snapshot, link.peer_id, None)
        hops.append(HopReport(peer_id=link.peer_id, blocks=(link.span.start, link.span.end), seconds=seconds))
        at = link.peer_id
    time = chain_time(snapshot, chain)
    return ChainReport(hops=tuple(hops), step_time=time, tokens_per_second=1 / time)


def departures(model: ModelPicture, best: Chain | None) -> Mapping[str, Departure]:
    """What happens if each of the serving servers leaves, by peer id. best: the fastest chain now.

    The chain is searched as if the others were as busy as they are; then it is charged with what `moved_load` says.
    Only the leaving of a server of the best chain changes the choice, so only those are searched anew, and of a chain
    of very many (see `MOST_SEARCHED`) only the first: the mapping lacks the others.
    """
    now = None if best is None else chain_time(model.served, best)
    lonely = tuple(block for block, count in enumerate(model.replicas) if count == 1)
    used = list(dict.fromkeys(link.peer_id for link in best or ()))
    searched = set(used[: MOST_SEARCHED // model.model.num_blocks])
    found = {}
    for server in model.serving:
        lost = tuple(block for block in lonely if block in server.info.span)
        chain, time = (None, None) if lost else (best, now)
        if chain is not None and server.peer_id in used:
            if server.peer_id not in searched:
                continue
            chain = best_chain(model, without=server.peer_id)
            time = None if chain is None else chain_time(model.served, chain)
        if chain is not None and time is not None:
            time += moved_load(model, chain, server.info)
        found[server.peer_id] = Departure(lost_blocks=lost, step_time=time)
    return found


def moved_load(model: ModelPicture, chain: Chain, leaving: ServerInfo) -> float:
    """Seconds by which a step through a chain of others gets slower because `leaving` leaves its sessions to them.

    Clients move them to other holders of the same blocks, each as is best from where it is, which nobody can know:
    they are taken to spread evenly. With one holder left, all of them meet there.
    """
    rows, slower = present_rows(leaving), 0.0
    if not rows:
        return slower
    for link in chain:
        record = model.served.get(link.peer_id)
        assert record is not None
        span = record.info.span
        shared = model.replicas[max(span.start, leaving.span.start) : min(span.end, leaving.span.end)]
        if shared:
            more = rows / (min(shared) - 1)
            slower += entry_time(record.info, more) + span_time(record.info, len(link.span), more)
            slower -= entry_time(record.info) + span_time(record.info, len(link.span))
    return slower
