"""Rows that become copies of others, as beam search asks for: a model of lists, plain transformers, and odd moments."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache

from swarm.data_structures import BlockSpan
from swarm.errors import EngineError, ProtocolError, SessionLost, SwarmError
from swarm.protocol import Reorder
from swarm.server.batch import RowChunk
from swarm.server.engine import Engine
from swarm.server.eviction import EvictionLimits
from swarm.server.kv_cache import KVCache, RowCache
from swarm.server.reorder import reorder_rows
from swarm.server.span import Span
from swarm.server.tasks import RowWork, StepTask

LIMIT = 60.0  # seconds for what takes milliseconds on an idle machine
CPU = torch.device("cpu")
PAGE = 4
MAX_LENGTH = 22  # not a whole number of pages


class ReorderMachine(RuleBasedStateMachine):
    """Two sessions of several rows beside a model of lists: every token that is written has a number of its own."""

    @initialize(rows=st.integers(2, 5), other=st.integers(1, 3))
    def open(self, rows: int, other: int) -> None:
        self.cache = KVCache(1, (rows + other) * 6 * PAGE, PAGE, CPU, torch.float32)
        self.sessions = [self.cache.admit(number, MAX_LENGTH) for number in (rows, other)]
        self.model: list[list[list[int]]] = [[[] for _ in range(number)] for number in (rows, other)]
        self.written = 0
        one = torch.zeros(1, 1, 1, 1)
        self.keys, self.values = self.cache.storage(0, one, one)

    def which(self, data: st.DataObject) -> int:
        open_ones = [index for index, rows in enumerate(self.sessions) if rows]
        return data.draw(st.sampled_from(open_ones))

    @precondition(lambda self: any(self.sessions))
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """New tokens of a row, behind its end or instead of some that it has."""
        session = self.which(data)
        index = data.draw(st.integers(0, len(self.sessions[session]) - 1))
        row, tokens = self.sessions[session][index], self.model[session][index]
        position = data.draw(st.integers(0, len(tokens)))
        number = data.draw(st.integers(1, MAX_LENGTH - position)) if position < MAX_LENGTH else 0
        self.cache.truncate(row, position)
        del tokens[position:]
        if number:
            assert self.cache.grow(row, position + number)
            fresh = list(range(self.written, self.written + number))
            self.written += number
            slots = self.cache.slots(row, position, position + number)
            self.keys[0, 0, slots, 0] = torch.tensor(fresh, dtype=torch.float32)
            self.values[0, 0, slots, 0] = -torch.tensor(fresh, dtype=torch.float32)
            self.cache.written(row, position, number)
            tokens += fresh

    @precondition(lambda self: any(self.sessions))
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        session = self.which(data)
        rows, before = self.sessions[session], [list(tokens) for tokens in self.model[session]]
        some_row = st.integers(0, len(rows) - 1)
        sources = data.draw(
            st.permutations(range(len(rows))) | st.lists(some_row, min_size=len(rows), max_size=len(rows))
        )
        keep = [data.draw(st.sampled_from([MAX_LENGTH, len(before[source]), 1, 7])) for source in sources]
        pages = [len(row.pages) for row in rows]
        copied = []
        copy_slots = self.cache.copy_slots
        self.cache.copy_slots = lambda origin, target: (copied.append(len(origin)), copy_slots(origin, target))[1]  # type: ignore[method-assign,func-returns-value]
        try:
            reorder_rows(self.cache, rows, sources, keep)
        finally:
            del self.cache.copy_slots
        lacking = 0
        for index, source in enumerate(sources):
            if source == index:
                continue
            after = before[source][: keep[index]]
            self.model[session][index] = after
            lacking += len(after) - common_prefix(before[index], after)
            needed = -(-len(after) // PAGE)
            assert len(rows[index].pages) <= max(needed, pages[index])
        assert sum(copied) == lacking  # and no token more

    @precondition(lambda self: len(self.sessions[1]) > 0)
    @rule()
    def close(self) -> None:
        self.cache.release(self.sessions[1])
        self.sessions[1], self.model[1] = [], []

    @invariant()
    def contents_are_those_of_the_lists(self) -> None:
        for rows, lists in zip(self.sessions, self.model, strict=True):
            for row, tokens in zip(rows, lists, strict=True):
                assert row.length == len(tokens)
                if tokens:
                    slots = self.cache.slots(row, 0, len(tokens))
                    assert self.keys[0, 0, slots, 0].tolist() == tokens
                    assert self.values[0, 0, slots, 0].neg().tolist() == tokens

    @invariant()
    def no_page_is_lost_or_shared(self) -> None:
        pages = [page for rows in self.sessions for row in rows for page in row.pages]
        assert len(pages) == len(set(pages))
        assert self.cache.free_pages == self.cache.num_pages - len(pages)
        assert not any(row.held for rows in self.sessions for row in rows)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for rows in self.sessions:
                self.cache.release(rows)
            assert self.cache.free_pages == self.cache.num_pages
            assert self.cache.tokens_left == self.cache.num_pages * PAGE


def common_prefix(one: list[int], other: list[int]) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


ReorderMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
TestReorderMachine = ReorderMachine.TestCase


# --- beside plain transformers ------------------------------------------------------------------------------------


class Steps:
    """Steps of sessions through an engine with the whole tiny Llama."""

    def __init__(self, engine: Engine, model: Any):
        self.engine, self.model = engine, model

    def run(self, rows: list[RowCache], tokens: list[list[int]], reorder: Reorder | None = None, back: int = 0) -> Any:
        """New tokens for each row, behind its end once it is reordered, or `back` tokens before: [tokens, hidden]."""
        lengths = [row.length for row in rows]
        if reorder is not None and reorder.number > rows[0].session.reorder_number:
            lengths = [lengths[source] for source in reorder.sources]
        flat = torch.tensor([token for row in tokens for token in row])
        work = [RowWork(row, length - back, len(new)) for row, length, new in zip(rows, lengths, tokens, strict=True)]
        hidden = self.model.model.embed_tokens(flat).detach()
        output = self.engine.submit(StepTask(hidden, work, 0, 8, reorder=reorder)).result(LIMIT).hidden
        return self.model.model.norm(output).detach()

    def expected(self, texts: list[list[int]], new: list[list[int]]) -> torch.Tensor:
        """What plain transformers, without a cache, has for the last tokens of each text."""
        with torch.inference_mode():
            outputs = [self.model.model(torch.tensor([text]), use_cache=False).last_hidden_state[0] for text in texts]
        return torch.cat([output[-len(tokens) :] for output, tokens in zip(outputs, new, strict=True)])


@pytest.fixture
def make_steps(tiny_span: Span, tiny_model: Any) -> Iterator[Callable[..., Steps]]:
    engines: list[Engine] = []

    def make(num_pages: int = 256, **settings: Any) -> Steps:
        cache = KVCache(8, num_pages * PAGE, PAGE, CPU, torch.float32, **settings)
        engines.append(Engine(tiny_span, cache, max_batch_tokens=32))
        engines[-1].start()
        return Steps(engines[-1], tiny_model)

    yield make
    for engine in engines:
        engine.stop(LIMIT)


REORDERINGS = {
    "nothing changes": (0, 1, 2, 3),
    "all from one": (2, 2, 2, 2),
    "two change places": (1, 0, 2, 3),
    "a cycle": (1, 2, 3, 0),
    "duplicates of a cycle": (1, 0, 0, 1),
    "reversed": (3, 2, 1, 0),
}


@pytest.mark.parametrize("sources", REORDERINGS.values(), ids=REORDERINGS)
def test_as_the_cache_of_plain_transformers_does(
    make_steps: Callable[..., Steps], tiny_model: Any, sources: tuple[int, ...]
) -> None:
    steps = make_steps()
    rows = steps.engine.cache.admit(4, 40)
    cache = DynamicCache(config=tiny_model.config)
    generator = torch.Generator().manual_seed(0)
    for number, length in enumerate([7, 1, 1, 3, 1]):
        ids = torch.randint(0, 256, (4, length), generator=generator)
        reorder = Reorder(number, sources) if number else None
        if reorder is not None:
            cache.reorder_cache(torch.tensor(sources))
        with torch.inference_mode():
            wanted = tiny_model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state
        output = steps.run(rows, ids.tolist(), reorder)
        torch.testing.assert_close(output, wanted.reshape(-1, 64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overcommit", [1.0, 4.0])
def test_rows_of_different_lengths(make_steps: Callable[..., Steps], overcommit: float) -> None:
    """Left-padded batches are such rows."""
    steps = make_steps(overcommit=overcommit)
    rows = steps.engine.cache.admit(4, 60)
    other = steps.engine.cache.admit(2, 60)
    generator = torch.Generator().manual_seed(1)
    texts: list[list[int]] = [[], [], [], []]
    for number in range(12):
        sources = torch.randint(0, 4, (4,), generator=generator).tolist() if number else [0, 1, 2, 3]
        new = [
            torch.randint(0, 256, (size,), generator=generator).tolist()
            for size in ([3, 11, 1, 6] if number == 0 else [1 + number % 2] * 4)
        ]
        texts = [[*texts[source], *tokens] for source, tokens in zip(sources, new, strict=True)]
        output = steps.run(rows, new, Reorder(number, tuple(sources)) if number else None)
        torch.testing.assert_close(output, steps.expected(texts, new), rtol=1e-4, atol=1e-5)
        steps.run(other, [[number], [number + 1]])  # takes pages in between
    assert steps.engine.cache.sessions()[0].reorder_number == 11


def test_a_reordering_that_was_done_is_skipped(make_steps: Callable[..., Steps]) -> None:
    steps = make_steps()
    rows = steps.engine.cache.admit(2, 40)
    steps.run(rows, [[5, 6, 7], [8, 9]])
    swap = Reorder(1, (1, 0))
    wanted = steps.expected([[8, 9, 1], [5, 6, 7, 2]], [[1], [2]])
    torch.testing.assert_close(steps.run(rows, [[1], [2]], swap), wanted, rtol=1e-4, atol=1e-5)
    again = steps.run(rows, [[1], [2]], swap, back=1)  # the step is tried again
    torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-5)
    old = steps.run(rows, [[1], [2]], Reorder(0, (0, 0)), back=1)
    torch.testing.assert_close(old, wanted, rtol=1e-4, atol=1e-5)
    wanted = steps.expected([[5, 6, 7, 2, 3], [8, 9, 1, 4]], [[3], [4]])
    torch.testing.assert_close(steps.run(rows, [[3], [4]], Reorder(2, (1, 0))), wanted, rtol=1e-4, atol=1e-5)


def test_a_step_that_fails_leaves_what_its_repetition_needs(
    make_steps: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = make_steps()
    rows = steps.engine.cache.admit(3, 40)
    steps.run(rows, [[5, 6, 7], [8, 9], [1]])
    cycle = Reorder(1, (1, 2, 0))
    with monkeypatch.context() as patch:
        patch.setattr(steps.engine.span, "forward", lambda *args: 1 / 0)
        with pytest.raises(EngineError, match="the forward pass failed"):
            steps.run(rows, [[1], [2], [3]], cycle)
    output = steps.run(rows, [[1], [2], [3]], cycle)
    wanted = steps.expected([[8, 9, 1], [1, 2], [5, 6, 7, 3]], [[1], [2], [3]])
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


# --- odd moments --------------------------------------------------------------------------------------------------


def test_a_step_that_rewinds_takes_no_pages_for_what_it_forgets(make_steps: Callable[..., Steps]) -> None:
    """All pages of an overcommitted cache are taken; the step needs one for each row, which it has."""
    steps = make_steps(num_pages=6, overcommit=4.0)
    rows, other = steps.engine.cache.admit(2, 12), steps.engine.cache.admit(1, 12)
    text = list(range(1, 13))
    steps.run(rows, [[50, 51], text])
    steps.run(other, [text[:6]])  # and two more tokens of room, as a session takes that comes in
    assert steps.engine.cache.free_pages == 0
    short = [RowWork(row, 2, 1) for row in rows]
    hidden = steps.model.model.embed_tokens(torch.tensor([7, 8])).detach()
    task = StepTask(hidden, short, 0, 8, reorder=Reorder(1, (1, 1)))
    output = steps.model.model.norm(steps.engine.submit(task).result(LIMIT).hidden)
    wanted = steps.expected([[1, 2, 7], [1, 2, 8]], [[7], [8]])
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    assert steps.engine.cache.free_pages == 2


def test_a_reordering_may_make_rows_too_short_for_their_step(make_steps: Callable[..., Steps]) -> None:
    """The session checks it; should its view be outdated, the step fails and the engine goes on."""
    steps = make_steps()
    rows = steps.engine.cache.admit(2, 12)
    steps.run(rows, [[5], [6, 7, 8]])
    hidden = steps.model.model.embed_tokens(torch.tensor([7, 8])).detach()
    work = [RowWork(rows[0], 1, 1), RowWork(rows[1], 3, 1)]
    with pytest.raises(ProtocolError, match="goes on at 3, but only 1 tokens are cached"):
        steps.engine.submit(StepTask(hidden, work, 0, 8, reorder=Reorder(1, (1, 0)))).result(LIMIT)
    output = steps.run(rows, [[1], [2]])
    assert output.isfinite().all()


@pytest.mark.parametrize("moment", ["hold", "grow", "slots", "copy_slots", "truncate", "let_go"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_session_that_ends_while_its_rows_are_reordered(
    make_steps: Callable[..., Steps], moment: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = make_steps(num_pages=32)
    cache = steps.engine.cache
    rows, other = cache.admit(4, 20), cache.admit(1, 20)
    steps.run(rows, [[5, 6, 7, 8, 9, 1], [8, 9, 1, 2, 3, 4, 5], [1], [4, 4]])
    died = threading.Event()
    monkeypatch.setattr(steps.engine, "_on_death", died.set)
    method = getattr(cache, moment)
    calls = []

    def ending(*args: Any) -> Any:
        calls.append(threading.current_thread().name)
        if len(calls) == call:
            cache.release(rows)
        return method(*args)

    monkeypatch.setattr(cache, moment, ending)
    try:
        steps.run(rows, [[1], [2], [3], [4]], Reorder(1, (1, 2, 0, 0)))
    except EngineError as error:
        assert "the session ended while" in str(error)
    assert "engine" in calls and not died.is_set()
    cache.release(rows)  # if the moment never came
    monkeypatch.undo()
    output = steps.run(other, [[5, 6, 7]])  # the engine lives
    torch.testing.assert_close(output, steps.expected([[5, 6, 7]], [[5, 6, 7]]), rtol=1e-4, atol=1e-5)
    cache.release(other)
    assert cache.free_pages == cache.num_pages == 32
    assert cache.tokens_left == 32 * PAGE


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no memory is left"), RuntimeError("a bug")],
    ids=lambda error: type(error).__name__,
)
def test_a_session_whose_copying_fails_half_way_is_lost_and_the_engine_goes_on(
    make_steps: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Its first layers may be reordered already: to do it again would mix up rows."""
    steps = make_steps(num_pages=32)
    cache = steps.engine.cache
    rows, other = cache.admit(2, 20), cache.admit(1, 20)
    steps.run(rows, [[5, 6, 7], [8, 9]])
    with monkeypatch.context() as patch:
        patch.setattr(cache, "copy_slots", Mock(side_effect=error))
        with pytest.raises(SessionLost, match=f"{error}; the session can be replayed"):
            steps.run(rows, [[1], [2]], Reorder(1, (1, 0)))
    assert rows[0].session.evicted
    with pytest.raises(SwarmError):
        steps.run(rows, [[1], [2]], Reorder(1, (1, 0)))
    output = steps.run(other, [[5, 6, 7]])
    torch.testing.assert_close(output, steps.expected([[5, 6, 7]], [[5, 6, 7]]), rtol=1e-4, atol=1e-5)
    cache.release(rows)  # as the handler does at last
    cache.release(other)
    assert cache.free_pages == cache.num_pages == 32
    assert cache.tokens_left == 32 * PAGE


class FakeSpan:
    """Takes no time, and stores nothing."""

    def __init__(self) -> None:
        self.device, self.dtype = CPU, torch.float32
        self.blocks = BlockSpan(start=0, end=1)

    def forward(self, hidden: torch.Tensor, chunks: list[RowChunk], cache: KVCache) -> torch.Tensor:
        return hidden


def test_sessions_that_reorder_share_an_overcommitted_cache() -> None:
    """More than it holds: they wait for each other, some are evicted, none is stuck, and no page is lost."""
    cache = KVCache(1, 12 * PAGE, PAGE, CPU, torch.float32, overcommit=8.0)
    limits = EvictionLimits(idle_protection=0.02, turn_time=0.05, page_wait_limit=LIMIT)
    engine = Engine(FakeSpan(), cache, 16, limits=limits)  # type: ignore[arg-type]
    engine.start()

    def live(seed: int) -> int:
        generator = torch.Generator().manual_seed(seed)
        done = evictions = 0
        rows = cache.admit(3, 16)
        lengths = [0, 0, 0]
        while done < 25:
            number = rows[0].session.reorder_number + 1
            sources = torch.randint(0, 3, (3,), generator=generator).tolist()
            after = [lengths[source] for source in sources]
            positions = [min(length, 14 - 5 * row) for row, length in enumerate(after)]
            work = [RowWork(row, position, 1) for row, position in zip(rows, positions, strict=True)]
            task = StepTask(torch.zeros(3, 2), work, 0, 1, reorder=Reorder(number, tuple(sources)))
            try:
                engine.submit(task).result(LIMIT)
            except SessionLost:
                evictions += 1
                rows, lengths = cache.admit(3, 16), [0, 0, 0]
                continue
            done += 1
            lengths = [position + 1 for position in positions]
            assert [row.length for row in rows] == lengths
        cache.release(rows)
        return evictions

    try:
        with ThreadPoolExecutor(5) as pool:
            evictions = list(pool.map(live, range(5)))
    finally:
        engine.stop(LIMIT)
    assert sum(evictions) == cache.num_evictions > 0
    assert cache.free_pages == cache.num_pages
