"""Sessions share batches and nothing else: one's failure, end or length is no other's business."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import pytest
import torch

from swarm.data_structures import BlockSpan
from swarm.errors import EngineError, SessionTooLong
from swarm.server.batch import RowChunk
from swarm.server.engine import Engine, Load
from swarm.server.kv_cache import KVCache
from swarm.server.pace import SAFETY, Pace
from swarm.server.settling import Settling
from swarm.server.span import Span
from swarm.server.tasks import RowWork, StepOutput, StepTask

LIMIT = 60.0  # seconds for what takes milliseconds on an idle machine
HIDDEN_SIZE = 2


class FakeSpan:
    """Adds 1 to what it gets, when the test lets it. A value of 13 brings bad luck to its whole batch."""

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.blocks = BlockSpan(start=0, end=1)
        self.batches: list[list[tuple[int, int]]] = []  # of each batch, (position, num_tokens) of each row
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.in_forward: Callable[[], None] = lambda: None

    def forward(self, hidden: torch.Tensor, chunks: list[RowChunk], cache: KVCache) -> torch.Tensor:
        self.batches.append([(chunk.position, chunk.num_tokens) for chunk in chunks])
        self.entered.release()
        assert self.gate.acquire(timeout=LIMIT)
        self.in_forward()
        if (hidden == 13).any():
            raise ZeroDivisionError("bad luck")
        return hidden + 1

    def wait_until_busy(self) -> None:
        assert self.entered.acquire(timeout=LIMIT)

    def open(self) -> None:
        """Let all batches through from now on."""
        self.gate.release(1000)


class Fixture:
    """An engine over a fake span."""

    def __init__(self, max_batch_tokens: int = 16):
        self.span = FakeSpan()
        self.cache = KVCache(1, 1024, 4, self.span.device, self.span.dtype)
        self.engine = Engine(self.span, self.cache, max_batch_tokens, max_stall=0)  # type: ignore[arg-type]
        self.engine.start()

    def task(self, num_tokens: int = 1, value: float = 0.0, max_length: int = 64) -> StepTask:
        (row,) = self.cache.admit(1, max_length)
        hidden = torch.arange(float(num_tokens)).repeat(HIDDEN_SIZE, 1).t() * 1e-3 + value
        return StepTask(hidden, [RowWork(row, 0, num_tokens)], 0, 1)

    def submit(self, *args: Any, **kwargs: Any) -> Future[StepOutput]:
        return self.engine.submit(self.task(*args, **kwargs))

    def occupy(self) -> Future[StepOutput]:
        """Start a batch that stays on the device until the gate opens."""
        future = self.submit()
        self.span.wait_until_busy()
        return future


@pytest.fixture
def fake() -> Iterator[Fixture]:
    fixture = Fixture()
    yield fixture
    fixture.span.open()
    fixture.engine.stop(LIMIT)


def result(future: Future[StepOutput]) -> torch.Tensor:
    return future.result(LIMIT).hidden


def test_what_waits_when_the_device_is_free_runs_in_one_batch(fake: Fixture) -> None:
    first = fake.occupy()
    others = [fake.submit(num_tokens, value=10.0 * num_tokens) for num_tokens in (1, 5, 2)]
    fake.span.open()
    wait_for([first, *others], LIMIT)
    assert fake.span.batches[1] == [(0, 1), (0, 5), (0, 2)]
    assert (fake.engine.num_batches, fake.engine.num_batched_rows) == (2, 4)
    for future, num_tokens in zip(others, (1, 5, 2), strict=True):
        expected = torch.arange(float(num_tokens)) * 1e-3 + 10.0 * num_tokens + 1
        assert torch.equal(result(future), torch.stack([expected] * HIDDEN_SIZE, dim=1))


def test_a_long_prompt_runs_in_chunks_beside_decoding(fake: Fixture) -> None:
    fake.occupy()
    prompt = fake.task(40)
    futures = [fake.engine.submit(prompt), fake.submit(1), fake.submit(1)]
    fake.span.open()
    output = result(futures[0])
    assert fake.span.batches[1:] == [[(0, 14), (0, 1), (0, 1)], [(14, 16)], [(30, 10)]]
    assert torch.equal(output, prompt.hidden + 1)
    assert prompt.rows[0].cache.length == 40


def test_the_rows_of_a_session_come_back_in_their_order(fake: Fixture) -> None:
    rows = fake.cache.admit(3, 32)
    hidden = torch.arange(25.0).repeat(HIDDEN_SIZE, 1).t() * 1e-3
    work = [RowWork(rows[2], 0, 12), RowWork(rows[0], 0, 1), RowWork(rows[1], 0, 12)]
    fake.span.open()
    assert torch.equal(result(fake.engine.submit(StepTask(hidden, work, 0, 1))), hidden + 1)
    assert [row.length for row in rows] == [1, 12, 12]
    assert len(fake.span.batches) == 2


def test_the_present_load(fake: Fixture) -> None:
    assert fake.engine.load == Load(0, 0)
    fake.occupy()
    assert fake.engine.load == Load(1, 0)
    rows = fake.cache.admit(2, 8)
    pair = fake.engine.submit(
        StepTask(torch.zeros(3, HIDDEN_SIZE), [RowWork(rows[0], 0, 1), RowWork(rows[1], 0, 2)], 0, 1)
    )
    prompt, dropped = fake.submit(40), fake.submit(1)
    assert fake.engine.load == Load(1, 4)
    dropped.cancel()
    assert fake.engine.load == Load(1, 3)
    fake.span.gate.release()
    fake.span.wait_until_busy()
    assert fake.engine.load == Load(3, 0)  # a part of the prompt too
    fake.span.gate.release()
    fake.span.wait_until_busy()
    assert pair.done() and not prompt.done()
    assert fake.engine.load == Load(1, 0)
    fake.span.open()
    result(prompt)
    assert fake.engine.load == Load(0, 0)


def test_times_are_measured(fake: Fixture) -> None:
    fake.span.open()
    output = fake.submit(40).result(LIMIT)
    assert output.queue_time > 0
    assert output.compute_time > 0


def test_the_answer_has_the_dtype_of_the_question(fake: Fixture) -> None:
    fake.span.open()
    (row,) = fake.cache.admit(1, 4)
    future = fake.engine.submit(StepTask(torch.zeros(1, HIDDEN_SIZE).bfloat16(), [RowWork(row, 0, 1)], 0, 1))
    assert result(future).dtype is torch.bfloat16


def test_a_failure_is_that_of_the_session_which_caused_it(fake: Fixture) -> None:
    fake.occupy()
    unlucky, neighbour = fake.submit(1, value=13.0), fake.submit(1)
    fake.span.gate.release()
    fake.span.wait_until_busy()
    later = fake.submit(1, value=5.0)
    fake.span.open()
    with pytest.raises(EngineError, match="the forward pass failed: ZeroDivisionError: bad luck"):
        unlucky.result(LIMIT)
    assert result(neighbour)[0, 0] == 1.0
    assert result(later)[0, 0] == 6.0
    assert [len(batch) for batch in fake.span.batches] == [1, 2, 1, 1, 1]  # once together, once each alone


def test_a_failed_step_can_be_repeated(fake: Fixture) -> None:
    fake.span.open()
    task = fake.task(3)
    result(fake.engine.submit(task))
    (work,) = task.rows
    again = [RowWork(work.cache, 3, 1)]
    with pytest.raises(EngineError):
        fake.engine.submit(StepTask(torch.full((1, HIDDEN_SIZE), 13.0), again, 0, 1)).result(LIMIT)
    assert work.cache.length == 3
    assert result(fake.engine.submit(StepTask(torch.zeros(1, HIDDEN_SIZE), again, 0, 1)))[0, 0] == 1.0
    assert work.cache.length == 4


def test_a_failed_step_leaves_the_session_where_the_step_began(fake: Fixture) -> None:
    """Part of what was cached behind that position may be overwritten."""
    fake.span.open()
    task = fake.task(8)
    result(fake.engine.submit(task))
    (work,) = task.rows
    rewinding = StepTask(torch.full((2, HIDDEN_SIZE), 13.0), [RowWork(work.cache, 3, 2)], 0, 1)
    with pytest.raises(EngineError):
        fake.engine.submit(rewinding).result(LIMIT)
    assert work.cache.length == 3


def test_a_cancelled_step_does_not_run(fake: Fixture) -> None:
    fake.occupy()
    cancelled, kept = fake.submit(2), fake.submit(3)
    assert cancelled.cancel()
    fake.span.open()
    result(kept)
    assert fake.span.batches[1:] == [[(0, 3)]]


def test_a_step_cancelled_between_its_chunks_is_dropped(fake: Fixture) -> None:
    prompt = fake.submit(40)
    fake.span.wait_until_busy()
    assert prompt.cancel()
    fake.span.open()
    result(fake.submit(1))
    assert fake.span.batches == [[(0, 16)], [(0, 1)]]


def test_a_session_that_ends_while_its_step_waits(fake: Fixture) -> None:
    fake.occupy()
    ended = fake.task(2)
    futures = [fake.engine.submit(ended), fake.submit(3)]
    fake.cache.release([ended.rows[0].cache])
    fake.span.open()
    with pytest.raises(EngineError, match="the session ended"):
        futures[0].result(LIMIT)
    result(futures[1])
    assert fake.span.batches[1] == [(0, 3)]


def test_a_session_that_ends_in_a_batch_keeps_its_pages_until_the_batch_is_done(fake: Fixture) -> None:
    fake.occupy()
    ending, staying = fake.task(8), fake.task(8)
    (row,) = (work.cache for work in ending.rows)
    seen = []

    def end_the_session() -> None:
        if len(fake.span.batches) == 2:
            pages = list(row.pages)
            fake.cache.release([row])
            seen.append((pages, list(row.pages)))

    fake.span.in_forward = end_the_session
    left = fake.cache.tokens_left
    futures = [fake.engine.submit(ending), fake.engine.submit(staying)]
    fake.span.open()
    wait_for(futures, LIMIT)
    result(fake.submit(1))  # the next batch has begun
    ((before, during),) = seen
    assert before == during != []
    assert row.pages == []
    assert fake.cache.tokens_left == left + 64 - 64  # the ended one's are back, the last one's are taken
    result(futures[1])


def test_a_step_too_long_for_its_session_fails_alone(fake: Fixture) -> None:
    fake.occupy()
    futures = [fake.submit(9, max_length=8), fake.submit(2)]
    fake.span.open()
    with pytest.raises(SessionTooLong):
        futures[0].result(LIMIT)
    result(futures[1])


def test_stopping_fails_what_waits_and_finishes_what_runs(fake: Fixture) -> None:
    running = fake.occupy()
    waiting = fake.submit(1)
    stopping = threading.Thread(target=fake.engine.stop, args=(LIMIT,))
    stopping.start()
    with fake.engine._wake:
        assert fake.engine._wake.wait_for(lambda: fake.engine._stopping, LIMIT)
    with pytest.raises(EngineError, match="the server is stopping"):
        fake.submit(1).result(LIMIT)
    fake.span.open()
    assert result(running)[0, 0] == 1.0
    with pytest.raises(EngineError, match="the server is stopping"):
        waiting.result(LIMIT)
    stopping.join(LIMIT)
    assert not stopping.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_died_of_a_bug(fake: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.occupy()
    monkeypatch.setattr(fake.engine, "_schedule", lambda tasks: 1 / 0)
    waiting = fake.submit(1)
    fake.span.open()
    with pytest.raises(EngineError):
        waiting.result(LIMIT)
    with pytest.raises(EngineError):
        fake.submit(1).result(LIMIT)


@pytest.fixture
def make_engine(tiny_span: Span, make_cache: Callable[..., KVCache]) -> Iterator[Callable[..., Engine]]:
    """Running engines over the tiny Llama."""
    engines = []

    def make(max_batch_tokens: int, max_stall: float = 0) -> Engine:
        engine = Engine(tiny_span, make_cache(tiny_span), max_batch_tokens, max_stall=max_stall)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop(LIMIT)


class Generation:
    """Greedy generation with the blocks on an engine, and embeddings and head of a plain model."""

    def __init__(self, engine: Engine, model: Any, max_length: int):
        self.engine, self.model = engine, model
        (self.row,) = engine.cache.admit(1, max_length)

    @torch.inference_mode()
    def run(self, prompt: list[int], num_tokens: int) -> list[int]:
        tokens, position = list(prompt), 0
        while len(tokens) < len(prompt) + num_tokens:
            new = torch.tensor(tokens[position:])
            hidden = self.model.model.embed_tokens(new)
            work = [RowWork(self.row, position, len(new))]
            output = result(self.engine.submit(StepTask(hidden, work, 0, len(self.engine.span.blocks))))
            position = len(tokens)
            tokens.append(int(self.model.lm_head(self.model.model.norm(output[-1:])).argmax()))
        return tokens


@pytest.mark.parametrize("max_batch_tokens", [7, 1024])
def test_sessions_generate_together_what_each_generates_alone(
    make_engine: Callable[..., Engine], tiny_model: Any, max_batch_tokens: int
) -> None:
    engine = make_engine(max_batch_tokens)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (1, 5, 18, 37)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        futures = [pool.submit(Generation(engine, tiny_model, 64).run, prompt, 24) for prompt in prompts]
        together = [future.result(LIMIT) for future in futures]
    assert engine.num_batched_rows > engine.num_batches
    for prompt, tokens in zip(prompts, together, strict=True):
        expected = tiny_model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        assert tokens == expected[0].tolist()


def test_a_prompt_in_chunks_equals_the_prompt_in_one(make_engine: Callable[..., Engine]) -> None:
    hidden = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for max_batch_tokens in (1024, 7, 2):
        engine = make_engine(max_batch_tokens)
        (row,) = engine.cache.admit(1, 50)
        outputs.append(result(engine.submit(StepTask(hidden, [RowWork(row, 0, 50)], 0, 8))))
        assert engine.num_batches == -(-50 // max_batch_tokens)
    whole, *chunked = outputs
    for output in chunked:
        assert (output - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_a_prompt_is_read_in_small_chunks_while_somebody_decodes(fake: Fixture) -> None:
    fake.span.open()
    fake.engine.max_batch_tokens = 64
    (row,) = fake.cache.admit(1, 64)
    pace = fake.engine._pace = Pace(max_stall=3.0)
    now = time.monotonic()
    pace.finished([], 1000, False, now - 1300.0, now - 300.0)  # a token of a prompt takes one second
    for number in range(20):  # and a batch without any one more, so this row's tokens came 16 seconds apart
        at = now - 16.0 * (19 - number)
        pace.arrived(row, True, at - 1.0)
        pace.finished([row], 0, True, at - 1.0, at)
    prompt = fake.task(60)
    result(fake.engine.submit(prompt))  # the row is away, and leaves half of its time to this batch
    assert fake.span.batches[0] == [(0, int(16.0 * 3.0 * SAFETY / 2 - 1.0))]
    fake.cache.release([row, prompt.rows[0].cache])
    result(fake.submit(100, max_length=100))
    assert fake.span.batches[-2:] == [[(0, 64)], [(64, 36)]]


def test_a_free_device_waits_for_the_rows_of_its_last_batch(fake: Fixture) -> None:
    fake.span.open()
    tasks = [fake.task(), fake.task()]
    settling = fake.engine._settling = Settling(max_wait=LIMIT)
    settling.finished([task.rows[0].cache for task in tasks], time.monotonic())
    first = fake.engine.submit(tasks[0])
    assert not wait_for([first], timeout=0.05).done
    second = fake.engine.submit(tasks[1])
    wait_for([first, second], LIMIT)
    assert [len(batch) for batch in fake.span.batches] == [2]


def test_a_free_device_does_not_wait_for_a_session_that_ended(fake: Fixture) -> None:
    fake.span.open()
    gone = fake.task()
    settling = fake.engine._settling = Settling(max_wait=2 * LIMIT)
    settling.finished([gone.rows[0].cache], time.monotonic())
    fake.cache.release([gone.rows[0].cache])
    assert result(fake.submit()).shape == (1, HIDDEN_SIZE)


def test_a_deadline_that_has_passed_counts_no_more() -> None:
    fake = Fixture(max_batch_tokens=2)
    try:
        fake.occupy()
        tasks = [fake.task(value=float(number)) for number in range(3)]
        tasks[1].deadline, tasks[2].deadline = time.monotonic() - 1.0, time.monotonic() + 1e6
        futures = [fake.engine.submit(task) for task in tasks]
        fake.span.gate.release(2)
        wait_for([futures[0], futures[2]], LIMIT)
        assert not futures[1].done()
    finally:
        fake.span.open()
        fake.engine.stop(LIMIT)
