"""Predictions about a model: its fastest chain, and what is left of it when a server leaves. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from swarm.data_structures import BlockSpan
from swarm.routing.chain import Chain, chain_time, find_chain
from swarm.routing.cost import edge_time, entry_time, span_time

from .picture import ModelPicture
from .report import ChainReport, Departure, HopReport

#: Cache that a server must have free to count: a short session's.
SESSION_TOKENS = 128


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

    Only the leaving of a server of that chain changes it, so only those are searched anew.
    """
    used = {link.peer_id for link in best or ()}
    now = None if best is None else chain_time(model.served, best)
    found = {}
    for server in model.serving:
        lost = tuple(block for block in server.info.span.blocks() if model.replicas[block] == 1)
        time = now
        if lost:
            time = None
        elif server.peer_id in used:
            rest = best_chain(model, without=server.peer_id)
            time = None if rest is None else chain_time(model.served, rest)
        found[server.peer_id] = Departure(lost_blocks=lost, step_time=time)
    return found
