"""Which tokens have which adapter: every arrangement holds each member's tokens once, in order, and nobody else's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.adapters.tokens import Run, TokenMap

CPU = torch.device("cpu")

RUNS = st.lists(st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.integers(1, 9)), min_size=1, max_size=12)


def token_map(runs: list[Run], most_padded: int = 4) -> TokenMap:
    return TokenMap(runs, CPU, most_padded)


def places_of(runs: list[Run]) -> dict[str, list[int]]:
    """Every adapter's tokens, written out one by one."""
    owners = [adapter for adapter, count in runs for _ in range(count)]
    return {name: [i for i, owner in enumerate(owners) if owner == name] for name in dict.fromkeys(owners) if name}


@given(runs=RUNS, slots=st.permutations(range(8)), gathers=st.booleans(), most_padded=st.integers(0, 9))
def test_an_arrangement_holds_every_token_of_its_members_once(
    runs: list[Run], slots: list[int], gathers: bool, most_padded: int
) -> None:
    expected = places_of(runs)
    members = tuple(sorted(zip(expected, slots, strict=False), key=lambda member: member[1]))
    by_slot = {slot: expected[str(name)] for name, slot in members}
    arranged = token_map(runs, most_padded).arrange(members, 8, gathers=gathers)
    num_tokens = sum(count for _, count in runs)
    seen = {}
    for slot, where in arranged.long:
        assert slot not in seen
        seen[slot] = torch.arange(num_tokens)[where].tolist()
        assert not gathers or len(seen[slot]) > most_padded
    if (padded := arranged.padded) is not None:
        values = torch.arange(1.0, num_tokens + 1)[:, None]  # no zero, which marks places without a token
        filled = padded.put(values)
        assert filled.shape == (padded.num_slots, padded.width, 1)
        assert torch.equal(padded.take(filled), values[padded.tokens])
        assert gathers or padded.slots is None
        own = torch.arange(8) if padded.slots is None else padded.slots
        assert len(own) == padded.num_slots
        assert padded.of(torch.arange(8)).tolist() == own.tolist()
        for slot, row in zip(own.tolist(), filled[:, :, 0], strict=True):
            tokens = [int(value) - 1 for value in row if value]
            assert row.count_nonzero() == row[: len(tokens)].count_nonzero(), "tokens stand at the beginning"
            if tokens:
                assert slot not in seen
                seen[slot] = tokens
    assert seen == by_slot


@given(runs=RUNS, slots=st.permutations(range(1, 9)))
def test_the_slot_of_every_token(runs: list[Run], slots: list[int]) -> None:
    members = tuple(zip(places_of(runs), slots, strict=False))
    by_name = dict(members)
    wanted = [by_name.get(str(adapter), 0) for adapter, count in runs for _ in range(count)]
    found = token_map(runs).slot_of_tokens(members)
    assert (wanted == [found] * len(wanted)) if isinstance(found, int) else (found.tolist() == wanted)
    assert isinstance(found, int) == (len(set(wanted)) == 1)


def test_members_that_are_few_of_many_are_gathered_and_others_take_the_whole_pool() -> None:
    tokens = token_map([("a", 1), (None, 3), ("b", 2)])
    few = tokens.arrange((("a", 3), ("b", 6)), 8).padded
    most = tokens.arrange((("a", 1), ("b", 2)), 4).padded
    assert few is not None and most is not None
    assert (few.num_slots, most.num_slots) == (2, 4)
    assert few.slots is not None and few.slots.tolist() == [3, 6]
    assert most.slots is None


def test_padding_and_rows_without_adapters_are_nobodys() -> None:
    tokens = token_map([(None, 2), ("a", 1), (None, 5)])
    assert tokens.present == {"a"}
    assert tokens.num_tokens == 8
    padded = tokens.arrange((("a", 0),), 1).padded
    assert padded is not None
    assert padded.tokens.tolist() == [2]


@pytest.mark.parametrize("most_padded", [3, 4])
def test_the_tokens_of_several_runs_count_together(most_padded: int) -> None:
    """Whether a member has many tokens does not depend on how its rows lie."""
    arranged = token_map([("a", 2), (None, 1), ("a", 2)], most_padded).arrange((("a", 0),), 1)
    assert (arranged.padded is None) == (most_padded == 3)
