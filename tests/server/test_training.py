"""Passes for training run behind the steps of sessions: they change no token, hold nobody up, and are not starved."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.data_structures import BlockSpan
from swarm.errors import EngineError
from swarm.server import training
from swarm.server.batch import RowChunk, WholeRows
from swarm.server.engine import Engine
from swarm.server.kv_cache import KVCache
from swarm.server.pace import Pace
from swarm.server.passes import PassOutput, PassTask
from swarm.server.span import Span
from swarm.server.tasks import RowWork, StepOutput, StepTask
from swarm.server.training import PATIENCE_BATCHES, PATIENCE_PIECES, PATIENCE_SECONDS, PassQueue, PieceTimes

LIMIT = 60.0  # seconds for what takes milliseconds on an idle machine
HIDDEN_SIZE = 2
NUM_BLOCKS = 3


# --- whose turn it is ------------------------------------------------------------------------------------------------


def task_of(owner: str) -> PassTask:
    return PassTask(owner, torch.zeros(1, HIDDEN_SIZE), (1,), 0, NUM_BLOCKS)


def take_all(queue: PassQueue) -> list[int]:
    """Which tasks, by identity: tensors do not compare."""
    return [id(task) for task in iter(queue.take, None)]


def ids(*tasks: PassTask) -> list[int]:
    return [id(task) for task in tasks]


def test_peers_take_turns_and_each_of_them_in_its_order() -> None:
    queue = PassQueue()
    tasks = [task_of(owner) for owner in "aaabbc"]
    for task in tasks:
        queue.add(task)
    assert len(queue) == 6
    a1, a2, a3, b1, b2, c1 = tasks
    assert take_all(queue) == ids(a1, b1, c1, a2, b2, a3)
    assert len(queue) == 0


def test_who_comes_later_is_behind_those_who_wait_but_not_behind_all_that_they_want() -> None:
    queue = PassQueue()
    first, second, newcomer = task_of("a"), task_of("a"), task_of("b")
    queue.add(first)
    queue.add(second)
    assert queue.take() is first
    queue.add(newcomer)
    assert queue.take() is second  # it waited already
    assert queue.take() is newcomer


def test_what_was_cancelled_costs_its_owner_no_turn() -> None:
    queue = PassQueue()
    given_up, also_given_up, kept = (task_of("a") for _ in range(3))
    others = [task_of("b") for _ in range(3)]
    for task in (given_up, also_given_up, kept, *others):
        queue.add(task)
    given_up.future.cancel()
    also_given_up.future.cancel()
    assert take_all(queue) == ids(kept, *others)


def test_passes_that_were_given_up_do_not_pile_up_behind_a_busy_device() -> None:
    """A cancelled pass has given its quota back, so its tensors may not stay until their turn comes."""
    queue = PassQueue()
    other = task_of("b")
    queue.add(other)
    tensors = []
    for _ in range(5):
        task = task_of("a")
        queue.add(task)
        task.future.cancel()
        tensors.append(weakref.ref(task.hidden))
        del task
    assert [tensor() is None for tensor in tensors] == [True] * 4 + [False]
    kept = task_of("a")
    queue.add(kept)
    assert tensors[-1]() is None
    assert len(queue) == 2
    assert take_all(queue) == ids(other, kept)


def test_clearing_gives_back_all_that_waits() -> None:
    queue = PassQueue()
    tasks = [task_of(owner) for owner in "aba"]
    for task in tasks:
        queue.add(task)
    assert sorted(ids(*queue.clear())) == sorted(ids(*tasks))
    assert queue.take() is None and len(queue) == 0


@given(st.lists(st.one_of(st.sampled_from("abc"), st.integers(0, 30), st.none()), max_size=60))
def test_no_peer_is_served_twice_while_another_waits(actions: list[str | int | None]) -> None:
    """A letter: a peer adds a task; a number: the task of that number is cancelled; None: one is taken."""
    queue, tasks = PassQueue(), list[PassTask]()
    waiting: dict[str, deque[int]] = {owner: deque() for owner in "abc"}
    served_since: dict[str, set[str]] = {}  # of each peer that waits, whom it saw served
    for action in actions:
        if isinstance(action, str):
            task = task_of(action)
            tasks.append(task)
            queue.add(task)
            waiting[action].append(id(task))
            served_since.setdefault(action, set())
        elif isinstance(action, int):
            if action < len(tasks):
                task = tasks[action]
                task.future.cancel()
                if id(task) in waiting[task.owner]:
                    waiting[task.owner].remove(id(task))
        else:
            taken = queue.take()
            if taken is None:
                assert not any(waiting.values())
                continue
            assert waiting[taken.owner].popleft() == id(taken)
            served_since[taken.owner] = set()
            for owner, line in waiting.items():
                if owner != taken.owner and line:
                    assert taken.owner not in served_since[owner], f"{taken.owner} overtook {owner} twice"
                    served_since[owner].add(taken.owner)
        for owner, line in waiting.items():
            if not line:
                served_since[owner] = set()
    assert sorted(take_all(queue)) == sorted(number for line in waiting.values() for number in line)


# --- whether a piece may begin ---------------------------------------------------------------------------------------


def test_a_piece_may_begin_whenever_nobody_decodes() -> None:
    assert PieceTimes(0.0).may_begin(512, None, 0.0)


def test_the_first_piece_waits_until_it_is_overdue_while_somebody_decodes() -> None:
    """Nobody knows how long it will take."""
    times = PieceTimes(0.0)
    assert not times.may_begin(1, 1e9, PATIENCE_SECONDS * 0.99)
    assert times.may_begin(1, 0.0, PATIENCE_SECONDS)


def test_a_piece_begins_only_if_it_ends_before_the_deadline() -> None:
    times = PieceTimes(0.0)
    times.observe(100, 0.5, now=0.0)
    assert times.may_begin(100, 0.51, now=0.1)
    assert not times.may_begin(100, 0.49, now=0.1)
    assert times.may_begin(50, 0.26, now=0.1)
    assert not times.may_begin(1, -0.1, now=0.1)
    times.observe(100, 1.5, now=0.2)  # slower lately
    assert not times.may_begin(100, 0.51, now=0.3)


def test_patience_counts_batches_and_begins_anew_with_every_piece() -> None:
    times = PieceTimes(0.0)
    times.observe(1, 0.0, now=0.0)
    for _ in range(2):
        for _ in range(PATIENCE_BATCHES):
            assert not times.is_overdue(1, 0.0)
            times.passed_over()
        assert times.is_overdue(1, 0.0) and times.may_begin(1, 0.0, 0.0)
        times.observe(1, 0.0, now=0.0)
    for _ in range(PATIENCE_BATCHES):
        times.passed_over()
    times.rested(5.0)
    assert not times.is_overdue(1, 5.0)
    assert times.is_overdue(1, 5.0 + PATIENCE_SECONDS)


def test_a_long_piece_is_overdue_only_after_several_times_what_it_takes() -> None:
    """A stranger's longest rows would leave sessions less of the device than passes get."""
    times = PieceTimes(0.0)
    times.observe(500, 1.0, now=0.0)
    for _ in range(PATIENCE_BATCHES):
        times.passed_over()
    seconds = PATIENCE_PIECES * 8.0
    assert not times.is_overdue(4000, 0.99 * seconds) and not times.may_begin(4000, 0.0, 0.99 * seconds)
    assert times.is_overdue(4000, seconds) and times.may_begin(4000, 0.0, seconds)
    assert times.is_overdue(500, PATIENCE_PIECES * 1.0)


# --- on the engine's thread ------------------------------------------------------------------------------------------


class FakeSpan:
    """Blocks that double what they get, when the test lets them; a step's output is its input + 1.

    log: what ran, "step" or the number of a block. A value of 13 brings bad luck.
    """

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.blocks = BlockSpan(start=0, end=NUM_BLOCKS)
        self.log: list[str | int] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.in_forward: Callable[[], None] = lambda: None
        self.in_block: Callable[[int], None] = lambda block: None
        self.activations: list[weakref.ref[torch.Tensor]] = []

    def _run(self, what: str | int) -> None:
        self.log.append(what)
        self.entered.release()
        assert self.gate.acquire(timeout=LIMIT)

    def forward(self, hidden: torch.Tensor, chunks: list[RowChunk], cache: KVCache) -> torch.Tensor:
        self._run("step")
        self.in_forward()
        return hidden + 1

    def run_whole(self, hidden: torch.Tensor, batch: WholeRows, block: int) -> torch.Tensor:
        self._run(block)
        self.in_block(block)
        if (hidden == 13).any():
            raise ZeroDivisionError("bad luck")
        output = hidden * 2
        self.activations.append(weakref.ref(output))
        return output

    def wait_until_busy(self) -> None:
        assert self.entered.acquire(timeout=LIMIT)

    def open(self) -> None:
        """Let everything through from now on."""
        self.gate.release(100_000)


class FixedPace(Pace):
    """Says itself how long the device may be taken."""

    def __init__(self, left: float | None) -> None:
        super().__init__(max_stall=3.0)
        self.left = left
        self.asked = threading.Semaphore(0)

    def seconds_left(self, present: Collection[Hashable], now: float) -> float | None:
        self.asked.release()
        return self.left


class Fixture:
    """An engine over a fake span."""

    def __init__(self) -> None:
        self.span = FakeSpan()
        self.cache = KVCache(1, 4096, 4, self.span.device, self.span.dtype)
        self.engine = Engine(self.span, self.cache, 16, max_stall=0)  # type: ignore[arg-type]
        self.engine.start()

    def step(self) -> Future[StepOutput]:
        (row,) = self.cache.admit(1, 4)
        return self.engine.submit(StepTask(torch.zeros(1, HIDDEN_SIZE), [RowWork(row, 0, 1)], 0, 1))

    def train(self, value: float = 1.0, owner: str = "peer", *, backward: bool = False) -> Future[PassOutput]:
        hidden = torch.full((3, HIDDEN_SIZE), value)
        gradient = torch.ones_like(hidden) if backward else None
        return self.engine.submit_pass(PassTask(owner, hidden, (1, 2), 0, NUM_BLOCKS, gradient=gradient))

    def occupy(self) -> Future[StepOutput]:
        """Start a batch that stays on the device until the gate opens."""
        future = self.step()
        self.span.wait_until_busy()
        return future

    def know_pieces(self, seconds_per_token: float) -> None:
        self.engine._pass_runner.times.observe(1, seconds_per_token, now=float("inf"))  # never overdue by time


@pytest.fixture
def fake() -> Iterator[Fixture]:
    fixture = Fixture()
    yield fixture
    fixture.span.open()
    fixture.engine.stop(LIMIT)


def result(future: Future[PassOutput]) -> torch.Tensor:
    return future.result(LIMIT).hidden


def test_passes_forward_and_backward(fake: Fixture) -> None:
    fake.span.open()
    assert result(fake.train(1.0)).eq(2.0**NUM_BLOCKS).all()
    assert result(fake.train(1.0, backward=True)).eq(2.0**NUM_BLOCKS).all()
    assert fake.span.log == [0, 1, 2, 0, 1, 2]


def test_steps_go_first(fake: Fixture) -> None:
    fake.occupy()
    futures: list[Future[Any]] = [fake.train(), fake.step(), fake.step()]
    fake.span.open()
    wait_for(futures, LIMIT)
    assert fake.span.log == ["step", "step", 0, 1, 2]  # the two steps in one batch


def test_a_step_that_comes_during_a_pass_waits_for_one_piece_only(fake: Fixture) -> None:
    training_pass = fake.train()
    fake.span.wait_until_busy()
    step = fake.step()
    fake.span.open()
    wait_for([training_pass, step], LIMIT)
    assert fake.span.log == [0, "step", 1, 2]


def test_passes_of_different_peers_take_turns(fake: Fixture) -> None:
    fake.occupy()
    order: list[str] = []
    futures = []
    for name, owner in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b")):
        futures.append(fake.train(owner=owner))
        futures[-1].add_done_callback(lambda _, name=name: order.append(name))
    fake.span.open()
    wait_for(futures, LIMIT)
    assert order == ["a1", "b1", "a2", "a3"]
    assert fake.span.log == ["step", *[0, 1, 2] * 4]  # one after the other: so less memory is needed at a time


def test_a_pass_is_finished_though_sessions_always_have_work(fake: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PATIENCE_SECONDS", 1e9)
    monkeypatch.setattr(training, "PATIENCE_PIECES", 0)
    steps: list[Future[StepOutput]] = []
    fake.occupy()
    future = fake.train()

    def more_work() -> None:
        if not future.done():
            steps.append(fake.step())  # before the batch ends: the device is never without

    fake.span.in_forward = more_work
    fake.span.open()
    assert result(future).eq(2.0**NUM_BLOCKS).all()
    wait_for(steps, LIMIT)
    pieces = [place for place, what in enumerate(fake.span.log) if what != "step"]
    assert [fake.span.log[place] for place in pieces] == [0, 1, 2]
    assert pieces == [PATIENCE_BATCHES * (number + 1) + number for number in range(NUM_BLOCKS)]
    assert len(fake.span.log) <= pieces[-1] + 3  # the last piece was the end of it
    assert all(step.result(LIMIT).hidden.eq(1).all() for step in steps)


def test_patience_ends_by_the_clock_too(fake: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches may be slow: prompts, say."""
    monkeypatch.setattr(training, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(training, "PATIENCE_PIECES", 0)
    fake.occupy()
    futures: list[Future[Any]] = [fake.train(), *(fake.step() for _ in range(3))]
    fake.engine.max_batch_tokens = 1  # one step in each batch
    fake.span.open()
    wait_for(futures, LIMIT)
    assert fake.span.log[:6] == ["step", 0, "step", 1, "step", 2]


def test_while_somebody_decodes_a_piece_begins_only_if_it_ends_in_time(fake: Fixture) -> None:
    pace = fake.engine._pace = FixedPace(left=0.1)
    fake.know_pieces(seconds_per_token=0.05)  # 3 tokens take 0.15
    fake.engine._pass_runner.times._last_piece = float("inf")
    future = fake.train()
    for _ in range(5):  # it looks again and again
        assert pace.asked.acquire(timeout=LIMIT)
    assert fake.span.log == []
    pace.left = 1e6
    fake.span.open()
    assert result(future).eq(2.0**NUM_BLOCKS).all()


def test_a_cancelled_pass_ends_with_its_present_piece(fake: Fixture) -> None:
    dropped, kept = fake.train(owner="a"), fake.train(owner="b")
    fake.span.wait_until_busy()
    assert dropped.cancel()
    fake.span.open()
    result(kept)
    assert fake.span.log == [0, 0, 1, 2]


def test_a_pass_cancelled_before_it_begins_does_not_run(fake: Fixture) -> None:
    fake.occupy()
    dropped, kept = fake.train(owner="a"), fake.train(owner="b")
    assert dropped.cancel()
    fake.span.open()
    result(kept)
    assert fake.span.log == ["step", 0, 1, 2]


def test_stopping_fails_passes_that_run_or_wait(fake: Fixture) -> None:
    running, waiting = fake.train(), fake.train(owner="other")
    fake.span.wait_until_busy()
    stopping = threading.Thread(target=fake.engine.stop, args=(LIMIT,))
    stopping.start()
    with fake.engine._wake:
        assert fake.engine._wake.wait_for(lambda: fake.engine._stopping, LIMIT)
    late = fake.train()
    fake.span.open()
    for future in (running, waiting, late):
        with pytest.raises(EngineError, match="the server is stopping"):
            future.result(LIMIT)
    stopping.join(LIMIT)
    assert fake.span.log == [0]


def test_the_present_load_counts_a_running_pass(fake: Fixture) -> None:
    future = fake.train()
    fake.span.wait_until_busy()
    assert fake.engine.load.running_rows == 1
    fake.span.open()
    result(future)
    result(fake.train())  # the one before has left the device then
    assert fake.step().result(LIMIT) and fake.engine.load.running_rows == 0


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_pass_that_fails_is_nobody_elses_business(fake: Fixture) -> None:
    fake.occupy()
    unlucky, neighbour, step = fake.train(13.0, owner="a"), fake.train(owner="b"), fake.step()
    fake.span.open()
    with pytest.raises(EngineError, match="the pass failed: ZeroDivisionError: bad luck"):
        unlucky.result(LIMIT)
    assert result(neighbour).eq(2.0**NUM_BLOCKS).all()
    assert step.result(LIMIT).hidden.eq(1).all()


NO_MEMORY = pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
EITHER_WAY = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def failing(error: Exception, times: int) -> Callable[[int], None]:
    """What happens in a block: so many passes fail in the second one."""
    left = [error] * times

    def in_block(block: int) -> None:
        if block == 1 and left:
            raise left.pop()

    return in_block


@NO_MEMORY
@EITHER_WAY
def test_a_pass_without_memory_is_run_in_smaller_pieces(fake: Fixture, error: Exception, backward: bool) -> None:
    fake.span.in_block = failing(error, 1)
    fake.span.open()
    assert result(fake.train(backward=backward)).eq(2.0**NUM_BLOCKS).all()
    assert fake.span.log == [0, 1, *[0, 1, 2] * 2]  # both sequences together, then one after the other


@NO_MEMORY
@EITHER_WAY
def test_a_sequence_without_memory_fails_and_the_engine_goes_on(
    fake: Fixture, error: Exception, backward: bool
) -> None:
    fake.span.in_block = failing(error, 2)
    fake.span.open()
    with pytest.raises(EngineError, match="no memory is left for the activations of one sequence of this pass"):
        fake.train(backward=backward).result(LIMIT)
    assert result(fake.train(backward=backward)).eq(2.0**NUM_BLOCKS).all()
    assert fake.step().result(LIMIT).hidden.eq(1).all()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lost_device_ends_the_engine_and_nobody_waits_for_it(fake: Fixture) -> None:
    def fail(block: int) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    fake.occupy()
    fake.span.in_block = fail
    futures = [fake.train(owner=owner) for owner in "ab"]
    fake.span.open()
    for future in futures:
        with pytest.raises(EngineError, match="the server is stopping"):
            future.result(LIMIT)


@pytest.fixture
def no_collections() -> Iterator[None]:
    """What is gone here is gone by itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize("end", ["done", "cancelled", "failed", "NaN"])
def test_a_backward_pass_leaves_no_activations_behind(
    fake: Fixture, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However it ends, and though its future is still held."""
    hidden = torch.full((3, HIDDEN_SIZE), 13.0 / 2 if end == "failed" else 1.0)
    gradient = torch.full_like(hidden, float("nan") if end == "NaN" else 1.0)
    prompts = torch.zeros(NUM_BLOCKS, 2, HIDDEN_SIZE)  # whose gradient is looked at while other blocks wait
    task = PassTask("peer", hidden, (1, 2), 0, NUM_BLOCKS, prompts, gradient)
    caplog.set_level(logging.CRITICAL, "swarm.server.passes")  # pytest keeps what is logged, tracebacks included
    future = fake.engine.submit_pass(task)
    fake.span.wait_until_busy()
    if end == "cancelled":
        future.cancel()
    fake.span.open()
    if end != "cancelled":
        wait_for([future], LIMIT)
    assert (future.cancelled() or future.exception() is not None) == (end != "done")
    result(fake.train(owner="the next one"))  # so that the engine's thread has left the first
    activations = fake.span.activations[:-NUM_BLOCKS]
    assert len(activations) == {"done": 3, "cancelled": 1, "failed": 1, "NaN": 3}[end]
    assert not any(reference() is not None for reference in activations)


# --- beside real generations -----------------------------------------------------------------------------------------


class Generation:
    """Greedy generation with the blocks on an engine, and embeddings and head of a plain model."""

    def __init__(self, engine: Engine, model: Any, max_length: int):
        self.engine, self.model = engine, model
        (self.row,) = engine.cache.admit(1, max_length)

    @torch.inference_mode()
    def run(self, prompt: list[int], num_tokens: int) -> list[int]:
        tokens, position = list(prompt), 0
        while len(tokens) < len(prompt) + num_tokens:
            hidden = self.model.model.embed_tokens(torch.tensor(tokens[position:]))
            work = [RowWork(self.row, position, len(hidden))]
            future = self.engine.submit(StepTask(hidden, work, 0, len(self.engine.span.blocks)))
            position = len(tokens)
            output = future.result(LIMIT).hidden
            tokens.append(int(self.model.lm_head(self.model.model.norm(output[-1:])).argmax()))
        return tokens


def test_sessions_generate_beside_passes_what_they_generate_alone(
    tiny_span: Span, tiny_model: Any, make_cache: Callable[..., KVCache]
) -> None:
    engine = Engine(tiny_span, make_cache(tiny_span), 64)
    engine.start()
    generator = torch.Generator().manual_seed(1)
    hidden, gradient = (torch.randn(40, 64, generator=generator) for _ in range(2))
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (3, 37)]
    ended = threading.Event()

    def train(owner: str) -> list[PassOutput]:
        outputs = []
        while not outputs or not ended.is_set():
            task = PassTask(owner, hidden, (15, 25), 0, 8, gradient=gradient if owner == "b" else None)
            outputs.append(engine.submit_pass(task).result(LIMIT))
        return outputs

    try:
        with ThreadPoolExecutor(4) as pool:
            trainings = [pool.submit(train, owner) for owner in "ab"]
            futures = [pool.submit(Generation(engine, tiny_model, 64).run, prompt, 20) for prompt in prompts]
            try:
                together = [future.result(LIMIT) for future in futures]
            finally:
                ended.set()
            passes = [future.result(LIMIT) for future in trainings]
    finally:
        engine.stop(LIMIT)
    for prompt, tokens in zip(prompts, together, strict=True):
        expected = tiny_model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert tokens == expected[0].tolist()
    for outputs in passes:
        assert all(torch.equal(output.hidden, outputs[0].hidden) for output in outputs)
        assert all(output.queue_time >= 0 and output.compute_time > 0 for output in outputs)
