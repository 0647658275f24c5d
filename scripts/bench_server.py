"""A server for benchmarks: `python -m swarm.scripts.bench_server [--compute-time S] [--least-time S] [--drop-rate P]
[--drop-rate-file FILE] [--seed N] -- MODEL FLAGS...` with the flags of `run-server`. It is the real server, with two
things done to it from outside:

- Every forward pass takes S seconds longer for each block that it runs (--compute-time), or S seconds at least for
  each (--least-time), whatever the number of tokens: the engine's thread sleeps, so that a few cores can stand for many
  GPUs. The server announces its speed accordingly. With --least-time, what else the cores do is not seen, as long as
  it leaves them time enough.
- Every activation that comes in, from a client or from another server, is with probability P not answered: the
  connection of the session that it belongs to is dropped, and with it the session's cache.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swarm.data_structures import BlockSpan
from swarm.progress import Progress
from swarm.server import server as server_module
from swarm.server.batch import RowChunk
from swarm.server.engine import Engine
from swarm.server.handler import Handler
from swarm.server.hosting import Loaded
from swarm.server.kv_cache import KVCache
from swarm.server.server import Server
from swarm.server.span import Span
from swarm.server.speed_store import Speed
from swarm.server.tasks import StepOutput, StepTask
from swarm.server.throughput import PROMPT_TOKENS

from . import main as front_door

logger = logging.getLogger(__name__)


def bench_program(
    *,
    compute_time: float = 0.0,
    least_time: float = 0.0,
    drop_rate: float = 0.0,
    drop_rate_file: Path | None = None,
    seed: int = 0,
) -> tuple[str, ...]:
    """What `ServerSpec.program` takes. compute_time, least_time: see `Slowness`. drop_rate_file: see `write_rate`."""
    flags: dict[str, object] = {"--compute-time": compute_time, "--least-time": least_time, "--seed": seed}
    flags["--drop-rate"] = drop_rate
    if drop_rate_file is not None:
        flags["--drop-rate-file"] = drop_rate_file
    return "swarm.scripts.bench_server", *(str(part) for flag in flags.items() for part in flag), "--"


def write_rate(file: Path, rate: float) -> None:
    """From now on, the servers that were given this file lose so many of the activations that come in."""
    new = file.with_suffix(".new")
    new.write_text(repr(rate))
    new.replace(file)  # nobody reads half of it


@dataclass(frozen=True)
class Slowness:
    """Of a forward pass, in seconds for each block that it runs: beyond what it really takes, and at the least."""

    compute_time: float = 0.0
    least_time: float = 0.0

    def duration(self, seconds: float, num_blocks: int) -> float:
        """What a pass through so many blocks takes that really took so many seconds."""
        return max(seconds + self.compute_time * num_blocks, self.least_time * num_blocks)

    def applied_to(self, speed: Speed, num_blocks: int) -> Speed:
        """The speed of a span of so many blocks that was measured without it."""
        rate = speed.forward_rate
        return Speed(
            decode_times=tuple(self.duration(step, num_blocks) for step in speed.decode_times),
            forward_rate=None if rate is None else PROMPT_TOKENS / self.duration(PROMPT_TOKENS / rate, num_blocks),
        )


class SlowSpan(Span):
    """A span whose forward pass takes longer."""

    def __init__(self, span: Span, slowness: Slowness):
        vars(self).update(vars(span))
        self._slowness = slowness

    def forward(self, hidden: torch.Tensor, chunks: list[RowChunk], cache: KVCache) -> torch.Tensor:
        started = time.monotonic()
        output = super().forward(hidden, chunks, cache)
        blocks = {block for chunk in chunks for block in range(chunk.start, chunk.end)}
        taken = time.monotonic() - started
        time.sleep(self._slowness.duration(taken, len(blocks)) - taken)
        return output


class Drops:
    """Stands in for an engine's `submit` and loses sessions at random."""

    def __init__(self, engine: Engine, handler: Handler, rate: Callable[[], float], seed: int):
        """rate: the probability, asked for each step. seed: for the same steps in the same order, the same are lost."""
        self._submit = engine.submit
        self._handler = handler
        self._rate = rate
        self._random = random.Random(seed)

    def submit(self, task: StepTask) -> Future[StepOutput]:
        """Called on the event loop. The future of a lost step never gets a result: its session is gone first."""
        if self._random.random() >= self._rate():
            return self._submit(task)
        drop_session(self._handler, task)
        return task.future


def drop_session(handler: Handler, task: StepTask) -> None:
    """End the streams of the session that a step belongs to, which gives up its cache as well. Nobody is told why."""
    cache = task.rows[0].cache
    for stream in handler.by_session.values():
        if stream._session is not None and cache in stream._session.rows:
            logger.info("dropped session %s", stream._session.session_id)
            stream.task.cancel()
            return
    raise RuntimeError("a step of no session: the benchmark's server does not fit the handler any more")


class BenchServer(Server):
    def __init__(self, *arguments: Any, slowness: Slowness, drop_rate: Callable[[], float], seed: int, **settings: Any):
        super().__init__(*arguments, **settings)
        self._slowness = slowness
        self._drop_rate = drop_rate
        self._seed = seed

    def _load(self, span: BlockSpan, progress: Progress) -> Loaded:
        loaded = super()._load(span, progress)
        speed = self._slowness.applied_to(loaded.speed, len(span))
        return loaded._replace(span=SlowSpan(loaded.span, self._slowness), speed=speed)

    async def _open(self, loaded: Loaded) -> None:
        await super()._open(loaded)
        engine = self._handler.engine
        engine.submit = Drops(engine, self._handler, self._drop_rate, self._seed).submit  # type: ignore[method-assign]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench_server", description="A server for benchmarks: see the module.")
    parser.add_argument("--compute-time", type=float, default=0.0, help="added seconds per block and pass")
    parser.add_argument("--least-time", type=float, default=0.0, help="seconds per block and pass at least")
    parser.add_argument("--drop-rate", type=float, default=0.0, help="probability for each activation")
    parser.add_argument("--drop-rate-file", type=Path, help="where it stands instead; read at each activation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("run_server", nargs=argparse.REMAINDER, metavar="-- MODEL FLAGS...")
    options = parser.parse_args(arguments)
    if min(options.compute_time, options.least_time) < 0 or not 0 <= options.drop_rate <= 1:
        parser.error("a time is 0 or more, a drop rate from 0 to 1")

    def drop_rate() -> float:
        return options.drop_rate if options.drop_rate_file is None else float(options.drop_rate_file.read_text())

    def bench_server(*arguments: Any, **settings: Any) -> BenchServer:
        return BenchServer(
            *arguments,
            slowness=Slowness(options.compute_time, options.least_time),
            drop_rate=drop_rate,
            seed=options.seed,
            **settings,
        )

    # `run-server` looks its server up when it starts; this process has no other.
    server_module.Server = bench_server  # type: ignore[assignment,misc]
    front_door.main(["run-server", *(flag for flag in options.run_server if flag != "--")])


if __name__ == "__main__":
    main(sys.argv[1:])
