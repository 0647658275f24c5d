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

    Decode rows go first. Prompts fill what is left, oldest first, and get at least 1/8 of the budget, so neither kind
    starves the other. If anything waits, something is taken.
    """
    taken = [0] * len(waiting)
    prompts = [index for index, entry in enumerate(waiting) if not entry.decode]
    reserve = max(1, max_tokens // PREFILL_SHARE) if prompts else 0
    budget = max_tokens
    for index, entry in enumerate(waiting):
        if entry.decode and entry.num_tokens <= budget - reserve:
            taken[index] = entry.num_tokens
            budget -= entry.num_tokens
    for index in prompts:
        taken[index] = min(waiting[index].num_tokens, budget)
        budget -= taken[index]
    if waiting and not any(taken):
        taken[0] = min(waiting[0].num_tokens, max_tokens)
    return taken
