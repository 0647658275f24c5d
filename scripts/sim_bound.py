"""How much throughput the best possible assignment of blocks could give: an upper bound, by linear programming."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .sim_world import DrawnPeer

#: Bounds are improved until they fall by less than this share.
_CLOSE = 1e-3


def throughput_bound(num_blocks: int, peers: Sequence[DrawnPeer]) -> float:
    """Tokens/s that the weakest block has at most, however these servers are placed. 0 without servers.

    The relaxation in which a server may be split over several places, with its throughput split likewise: servers with
    equally many blocks are then as good as one, so the program stays small. Whoever is faster than the bound by himself
    counts as that fast, since the rest helps no block that is the weakest; that gives a lower bound, and so on.
    """
    if not peers:
        return 0.0
    bound, before = _relaxed(num_blocks, peers, np.inf), np.inf
    while bound < before * (1 - _CLOSE):
        bound, before = _relaxed(num_blocks, peers, bound), bound
    return bound


def _relaxed(num_blocks: int, peers: Sequence[DrawnPeer], most: float) -> float:
    """most: tokens/s that a single server counts at most.

    Maximise the least throughput over y[length, start] >= 0: what servers of that length give to the blocks from
    `start` on. Over all starts the y of a length add up to the throughput of its servers.
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    rates: defaultdict[int, float] = defaultdict(float)
    for peer in peers:
        rates[peer.num_blocks] += min(most, peer.throughput)
    places = [(row, start, length) for row, length in enumerate(rates) for start in range(num_blocks - length + 1)]
    number = len(places)
    covered = [(block, at) for at, (_, start, length) in enumerate(places) for block in range(start, start + length)]
    rows, columns = np.array([*covered, *((block, number) for block in range(num_blocks))]).T
    values = np.concatenate((-np.ones(len(covered)), np.ones(num_blocks)))
    solution = linprog(
        c=np.concatenate((np.zeros(number), [-1.0])),
        A_ub=coo_array((values, (rows, columns)), shape=(num_blocks, number + 1)).tocsr(),
        b_ub=np.zeros(num_blocks),
        A_eq=coo_array(
            (np.ones(number), ([row for row, _, _ in places], range(number))), shape=(len(rates), number + 1)
        ).tocsr(),
        b_eq=np.array(list(rates.values())),
        method="highs",
    )
    if solution.status != 0:
        raise RuntimeError(f"the linear program was not solved: {solution.message}")
    return float(solution.x[-1])
