"""Where the servers of a model are, and where they might be: moved in thought, for `rebalancing.plan_moves`.

Arrangements are compared by their smooth minimum, see `rebalancing`; here it is the sum itself, so less is better.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from swarm.data_structures import BlockSpan, ServerState

from .cost import counted_throughputs
from .units import Booleans, Integers

if TYPE_CHECKING:
    from swarm.dht import ServerRecord

Floats: TypeAlias = NDArray[np.float64]

#: A move has to lower the smooth minimum by this share: less is rounding.
_LEAST_STEP = 1e-6
#: What differs by less than this share is equal, and the first by peer id and by block is taken: the last bits may
#: differ from machine to machine.
_EQUAL = 1e-9
#: exp of this is a number. Only blocks that have many times the fair share come near it.
_MOST_EXPONENT = 600.0


class Arrangement:
    """The servers as columns, [servers], sorted by peer id; `move` moves them in thought.

    holds: whether each holds each block, [servers, blocks].
    online: 1 for those that serve now, which the others do not. movable: those of them that may be moved.
    """

    def __init__(self, num_blocks: int, records: Sequence[ServerRecord], staying: Collection[str]):
        states = [record.info.state for record in records]
        self.num_blocks = num_blocks
        self.peer_ids = [record.peer_id for record in records]
        self.start: Integers = np.array([record.info.span.start for record in records], dtype=np.int64)
        self.length: Integers = np.array([len(record.info.span) for record in records], dtype=np.int64)
        self.rate: Floats = np.array(counted_throughputs([record.info for record in records]), dtype=np.float64)
        self.online = np.array([state is ServerState.ONLINE for state in states], dtype=bool)
        self.draining = np.array([state is ServerState.DRAINING for state in states], dtype=bool)
        self.num_moving = len(records) - int(self.online.sum())
        self.movable = self.online & (self.length < num_blocks)
        self.movable &= np.array([not record.info.fixed for record in records], dtype=bool)
        self.movable &= np.array([peer_id not in staying for peer_id in self.peer_ids], dtype=bool)
        blocks, ends = np.arange(num_blocks), self.start + self.length
        self.holds: Booleans = (self.start[:, None] <= blocks) & (blocks < ends[:, None])
        self._rates: Floats = self.rate[:, None] * self.holds

    @classmethod
    def read(cls, num_blocks: int, records: Iterable[ServerRecord], staying: Collection[str]) -> Arrangement:
        """Spans that lie outside the model are left out, as snapshots leave them out."""
        present = (
            record
            for record in records
            if record.info.state is not ServerState.OFFLINE and record.info.span.end <= num_blocks
        )
        return cls(num_blocks, sorted(present, key=lambda record: record.peer_id), staying)

    @cached_property
    def fair_share(self) -> float:
        """Tokens/s of every block if the work were spread evenly: no arrangement has a higher throughput.

        A server that is faster than that by itself counts as that fast, since the rest of its speed helps nobody. 0 if
        there are too few servers for all blocks.
        """
        if self.length.sum() < self.num_blocks:
            return 0.0
        share, before = float(self.rate @ self.length) / self.num_blocks, np.inf
        while share < before * (1 - _LEAST_STEP):
            share, before = float(np.minimum(self.rate, share) @ self.length) / self.num_blocks, share
        return share

    def work_share(self, server: int) -> float:
        """How much of the work of all servers this one does, if each is busy."""
        return float(self.rate[server] * self.length[server] / (self.rate @ self.length))

    def span(self, server: int) -> BlockSpan:
        start = int(self.start[server])
        return BlockSpan(start=start, end=start + int(self.length[server]))

    def move(self, server: int, start: int) -> None:
        self.start[server] = start
        self.holds[server] = False
        self.holds[server, start : start + self.length[server]] = True
        self._rates[server] = self.rate[server] * self.holds[server]

    def throughputs(self, servers: Booleans | None = None) -> Floats:
        """Tokens/s through each block, [blocks], of these servers together (default: all)."""
        throughputs: Floats = (self._rates if servers is None else self._rates[servers]).sum(axis=0)
        return throughputs

    def rejoin(self, sharpness: float) -> None:
        """Draining servers go, one after the other, where they help most: some of them only move."""
        away = self.draining.copy()
        for server in np.flatnonzero(self.draining).tolist():
            weights = np.exp(-sharpness * self.throughputs(~away) / self.fair_share)
            sums = np.concatenate(([0.0], np.cumsum(weights)))
            length = int(self.length[server])
            windows = (sums[length:] - sums[: len(sums) - length]) / sums[-1]
            self.move(server, int(np.argmax(windows >= windows.max() - _EQUAL)))
            away[server] = False


class Wave:
    """Moves that may be made at once.

    moved: where to, by server, in order. Each of the moves makes the swarm better by itself too, and whatever subset of
    them has been made, the throughput is at least what it was before.
    """

    def __init__(self, swarm: Arrangement):
        self.moved: dict[int, BlockSpan] = {}
        self._swarm = swarm
        self._start, self._holds = swarm.start.copy(), swarm.holds.copy()  # before any of them moves
        self._before = swarm.throughputs()
        self._floor = self._before.copy()  # of those that do not move, and of those that do where they stay anyway
        self._least = float(self._before.min())
        self._online = swarm.online.copy()  # servers that count as holders

    def move_best(self, sharpness: float) -> int | None:
        """Move the server that helps most; None if none may, or none helps."""
        swarm = self._swarm
        candidates = np.flatnonzero(self._may_leave())
        if len(candidates) == 0:
            return None
        scale = sharpness / swarm.fair_share
        rate, length = swarm.rate[candidates], swarm.length[candidates]
        holds, throughputs = self._holds[candidates], swarm.throughputs()
        weights = np.exp(-scale * throughputs)
        smooth_now = weights.sum()
        # of the blocks' weights, those that they have without the server, [candidates, blocks]
        boost = np.exp(np.minimum(scale * rate, _MOST_EXPONENT))
        without = weights * np.where(holds, boost[:, None], 1.0)
        starts = np.arange(swarm.num_blocks)
        sums = np.zeros((len(candidates), swarm.num_blocks + 1))
        np.cumsum(without, axis=1, out=sums[:, 1:])
        ends = np.minimum(starts + length[:, None], swarm.num_blocks)
        windows = np.where(self._possible(candidates), np.take_along_axis(sums, ends, axis=1) - sums[:, :-1], -np.inf)
        highest = windows.max(axis=1)
        best = np.argmax(windows >= (highest - _EQUAL * sums[:, -1])[:, None], axis=1)
        smooth = (sums[:, -1] + np.expm1(-scale * rate) * highest) / smooth_now
        for chosen in np.argsort(np.floor(smooth / _EQUAL), kind="stable").tolist():
            if smooth[chosen] >= 1 - _LEAST_STEP:
                break
            server, start = int(candidates[chosen]), int(best[chosen])
            if self._helps_alone(server, start, scale):
                swarm.move(server, start)
                self._floor[self._holds[server] & ~swarm.holds[server]] -= swarm.rate[server]
                self._online[server] = False
                self.moved[server] = swarm.span(server)
                return server
        return None

    def _helps_alone(self, server: int, start: int, scale: float) -> bool:
        """Whether the smooth minimum falls too if no other server of the wave moves."""
        rate, length = self._swarm.rate[server], int(self._swarm.length[server])
        alone = self._before - rate * self._holds[server]
        alone[start : start + length] += rate
        smooth = np.exp(-scale * np.maximum(alone, 0.0)).sum()
        return bool(smooth < np.exp(-scale * self._before).sum() * (1 - _LEAST_STEP))

    def _may_leave(self) -> Booleans:
        """Movable servers that can do without their first or their last block, or else they can go nowhere, and each of
        whose blocks another one holds that is online and stays. [servers]
        """
        swarm = self._swarm
        others = np.concatenate(([0], np.cumsum(self._online.astype(np.int64) @ self._holds < 2)))
        lonely = others[self._start + swarm.length] > others[self._start]
        spare = self._floor - self._least * (1 - _EQUAL)
        loose = np.maximum(spare[self._start], spare[self._start + swarm.length - 1]) >= swarm.rate
        return swarm.movable & self._online & ~lonely & loose

    def _possible(self, servers: Integers) -> Booleans:
        """Where each of them may start: inside the model, and not off a block that cannot do without it.

        [servers, blocks]
        """
        swarm, starts = self._swarm, np.arange(self._swarm.num_blocks)
        length = swarm.length[servers][:, None]
        spare = self._floor - self._least * (1 - _EQUAL)
        tight = self._holds[servers] & (spare < swarm.rate[servers][:, None])
        any_tight = tight.any(axis=1)
        first = np.where(any_tight, tight.argmax(axis=1), swarm.num_blocks)[:, None]
        last = np.where(any_tight, swarm.num_blocks - 1 - tight[:, ::-1].argmax(axis=1), -1)[:, None]
        possible: Booleans = (starts + length <= swarm.num_blocks) & (starts <= first) & (last < starts + length)
        return possible
