"""Which rows' tokens form the next batch. A pure decision, so that it can be tested without a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Share of the token budget that waiting prompts keep when decode rows alone would fill a batch.
PREFILL_SHARE = 8


@dataclass(frozen=True)
class Waiting:
    """Tokens of one row that wait for the device. `decode`: the row continues token by token, somebody watches."""

    num_tokens: int
    decode: bool


def next_batch(waiting: Sequence[Waiting], max_tokens: int) -> list[int]:
    """How many tokens to take of each entry of `waiting` (oldest first) in the next batch, max_tokens at most in all.

    Decode rows go first. Prompts fill what is left, oldest first, and get at least 1/8 of the budget if they need it,
    so neither kind starves the other. If anything waits, something is taken.
    """
    if max_tokens == 1:  # not to be shared: the oldest goes, of whatever kind
        return [int(index == 0) for index in range(len(waiting))]
    taken = [0] * len(waiting)
    in_prompts = sum(entry.num_tokens for entry in waiting if not entry.decode)
    reserve = min(max(1, max_tokens // PREFILL_SHARE), in_prompts)
    budget = max_tokens
    for index, entry in enumerate(waiting):
        if entry.decode:
            taken[index] = min(entry.num_tokens, budget - reserve)
            budget -= taken[index]
    for index, entry in enumerate(waiting):
        if not entry.decode:
            taken[index] = min(entry.num_tokens, budget)
            budget -= taken[index]
    return taken
