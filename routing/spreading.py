"""Chains for training: whoever sends many batches wants all servers at work, not the quickest one alone."""

from __future__ import annotations

import random

import numpy as np

from swarm.data_structures import BlockSpan, ServerInfo

from .chain import Chain, Wanted, link_of, usable_servers
from .cost import effective_throughput
from .snapshot import Snapshot


def spread_chain(snapshot: Snapshot, wanted: Wanted, rng: random.Random) -> Chain | None:
    """A random chain; over many of them each block is served by its holders in proportion to their throughput.

    PETALS draws a server in proportion to its throughput and stays on it to the end of its span. Where spans overlap,
    that gives those that begin early more than their share. Here the shares hold for each block by itself, with as few
    changes of servers as that allows: from a block to the next, a server is kept with probability min(1, its share of
    the next / its share of this one), else the next one is drawn from those whose share grows, in proportion to by how
    much (the maximal coupling of two distributions).

    None exactly if a block has no usable server. numerics, source and sink of `wanted` do not matter here.
    """
    table, usable = snapshot.table, usable_servers(snapshot, wanted)
    rates = np.where(usable, [throughput(info) for info in table.infos], 0.0)
    parts: list[tuple[int, int]] = []
    before, at = np.zeros(len(rates)), -1
    for block in wanted.span.blocks():
        shares = np.where((table.start <= block) & (block < table.end), rates, 0.0)
        if not shares.any():
            return None
        shares /= shares.sum()
        grown = np.maximum(shares - before, 0.0).cumsum()
        if at < 0 or (grown[-1] > 0 and rng.random() * before[at] >= shares[at]):
            at = int(np.searchsorted(grown, rng.random() * grown[-1], side="right"))
            parts.append((at, block))
        before = shares
    ends = [start for _, start in parts[1:]] + [wanted.span.end]
    return tuple(
        link_of(snapshot, at, BlockSpan(start=start, end=end)) for (at, start), end in zip(parts, ends, strict=True)
    )


def throughput(server: ServerInfo) -> float:
    """Tokens/s of a batch through the whole span: of prompts, if that was measured, since training sends such."""
    return effective_throughput(server) if server.forward_rate is None else max(server.forward_rate, 1e-9)
