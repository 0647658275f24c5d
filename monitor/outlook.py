"""Predictions about a model: its fastest chain, and what is left of it when a server leaves. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.data_structures import BlockSpan
from swarm.routing.chain import Chain, Wanted, chain_time, fastest_chain, find_chain
from swarm.routing.cost import edge_time, entry_time, present_rows, span_time

from .picture import ModelPicture
from .report import ChainReport, Departure, HopReport

if TYPE_CHECKING:
    from swarm.dht import ServerRecord

#: Cache that a server must have free to count: a short session's.
SESSION_TOKENS = 128

#: Blocks that all searches for one report go through together, at most: a second or two with thousands of servers.
#: Strangers may announce many models of any size. 125 searches through a model with 80 blocks.
MOST_SEARCHED = 10_000

#: Of a step's time: by how much the best chain gets slower before another one is looked for.
NOTICEABLE = 0.1


@dataclass
class SearchBudget:
    """left: blocks that searches may still go through."""

    left: int = MOST_SEARCHED

    def take(self, num_blocks: int) -> bool:
        """Whether there is as much left; then it is spent."""
        if num_blocks > self.left:
            return False
        self.left -= num_blocks
        return True


def best_chain(model: ModelPicture) -> Chain | None:
    """The fastest chain of serving servers for a short session of one row; None if some block has none with room."""
    whole = BlockSpan(start=0, end=model.model.num_blocks)
    return find_chain(model.served, whole, cache_tokens=SESSION_TOKENS)


def describe_chain(model: ModelPicture, chain: Chain, correction: float | None = None) -> ChainReport:
    """What each hop is predicted to take. The way back from the last server counts to it.

    correction: see `ChainReport`."""
    snapshot, hops, at, factor = model.served, list[HopReport](), None, correction or 1.0
    for number, link in enumerate(chain):
        record = snapshot.get(link.peer_id)
        assert record is not None
        seconds = edge_time(snapshot, at, link.peer_id) + entry_time(record.info)
        seconds += span_time(record.info, len(link.span))
        if number == len(chain) - 1:
            seconds += edge_time(snapshot, link.peer_id, None)
        hops.append(HopReport(peer_id=link.peer_id, blocks=(link.span.start, link.span.end), seconds=factor * seconds))
        at = link.peer_id
    time = factor * chain_time(snapshot, chain)
    return ChainReport(hops=tuple(hops), step_time=time, tokens_per_second=1 / time, correction=correction)


def departures(
    model: ModelPicture, best: Chain | None, correction: float | None = None, budget: SearchBudget | None = None
) -> Mapping[str, Departure]:
    """What happens if each of the serving servers leaves, by peer id.

    best: the fastest chain now. correction: see `ChainReport`.

    Its sessions move to other holders of its blocks. Each client chooses what is best from where it is, which nobody
    else can know, so they are taken to spread evenly: with one holder left, all of them meet there.

    The best chain is searched anew if the server is part of it, or if its sessions would slow that by more than
    `NOTICEABLE`. If these are more searches than `budget` has, the mapping lacks some servers.
    """
    now = None if best is None else chain_time(model.served, best)
    lonely = tuple(block for block, count in enumerate(model.replicas) if count == 1)
    used = {link.peer_id for link in best or ()}
    budget = budget or SearchBudget()
    found = {}
    for server in sorted(model.serving, key=lambda server: server.peer_id not in used):
        lost = tuple(block for block in lonely if block in server.info.span)
        time = None
        if best is not None and now is not None and not lost:
            time = now + _moved_time(model, best, server)
            if server.peer_id in used or time > (1 + NOTICEABLE) * now:
                if not budget.take(model.model.num_blocks):
                    continue
                time = _time_without(model, server)
        corrected = None if time is None else time * (correction or 1.0)
        found[server.peer_id] = Departure(lost_blocks=lost, step_time=corrected)
    return found


def _time_without(model: ModelPicture, leaving: ServerRecord) -> float | None:
    """Seconds of a step through the fastest chain once this server's sessions have moved; None: there is no chain."""
    moved = {server.peer_id: _moved_rows(model, leaving, server) for server in model.serving}
    whole = BlockSpan(start=0, end=model.model.num_blocks)
    wanted = Wanted(whole, cache_tokens=SESSION_TOKENS, exclude=(leaving.peer_id,))
    chain = fastest_chain(model.served, wanted, extra_rows={peer: rows for peer, rows in moved.items() if rows})
    return None if chain is None else chain_time(model.served, chain) + _moved_time(model, chain, leaving)


def _moved_time(model: ModelPicture, chain: Chain, leaving: ServerRecord) -> float:
    """By how many seconds a step through `chain` gets slower when the sessions of a server that leaves move."""
    slower = 0.0
    for link in chain if present_rows(leaving.info) else ():
        server = model.served.get(link.peer_id)
        assert server is not None
        if rows := _moved_rows(model, leaving, server):
            info, blocks = server.info, len(link.span)
            slower += entry_time(info, rows) - entry_time(info)
            slower += span_time(info, blocks, rows) - span_time(info, blocks)
    return slower


def _moved_rows(model: ModelPicture, leaving: ServerRecord, server: ServerRecord) -> float:
    """How many of the rows that keep `leaving` busy come to `server`, on average."""
    one, other = leaving.info.span, server.info.span
    shared = model.replicas[max(one.start, other.start) : min(one.end, other.end)]
    if not shared or server is leaving:
        return 0.0
    return present_rows(leaving.info) / (min(shared) - 1)
