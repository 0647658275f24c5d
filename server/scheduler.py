"""Which rows' tokens form the next batch. A pure decision, so that it can be tested without a device.

What every kind of work can rely on, whatever else waits (tests/server/test_scheduler.py holds us to it):

- decode rows: the oldest `max_tokens - max_tokens // BULK_SHARE` of them go into every batch, and where some have
  deadlines at least half as many of the oldest;
- prompts: the oldest gets at least half of their budget in every batch; where adapters or deadlines decide the order,
  one that was passed over for long enough goes next.

Passes for training are no part of a batch: see `training.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

#: One part in so many of a batch is kept for prompts when decode rows alone would fill it.
BULK_SHARE = 8
#: A chunk takes the end of its prompt along if that exceeds the budget by one part in so many: a batch of its own would
#: cost more.
TAIL_SHARE = 8


class Kind(Enum):
    """DECODE: a row that goes on token by token, somebody watches. PREFILL: a prompt."""

    DECODE = auto()
    PREFILL = auto()


@dataclass(frozen=True)
class Waiting:
    """Tokens of one row that wait for the device. deadline: when they should be done, on any clock."""

    num_tokens: int
    kind: Kind
    deadline: float = math.inf


def next_batch(
    waiting: Sequence[Waiting], max_tokens: int, bulk_tokens: int, prompts_first: Sequence[int] | None = None
) -> list[int]:
    """How many tokens to take of each entry of `waiting` (oldest first) in the next batch, max_tokens at most in all.

    bulk_tokens: budget of prompts in there, at least 1: it decides how long decode rows are held up. The
    end of a prompt may exceed it by one part in TAIL_SHARE.
    prompts_first: which prompts go into the batch, in this order, decided elsewhere (see `adapters.scheduling.choose`).

    Decode rows go first: half of their room is the oldest ones', lest rows with deadlines starve the others, the rest
    goes by deadline. Then, unless somebody else decided, half of the bulk budget is the oldest prompt's, which so is
    done in time whatever comes after it, and the rest goes to the shortest first, so that a line of a chat does not
    wait for a book: that gives the shortest mean time to the first token. If anything waits, something is taken.
    """
    if max_tokens == 1:  # not to be shared: the oldest goes, of whatever kind
        return [int(index == 0) for index in range(len(waiting))]
    decoding, prompts = ([i for i, entry in enumerate(waiting) if entry.kind is kind] for kind in Kind)
    taken = [0] * len(waiting)
    in_bulk = sum(waiting[index].num_tokens for index in prompts)
    reserve = min(max(1, max_tokens // BULK_SHARE), bulk_tokens, in_bulk)
    room = max_tokens
    in_any_case = -(-(room - reserve) // 2)
    others = sorted(decoding[in_any_case:], key=lambda index: waiting[index].deadline)
    for index in (*decoding[:in_any_case], *others):
        taken[index] = min(waiting[index].num_tokens, room - reserve)
        room -= taken[index]

    bulk, tail = min(bulk_tokens, room), bulk_tokens // TAIL_SHARE
    if prompts_first is not None:
        turns = [(index, bulk) for index in prompts_first]
    else:
        turns = [(index, bulk) for index in sorted(prompts, key=lambda index: waiting[index].num_tokens)]
        if len(prompts) > 1:
            turns.insert(0, (prompts[0], -(-bulk // 2)))
    for index, most in turns:
        left = waiting[index].num_tokens - taken[index]
        size = min(left, most, bulk)
        if size and left <= min(size + tail, room):
            size = left
        taken[index] += size
        bulk = max(0, bulk - size)
        room -= size
    return taken
