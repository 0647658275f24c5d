"""Pools of adapters of one form, against plain products of each member alone, while members come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_adapters import bottleneck_of, dense
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.server.adapters.forms import ACTIVATIONS, Bottleneck, LowRank, Sparse
from swarm.server.adapters.groups import Group, SparseProducts, TwoProducts, Vectors, rank_bucket
from swarm.server.adapters.tokens import Run, TokenMap

CPU = torch.device("cpu")
IN, OUT = 6, 10
MOST_PADDED = 4

#: Of each step who is in the batch, with how many tokens.
STEPS = st.lists(
    st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 11)), st.integers(1, 7)), min_size=1, max_size=6),
    min_size=1,
    max_size=8,
)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(seed: int, rank: int | None = None) -> LowRank:
    rank = rank or 3 + seed % 2  # a bucket of four
    return LowRank(draw(seed, rank, IN), draw(seed + 100, OUT, rank))


def bottleneck(seed: int, activation: str = "relu") -> Bottleneck:
    """Some lack one bias or both."""
    rank = 3 + seed % 2
    down_bias = draw(seed + 200, rank) if seed % 3 else None
    up_bias = draw(seed + 300, IN) if seed % 4 else None
    return Bottleneck(draw(seed, rank, IN), draw(seed + 100, IN, rank), down_bias, up_bias, activation)


def sparse(seed: int) -> Sparse:
    entries = 1 + seed % 9
    indices = torch.randperm(IN * OUT, generator=torch.Generator().manual_seed(seed))[:entries].sort().values
    return Sparse.of(indices.to(torch.int32), draw(seed, entries), OUT, IN)


def of_low_rank(form: LowRank, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return output + input @ form.down.T @ form.up.T


def of_bottleneck(form: Bottleneck, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return output + bottleneck_of(form, input) - input


def of_sparse(form: Sparse, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return output + input @ dense(form).T


KINDS: dict[str, tuple[Callable[[int], Any], Callable[[Any], Group[Any]], Callable[..., torch.Tensor], int]] = {
    "low rank": (low_rank, TwoProducts, of_low_rank, OUT),
    "bottleneck": (bottleneck, TwoProducts, of_bottleneck, IN),
    "sparse": (sparse, SparseProducts, of_sparse, OUT),
}


class Pool:
    """A group, and what each of its members would do alone."""

    def __init__(self, kind: str):
        self._make, make_group, self._alone, self.out = KINDS[kind]
        self.forms = {seed: self._make(seed) for seed in range(12)}
        self.group: Any = make_group(self.forms[0])

    def run(self, runs: list[Run], seed: int = 0, *, most_padded: int = MOST_PADDED) -> torch.Tensor:
        """One batch, compared row by row."""
        tokens = TokenMap(runs, CPU, most_padded)
        input, output = draw(seed, tokens.num_tokens, IN), draw(seed + 1, tokens.num_tokens, self.out)
        expected, first = [], 0
        for adapter, count in runs:
            own = slice(first, first + count)
            form = None if adapter is None else self.forms[adapter]  # type: ignore[index]
            expected.append(output[own] if form is None else self._alone(form, input[own], output[own]))
            first += count
        members = self.group.members({adapter: self.forms[adapter] for adapter in tokens.present})  # type: ignore[index]
        with torch.inference_mode():
            got = self.group.add_to(output.clone(), input, tokens, members) if members else output
        torch.testing.assert_close(got, torch.cat(expected), rtol=1e-5, atol=1e-5)
        return got.clone()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(steps=STEPS, gone=st.lists(st.integers(0, 11), max_size=8))
def test_whoever_comes_and_goes_every_row_gets_its_own(kind: str, steps: list[list[Run]], gone: list[int]) -> None:
    """Slots are taken over, pools grow, members vanish, and one has several runs in a batch."""
    pool = Pool(kind)
    for number, runs in enumerate(steps):
        pool.run(runs, seed=number)
        if number < len(gone):
            pool.group.forget(gone[number])
            pool.forms[gone[number]] = pool._make(gone[number] + 12 * (number + 1))  # another one of the same name


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(runs=STEPS.map(lambda steps: steps[0]))
def test_gradients_of_the_input_are_those_of_each_member_alone(kind: str, runs: list[Run]) -> None:
    pool = Pool(kind)
    tokens = TokenMap(runs, CPU, MOST_PADDED)
    members = pool.group.members({adapter: pool.forms[adapter] for adapter in tokens.present})  # type: ignore[index]
    if not members:
        return
    input = draw(0, tokens.num_tokens, IN).requires_grad_()
    output, weights = draw(1, tokens.num_tokens, pool.out).requires_grad_(), draw(2, tokens.num_tokens, pool.out)
    got = torch.autograd.grad(
        (pool.group.add_to(output.clone(), input, tokens, members) * weights).sum(), (input, output), allow_unused=True
    )
    expected, first = output * 1.0, 0
    parts = []
    for adapter, count in runs:
        own = slice(first, first + count)
        form = None if adapter is None else pool.forms[adapter]  # type: ignore[index]
        parts.append(expected[own] if form is None else pool._alone(form, input[own], expected[own]))
        first += count
    wanted = torch.autograd.grad((torch.cat(parts) * weights).sum(), (input, output), allow_unused=True)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@given(others=STEPS.map(lambda steps: steps[0]), count=st.integers(1, 7), most_padded=st.integers(1, 6))
def test_what_a_row_gets_does_not_depend_on_the_others(
    kind: str, others: list[Run], count: int, most_padded: int
) -> None:
    """Beyond 1e-6 of the largest value: sums of another order. Whoever is beside it, padded or not."""
    alone, beside = Pool(kind), Pool(kind)
    first = alone.run([(0, count)], most_padded=most_padded)
    tokens = TokenMap([(0, count), *others], CPU, most_padded)
    input, output = draw(0, tokens.num_tokens, IN), draw(1, tokens.num_tokens, beside.out)
    input[:count], output[:count] = draw(0, count, IN), draw(1, count, beside.out)
    members = beside.group.members({adapter: beside.forms[adapter] for adapter in tokens.present})  # type: ignore[index]
    with torch.inference_mode():
        second = beside.group.add_to(output, input, tokens, members)[:count]
    assert (first - second).abs().max() <= 1e-6 * first.abs().max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_padding_a_rank_changes_nothing(activation: str) -> None:
    """Also where the activation of zero is not zero."""
    pool = Pool("bottleneck")
    pool.forms = {seed: bottleneck(seed, activation) for seed in (0, 2, 4)}  # of rank 3, in a pool of rank 4
    pool.group = TwoProducts(pool.forms[0])
    pool.run([(0, 2), (2, 9), (4, 1)])
    assert pool.group.down.shape[1] == 4


def test_a_larger_rank_comes_after_a_smaller_one_in_the_same_slot() -> None:
    """Nothing of the one who had it before is left."""
    pool = Pool("low rank")
    pool.forms = {0: low_rank(0, 4), 1: low_rank(1, 3)}
    pool.run([(0, 2)])
    pool.group.forget(0)
    pool.run([(1, 2)])
    assert pool.group.num_slots == 1


def test_a_pool_does_not_grow_for_ever_while_each_batch_has_few() -> None:
    pool = Pool("low rank")
    for seed in range(200):
        pool.forms[seed] = low_rank(seed)
        pool.run([(seed, 1), (seed - 1 if seed else None, 1)])
    assert pool.group.num_slots <= 8


@pytest.mark.parametrize("others", [[], [1, 2]])
@pytest.mark.parametrize("count", [1, MOST_PADDED + 1])
def test_a_sparse_difference_without_entries(others: list[int], count: int) -> None:
    """A mask that keeps every weight."""
    pool = Pool("sparse")
    nothing = torch.empty(0)
    pool.forms[0] = Sparse.of(nothing.to(torch.int32), nothing, OUT, IN)
    pool.run([(0, count), *((seed, 2) for seed in others), (None, 1)])
    tokens = TokenMap([(0, count)], CPU, MOST_PADDED)
    input = draw(0, count, IN).requires_grad_()
    output = pool.group.add_to(draw(1, count, OUT), input, tokens, pool.group.members({0: pool.forms[0]}))
    (gradient,) = torch.autograd.grad(output.sum() + input.sum(), input)
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_a_member_that_is_always_there_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool("low rank")
    copied = []
    put = pool.group._put
    monkeypatch.setattr(pool.group, "_put", lambda slot, form: (copied.append(form), put(slot, form)))
    for seed in range(1, 12):
        pool.run([(0, 1), (seed, 1)])
    assert sum(form is pool.forms[0] for form in copied) == 1


@pytest.mark.parametrize("kind", [*KINDS, "vectors"])
def test_members_that_come_before_a_backward_pass_do_not_change_it(kind: str) -> None:
    """Passes for training run in pieces, with batches of sessions between them."""
    group: Any = Vectors(torch.ones(IN)) if kind == "vectors" else Pool(kind).group
    forms = [draw(seed, IN) if kind == "vectors" else Pool(kind).forms[seed] for seed in range(4)]
    # Vectors that all tokens share are read where they lie, others are copied.
    runs: list[Run] = [(0, 11)] if kind == "vectors" else [(0, 2), (1, 9)]
    tokens = TokenMap(runs, CPU, MOST_PADDED)

    def run(input: torch.Tensor) -> torch.Tensor:
        members = group.members({seed: forms[seed] for seed, _ in runs})
        if kind == "vectors":
            return input * group.of_tokens(tokens, members)
        return group.add_to(torch.zeros(11, KINDS[kind][3]), input, tokens, members)

    inputs = draw(50, 11, IN), draw(50, 11, IN)
    first, second = (run(input.requires_grad_()) for input in inputs)
    (wanted,) = torch.autograd.grad(first.sum(), inputs[0])
    with torch.inference_mode():
        group.members({2: forms[2]})
        group.members({2: forms[2], 3: forms[3]})
        group.members({1: forms[1]})
    (found,) = torch.autograd.grad(second.sum(), inputs[1])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["_grow", "_put"])
def test_a_pool_whose_memory_ran_out_is_as_good_as_before(
    kind: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object) -> None:
        raise RuntimeError("out of memory")

    pool = Pool(kind)
    pool.run([(0, 2)])
    with monkeypatch.context() as patch:
        patch.setattr(type(pool.group), step, run_out)
        with pytest.raises(RuntimeError, match="out of memory"):
            pool.run([(0, 2), (1, 3)])
    pool.run([(0, 2), (1, 3)])  # compares


def test_who_was_used_least_recently_makes_room() -> None:
    pool = Pool("low rank")
    pool.run([(seed, 1) for seed in range(8)])
    pool.run([(0, 1), (2, 1)])
    pool.run([(8, 1)])
    assert pool.group.num_slots == 8
    assert pool.group._slots.keys() == {0, 2, 3, 4, 5, 6, 7, 8}


def test_vectors_are_neutral_where_a_row_has_none() -> None:
    neutral = draw(9, IN)
    group = Vectors(neutral)
    vectors = {name: draw(seed, IN) for seed, name in enumerate("abcde")}
    for names in ("ab", "cd", "e", "ace", "bd", "abcde"):
        runs: list[Run] = [(None, 2), *((name, 1 + number) for number, name in enumerate(names)), (names[0], 1)]
        tokens = TokenMap(runs, CPU, MOST_PADDED)
        members = group.members({name: vectors[name] for name in tokens.present})  # type: ignore[index]
        expected = [neutral if name is None else vectors[name] for name, count in runs for _ in range(count)]  # type: ignore[index]
        assert torch.equal(group.of_tokens(tokens, members), torch.stack(expected))
    group.forget("a")
    only = TokenMap([("b", 3)], CPU, MOST_PADDED)
    assert torch.equal(group.of_tokens(only, group.members({"b": vectors["b"]})), vectors["b"])


@given(rank=st.integers(1, 300))
def test_buckets_of_ranks(rank: int) -> None:
    bucket = rank_bucket(rank)
    assert rank <= bucket < 2 * rank
    assert bucket & (bucket - 1) == 0
