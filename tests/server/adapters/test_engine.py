"""Adapters on the engine's thread: errands between batches, batches that run out of memory, training, lasting prefixes,
and whose prompt goes next."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from dense_adapters import apply_forms
from hypothesis import given, settings
from hypothesis import strategies as st
from made_forms import Maker
from plain_blocks import run_plain

from swarm.data_structures import BlockSpan
from swarm.errors import CacheFull, EngineError
from swarm.server.adapters.applied import Adapter
from swarm.server.adapters.forms import AdapterForms, BlockForms, KeyValuePrefix
from swarm.server.adapters.scheduling import MAX_WAIT, AdapterTime
from swarm.server.batch import RowChunk
from swarm.server.engine import Engine
from swarm.server.eviction import EvictionLimits
from swarm.server.kv_cache import KVCache
from swarm.server.passes import PassTask, RunningPass
from swarm.server.tasks import RowWork, StepOutput, StepTask

Replay = Span = Any  # see conftest.py

LIMIT = 60.0  # seconds for what takes milliseconds on an idle machine
CPU = torch.device("cpu")
PAGE = 4
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class FakeSpan:
    """Adds 1 to what it gets, when the test lets it."""

    def __init__(self) -> None:
        self.device, self.dtype = CPU, torch.float32
        self.blocks = BlockSpan(start=0, end=1)
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.batches: list[list[tuple[Any, int]]] = []  # of each batch, (adapter, num_tokens) of each row

    def forward(self, hidden: torch.Tensor, chunks: list[RowChunk], cache: KVCache) -> torch.Tensor:
        self.batches.append([(chunk.cache.adapter, chunk.num_tokens) for chunk in chunks])
        self.entered.release()
        assert self.gate.acquire(timeout=LIMIT)
        return hidden + 1


class Fake:
    """An engine over a fake span."""

    def __init__(self, max_batch_tokens: int = 8, **settings: Any):
        self.span = FakeSpan()
        self.cache = KVCache(1, 4096, PAGE, CPU, torch.float32)
        self.engine = Engine(self.span, self.cache, max_batch_tokens, max_stall=0, **settings)  # type: ignore[arg-type]
        self.engine.start()

    def task(self, num_tokens: int = 1, adapter: Any = None, deadline: float | None = None) -> StepTask:
        (row,) = self.cache.admit(1, 128)
        row.adapter = adapter
        return StepTask(torch.zeros(num_tokens, 2), [RowWork(row, 0, num_tokens)], 0, 1, deadline=deadline)

    def submit(self, *arguments: Any, **options: Any) -> Future[StepOutput]:
        return self.engine.submit(self.task(*arguments, **options))

    def occupy(self) -> Future[StepOutput]:
        """Start a batch that stays on the device until the gate opens."""
        future = self.submit()
        assert self.span.entered.acquire(timeout=LIMIT)
        self.span.batches.clear()
        return future


@pytest.fixture
def fake() -> Iterator[Fake]:
    fake = Fake()
    yield fake
    fake.span.gate.release(1000)
    fake.engine.stop(LIMIT)


# --- errands -------------------------------------------------------------------------------------------------------


def test_errands_run_on_the_engines_thread_in_their_order(fake: Fake) -> None:
    """Also while it has nothing else to do."""
    order: list[int] = []
    errands = [fake.engine.run_between(lambda n=n: (order.append(n), threading.current_thread())[1]) for n in range(5)]
    threads = {errand.result(LIMIT) for errand in errands}
    assert order == [0, 1, 2, 3, 4]
    assert threads == {fake.engine._thread}


def test_an_errand_runs_between_batches_and_before_the_next(fake: Fake) -> None:
    first = fake.occupy()
    waiting = fake.submit(3)
    batches = fake.engine.run_between(lambda: len(fake.span.batches))
    assert not batches.done()
    fake.span.gate.release(1000)
    assert batches.result(LIMIT) == 0, "the batch that waited came first"
    first.result(LIMIT)
    waiting.result(LIMIT)


@pytest.mark.parametrize(
    "error", [ValueError("odd"), torch.OutOfMemoryError("no"), CacheFull("full", 0), KeyboardInterrupt()]
)
def test_an_errand_that_fails_tells_who_asked_and_nobody_else(fake: Fake, error: BaseException) -> None:
    def fail() -> None:
        raise error

    failed = fake.engine.run_between(fail)
    after = fake.engine.run_between(lambda: "fine")
    fake.span.gate.release(1000)
    with pytest.raises(type(error)):
        failed.result(LIMIT)
    assert after.result(LIMIT) == "fine"
    fake.submit(2).result(LIMIT)


def test_an_errand_that_nobody_wants_any_more_does_not_run(fake: Fake) -> None:
    fake.occupy()
    ran: list[int] = []
    unwanted = fake.engine.run_between(lambda: ran.append(1))
    assert unwanted.cancel()
    last = fake.engine.run_between(lambda: ran.append(2))
    fake.span.gate.release(1000)
    last.result(LIMIT)
    assert ran == [2]


def test_errands_that_wait_when_the_engine_stops_are_settled(fake: Fake) -> None:
    fake.occupy()
    waiting = fake.engine.run_between(lambda: "tidied up")
    stopping = threading.Thread(target=fake.engine.stop, args=(LIMIT,))
    stopping.start()
    while not fake.engine._stopping:
        time.sleep(0)
    fake.span.gate.release(1000)
    stopping.join(LIMIT)
    assert waiting.result(LIMIT) == "tidied up"
    with pytest.raises(EngineError, match="stopping"):
        fake.engine.run_between(lambda: None).result(LIMIT)


def test_errands_during_an_errand_do_not_hang(fake: Fake) -> None:
    inner = fake.engine.run_between(lambda: fake.engine.run_between(lambda: "inner")).result(LIMIT)
    assert inner.result(LIMIT) == "inner"


# --- whose prompt goes next ----------------------------------------------------------------------------------------


def test_the_earliest_deadline_goes_first_among_prompts(fake: Fake) -> None:
    now = time.monotonic()
    fake.occupy()
    prompts = {
        name: fake.submit(8, name, deadline=now + wait) for name, wait in (("late", 900), ("soon", 300), ("mid", 600))
    }
    prompts["whenever"] = fake.submit(8, "whenever")
    fake.span.gate.release(1000)
    for future in prompts.values():
        future.result(LIMIT)
    first = list(dict.fromkeys(adapter for batch in fake.span.batches for adapter, _ in batch))
    assert first == ["soon", "mid", "late", "whenever"]


def test_rows_that_decode_go_on_beside_prompts_with_deadlines(fake: Fake) -> None:
    now = time.monotonic()
    fake.occupy()
    prompts = [fake.submit(30, name, deadline=now + 300) for name in "ab"]
    decoding = fake.submit(1, "c")
    fake.span.gate.release(1000)
    for future in (*prompts, decoding):
        future.result(LIMIT)
    assert ("c", 1) in fake.span.batches[0]
    assert all(sum(count for _, count in batch) <= 8 + 1 for batch in fake.span.batches)
    assert all(batch for batch in fake.span.batches)


class Dear:
    """Costs under which the adapter "dear" is never worth its price."""

    row_time = 0.0

    def shared_time(self, tokens: int) -> float:
        return 1.0 + 0.01 * tokens

    def adapter_time(self, adapter: Any) -> AdapterTime:
        return AdapterTime(once=1000.0, per_token=100.0) if adapter == "dear" else AdapterTime(once=0.001)


def test_nobody_waits_for_ever_whatever_it_costs() -> None:
    """Cheap prompts and ones with deadlines come again and again; the dear one without a deadline gets its turn."""
    fake = Fake(8, adapter_costs=Dear())
    try:
        fake.occupy()
        dear = fake.task(8, "dear")
        dear.created -= MAX_WAIT  # it has waited already
        waiting = fake.engine.submit(dear)
        cheap = [fake.submit(8, "cheap", deadline=time.monotonic() + 300 if n % 2 else None) for n in range(6)]
        fake.span.gate.release(1)
        assert fake.span.entered.acquire(timeout=LIMIT)
        assert [adapter for adapter, _ in fake.span.batches[0]] == ["dear"]
        fake.span.gate.release(1000)
        for future in (waiting, *cheap):
            future.result(LIMIT)
    finally:
        fake.span.gate.release(1000)
        fake.engine.stop(LIMIT)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.sampled_from([None, "a", "b", "dear"]), st.none() | st.floats(-1, 5)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 12),
)
def test_all_that_waits_is_done_in_the_end(work: list[tuple[int, Any, float | None]], max_tokens: int) -> None:
    """In batches that are never empty and never too large, each row's tokens once and in their order."""
    fake = Fake(max_tokens, adapter_costs=Dear())
    try:
        fake.occupy()
        now = time.monotonic()
        futures = [
            fake.submit(tokens, adapter, deadline=None if wait is None else now + wait)
            for tokens, adapter, wait in work
        ]
        fake.span.gate.release(10_000)
        for future, (tokens, _, _) in zip(futures, work, strict=True):
            assert torch.equal(future.result(LIMIT).hidden, torch.ones(tokens, 2))
        sizes = [sum(count for _, count in batch) for batch in fake.span.batches]
        assert all(1 <= size <= max_tokens + math.ceil(max_tokens / 8) for size in sizes)
        assert sum(sizes) == sum(tokens for tokens, _, _ in work)
    finally:
        fake.span.gate.release(10_000)
        fake.engine.stop(LIMIT)


# --- real blocks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forms(tiny_model: Any) -> dict[str, Any]:
    return Maker(tiny_model, strength=0.2).all()


@pytest.mark.parametrize("fits", [1, 2, 5, 11])
def test_a_batch_with_adapters_that_runs_out_of_memory(
    tiny_span: Span,
    tiny_model: Any,
    forms: Any,
    make_cache: Any,
    hidden_at_boundaries: Any,
    monkeypatch: pytest.MonkeyPatch,
    fits: int,
) -> None:
    """It is run in halves: rows keep their adapters and the places behind their prefixes."""
    cache = make_cache(tiny_span)
    engine = Engine(tiny_span, cache, 64)
    names = ["everything", None, "prefix", "low rank", "sparse", "norms"]
    adapters = {name: tiny_span.adapters.add(forms[name], cache) for name in names if name is not None}
    forward = tiny_span.forward

    def limited(hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if len(hidden) > fits:
            raise OUT_OF_MEMORY
        return forward(hidden, *arguments)

    tasks, wanted = [], []
    for seed, name in enumerate(names):
        ids = torch.randint(0, 256, (7 + seed,), generator=torch.Generator().manual_seed(seed))
        with apply_forms(tiny_model, forms[name]) if name else _nothing():
            boundaries = hidden_at_boundaries(tiny_model, ids)
        (row,) = cache.admit(1, 32)
        row.adapter = adapters.get(name)
        tasks.append(StepTask(boundaries[0], [RowWork(row, 0, len(ids))], 0, 8))
        wanted.append(boundaries[-1])
    try:
        with monkeypatch.context() as patch:
            patch.setattr(tiny_span, "forward", limited)
            futures = [engine.submit(task) for task in tasks]
            engine.start()
            outputs = [future.result(LIMIT).hidden for future in futures]
    finally:
        engine.stop(LIMIT)
        for adapter in adapters.values():
            tiny_span.adapters.remove(adapter, cache)
    for output, expected in zip(outputs, wanted, strict=True):
        assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("with_prompts", [False, True])
@pytest.mark.parametrize("most_tokens", [1, 9, 12, 1000])
def test_passes_whose_sequences_have_adapters_run_in_groups(
    tiny_span: Span, tiny_model: Any, forms: Any, most_tokens: int, with_prompts: bool
) -> None:
    """Through a part of the span, and with deep prompts: each sequence as plain blocks with its adapter alone."""
    start, end = 2, 5
    names = ["low rank", None, "houlsby", "sparse", "low rank", "scales", "norms", "pfeiffer"]
    lengths = [4, 4, 7, 2, 4, 1, 5, 3]
    adapters = {name: tiny_span.adapters.add(forms[name]) for name in set(names) if name is not None}
    maker = Maker(tiny_model, 3)
    rows = [maker.normal(length, 64, std=1.0) for length in lengths]
    prompts = maker.normal(end - start, 3, 64, std=1.0) if with_prompts else None
    gradients = [maker.normal(length, 64, std=1.0) for length in lengths]
    of_prompts = torch.zeros(end - start, 3, 64)
    wanted, wanted_gradients = [], []
    for name, row, gradient in zip(names, rows, gradients, strict=True):
        with apply_forms(tiny_model, forms[name]) if name else _nothing():
            result = run_plain(tiny_model, row, (len(row),), start, end, prompts, gradient)
        wanted.append(result.output)
        wanted_gradients.append(result.hidden)
        if result.prompts is not None:
            of_prompts += result.prompts
    try:
        for gradient, expected in ((None, wanted), (torch.cat(gradients), wanted_gradients)):
            own = [adapters.get(name) for name in names]
            task = PassTask("me", torch.cat(rows), lengths, start, end, prompts, gradient, own)
            running = RunningPass(task, tiny_span, most_tokens)
            while not running.advance():
                pass
            running.finish()
            output = task.future.result(0)
            for mine, theirs in zip(output.hidden.split(lengths), expected, strict=True):
                assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
            if gradient is not None and output.prompts is not None:
                assert (output.prompts - of_prompts).norm() <= 1e-5 * of_prompts.norm()
    finally:
        for adapter in adapters.values():
            tiny_span.adapters.remove(adapter)


@pytest.mark.parametrize("kind", ["low rank", "prefix"])
def test_a_pass_out_of_memory_keeps_the_adapters_of_its_sequences(tiny_span: Span, forms: Any, kind: str) -> None:
    adapter = tiny_span.adapters.add(forms[kind])
    hidden = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    own = [adapter, None, adapter, None]

    def run(running: RunningPass | None) -> torch.Tensor:
        assert running is not None
        while not running.advance():
            pass
        running.finish()
        output: torch.Tensor = running.task.future.result(0).hidden
        return output

    try:
        whole = run(RunningPass(PassTask("me", hidden, [3] * 4, 0, 8, adapters=own), tiny_span))
        begun = RunningPass(PassTask("me", hidden, [3] * 4, 0, 8, adapters=own), tiny_span)
        begun.advance()
        halves = run(begun.in_smaller_pieces())
    finally:
        tiny_span.adapters.remove(adapter)
    assert (whole - halves).abs().max() <= 1e-5 * whole.abs().max()


# --- prefixes that stay in an overcommitted cache -------------------------------------------------------------------


def prefix_of(num_tokens: int) -> AdapterForms:
    values = torch.zeros(1, 1, num_tokens, 2)
    return AdapterForms([BlockForms()], KeyValuePrefix(values, values.clone()))


class Overcommitted:
    """Four pages, of which sessions may reserve 16, and blocks that have nothing but prefixes."""

    def __init__(self, **limits: float) -> None:
        from swarm.server.adapters.applied import AppliedAdapters

        self.cache = KVCache(1, 4 * PAGE, PAGE, CPU, torch.float32, overcommit=4.0)
        self.applied = AppliedAdapters([torch.nn.Module()], CPU)
        never = {"idle_protection": 1e6, "turn_time": 1e6, "page_wait_limit": 1e6}
        self.span = FakeSpan()
        self.span.gate.release(1000)
        self.engine = Engine(self.span, self.cache, 64, limits=EvictionLimits(**(never | limits)))  # type: ignore[arg-type]
        self.engine.start()

    def add_prefix(self, num_tokens: int) -> Adapter:
        return self.engine.run_between(lambda: self.applied.add(prefix_of(num_tokens), self.cache)).result(LIMIT)

    def run(self, row: Any, num_tokens: int) -> StepOutput:
        step = StepTask(torch.zeros(num_tokens, 2), [RowWork(row, row.length, num_tokens)], 0, 1)
        return self.engine.submit(step).result(LIMIT)


@pytest.fixture
def overcommitted() -> Iterator[Callable[..., Overcommitted]]:
    started: list[Overcommitted] = []

    def start(**limits: float) -> Overcommitted:
        started.append(Overcommitted(**limits))
        return started[-1]

    yield start
    for each in started:
        each.engine.stop(LIMIT)


def test_a_session_that_does_not_fit_beside_the_prefixes_is_not_admitted(
    overcommitted: Callable[..., Overcommitted],
) -> None:
    """It could wait for ever: prefixes are not evicted."""
    world = overcommitted()
    adapter = world.add_prefix(PAGE)
    assert world.cache.tokens_left == 3 * PAGE
    with pytest.raises(CacheFull):
        world.cache.admit(1, 3 * PAGE + 1)
    (row,) = world.cache.admit(1, 3 * PAGE)
    world.run(row, 3 * PAGE)
    world.cache.release([row])
    world.engine.run_between(lambda: world.applied.remove(adapter, world.cache)).result(LIMIT)
    assert world.cache.tokens_left == 4 * PAGE


def test_an_idle_session_is_evicted_and_a_prefix_is_not(overcommitted: Callable[..., Overcommitted]) -> None:
    world = overcommitted(idle_protection=0.0)
    adapter = world.add_prefix(PAGE)
    rows = [world.cache.admit(1, 3 * PAGE)[0] for _ in range(4)]
    for row in rows:
        world.run(row, 3 * PAGE)
    assert world.cache.num_evictions == 3
    assert adapter.prefix_row is not None
    assert not adapter.prefix_row.released
    assert len(adapter.prefix_row.pages) == 1


def test_a_prefix_that_finds_all_pages_taken_is_refused(overcommitted: Callable[..., Overcommitted]) -> None:
    world = overcommitted()
    (row,) = world.cache.admit(1, 4 * PAGE)
    world.run(row, 4 * PAGE)
    with pytest.raises(CacheFull):
        world.add_prefix(PAGE)
    world.cache.release([row])
    assert world.cache.tokens_left == 4 * PAGE, "what was refused holds nothing"
    world.add_prefix(PAGE)


def test_rows_behind_a_prefix_do_not_write_into_it(
    tiny_span: Span, tiny_model: Any, forms: Any, make_cache: Any
) -> None:
    cache = make_cache(tiny_span)
    adapter = tiny_span.adapters.add(forms["prefix"], cache)
    row = adapter.prefix_row
    assert row is not None
    slots = cache.slots(row, 0, adapter.prefix_tokens)

    def contents() -> torch.Tensor:
        return torch.stack(
            [stored[0][:, slots] for stored in itertools.chain(*zip(cache._keys, cache._values, strict=True))]
        )

    before = contents()
    (own,) = cache.admit(1, 32)
    own.adapter = adapter
    hidden = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    for first, last in ((0, 9), (9, 10), (4, 12), (0, 20)):  # rewinding as well
        cache.truncate(own, first)
        cache.grow(own, last)
        tiny_span.forward(hidden[first:last], [RowChunk(own, first, last - first, 0, 8)], cache)
        own.length = last
    assert torch.equal(contents(), before)
    tiny_span.adapters.remove(adapter, cache)
