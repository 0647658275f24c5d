"""Swarms and chains drawn at random: what `swarm bench routes` and `swarm bench departures` measure.

Pure, the same for the same seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swarm.data_structures import BlockSpan
from swarm.routing.chain import Chain, ChainLink
from swarm.routing.snapshot import Snapshot

#: Seconds that a pass through all blocks would take at the fastest and at the slowest server.
PASS_TIMES = (0.08, 0.32)
#: Seconds one way of the nearest and of the farthest server's link.
DELAYS = (0.001, 0.04)
#: A server holds between these parts of all blocks.
PARTS = (1 / 4, 1 / 2)
#: Servers that hold a block at least.
HOLDERS = 2
#: Every third server is busy with so many rows of others, which step without a break.
BUSY_ROWS = (1, 3)
#: A chain that is drawn stays on a server to the end of its span with this probability.
STAY = 0.5


@dataclass(frozen=True)
class DrawnServer:
    """span: its blocks. block_time: seconds of a pass through one of them. delay: seconds one way of its link.

    busy_rows: of others, that it works on all the time.
    """

    span: BlockSpan
    block_time: float
    delay: float
    busy_rows: int


def draw_servers(rng: random.Random, num_blocks: int, number: int, holders: int = HOLDERS) -> list[DrawnServer]:
    """Unequal, loaded servers with overlapping spans; each block has `holders` of them at least.

    number: of servers, at least 2 * `holders` / the larger of `PARTS`, or the drawing may not end.
    """
    while True:
        spans = [_draw_span(rng, num_blocks) for _ in range(number)]
        if all(sum(block in span for span in spans) >= holders for block in range(num_blocks)):
            break
    busy = set(rng.sample(range(number), number // 3))
    return [
        DrawnServer(
            span,
            _log_uniform(rng, *PASS_TIMES) / num_blocks,
            _log_uniform(rng, *DELAYS),
            rng.randint(*BUSY_ROWS) if index in busy else 0,
        )
        for index, span in enumerate(spans)
    ]


def _draw_span(rng: random.Random, num_blocks: int) -> BlockSpan:
    length = max(1, round(rng.uniform(*PARTS) * num_blocks))
    # half of it may lie outside, and is moved inside: else few would hold the first and the last blocks
    start = min(max(0, rng.randint(-length // 2, num_blocks - length // 2)), num_blocks - length)
    return BlockSpan(start=start, end=start + length)


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


def draw_chain(rng: random.Random, snapshot: Snapshot) -> Chain:
    """Any chain through the whole model: no peer comes twice in a row, parts may end at any block."""
    links: list[ChainLink] = []
    at = 0
    while at < snapshot.num_blocks:
        others = [record for record in snapshot.serving(at) if not links or record.peer_id != links[-1].peer_id]
        record = rng.choice(others)
        last = record.info.span.end
        end = last if rng.random() < STAY else rng.randint(at + 1, last)
        links.append(ChainLink(record.peer_id, BlockSpan(start=at, end=end), record.info.numerics))
        at = end
    return tuple(links)


def draw_alternatives(
    rng: random.Random, chosen: Chain, number: int, draw: Callable[[], Chain], predict: Callable[[Chain], float]
) -> list[Chain]:
    """So many different chains other than the chosen one: half of them the best of those drawn, the rest any of them.

    predict: seconds of a step. Fewer if there are not so many.
    """
    drawn = {draw(): None for _ in range(500 * number)}  # in the order of drawing
    drawn.pop(chosen, None)
    best = sorted(drawn, key=predict)[: number // 2]
    for chain in best:
        del drawn[chain]
    others = list(drawn)
    return best + rng.sample(others, min(len(others), number - len(best)))


def describe(chain: Chain, peer_ids: Sequence[str]) -> str:
    """Its parts and the numbers of their servers. peer_ids: in the order of their numbers."""
    return " ".join(f"{link.span}@{peer_ids.index(link.peer_id)}" for link in chain)
