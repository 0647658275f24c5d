"""Chains for clients who choose at the same time, so that they do not all choose the same servers.

Whoever opens a session raises the load of its servers, but the others see that only once it is open. So each client
that is about to open one joins a line at every server that comes into question (`swarm.server.openings`) and learns how
many stand before him. Each is assumed to decide like himself: he makes their choices first, one after the other, adds a
row to the load of every server so chosen, and then makes his own. Equal replicas are so filled evenly whether clients
come one after another (then the servers' own figures show it), all at once (then the line does), or in between.

Measured times differ a little from client to client. Lest that decides, servers that are about as fast, or cannot be
told apart by round trips as noisy as theirs, count as equal, and the one with the fewest rows of sessions is taken, the
first by peer id among those.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from .chain import Chain, Wanted, edges_to, fastest_chain, usable_servers
from .snapshot import Snapshot
from .units import Integers, nanoseconds

#: Chains that take this share longer than the fastest one are about as fast, and so are those that take a millisecond
#: longer: speeds are measured no better.
ALIKE = 0.05
ALIKE_TIME = 0.001

#: Choices of others that are made before one's own, at most.
MAX_BEFORE = 32


def share_chain(
    snapshot: Snapshot,
    wanted: Wanted,
    *,
    num_before: int = 0,
    extra_rows: Mapping[str, int] = MappingProxyType({}),
    rng: random.Random | None = None,
) -> Chain | None:
    """The fastest chain for somebody before whom `num_before` others choose; None if there is none.

    extra_rows: by peer, rows that are at work, or soon will be, beyond what the snapshot shows.
    rng: chooses among servers that are about as fast, whatever they hold; None: the one with the fewest rows.
    """
    rows = Counter(extra_rows)
    for _ in range(min(num_before, MAX_BEFORE)):
        chain = _choose(snapshot, wanted, rows, rng)
        rows.update(link.peer_id for link in chain or ())
    return _choose(snapshot, wanted, rows, rng)


def servers_in_question(snapshot: Snapshot, wanted: Wanted) -> list[str]:
    """The peers of the fastest chain and those about as fast in the place of any of them, by peer id."""
    chain = fastest_chain(snapshot, wanted)
    if chain is None:
        return []
    ways = _Ways(snapshot, wanted, {})
    slack = ways.slack(chain)
    positions = {at for number in range(len(chain)) for at in ways.replacements(chain, number, slack)[0]}
    return sorted(snapshot.servers[at].peer_id for at in positions)


def _choose(
    snapshot: Snapshot, wanted: Wanted, extra_rows: Mapping[str, int], rng: random.Random | None
) -> Chain | None:
    """The fastest chain, but with the least loaded of the servers that are about as fast."""
    chain = fastest_chain(snapshot, wanted, extra_rows=extra_rows)
    if chain is None:
        return None
    ways = _Ways(snapshot, wanted, extra_rows)
    slack, links = ways.slack(chain), list(chain)
    for number, link in enumerate(links):
        positions, longer = ways.replacements(tuple(links), number, slack)
        peer_ids = [snapshot.servers[at].peer_id for at in positions]
        held = ways.table.session_rows[positions].tolist()
        if rng is not None:
            best = rng.randrange(len(positions))
        else:
            best = min(range(len(positions)), key=list(zip(held, peer_ids, strict=True)).__getitem__)
        slack -= max(0, int(longer[best]))
        links[number] = replace(link, peer_id=peer_ids[best])
    return tuple(links)


class _Ways:
    """What chains cost when one of their servers is replaced by another that can do its part."""

    def __init__(self, snapshot: Snapshot, wanted: Wanted, extra_rows: Mapping[str, int]):
        self.table = snapshot.table.with_extra_rows(extra_rows).with_short_caches(wanted.cache_tokens)
        self._usable = usable_servers(snapshot, wanted)
        self._first, self._last = edges_to(snapshot, wanted.source), edges_to(snapshot, wanted.sink)
        noise = self.table.edges.noise_of_client(snapshot.ping_noise)
        self._noise_first = noise if wanted.source is None else np.zeros_like(noise)
        self._noise_last = noise if wanted.sink is None else np.zeros_like(noise)

    def slack(self, chain: Chain) -> int:
        """How many nanoseconds longer a chain may take that is about as fast."""
        table, at = self.table, [self.table.index[link.peer_id] for link in chain]
        lengths = [len(link.span) for link in chain]
        time = int(self._first[at[0]] + self._last[at[-1]] + table.entry[at].sum() + table.block[at] @ lengths)
        time += sum(int(table.edges.of_server(one)[other]) for one, other in pairwise(at))
        return round(ALIKE * time) + nanoseconds(ALIKE_TIME)

    def replacements(self, chain: Chain, number: int, slack: int) -> tuple[Integers, Integers]:
        """Servers that can take the place of link `number` for at most `slack` nanoseconds, itself included.

        Their positions in the table, and how many nanoseconds longer the chain takes with each of them; of what the
        client's round trips differ, only what is beyond their noise counts.
        """
        table, link, is_last = self.table, chain[number], number == len(chain) - 1
        at = [table.index[other.peer_id] for other in chain]
        before = self._first if number == 0 else table.edges.of_server(at[number - 1])
        after = self._last if is_last else table.edges.of_server(at[number + 1])
        noise = self._noise_first * (number == 0) + self._noise_last * is_last
        network = _beyond(before + after - (before + after)[at[number]], noise + noise[at[number]])
        inside = table.entry + len(link.span) * table.block
        longer = network + inside - inside[at[number]]
        fit = self._usable & (table.start <= link.span.start) & (table.end >= link.span.end) & (longer <= slack)
        fit[at] = False  # a server that comes twice would need room for two
        fit[at[number]] = True
        positions = [spare for spare in np.flatnonzero(fit).tolist() if table.infos[spare].numerics == link.numerics]
        return np.array(positions), longer[positions]


def _beyond(differences: Integers, noise: Integers) -> Integers:
    """What is left of differences when so much of them is chance."""
    return np.sign(differences) * np.maximum(np.abs(differences) - noise, 0)
