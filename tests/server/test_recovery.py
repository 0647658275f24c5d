"""What goes wrong in a batch is the guilty session's alone; everybody else has the tokens of a run of its own."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.checkpoint import Checkpoint
from swarm.data_structures import BlockSpan
from swarm.errors import EngineError
from swarm.server.batch import RowChunk
from swarm.server.engine import Engine
from swarm.server.kv_cache import KVCache, SessionCache
from swarm.server.loader import load_span
from swarm.server.recovery import is_out_of_memory, run_batch
from swarm.server.span import Span
from swarm.server.tasks import Piece, RowWork, StepOutput, StepTask

LIMIT = 60.0
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


def pieces_of(sizes: Sequence[Sequence[int]]) -> list[Piece]:
    """For each task the tokens of each of its rows. Their hidden states count up from 0, over all tasks."""
    pieces, value = [], 0.0
    for rows in sizes:
        hidden = (torch.arange(float(sum(rows))) + value)[:, None]
        value += sum(rows)
        task = StepTask(
            hidden,
            [RowWork(cache, 0, size) for cache, size in zip(SessionCache(len(rows), 1000).rows, rows, strict=True)],
            0,
            1,
        )
        first = 0
        for index, (row, size) in enumerate(zip(task.rows, rows, strict=True)):
            pieces.append(Piece(task, index, first, RowChunk(row.cache, 0, size, 0, 1)))
            first += size
    return pieces


def inputs(pieces: Sequence[Piece]) -> torch.Tensor:
    return torch.cat([piece.task.hidden[piece.first : piece.first + piece.chunk.num_tokens] for piece in pieces])


def outputs(pieces: Sequence[Piece], forward: Callable[[Sequence[Piece]], torch.Tensor]) -> list[list[float] | str]:
    """For each task its output in order, or its error; every token must have been computed once for good."""
    found: dict[int, list[tuple[int, list[float]]]] = {id(piece.task): [] for piece in pieces}
    errors: dict[int, str] = {}
    for piece, part in run_batch(pieces, forward):
        if isinstance(part, EngineError):
            errors[id(piece.task)] = str(part)
        else:
            assert len(part) == piece.chunk.num_tokens
            found[id(piece.task)].append((piece.first, part[:, 0].tolist()))
    return [errors.get(task) or [value for _, part in sorted(parts) for value in part] for task, parts in found.items()]


SIZES = st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=3), min_size=1, max_size=6)


@given(SIZES, st.integers(1, 30), st.sampled_from([CUDA, CPU, MemoryError()]))
def test_out_of_memory_costs_nobody_anything_as_long_as_one_token_fits(
    sizes: list[list[int]], fits: int, error: Exception
) -> None:
    done: dict[int, int] = {}

    def forward(pieces: Sequence[Piece]) -> torch.Tensor:
        if sum(piece.chunk.num_tokens for piece in pieces) > fits:
            raise error
        for piece in pieces:  # a row's tokens come in their order, as each attends to those before it
            assert piece.chunk.position == done.get(id(piece.chunk.cache), 0)
            done[id(piece.chunk.cache)] = piece.chunk.position + piece.chunk.num_tokens
        return inputs(pieces) + 0.5

    pieces = pieces_of(sizes)
    tasks = list({id(piece.task): piece.task for piece in pieces}.values())
    assert outputs(pieces, forward) == [(task.hidden[:, 0] + 0.5).tolist() for task in tasks]


@given(SIZES, st.data())
def test_whatever_fails_fails_for_the_guilty_alone(sizes: list[list[int]], data: st.DataObject) -> None:
    pieces = pieces_of(sizes)
    guilty = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    kind = data.draw(st.sampled_from(["raises", "no memory", "infinite"]))
    tasks = list({id(piece.task): piece.task for piece in pieces}.values())
    bad = {id(tasks[index]) for index in guilty}

    def forward(pieces: Sequence[Piece]) -> torch.Tensor:
        output = inputs(pieces) + 0.5
        if any(id(piece.task) in bad for piece in pieces):
            if kind == "raises":
                raise ZeroDivisionError("bad luck")
            if kind == "no memory":
                raise CUDA
            first = 0
            for piece in pieces:
                if id(piece.task) in bad:
                    output[first] = float("inf")
                first += piece.chunk.num_tokens
        return output

    expected = {
        "raises": "ZeroDivisionError: bad luck",
        "no memory": "no memory is left",
        "infinite": "NaN or infinity",
    }
    for index, output in enumerate(outputs(pieces, forward)):
        if index in guilty:
            assert isinstance(output, str)
            assert expected[kind] in output
        else:
            assert output == (tasks[index].hidden[:, 0] + 0.5).tolist()


def test_a_lost_device_ends_the_engine() -> None:
    """After an illegal access every forward pass fails; a server that went on would lure clients in and fail them."""

    def broken(pieces: Sequence[Piece]) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        run_batch(pieces_of([[1], [2]]), broken)


def test_the_memory_of_a_failed_forward_is_free_again_before_the_next_try() -> None:
    activations: list[weakref.ref[torch.Tensor]] = []

    def forward(pieces: Sequence[Piece]) -> torch.Tensor:
        assert all(reference() is None for reference in activations)
        held = torch.zeros(3)
        activations.append(weakref.ref(held))
        if len(pieces) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs(pieces)

    run_batch(pieces_of([[1], [1]]), forward)
    assert len(activations) == 3


@pytest.mark.parametrize(
    ("error", "expected"),
    [(CUDA, True), (CPU, True), (MemoryError(), True), (RuntimeError("shapes differ"), False), (KeyError(1), False)],
)
def test_out_of_memory_is_known_by_its_type_or_text(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_text_is_what_torch_says() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**45)
    assert is_out_of_memory(caught.value)


# --- on an engine with a real span ---------------------------------------------------------------------------------


class Trouble:
    """A span whose forward passes fail on demand, after they wrote into the cache."""

    def __init__(self, span: Span):
        self._span = span
        self.strikes: Callable[[list[RowChunk]], Exception | None] = lambda chunks: None
        self.spoils: Callable[[RowChunk], bool] = lambda chunk: False
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._span, name)

    def forward(self, hidden: torch.Tensor, chunks: list[RowChunk], cache: KVCache) -> torch.Tensor:
        self.entered.release()
        assert self.gate.wait(LIMIT)
        self.batches.append([chunk.num_tokens for chunk in chunks])
        if (error := self.strikes(chunks)) is not None:
            self._span.forward(torch.full_like(hidden, 7.0), chunks, cache)  # it leaves rubbish behind
            raise error
        output = self._span.forward(hidden, chunks, cache).clone()
        first = 0
        for chunk in chunks:
            if self.spoils(chunk):
                output[first] = float("nan")
            first += chunk.num_tokens
        return output


class World:
    """Four sessions on an engine in trouble, and the same on one at peace."""

    def __init__(self, span: Span, make_cache: Callable[..., KVCache]):
        self.trouble = Trouble(span)
        self.engines = [Engine(s, make_cache(span), 64, max_stall=0) for s in (self.trouble, span)]  # type: ignore[arg-type]
        for engine in self.engines:
            engine.start()
        generator = torch.Generator().manual_seed(4)
        self.hidden = [torch.randn(64, 64, generator=generator) for _ in range(4)]
        self.rows = [engine.cache.admit(4, 64) for engine in self.engines]
        self.lengths = [0] * 4

    def submit(self, session: int, num_tokens: int, engine: int = 0) -> Future[StepOutput]:
        """The next tokens of a session."""
        first = self.lengths[session]
        hidden = self.hidden[session][first : first + num_tokens]
        work = RowWork(self.rows[engine][session], first, num_tokens)
        return self.engines[engine].submit(StepTask(hidden, [work], 0, len(self.trouble.blocks)))

    def submit_together(self, steps: dict[int, int]) -> dict[int, Future[StepOutput]]:
        """Steps of sessions, so many tokens each, that are ready when the device becomes free: one batch."""
        self.trouble.gate.clear()
        while self.trouble.entered.acquire(blocking=False):
            pass
        (row,) = self.engines[0].cache.admit(1, 4)
        occupying = self.engines[0].submit(StepTask(torch.zeros(1, 64), [RowWork(row, 0, 1)], 0, 1))
        assert self.trouble.entered.acquire(timeout=LIMIT)
        futures = {session: self.submit(session, num_tokens) for session, num_tokens in steps.items()}
        self.trouble.batches.clear()
        self.trouble.gate.set()
        occupying.result(LIMIT)
        self.engines[0].cache.release([row])
        return futures

    def expect(self, session: int, num_tokens: int, future: Future[StepOutput]) -> None:
        """The answer is that of the engine at peace; the session goes on behind it."""
        expected = self.submit(session, num_tokens, engine=1).result(LIMIT).hidden
        assert (future.result(LIMIT).hidden - expected).abs().max() <= 1e-5 * expected.abs().max()
        self.lengths[session] += num_tokens
        assert self.rows[0][session].length == self.lengths[session]

    def step_all(self, num_tokens: int) -> None:
        for session in range(4):
            self.expect(session, num_tokens, self.submit(session, num_tokens))


@pytest.fixture
def world(tiny_span: Span, make_cache: Callable[..., KVCache]) -> Iterator[World]:
    world = World(tiny_span, make_cache)
    yield world
    world.trouble.gate.set()
    for engine in world.engines:
        engine.stop(LIMIT)


@pytest.mark.parametrize("error", [CUDA, CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize("fits", [1, 9])
def test_a_batch_that_does_not_fit_into_memory_is_run_in_parts(world: World, error: Exception, fits: int) -> None:
    world.step_all(3)
    steps = {0: 20, 1: 1, 2: 1, 3: 7}
    world.trouble.strikes = lambda chunks: error if sum(chunk.num_tokens for chunk in chunks) > fits else None
    futures = world.submit_together(steps)
    for session, num_tokens in steps.items():
        world.expect(session, num_tokens, futures[session])
    assert world.trouble.batches[1] == [20, 1, 1, 7]
    world.trouble.strikes = lambda chunks: None
    world.step_all(2)


@pytest.mark.parametrize("kind", ["raises", "no memory", "NaN"])
def test_a_session_that_always_fails_harms_nobody_and_may_try_again(world: World, kind: str) -> None:
    world.step_all(3)
    guilty = world.rows[0][2]
    if kind == "NaN":
        world.trouble.spoils = lambda chunk: chunk.cache is guilty
    else:
        error = CUDA if kind == "no memory" else ZeroDivisionError("bad luck")
        world.trouble.strikes = lambda chunks: error if any(chunk.cache is guilty for chunk in chunks) else None
    steps = {0: 20, 1: 1, 2: 5, 3: 1}
    futures = world.submit_together(steps)
    text = {"raises": "ZeroDivisionError", "no memory": "no memory is left", "NaN": "NaN or infinity"}[kind]
    with pytest.raises(EngineError, match=text):
        futures[2].result(LIMIT)
    for session in (0, 1, 3):
        world.expect(session, steps[session], futures[session])
    world.trouble.spoils, world.trouble.strikes = lambda chunk: False, lambda chunks: None
    world.step_all(4)


def test_values_that_overflow_half_precision_are_an_error_of_that_session_alone(
    tiny_checkpoint: Checkpoint, make_cache: Callable[..., KVCache]
) -> None:
    span = load_span(
        tiny_checkpoint, BlockSpan(start=0, end=8), dtype=torch.float16, quantization="none", device=torch.device("cpu")
    )
    engine = Engine(span, make_cache(span), 64)
    engine.start()
    try:
        rows = engine.cache.admit(2, 8)
        hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
        huge = torch.full((2, 64), 3e38)
        futures = [
            engine.submit(StepTask(h, [RowWork(row, 0, 2)], 0, 8)) for h, row in zip((huge, hidden), rows, strict=True)
        ]
        with pytest.raises(EngineError, match="float16 overflows"):
            futures[0].result(LIMIT)
        alone = engine.submit(StepTask(hidden, [RowWork(rows[0], 0, 2)], 0, 8)).result(LIMIT).hidden
        assert (futures[1].result(LIMIT).hidden - alone).abs().max() <= 1e-2 * alone.abs().max()
    finally:
        engine.stop(LIMIT)


def test_an_output_that_overflows_what_a_session_asked_for_says_so(
    tiny_span: Span, make_cache: Callable[..., KVCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server computes in float32, a client that sends float16 gets float16 back."""
    monkeypatch.setattr(tiny_span, "forward", lambda hidden, chunks, cache: hidden + 1e5)
    engine = Engine(tiny_span, make_cache(tiny_span), 64)
    engine.start()
    try:
        rows = engine.cache.admit(2, 8)
        small = StepTask(torch.zeros(2, 64, dtype=torch.float16), [RowWork(rows[0], 0, 2)], 0, 8)
        large = StepTask(torch.zeros(2, 64), [RowWork(rows[1], 0, 2)], 0, 8)
        futures = [engine.submit(task) for task in (small, large)]
        with pytest.raises(EngineError, match="overflows float16, which this session asked for"):
            futures[0].result(LIMIT)
        assert futures[1].result(LIMIT).hidden.isfinite().all()
    finally:
        engine.stop(LIMIT)
