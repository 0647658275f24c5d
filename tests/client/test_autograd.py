"""Passes over a swarm that fails in every way: the same gradients, and only what was lost is done again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from fake_passes import HIDDEN_SIZE, FakePasses, run_blocks, scales_of
from hypothesis import given
from hypothesis import strategies as st

from swarm.client import autograd
from swarm.client.autograd import MAX_PARTS_AT_ONCE, Passes, split_rows
from swarm.client.config import ClientConfig
from swarm.data_structures import AdapterRef, BlockSpan
from swarm.errors import (
    AdapterNotHere,
    AdapterNotServed,
    EngineError,
    MessageTooLarge,
    MissingBlocks,
    NetworkError,
    NotSupported,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    QuotaExceeded,
    RoutingError,
    SessionLost,
    SwarmError,
    UsageError,
)
from swarm.node_thread import NodeThread
from swarm.passes import MAX_PASS_TOKENS
from swarm.protocol import MAX_ROWS, row_adapters

SPAN = BlockSpan(start=0, end=8)
LENGTHS = (5, 1, 7)
LIMIT = 60.0

pytestmark = pytest.mark.timeout(60)


# --- how a batch is cut ----------------------------------------------------------------------------------------------

lengths_of_rows = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(lengths_of_rows, st.integers(1, 60), st.integers(1, 20))
def test_parts_hold_all_rows_in_order_and_are_within_the_limits(
    lengths: list[int], max_tokens: int, max_rows: int
) -> None:
    parts = split_rows(lengths, max_tokens, max_rows)
    assert [length for part in parts for length in part] == lengths
    for part in parts:
        assert 1 <= len(part) <= max_rows
        assert sum(part) <= max_tokens or len(part) == 1


@given(lengths_of_rows, st.integers(1, 60), st.integers(1, 20))
def test_parts_are_as_few_as_can_be(lengths: list[int], max_tokens: int, max_rows: int) -> None:
    parts = split_rows(lengths, max_tokens, max_rows)
    for part, following in pairwise(_greedy(lengths, max_tokens, max_rows)):
        assert sum(part) + following[0] > max_tokens or len(part) == max_rows
    assert len(parts) == len(_greedy(lengths, max_tokens, max_rows))


def _greedy(lengths: list[int], max_tokens: int, max_rows: int) -> list[list[int]]:
    """Rows as long as they fit: no other way needs fewer parts."""
    parts = [[lengths[0]]]
    for length in lengths[1:]:
        if sum(parts[-1]) + length <= max_tokens and len(parts[-1]) < max_rows:
            parts[-1].append(length)
        else:
            parts.append([length])
    return parts


@given(lengths_of_rows, st.integers(1, 60))
def test_the_largest_part_is_as_small_as_can_be(lengths: list[int], max_tokens: int) -> None:
    parts = split_rows(lengths, max_tokens)
    largest = max(map(sum, parts))
    assert largest <= max(max_tokens, *lengths)
    # with any smaller limit there would be more of them, or a row does not fit
    assert largest <= max(lengths) or len(_greedy(lengths, largest - 1, MAX_ROWS)) > len(parts)


def test_a_usual_batch() -> None:
    assert split_rows([128] * 4) == [[128] * 4]
    assert split_rows([128] * 10) == [[128] * 5, [128] * 5]
    assert split_rows([1024, 1024]) == [[1024], [1024]]
    assert split_rows([3000, 5, 6]) == [[3000], [5, 6]]
    assert split_rows([1] * (MAX_ROWS + 2), MAX_PASS_TOKENS * 2) == [[1] * (MAX_ROWS // 2 + 1)] * 2


# --- a swarm to pass through -----------------------------------------------------------------------------------------


class Fixture:
    """A client of the fake swarm."""

    def __init__(self, thread: NodeThread):
        self.thread = thread
        self.swarm = FakePasses()
        self.connect()

    def connect(self, **settings: Any) -> None:
        """Once more, with other settings."""
        config = ClientConfig(**{"retry_delay": 0.01, "max_retry_delay": 0.02, **settings})
        self.passes = Passes(self.thread, self.swarm, self.swarm, config)

    def call(self, function: Callable[[], Any]) -> Any:
        """In the thread of the swarm."""

        async def run() -> Any:
            return function()

        return self.thread.run(run())


@pytest.fixture
def fake(node_thread: NodeThread) -> Iterator[Fixture]:
    """A chain A, B, C, and a spare of B in two parts, with boundaries of their own."""
    fixture = Fixture(node_thread)
    for name, start, end in (("A", 0, 3), ("B", 3, 6), ("C", 6, 8), ("D", 2, 4), ("E", 4, 7)):
        fixture.swarm.add(name, start, end)
    yield fixture
    assert fixture.swarm.running == 0, "a pass was left behind"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Batch:
    """Inputs, and what becomes of them on one machine."""

    def __init__(
        self,
        lengths: tuple[int, ...] = LENGTHS,
        num_prompts: int = 2,
        span: BlockSpan = SPAN,
        adapters: Sequence[AdapterRef | None] = (),
    ):
        """adapters: of the rows; none: no row has one."""
        self.lengths, self.span = lengths, span
        self.adapters = row_adapters(adapters)
        self.hidden = random(sum(lengths), HIDDEN_SIZE, seed=1).requires_grad_()
        self.prompts = random(len(span), num_prompts, HIDDEN_SIZE, seed=2).requires_grad_() if num_prompts else None
        self.gradient = random(sum(lengths), HIDDEN_SIZE, seed=3)

    @property
    def inputs(self) -> list[torch.Tensor]:
        return [self.hidden] if self.prompts is None else [self.hidden, self.prompts]

    def forward(self, passes: Passes) -> torch.Tensor:
        return passes.run_blocks(self.span, self.hidden, self.lengths, self.prompts, self.adapters)

    def check(self, passes: Passes) -> None:
        """Output and gradients, against those of one machine."""
        output = self.forward(passes)
        self.check_output(output)
        self.check_gradients(torch.autograd.grad(output, self.inputs, self.gradient))

    def check_output(self, output: torch.Tensor) -> None:
        with torch.no_grad():
            expected = self._on_one_machine()
        torch.testing.assert_close(output.detach(), expected, rtol=0, atol=1e-5)

    def check_gradients(self, found: tuple[torch.Tensor, ...], times: int = 1) -> None:
        output = self._on_one_machine()
        wanted = torch.autograd.grad(output, self.inputs, times * self.gradient)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()

    def _on_one_machine(self) -> torch.Tensor:
        scales = scales_of(self.adapters)
        return run_blocks(self.span, self.hidden, self.lengths, self.prompts, scales=scales)


def route(fake: Fixture, *, backward: bool) -> list[str]:
    return [call.server for call in fake.swarm.calls if call.backward == backward]


def test_undisturbed(fake: Fixture) -> None:
    Batch().check(fake.passes)
    assert route(fake, backward=False) == ["A", "B", "C"]
    assert route(fake, backward=True) == ["C", "B", "A"]
    assert fake.swarm.searches == 1


def test_without_prompts_and_for_a_part_of_the_blocks(fake: Fixture) -> None:
    Batch(num_prompts=0).check(fake.passes)
    Batch(span=BlockSpan(start=4, end=7)).check(fake.passes)
    assert route(fake, backward=False) == ["A", "B", "C", "B", "C"]


# --- what autograd expects -------------------------------------------------------------------------------------------


def test_gradients_for_the_prompts_alone(fake: Fixture) -> None:
    batch = Batch()
    batch.hidden.requires_grad_(False)
    output = batch.forward(fake.passes)
    output.backward(batch.gradient)
    assert batch.prompts is not None and batch.prompts.grad is not None and batch.hidden.grad is None
    batch.hidden.requires_grad_()
    batch.check_gradients(
        (torch.autograd.grad(batch.forward(fake.passes), batch.hidden, batch.gradient)[0], batch.prompts.grad)
    )


def test_gradients_for_the_hidden_states_alone(fake: Fixture) -> None:
    batch = Batch()
    assert batch.prompts is not None
    batch.prompts.requires_grad_(False)
    batch.forward(fake.passes).backward(batch.gradient)
    assert batch.prompts.grad is None and batch.hidden.grad is not None


def test_without_gradients_there_is_no_graph_and_no_backward_pass(fake: Fixture) -> None:
    batch = Batch()
    with torch.no_grad():
        output = batch.forward(fake.passes)
    assert output.grad_fn is None and not output.requires_grad
    batch.check_output(output)
    with torch.inference_mode():
        batch.check_output(batch.forward(fake.passes))
    for tensor in batch.inputs:
        tensor.requires_grad_(False)
    assert batch.forward(fake.passes).grad_fn is None
    assert route(fake, backward=True) == []


def test_gradients_accumulate(fake: Fixture) -> None:
    batch = Batch()
    for _ in range(3):
        batch.forward(fake.passes).backward(batch.gradient)
    grads = tuple(tensor.grad for tensor in batch.inputs if tensor.grad is not None)
    batch.check_gradients(grads, times=3)


def test_a_graph_that_is_retained_gives_the_same_gradients_again(fake: Fixture) -> None:
    batch = Batch()
    output = batch.forward(fake.passes)
    for _ in range(2):
        batch.check_gradients(torch.autograd.grad(output, batch.inputs, batch.gradient, retain_graph=True))
    fake.swarm["B"].gone = True  # between the two and a third
    batch.check_gradients(torch.autograd.grad(output, batch.inputs, batch.gradient))


@pytest.mark.parametrize("power", [1, 2], ids=["linear", "square"])
def test_gradients_of_gradients_are_refused(fake: Fixture, power: int) -> None:
    """Also where the loss is linear in the output, and torch would take them for constants."""
    batch = Batch()
    loss = batch.forward(fake.passes).pow(power).sum()
    with pytest.raises(NotSupported, match="gradients of gradients do not pass through the swarm's blocks"):
        torch.autograd.grad(loss, batch.inputs, create_graph=True)


def test_what_changes_in_place_between_the_passes_changes_no_gradient(fake: Fixture) -> None:
    """An optimiser's step between them, or a layer that works in place."""
    batch = Batch()
    output = batch.forward(fake.passes)
    before = [tensor.detach().clone() for tensor in batch.inputs]
    with torch.no_grad():
        for tensor in batch.inputs:
            tensor.add_(3.0)
    found = torch.autograd.grad(output, batch.inputs, batch.gradient)
    with torch.no_grad():
        for tensor, old in zip(batch.inputs, before, strict=True):
            tensor.copy_(old)
    batch.check_gradients(found)


def test_several_calls_in_one_graph(fake: Fixture) -> None:
    """A module between blocks, and blocks that are called twice."""
    hidden = random(6, HIDDEN_SIZE).requires_grad_()
    first, last = BlockSpan(start=0, end=5), BlockSpan(start=5, end=8)

    def through(run: Callable[..., torch.Tensor]) -> torch.Tensor:
        states = run(first, hidden, (2, 4), None)
        states = torch.sin(states) + states
        return run(last, run(last, states, (2, 4), None), (2, 4), None)

    ours = torch.autograd.grad(through(fake.passes.run_blocks).sum(), hidden)[0]
    wanted = torch.autograd.grad(through(run_blocks).sum(), hidden)[0]
    assert (ours - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_come_back_as_they_went(fake: Fixture, dtype: torch.dtype) -> None:
    fake.swarm["A"].tamper = fake.swarm["B"].tamper = fake.swarm["C"].tamper = lambda output: replace(
        output, hidden=output.hidden.to(dtype), prompts=None if output.prompts is None else output.prompts.to(dtype)
    )
    hidden = random(6, HIDDEN_SIZE).to(dtype).requires_grad_()
    prompts = random(8, 2, HIDDEN_SIZE).requires_grad_()  # a user may train them in float32
    output = fake.passes.run_blocks(SPAN, hidden, (6,), prompts)
    output.sum().backward()
    assert output.dtype is dtype
    assert hidden.grad is not None and hidden.grad.dtype is dtype
    assert prompts.grad is not None and prompts.grad.dtype is torch.float32


# --- servers that are lost -------------------------------------------------------------------------------------------

FAULTS = [PeerUnreachable, PeerTimeout, PeerRefused, EngineError, ProtocolError]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_lost_in_a_forward_pass_is_replaced_by_two_with_other_boundaries(
    fake: Fixture, fault: type[SwarmError]
) -> None:
    fake.swarm["B"].failures = [fault("no")]
    Batch().check(fake.passes)
    assert route(fake, backward=False) == ["A", "B", "D", "E", "C"]
    assert route(fake, backward=True) == ["C", "E", "D", "A"]
    spans = [call.span for call in fake.swarm.calls if not call.backward]
    assert spans == [(0, 3), (3, 6), (3, 4), (4, 6), (6, 8)]
    assert fake.swarm.banned == {"B"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_lost_in_a_backward_pass_is_replaced_and_only_its_part_is_done_again(
    fake: Fixture, fault: type[SwarmError]
) -> None:
    batch = Batch()
    output = batch.forward(fake.passes)
    fake.swarm["B"].failures = [fault("no")]
    batch.check_gradients(torch.autograd.grad(output, batch.inputs, batch.gradient))
    assert route(fake, backward=True) == ["C", "B", "E", "D", "A"]
    # D must run forward for E to know its inputs; E itself need not.
    assert route(fake, backward=False) == ["A", "B", "C", "D"]
    assert fake.swarm.banned == {"B"}


@pytest.mark.parametrize("victim", "ABC")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_any_server_may_be_lost(fake: Fixture, victim: str, backward: bool) -> None:
    fake.swarm.add("F", 0, 8)
    batch = Batch()
    if backward:
        output = batch.forward(fake.passes)
        fake.swarm[victim].gone = True
        batch.check_gradients(torch.autograd.grad(output, batch.inputs, batch.gradient))
    else:
        fake.swarm[victim].gone = True
        batch.check(fake.passes)
    assert fake.swarm.calls_of(victim, backward=backward) == 1
    assert fake.swarm.banned == {victim}


def test_replacements_that_fail_are_replaced_too(fake: Fixture) -> None:
    fake.swarm.add("F", 0, 8)
    batch = Batch()
    output = batch.forward(fake.passes)
    fake.swarm["B"].gone = True
    fake.swarm["D"].failures = [None, PeerUnreachable("gone after its forward pass")]
    fake.swarm["E"].gone = True
    batch.check_gradients(torch.autograd.grad(output, batch.inputs, batch.gradient))
    assert fake.swarm.banned == {"B", "D", "E"}
    assert route(fake, backward=True) == ["C", "B", "E", "F", "D", "F", "A"]


def test_the_whole_first_chain_is_lost_between_the_two_passes(fake: Fixture) -> None:
    batch = Batch()
    output = batch.forward(fake.passes)
    for name in "ABC":
        fake.swarm[name].gone = True
    fake.swarm.add("F", 0, 8)
    batch.check_gradients(torch.autograd.grad(output, batch.inputs, batch.gradient))
    assert fake.swarm.banned == {"A", "B", "C"}


def test_a_server_without_room_is_waited_for_and_not_blamed(fake: Fixture) -> None:
    fake.connect(retry_delay=0.02, max_retry_delay=1.0)
    fake.swarm["B"].failures = [QuotaExceeded("streams"), QuotaExceeded("streams")]
    started = time.monotonic()
    Batch().check(fake.passes)
    assert time.monotonic() - started >= 0.02 + 0.04
    assert fake.swarm.banned == set()
    assert route(fake, backward=False) == ["A", "B", "B", "B", "C"]


def test_a_session_lost_is_no_reason_to_ban(fake: Fixture) -> None:
    fake.swarm["B"].failures = [SessionLost("what session?")]
    Batch().check(fake.passes)
    assert fake.swarm.banned == set()


# --- giving up -------------------------------------------------------------------------------------------------------


def test_retries_are_bounded_and_the_error_says_what_went_on(fake: Fixture) -> None:
    fake.connect(max_retries=3)
    for name in "ABC":
        fake.swarm[name].failures = [SessionLost(f"{name} has its reasons")] * 100  # so it is asked again
    with pytest.raises(RoutingError, match=r"A has its reasons \(gave up after \d+\.\d s and 4 attempts\)"):
        Batch().forward(fake.passes)
    assert route(fake, backward=False) == ["A"] * 4


def test_a_server_that_never_has_room_keeps_its_error(fake: Fixture) -> None:
    fake.connect(max_retries=2)
    fake.swarm["A"].failures = [QuotaExceeded("too many streams")] * 100
    with pytest.raises(QuotaExceeded, match=r"too many streams \(gave up after .* and 3 attempts\)"):
        Batch().forward(fake.passes)


def test_a_row_that_no_server_takes_is_nobodys_fault(fake: Fixture) -> None:
    fake.connect(max_retries=2)
    fake.swarm["B"].failures = [MessageTooLarge("a pass of 5000 tokens")] * 100
    with pytest.raises(MessageTooLarge, match=r"a pass of 5000 tokens \(gave up after .* and 3 attempts\)"):
        Batch((MAX_PASS_TOKENS + 1,)).forward(fake.passes)
    assert fake.swarm.banned == set()


def test_a_server_that_takes_less_than_every_server_has_to_is_left(fake: Fixture) -> None:
    fake.swarm["B"].failures = [MessageTooLarge("a pass of 13 tokens")] * 100
    Batch().check(fake.passes)
    assert fake.swarm.banned == {"B"}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("max_retries", [2, 3, 6])
def test_what_no_server_can_compute_is_the_inputs_fault(fake: Fixture, max_retries: int, backward: bool) -> None:
    """A gradient that overflows float16, say. Healthy servers would be banned, and blocks seem to be missing."""
    fake.connect(max_retries=max_retries)
    for name in "BDE":
        fake.swarm[name].failures = [None] * backward + [EngineError("the pass gave NaN or infinity")] * 100
    with pytest.raises(RoutingError, match=r"the pass gave NaN or infinity \(gave up after") as caught:
        batch = Batch()
        batch.forward(fake.passes).backward(batch.gradient)
    assert not isinstance(caught.value, MissingBlocks)
    assert fake.swarm.banned == set()
    assert fake.swarm.calls_of("B", backward=backward) >= 1


def test_a_server_that_fails_at_what_another_can_compute_is_banned(fake: Fixture) -> None:
    fake.swarm["B"].failures = [EngineError("the pass gave NaN or infinity")] * 100
    Batch().check(fake.passes)
    assert fake.swarm.banned == {"B"}


def test_a_server_that_failed_once_and_is_the_only_one_is_asked_again(fake: Fixture) -> None:
    fake.swarm["C"].failures = [EngineError("no memory is left")]
    Batch().check(fake.passes)
    assert fake.swarm.banned == set()
    assert route(fake, backward=False) == ["A", "B", "C", "C"]


def test_retries_are_counted_for_each_pass_anew(fake: Fixture) -> None:
    fake.connect(max_retries=2)
    for _ in range(4):
        fake.swarm["B"].failures = [SessionLost("no")] * 2
        Batch().check(fake.passes)


def test_blocks_that_were_never_there_are_not_waited_for(fake: Fixture) -> None:
    del fake.swarm.servers["C"]
    with pytest.raises(MissingBlocks, match=r"no usable server holds block 7$") as caught:
        Batch().forward(fake.passes)
    assert caught.value.blocks == (7,)
    assert fake.swarm.searches == 1 and fake.swarm.calls == []


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_blocks_that_were_there_are_waited_for(fake: Fixture, backward: bool) -> None:
    batch = Batch()
    output = batch.forward(fake.passes)
    for name in "BDE":
        fake.swarm[name].gone = True
    searches = fake.swarm.searches

    def restart(number: int) -> None:
        if number == searches + 6:
            fake.swarm.add("F", 3, 8)

    fake.swarm.on_search = restart
    if backward:
        batch.check_gradients(torch.autograd.grad(output, batch.inputs, batch.gradient))
    else:
        batch.check(fake.passes)
    assert fake.swarm.searches > searches + 6


def test_blocks_that_never_come_back_are_named_in_the_end(fake: Fixture) -> None:
    batch = Batch()
    batch.check(fake.passes)
    fake.connect(max_retries=4)
    batch.check(fake.passes)
    for name in "BDE":
        fake.swarm[name].gone = True
    with pytest.raises(MissingBlocks, match=r"no usable server holds block \d .*gave up after") as caught:
        batch.forward(fake.passes)
    assert len(caught.value.blocks) == 1


def test_a_directory_that_cannot_be_read_is_waited_for_once_it_was_there(fake: Fixture) -> None:
    fake.swarm.search_error = NetworkError("nobody answers")
    with pytest.raises(NetworkError, match=r"nobody answers$"):
        Batch().forward(fake.passes)
    fake.swarm.search_error = None
    Batch().check(fake.passes)
    searches = fake.swarm.searches
    fake.swarm.search_error = NetworkError("nobody answers")
    fake.swarm.on_search = lambda number: setattr(
        fake.swarm, "search_error", fake.swarm.search_error if number < searches + 3 else None
    )
    Batch().check(fake.passes)


# --- parts of a batch ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of a batch have so many tokens, at most."""
    monkeypatch.setattr(autograd, "split_rows", lambda lengths: split_rows(lengths, 10))
    return 10


MANY = (7, 3, 9, 10, 2, 25, 4, 4)


@pytest.mark.usefixtures("small_parts")
def test_parts_of_a_batch_give_what_the_whole_gives(fake: Fixture) -> None:
    fake.swarm.spread = True
    Batch(MANY, num_prompts=3).check(fake.passes)
    assert sorted(call.tokens for call in fake.swarm.calls if call.span[1] == 8 and not call.backward) == [
        2,
        8,
        9,
        10,
        10,
        25,  # the last is one row alone
    ]


@pytest.mark.usefixtures("small_parts")
def test_parts_travel_at_the_same_time_over_different_chains(fake: Fixture) -> None:
    for name, start, end in (("A2", 0, 3), ("B2", 3, 6), ("C2", 6, 8)):
        fake.swarm.add(name, start, end)
    for name in "DE":
        del fake.swarm.servers[name]
    fake.swarm.spread = True
    seen: list[int] = []
    gate = fake.call(asyncio.Event)
    for name in ("A", "A2"):
        fake.swarm[name].gate = gate

    def before(call: Any) -> None:
        seen.append(fake.swarm.running)
        if sum(call.span == (0, 3) for call in fake.swarm.calls) == 4:
            gate.set()  # not before all four parts are on their way: one after the other would wait for ever

    fake.swarm.before = before
    Batch((10, 10, 10, 10)).check(fake.passes)
    assert {"A", "A2", "B", "B2", "C", "C2"} <= set(route(fake, backward=False))
    assert fake.swarm.most_running == 4


@pytest.mark.usefixtures("small_parts")
def test_so_many_parts_travel_at_once_and_no_more(fake: Fixture) -> None:
    gate = fake.swarm["A"].gate = fake.call(asyncio.Event)

    def before(call: Any) -> None:
        if fake.swarm.running == MAX_PARTS_AT_ONCE - 1:  # and this one
            fake.thread.loop.call_soon(gate.set)

    fake.swarm.before = before
    Batch((10,) * (MAX_PARTS_AT_ONCE + 3)).check(fake.passes)
    assert fake.swarm.most_running == MAX_PARTS_AT_ONCE


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_server_lost_to_one_part_is_replaced_for_that_part(fake: Fixture, backward: bool) -> None:
    batch = Batch((10, 10, 10))
    fake.swarm.add("F", 0, 8)
    failures: list[SwarmError | None] = [None, PeerUnreachable("gone"), None]
    if backward:
        output = batch.forward(fake.passes)
        fake.swarm["B"].failures = failures
        batch.check_gradients(torch.autograd.grad(output, batch.inputs, batch.gradient))
    else:
        fake.swarm["B"].failures = failures
        batch.check(fake.passes)
    assert fake.swarm.calls_of("B", backward=backward) == 3
    assert fake.swarm.calls_of("A", backward=False) == 3
    assert fake.swarm.calls_of("A", backward=True) == 3


@pytest.mark.usefixtures("small_parts")
def test_the_failure_of_one_part_ends_the_others(fake: Fixture) -> None:
    fake.connect(max_retries=0)
    gate = fake.swarm["C"].gate = fake.call(asyncio.Event)
    fake.swarm["A"].failures = [None, None, PeerUnreachable("gone")]
    with pytest.raises(RoutingError, match=r"gone \(gave up"):
        Batch((10, 10, 10)).forward(fake.passes)
    assert not gate.is_set()
    assert fake.swarm.running == 0 and fake.swarm["C"].cancelled == fake.swarm.calls_of("C", backward=False)


@pytest.mark.usefixtures("small_parts")
def test_who_waits_can_be_interrupted(fake: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C: nothing goes on behind the user's back."""
    fake.swarm["A"].gate = fake.call(asyncio.Event)
    interrupted: list[int] = []
    run = fake.thread.run

    def run_and_be_interrupted(coroutine: Any, timeout: float | None = None) -> Any:
        if interrupted:
            return run(coroutine, timeout)
        interrupted.append(1)
        return run(coroutine, 0.05)  # raises TimeoutError, and cancels the coroutine just as Ctrl-C does

    monkeypatch.setattr(fake.thread, "run", run_and_be_interrupted)
    with pytest.raises(TimeoutError):
        Batch((10, 10)).forward(fake.passes)
    deadline = time.monotonic() + LIMIT
    while fake.swarm.running:
        assert time.monotonic() < deadline
        fake.call(lambda: None)
    assert fake.swarm["A"].cancelled == 2


@pytest.mark.usefixtures("small_parts")
def test_gradients_of_prompts_are_the_same_whichever_part_is_done_first(fake: Fixture) -> None:
    """Sums of floats depend on their order."""
    fake.swarm.add("A2", 0, 3)
    fake.swarm.spread = True
    gradients = []
    for slow in ("A", "A2"):
        batch = Batch((10, 10, 10, 10))
        output = batch.forward(fake.passes)
        gate = fake.swarm[slow].gate = fake.call(asyncio.Event)
        quick = {"A": "A2", "A2": "A"}[slow]

        def release(call: Any, quick: str = quick, gate: asyncio.Event = gate) -> None:
            if call.server == quick:
                fake.thread.loop.call_later(0.02, gate.set)

        fake.swarm.before = release
        gradients.append(torch.autograd.grad(output, batch.inputs, batch.gradient))
        fake.swarm[slow].gate = None
        fake.swarm.before = lambda call: None
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_the_users_error(fake: Fixture, value: float) -> None:
    batch = Batch()
    output = batch.forward(fake.passes)
    batch.gradient[3, 2] = value
    with pytest.raises(UsageError, match="the gradient of the blocks' output holds NaN or infinity: the loss"):
        output.backward(batch.gradient)
    assert route(fake, backward=True) == [] and fake.swarm.banned == set()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden": torch.full((13, HIDDEN_SIZE), float("nan"))}, "the hidden states hold NaN or infinity"),
        ({"hidden": torch.zeros(13, HIDDEN_SIZE, dtype=torch.float64)}, "hidden states of torch.float64 do not travel"),
        ({"hidden": torch.zeros(12, HIDDEN_SIZE)}, r"hidden states of shape \[12, 4\] for rows of 13 tokens"),
        ({"hidden": torch.zeros(1, 13, HIDDEN_SIZE)}, r"hidden states of shape \[1, 13, 4\]"),
        ({"prompts": torch.zeros(7, 2, HIDDEN_SIZE)}, r"wanted \[8 blocks, prompt tokens, 4\]"),
        ({"prompts": torch.zeros(8, 2, 5)}, r"deep prompts of shape \[8, 2, 5\]"),
        ({"prompts": torch.zeros(8, 0, HIDDEN_SIZE)}, "deep prompts for 0 tokens; from 1 to 512"),
        ({"prompts": torch.zeros(8, 513, HIDDEN_SIZE)}, "deep prompts for 513 tokens"),
        ({"prompts": torch.zeros(8, HIDDEN_SIZE)}, r"deep prompts of shape \[8, 4\]"),
        ({"prompts": torch.full((8, 1, HIDDEN_SIZE), float("inf"))}, "the deep prompts hold NaN or infinity"),
        pytest.param(  # as they would travel
            {"prompts": torch.full((8, 1, HIDDEN_SIZE), 1e5), "hidden": torch.zeros(13, HIDDEN_SIZE).half()},
            "the deep prompts hold NaN or infinity",
            id="too large for float16",
        ),
    ],
    ids=str,
)
def test_bad_input_never_reaches_a_server(fake: Fixture, changes: dict[str, torch.Tensor], text: str) -> None:
    inputs = {"hidden": torch.zeros(13, HIDDEN_SIZE), "prompts": None, **changes}
    with pytest.raises(UsageError, match=text):
        fake.passes.run_blocks(SPAN, inputs["hidden"], LENGTHS, inputs["prompts"])
    assert fake.swarm.calls == [] and fake.swarm.searches == 0


# --- adapters of servers ---------------------------------------------------------------------------------------------

ONE, TWO = AdapterRef("one", f"{1:016x}"), AdapterRef("two", f"{2:016x}")


def give_adapters(fake: Fixture, names: str, *adapters: AdapterRef) -> None:
    for name in names:
        fake.swarm[name].adapters = set(adapters)


def test_rows_have_their_adapters_in_both_passes(fake: Fixture) -> None:
    give_adapters(fake, "BCDE", ONE, TWO)
    fake.swarm.add("F", 0, 3).adapters = {ONE, TWO}
    Batch(adapters=(ONE, None, TWO)).check(fake.passes)
    assert route(fake, backward=False) == ["F", "B", "C"]
    assert route(fake, backward=True) == ["C", "B", "F"]
    assert {call.adapters for call in fake.swarm.calls} == {("one", None, "two")}


@pytest.mark.usefixtures("small_parts")
def test_each_part_of_a_batch_has_the_adapters_of_its_rows(fake: Fixture) -> None:
    give_adapters(fake, "AC", ONE, TWO)
    give_adapters(fake, "B", TWO)
    give_adapters(fake, "DE", ONE)
    Batch((10, 9, 8), adapters=(ONE, TWO, None)).check(fake.passes)
    calls = {(call.server, call.adapters) for call in fake.swarm.calls if not call.backward}
    assert {adapters for server, adapters in calls if server == "B"} == {("two",), ()}
    assert {adapters for server, adapters in calls if server in "DE"} == {("one",)}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_replacement_has_the_adapters_too(fake: Fixture, backward: bool) -> None:
    give_adapters(fake, "ABCDE", ONE)
    fake.swarm["B"].failures = [*([None] * backward), PeerUnreachable("gone")]
    Batch(adapters=(ONE, None, ONE)).check(fake.passes)
    assert {call.adapters for call in fake.swarm.calls} == {("one", None, "one")}
    assert route(fake, backward=backward).count("E") == 1


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_server_without_the_adapter_is_passed_over_and_not_banned(fake: Fixture, backward: bool) -> None:
    give_adapters(fake, "ABCDE", ONE)
    fake.swarm["B"].failures = [*([None] * backward), AdapterNotHere("no adapter 'one'")]
    Batch(adapters=(ONE,) * 3).check(fake.passes)
    assert "B" not in fake.swarm.banned
    assert route(fake, backward=backward).count("E") == 1
    Batch(adapters=(ONE,) * 3).check(fake.passes)
    assert fake.swarm.calls[-1].server == "A" and "B" in route(fake, backward=backward)[3:]  # asked again


def test_an_adapter_that_no_server_turns_out_to_have(fake: Fixture) -> None:
    give_adapters(fake, "ABCDE", ONE)
    fake.connect(max_retries=2)
    fake.swarm["A"].failures = [AdapterNotHere(f"no adapter 'one', answer {number}") for number in range(9)]
    with pytest.raises(
        AdapterNotServed, match=r"no server of blocks 0:3 has the adapters of the batch \(no adapter 'one'"
    ):
        Batch(adapters=(ONE,) * 3).forward(fake.passes)
    assert len(fake.swarm["A"].failures) == 6  # asked once for each try, bounded by max_retries
    assert fake.swarm.banned == set()
