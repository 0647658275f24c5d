"""`swarm bench routes`: does the router choose the fastest chain? The chosen one, measured beside others.

Swarms drawn at random (see drawn_swarm.py): servers that differ in speed and in the delay of their link, with
overlapping spans, some of them busy with sessions of others. A client that knows nothing yet chooses a chain; then
sessions are opened on that chain and on others, and each takes steps in turn with the rest. What counts is the time of
a token from the client through all servers and back, with direct push.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.errors import SwarmError

from .bench_report import MILLISECONDS, JsonFile, Model, Report, Runs, run_benchmark

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from swarm.client.connection import SwarmConnection
    from swarm.routing.chain import Chain

    from .bench_echo import EchoSession
    from .drawn_swarm import DrawnServer
    from .local_swarm import LocalSwarm

#: Seconds between two announcements of a server, and until they show what a load makes of it.
ANNOUNCE_PERIOD = 4.0
SETTLE_TIME = 12.0
#: Seconds until every server has measured the ways to those that hold the blocks after its own.
SURVEY_TIME = 60.0
#: Seconds for the sessions that keep servers busy to end.
STOP_TIME = 60.0
#: Seconds without an answer to a ping: these servers are slow, not dead.
HANG_TIMEOUT = 20.0
#: The chosen chain and the best of the others are measured so many times as long again.
AGAIN = 4
#: Tokens of a session's prompt, and the most that it may hold.
PROMPT_TOKENS = 4
MAX_LENGTH = 128


def routes(
    model: Model = None,
    swarms: Annotated[int, typer.Option(min=1, help="How many are drawn and measured, one after another.")] = 3,
    servers: Annotated[int, typer.Option(min=8, help="Of each swarm.")] = 9,
    alternatives: Annotated[int, typer.Option(min=1, help="Chains beside the chosen one.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="That a chain takes before it is the next one's turn.")] = 4,
    runs: Runs = 5,
    seed: Annotated[int, typer.Option(help="Of the first swarm; the others count on.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Step time of the chain that the router chooses, beside that of others, in unequal and loaded swarms."""
    run_benchmark(
        measure,
        model,
        json_file,
        num_swarms=swarms,
        num_servers=servers,
        num_alternatives=alternatives,
        steps=steps,
        runs=runs,
        seed=seed,
    )


@dataclass(frozen=True)
class Timed:
    """One chain. predicted: seconds of a step. measured: of each of many."""

    name: str
    predicted: float
    measured: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.measured)


@dataclass(frozen=True)
class Duel:
    """Seconds of each step of two chains that were measured beside each other once more."""

    chosen: Sequence[float]
    best: Sequence[float]


def measure(
    model: str,
    *,
    num_swarms: int,
    num_servers: int,
    num_alternatives: int,
    steps: int,
    runs: int,
    seed: int,
    progress: Callable[[str], None],
) -> Report:
    """Run the benchmark."""
    from swarm.checkpoint import open_checkpoint

    from .bench_generation import threads

    settings = {
        "model": open_checkpoint(model).name,
        "servers": num_servers,
        "alternatives": num_alternatives,
        "steps": steps,
        "runs": runs,
        "seeds": list(range(seed, seed + num_swarms)),
    }
    report = Report("routes", settings)
    for number in range(seed, seed + num_swarms):

        def show(text: str, number: int = number) -> None:
            progress(f"swarm {number}: {text}")

        with threads(1):
            timed, duel = _measure_swarm(model, number, num_servers, num_alternatives, steps, runs, show)
        add_results(report, f"swarm {number}", timed, duel)
    ratios = [ratio for name, ratio in report.ratios.items() if name.endswith("chosen / best alternative")]
    report.ratios["the worst of all swarms: chosen / best alternative"] = max(ratios)
    return report


def _measure_swarm(
    model: str,
    seed: int,
    num_servers: int,
    num_alternatives: int,
    steps: int,
    runs: int,
    progress: Callable[[str], None],
) -> tuple[list[Timed], Duel]:
    """The chosen chain, then the others."""
    import torch

    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint
    from swarm.data_structures import BlockSpan
    from swarm.routing.chain import chain_time

    from .bench_server import bench_program
    from .drawn_swarm import describe, draw_alternatives, draw_chain, draw_servers
    from .link_line import Link
    from .local_swarm import LocalSwarm, ServerSpec

    rng = random.Random(seed)
    config = open_checkpoint(model).config
    blocks = num_blocks(config)
    rows = torch.randn(PROMPT_TOKENS, config.get_text_config().hidden_size)
    drawn = draw_servers(rng, blocks, num_servers)
    specs = [
        ServerSpec(
            str(server.span),
            link=Link(one_way_delay_s=server.delay),
            program=bench_program(least_time=server.block_time),
        )
        for server in drawn
    ]
    flags = ["--dtype", "float32", "--threads", "1", "--announce-period", str(ANNOUNCE_PERIOD)]
    with ExitStack() as stack:
        progress(f"starting {num_servers} servers")
        swarm = stack.enter_context(LocalSwarm(model, specs, flags=flags))
        others = stack.enter_context(connected(model, swarm))
        progress("waiting for the servers to measure the ways between them")
        wait_for_survey(others)
        stack.enter_context(
            load(others, dict(zip([server.peer_id for server in swarm.servers], drawn, strict=True)), rows)
        )
        time.sleep(SETTLE_TIME)
        client = stack.enter_context(connected(model, swarm))
        span = BlockSpan(start=0, end=blocks)
        chosen = client.thread.run(client.router.find_chain(span, cache_tokens=MAX_LENGTH))
        snapshot = client.router.snapshot()

        def predict(chain: Chain) -> float:
            return chain_time(snapshot, chain, cache_tokens=MAX_LENGTH)

        chains = [
            chosen,
            *draw_alternatives(rng, chosen, num_alternatives, lambda: draw_chain(rng, snapshot), predict),
        ]
        measured = step_times(client, chains, rows, steps, runs, rng, progress)
        names = [server.peer_id for server in swarm.servers]
        timed = [
            Timed(describe(chain, names), predict(chain), times) for chain, times in zip(chains, measured, strict=True)
        ]
        # The least of 20 noisy medians is too low: what it is worth shows when both are measured once more.
        best = 1 + min(range(num_alternatives), key=lambda at: timed[1 + at].median)
        progress("once more the chosen chain and the best of the others")
        again = step_times(client, [chosen, chains[best]], rows, steps, AGAIN * runs, rng, progress)
        return timed, Duel(*again)


@contextmanager
def connected(model: str, swarm: LocalSwarm) -> Iterator[SwarmConnection]:
    """A client without a model."""
    from swarm.checkpoint import open_checkpoint
    from swarm.client.config import ClientConfig
    from swarm.client.connection import SwarmConnection

    config = ClientConfig(
        initial_peers=tuple(swarm.initial_peers), compression="none", update_period=1.0, hang_timeout=HANG_TIMEOUT
    )
    connection = SwarmConnection(open_checkpoint(model), config)
    try:
        yield connection
    finally:
        connection.thread.stop()


def wait_for_survey(connection: SwarmConnection) -> None:
    """Until every server announces the ways to all servers that hold the block after its span.

    Raises SwarmError if that takes too long.
    """
    deadline = time.monotonic() + SURVEY_TIME
    while True:
        connection.thread.run(connection.router.refresh())
        servers = connection.router.snapshot().servers
        unknown = [
            (one.peer_id, other.peer_id)
            for one in servers
            for other in servers
            if one.info.span.end in other.info.span and other.peer_id not in one.info.next_pings
        ]
        if not unknown:
            return
        if time.monotonic() > deadline:
            raise SwarmError(f"{len(unknown)} ways between servers were not measured within {SURVEY_TIME:g} s")
        time.sleep(1.0)


@contextmanager
def load(connection: SwarmConnection, servers: Mapping[str, DrawnServer], rows: torch.Tensor) -> Iterator[None]:
    """Sessions of others keep servers busy in here. servers: by peer id. rows: the prompt, [tokens, hidden_size]."""
    from swarm.routing.chain import ChainLink

    from .bench_echo import EchoSession

    stopped = threading.Event()

    async def keep_busy(chain: Chain) -> None:
        session = await EchoSession.open(connection, chain, MAX_LENGTH, rows)
        await session.step(0, rows)
        while not stopped.is_set():
            await session.step(len(rows), rows[:1])
        session.close()

    async def keep_all_busy() -> None:
        sessions = []
        for peer_id, server in servers.items():
            info = connection.router.info(peer_id)
            assert info is not None
            chain = (ChainLink(peer_id, server.span, info.numerics),)
            sessions += [keep_busy(chain) for _ in range(server.busy_rows)]
        await asyncio.gather(*sessions)

    running = asyncio.run_coroutine_threadsafe(keep_all_busy(), connection.thread.loop)
    try:
        yield
    finally:
        stopped.set()
        running.result(STOP_TIME)  # raises what went wrong meanwhile


def step_times(
    connection: SwarmConnection,
    chains: Sequence[Chain],
    rows: torch.Tensor,
    steps: int,
    runs: int,
    rng: random.Random,
    progress: Callable[[str], None],
) -> list[list[float]]:
    """Seconds of each of `runs` * `steps` steps through each of these chains, in an order that changes.

    rows: the prompt, [tokens, hidden_size].
    """
    from .bench_echo import EchoSession

    found: list[list[float]] = [[] for _ in chains]

    async def measure_chain(session: EchoSession, times: list[float]) -> None:
        for _ in range(steps):
            started = time.perf_counter()
            await session.step(len(rows), rows[:1])
            times.append(time.perf_counter() - started)

    async def measure_all() -> None:
        sessions = [await EchoSession.open(connection, chain, MAX_LENGTH, rows) for chain in chains]
        for session in sessions:
            await session.step(0, rows)
        for number in range(runs + 1):
            progress(f"round {number} of {runs}" if number else "warming up")
            for at in rng.sample(range(len(chains)), len(chains)):
                await measure_chain(sessions[at], found[at] if number else [])
        for session in sessions:
            session.close()

    connection.thread.run(measure_all())
    return found


def add_results(report: Report, name: str, timed: Sequence[Timed], duel: Duel) -> None:
    """timed: the chosen chain first. Predictions are in the order of the chains."""
    chosen, *others = timed
    best = min(others, key=lambda chain: chain.median)
    medians = [
        report.add(f"{name}: {title}", "ms", [MILLISECONDS * step for step in steps]).median
        for title, steps in (("chosen", duel.chosen), ("best alternative", duel.best))
    ]
    for chain in timed:
        report.add(f"{name}: chain {chain.name}", "ms", [MILLISECONDS * step for step in chain.measured])
    report.add(f"{name}: predicted", "ms", [MILLISECONDS * chain.predicted for chain in timed])
    accuracy = report.add(f"{name}: predicted / measured", "ratio", [chain.predicted / chain.median for chain in timed])
    report.ratios[f"{name}: chosen / best alternative"] = medians[0] / medians[1]
    report.ratios[f"{name}: the same when the best was found"] = chosen.median / best.median
    report.ratios[f"{name}: predicted / measured"] = accuracy.median
    report.ratios[f"{name}: correlation of predicted and measured"] = statistics.correlation(
        [chain.predicted for chain in timed], [chain.median for chain in timed]
    )
