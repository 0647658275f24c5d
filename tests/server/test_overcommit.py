"""An engine over an overcommitted cache: steps wait for pages without spinning, sessions are evicted and come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from swarm.data_structures import BlockSpan
from swarm.errors import CacheFull, EngineError, SessionLost
from swarm.server.batch import RowChunk
from swarm.server.engine import Engine
from swarm.server.eviction import EvictionLimits
from swarm.server.kv_cache import KVCache, RowCache
from swarm.server.page_queue import PageQueue
from swarm.server.span import Span
from swarm.server.tasks import RowWork, StepOutput, StepTask

LIMIT = 60.0  # seconds for what takes milliseconds on an idle machine
CPU = torch.device("cpu")
PAGE = 4


class FakeSpan:
    """Takes no time. Counts batches."""

    def __init__(self) -> None:
        self.device, self.dtype = CPU, torch.float32
        self.blocks = BlockSpan(start=0, end=1)

    def forward(self, hidden: torch.Tensor, chunks: list[RowChunk], cache: KVCache) -> torch.Tensor:
        return hidden


class World:
    """An engine over a cache of four pages, of which sessions may reserve 16."""

    def __init__(self, **limits: float):
        self.cache = KVCache(1, 4 * PAGE, PAGE, CPU, torch.float32, overcommit=4.0)
        never = {"idle_protection": 1e6, "turn_time": 1e6, "page_wait_limit": 1e6}
        self.engine = Engine(FakeSpan(), self.cache, 64, limits=EvictionLimits(**(never | limits)))  # type: ignore[arg-type]
        self.rounds = 0
        provide = self.engine._pages.provide

        def counted(tasks):  # type: ignore[no-untyped-def]
            self.rounds += 1
            answer = provide(tasks)
            self.provided.set()
            return answer

        self.provided = threading.Event()
        self.engine._pages.provide = counted  # type: ignore[method-assign]
        self.engine.start()

    def admit(self, max_length: int = 4 * PAGE) -> RowCache:
        (row,) = self.cache.admit(1, max_length)
        return row

    def submit(self, *rows: RowCache, num_tokens: int, position: int | None = None) -> Future[StepOutput]:
        work = [RowWork(row, row.length if position is None else position, num_tokens) for row in rows]
        return self.engine.submit(StepTask(torch.zeros(num_tokens * len(rows), 2), work, 0, 1))

    def run(self, row: RowCache, num_tokens: int) -> None:
        self.submit(row, num_tokens=num_tokens).result(LIMIT)

    def wait_for_a_round(self) -> None:
        self.provided.clear()
        assert self.provided.wait(LIMIT)


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    worlds = []

    def make(**limits: float) -> World:
        worlds.append(World(**limits))
        return worlds[-1]

    yield make
    for world in worlds:
        world.engine.stop(LIMIT)


def test_more_is_admitted_than_fits_but_no_session_that_cannot_fit_alone() -> None:
    cache = KVCache(1, 4 * PAGE, PAGE, CPU, torch.float32, overcommit=2.5)
    assert cache.tokens_left == 4 * PAGE
    with pytest.raises(CacheFull):
        cache.admit(1, 4 * PAGE + 1)
    with pytest.raises(CacheFull):
        cache.admit(5, PAGE)
    rows = [cache.admit(1, 4 * PAGE) for _ in range(2)]
    assert cache.tokens_left == 2 * PAGE
    with pytest.raises(CacheFull) as caught:
        cache.admit(1, 3 * PAGE)
    assert caught.value.tokens_left == 2 * PAGE
    cache.release(rows[0])
    assert cache.tokens_left == 4 * PAGE


def test_a_step_waits_for_pages_without_spinning_and_wakes_when_they_come(make_world: Callable[..., World]) -> None:
    world = make_world()
    holder, waiting = world.admit(), world.admit()
    world.run(holder, 3 * PAGE)  # and a page to spare
    future = world.submit(waiting, num_tokens=1)
    world.wait_for_a_round()
    rounds, started = world.rounds, time.monotonic()
    for _ in range(3):
        world.wait_for_a_round()
    assert world.rounds - rounds <= 2 + (time.monotonic() - started) / 0.1
    assert not future.done()
    world.run(holder, 1)  # others go on
    world.engine._look_again = time.monotonic() + 2 * LIMIT  # only a release can wake it now
    world.cache.release([holder])
    assert len(future.result(LIMIT).hidden) == 1
    assert world.cache.num_evictions == 0


def test_a_newcomer_evicts_an_idle_session(make_world: Callable[..., World]) -> None:
    world = make_world(idle_protection=0.05)
    idle, newcomer = world.cache.admit(2, 2 * PAGE), world.admit()
    world.submit(*idle, num_tokens=2 * PAGE).result(LIMIT)
    left = world.cache.tokens_left
    world.run(newcomer, 1)
    assert world.cache.num_evictions == 1
    assert [row.pages for row in idle] == [[], []]  # all rows of a session go together
    assert idle[0].session.evicted
    assert world.cache.tokens_left == min(4 * PAGE, left + 4 * PAGE)
    with pytest.raises(SessionLost, match="evicted"):
        world.submit(idle[0], num_tokens=1).result(LIMIT)


def test_pages_given_back_while_it_is_decided_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(1, 4 * PAGE, PAGE, CPU, torch.float32, overcommit=4.0)
    (idle,), (newcomer,) = cache.admit(1, 4 * PAGE), cache.admit(1, 4 * PAGE)
    cache.grow(idle, 2 * PAGE)
    queue = PageQueue(cache, EvictionLimits(idle_protection=0.0, turn_time=1e6, page_wait_limit=1e6))
    sessions = cache.sessions
    # Its client closes the session after one of the two was read and before the other.
    monkeypatch.setattr(cache, "sessions", lambda: (cache.release([idle]), sessions())[1])
    step = StepTask(torch.zeros(4 * PAGE, 2), [RowWork(newcomer, 0, 4 * PAGE)], 0, 1)
    for _ in range(2):
        ready, failed = queue.provide([step])
        assert not failed
    assert ready == [step]
    assert len(newcomer.pages) == 4


def test_of_two_sessions_that_wait_for_pages_the_later_one_makes_room(make_world: Callable[..., World]) -> None:
    world = make_world()
    rows = first, second = world.admit(), world.admit()
    for num_tokens in (PAGE, 1):
        for row in rows:
            world.run(row, num_tokens)  # in the end all four pages are taken
    waiting = world.submit(first, num_tokens=PAGE)
    world.wait_for_a_round()
    assert not waiting.done()
    with pytest.raises(SessionLost, match="evicted"):
        world.submit(second, num_tokens=PAGE).result(LIMIT)
    assert len(waiting.result(LIMIT).hidden) == PAGE
    assert world.cache.num_evictions == 1


def test_after_a_turn_the_next_one_comes_in(make_world: Callable[..., World]) -> None:
    world = make_world(turn_time=0.3)
    resident, waiting = world.admit(), world.admit()
    world.run(resident, 2 * PAGE)
    future = world.submit(waiting, num_tokens=PAGE + 1)
    while not future.done():  # the resident never pauses
        try:
            world.submit(resident, num_tokens=1, position=2 * PAGE).result(LIMIT)
        except SessionLost:
            break
    assert future.result(LIMIT).queue_time >= 0.3
    assert world.cache.num_evictions == 1


def test_a_step_whose_session_ends_while_it_waits_fails(make_world: Callable[..., World]) -> None:
    world = make_world()
    holder, waiting = world.admit(), world.admit()
    world.run(holder, 3 * PAGE)
    future = world.submit(waiting, num_tokens=1)
    world.wait_for_a_round()
    world.cache.release([waiting])
    with pytest.raises(EngineError, match="the session ended"):
        future.result(LIMIT)


def test_a_refused_step_keeps_its_place_in_the_line(make_world: Callable[..., World]) -> None:
    world = make_world(page_wait_limit=0.3)
    holder, early, late = world.admit(), world.admit(), world.admit()
    world.run(holder, 3 * PAGE)
    with pytest.raises(CacheFull, match=r"no cache became free within 0.3 s; go on elsewhere"):
        world.submit(early, num_tokens=3 * PAGE).result(LIMIT)
    second = world.submit(late, num_tokens=3 * PAGE)
    world.wait_for_a_round()
    again = world.submit(early, num_tokens=3 * PAGE)  # younger than the other's step
    world.cache.release([holder])
    assert len(again.result(LIMIT).hidden) == 3 * PAGE
    with pytest.raises(CacheFull):
        second.result(LIMIT)


def test_without_overcommitment_nothing_waits() -> None:
    cache = KVCache(1, 4 * PAGE, PAGE, CPU, torch.float32)
    engine = Engine(FakeSpan(), cache, 64, limits=EvictionLimits(page_wait_limit=0.0))  # type: ignore[arg-type]
    engine.start()
    rows = [cache.admit(1, PAGE)[0] for _ in range(4)]
    futures = [engine.submit(StepTask(torch.zeros(PAGE, 2), [RowWork(row, 0, PAGE)], 0, 1)) for row in rows]
    assert all(len(future.result(LIMIT).hidden) == PAGE for future in futures)
    assert cache.num_evictions == 0
    engine.stop(LIMIT)


class Generation:
    """Greedy generation with the blocks on an engine; replays itself after an eviction, as a client does."""

    def __init__(self, engine: Engine, model: Any, max_length: int):
        self.engine, self.model, self.max_length = engine, model, max_length

    @torch.inference_mode()
    def run(self, prompt: list[int], num_tokens: int) -> list[int]:
        tokens, position = list(prompt), 0
        (row,) = self.engine.cache.admit(1, self.max_length)
        while len(tokens) < len(prompt) + num_tokens:
            hidden = self.model.model.embed_tokens(torch.tensor(tokens[position:]))
            work = [RowWork(row, position, len(hidden))]
            try:
                output = self.engine.submit(StepTask(hidden, work, 0, len(self.engine.span.blocks))).result(LIMIT)
            except SessionLost:
                (row,) = self.engine.cache.admit(1, self.max_length)
                position = 0
                continue
            position = len(tokens)
            tokens.append(int(self.model.lm_head(self.model.model.norm(output.hidden[-1:])).argmax()))
        self.engine.cache.release([row])
        return tokens


@pytest.mark.parametrize("max_batch_tokens", [16, 1024])
def test_forty_sessions_on_cache_for_ten_generate_what_each_generates_alone(
    tiny_span: Span, tiny_model: Any, max_batch_tokens: int
) -> None:
    prompt_tokens, new_tokens = 8, 24
    pages = 10 * (prompt_tokens + new_tokens) // PAGE
    cache = KVCache(len(tiny_span.blocks), pages * PAGE, PAGE, CPU, torch.float32, overcommit=4.0)
    limits = EvictionLimits(idle_protection=0.5, turn_time=1.0, page_wait_limit=LIMIT)
    engine = Engine(tiny_span, cache, max_batch_tokens, limits=limits)
    engine.start()
    prompts = torch.randint(0, 256, (40, prompt_tokens), generator=torch.Generator().manual_seed(5))
    with ThreadPoolExecutor(len(prompts)) as pool:
        run = Generation(engine, tiny_model, prompt_tokens + new_tokens).run
        futures = [pool.submit(run, prompt.tolist(), new_tokens) for prompt in prompts]
        found = [future.result(LIMIT) for future in futures]
    engine.stop(LIMIT)
    mask = torch.ones_like(prompts)
    expected = tiny_model.generate(prompts, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    assert found == expected.tolist()
    assert 0 < cache.num_evictions < 4 * 40
    assert engine._tally.evictions == cache.num_evictions
    assert cache.free_pages == pages
    assert cache.sessions() == []
