"""`swarm bench churn`: generation through servers that lose sessions at random, as in PETALS' experiment on failures
(Borzunov et al., NeurIPS'23, section 4).

Every activation that a server receives, from the client or pushed by the server before it, is with probability p not
answered: the connection of its session is dropped, and the session's cache with it. So a token has one transfer for
each stage that may fail; the last output's way back to the client never does by itself. Nobody else holds the blocks,
so the client has to go on with the same server. Ways to do that:

- replay: this client. The lost stage reads again what it was sent; others keep their caches.
- restart: a client without histories, which opens a new chain and reads the text so far anew, on all stages.
- no cache: every token reads the whole text anew, so that there is no cache to lose.
- start over: a client that throws away the text too, and begins again at the prompt. Not measured unless asked for: it
  hardly ends. The paper's restarts kept 0.045 of their steps/s at p = 1e-3 and 1,024 tokens; by count of steps alone
  this would keep 0.071 with 4 transfers that may fail in each step, 0.032 with 5. So the paper's probably began anew.

All that is compared runs on the same servers, in turn; they read p from a file. What is not finished in time counts
with the tokens that it has by then, the first and cheapest ones, and is marked; so its figure flatters.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from swarm.errors import MissingBlocks, RoutingError, UsageError

from .bench_decode import choose_threads, even_spans, load_local
from .bench_report import DType, JsonFile, Model, Precision, Report, Runs, ServerThreads, run_benchmark

if TYPE_CHECKING:
    import torch

#: What PETALS kept of its steps/s without failures (BLOOM-7.1B, 1,024 tokens), by p.
PAPER = {1e-3: 0.73, 1e-2: 0.20}
PROMPT_TOKENS = 8
CALIBRATION_TOKENS = 32
WARM_UP_TOKENS = 8
ALGORITHMS = ["replay", "restart", "no cache", "start over"]
#: Those that are measured unless others are asked for.
USUAL_ALGORITHMS = ALGORITHMS[:3]


def churn(
    model: Model = None,
    stages: Annotated[int, typer.Option(min=1, help="Servers of the chain, one for each part.")] = 4,
    rates: Annotated[
        list[float], typer.Option("--rate", min=0, max=1, help="Probability p; give it several times.")
    ] = [0.0, 1e-4, 1e-3, 1e-2],  # noqa: B006 (typer reads it, nobody writes it)
    lengths: Annotated[
        list[int], typer.Option("--length", min=PROMPT_TOKENS + 2, help="Of the text, prompt included; likewise.")
    ] = [128, 1024],  # noqa: B006
    algorithms: Annotated[
        list[str], typer.Option("--algorithm", help=f"Of {', '.join(ALGORITHMS)}; likewise.")
    ] = USUAL_ALGORITHMS,
    limit: Annotated[float, typer.Option(min=1, help="Seconds of each run; what was done by then counts.")] = 180,
    runs: Runs = 1,
    seed: Annotated[int, typer.Option(help="Of the failures.")] = 0,
    dtype: Precision = DType.FLOAT32,
    server_threads: ServerThreads = 1,
    json_file: JsonFile = None,
) -> None:
    """Steps/s under failures: replay, restart from scratch and no cache, beside plain transformers."""
    if unknown := set(algorithms).difference(ALGORITHMS):
        raise UsageError(f"no algorithm is called {unknown.pop()!r}: use one of {', '.join(ALGORITHMS)}")
    run_benchmark(
        measure,
        model,
        json_file,
        stages=stages,
        rates=rates,
        lengths=lengths,
        algorithms=algorithms,
        limit=limit,
        runs=runs,
        seed=seed,
        dtype=dtype.value,
        server_threads=server_threads,
    )


@dataclass(frozen=True)
class Run:
    """Tokens generated, of the longest text where it began again; in how many seconds; how often a session was lost."""

    tokens: int
    seconds: float
    failures: int
    finished: bool

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


class Failure(Enum):
    """On the way to the next token. LOST: a session, and no token with it. ALL_LOST: begins at the prompt again."""

    LOST = auto()
    ALL_LOST = auto()


#: Gives a generator of one token after the other, without end, with what fails in between.
Algorithm: TypeAlias = Callable[[], Generator[int | Failure]]


def measure(
    model: str,
    *,
    stages: int,
    rates: Sequence[float],
    lengths: Sequence[int],
    algorithms: Sequence[str],
    limit: float,
    runs: int,
    seed: int,
    dtype: str,
    server_threads: int,
    progress: Callable[[str], None],
) -> Report:
    """Run the benchmark. Raises SwarmError if the swarm's tokens are not those of the local model."""
    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint

    from .bench_generation import client, generate, random_prompt, threads
    from .bench_server import bench_program, write_rate
    from .local_swarm import LocalSwarm, ServerSpec

    checkpoint = open_checkpoint(model)
    settings = {
        "model": checkpoint.name,
        "dtype": dtype,
        "stages": stages,
        "rates": ", ".join(map(str, rates)),
        "lengths": ", ".join(map(str, lengths)),
        "algorithms": ", ".join(algorithms),
        "limit": limit,
        "runs": runs,
        "seed": seed,
        "server_threads": server_threads,
    }
    report = Report("churn", settings)
    prompt = random_prompt(checkpoint.config, PROMPT_TOKENS)
    local = load_local(checkpoint, dtype)
    progress("choosing the local model's threads")
    local_threads = choose_threads(report, lambda: generate(local, prompt, CALIBRATION_TOKENS))
    report.settings["local_threads"] = local_threads
    spans = [str(span) for span in even_spans(num_blocks(checkpoint.config), stages)]
    with ExitStack() as stack:
        rate_file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="petswarm-churn-"))) / "rate"
        write_rate(rate_file, 0.0)
        progress(f"starting {stages} servers")
        servers = [
            # the same seed for all would lose all stages at the same step
            ServerSpec(span, program=bench_program(drop_rate_file=rate_file, seed=seed * stages + number))
            for number, span in enumerate(spans)
        ]
        flags = ["--dtype", dtype, "--threads", str(server_threads)]
        swarm = stack.enter_context(LocalSwarm(model, servers, flags=flags))
        patient = stack.enter_context(client(model, swarm.initial_peers, dtype, max_retries=1000))
        forgetful = stack.enter_context(client(model, swarm.initial_peers, dtype, max_retries=0))
        stack.enter_context(threads(1))
        text = generate(local, prompt, WARM_UP_TOKENS).tokens
        for remote in (patient, forgetful):
            timed(restarted(remote, prompt, PROMPT_TOKENS + WARM_UP_TOKENS), text, limit)
        for length in lengths:
            make = {
                "replay": replayed(patient, prompt, length),
                "restart": restarted(forgetful, prompt, length),
                "no cache": without_cache(patient, prompt),
                "start over": restarted(forgetful, prompt, length, keep_text=False),
            }
            speeds: list[float] = []
            done: dict[tuple[str, float], list[Run]] = {(name, rate): [] for rate in rates for name in algorithms}
            for number in range(1, runs + 1):
                progress(f"{length} tokens, run {number} of {runs}: the local model")
                with threads(local_threads):
                    alone = generate(local, prompt, length - PROMPT_TOKENS)
                speeds.append(alone.speed)
                for (name, rate), found in done.items():
                    progress(f"{length} tokens, run {number} of {runs}: {name}, p = {rate:g}")
                    write_rate(rate_file, rate)
                    found.append(timed(make[name], alone.tokens, limit))
            report.add(f"local, {length} tokens", "steps/s", speeds)
            for (name, rate), found in done.items():
                _add(report, name, rate, length, found)
    _add_ratios(report, algorithms, rates, lengths)
    return report


def greedy(model: Any, ids: torch.Tensor) -> Iterator[int]:
    """Token after token. ids: int64 [1, tokens], those that the model has not read. In an active session."""
    import torch

    while True:
        with torch.inference_mode():
            ids = model(ids, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        yield int(ids)


def replayed(remote: Any, prompt: torch.Tensor, length: int) -> Algorithm:
    """One session, whatever happens."""

    def tokens() -> Generator[int | Failure]:
        with remote.inference_session(max_length=length) as session:
            failures = 0
            for token in greedy(remote, prompt):
                yield from [Failure.LOST] * (len(session.replacements) - failures)
                failures = len(session.replacements)
                yield token

    return tokens


def restarted(remote: Any, prompt: torch.Tensor, length: int, *, keep_text: bool = True) -> Algorithm:
    """A new session after each failure, for the text so far or for the prompt. remote: a client that gives up at once.

    MissingBlocks passes through: servers that lose sessions are there, so one that is not is no part of the experiment.
    """

    def tokens() -> Generator[int | Failure]:
        text = prompt
        while True:
            try:
                with remote.inference_session(max_length=length):
                    for token in greedy(remote, text):
                        text = _longer(text, token)
                        yield token
            except MissingBlocks:
                raise
            except RoutingError:
                if keep_text:
                    yield Failure.LOST
                else:
                    text = prompt
                    yield Failure.ALL_LOST

    return tokens


def without_cache(remote: Any, prompt: torch.Tensor) -> Algorithm:
    """Every token in a call of its own. What fails in it is replayed as usual."""
    import torch

    def tokens() -> Generator[int | Failure]:
        text = prompt
        while True:
            with torch.inference_mode():
                token = int(remote(text, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
            text = _longer(text, token)
            yield token

    return tokens


def _longer(text: torch.Tensor, token: int) -> torch.Tensor:
    import torch

    return torch.cat([text, torch.tensor([[token]])], dim=1)


def timed(algorithm: Algorithm, wanted: Sequence[int], limit: float) -> Run:
    """Generate these tokens, or as many as come in `limit` seconds. Raises SwarmError if they are others."""
    from .bench_generation import check_same

    found: list[int] = []
    failures = most = 0
    started = time.perf_counter()
    with contextlib.closing(algorithm()) as tokens:
        while len(found) < len(wanted) and time.perf_counter() - started < limit:
            token = next(tokens)
            if isinstance(token, Failure):
                failures += 1
                if token is Failure.ALL_LOST:
                    found.clear()
            else:
                found.append(token)
                most = max(most, len(found))
        seconds = time.perf_counter() - started
    check_same(found, wanted[: len(found)])
    return Run(most, seconds, failures, finished=len(found) == len(wanted))


def _add(report: Report, name: str, rate: float, length: int, done: Sequence[Run]) -> None:
    cell = _cell(name, rate, length)
    report.add(cell, "steps/s", [run.speed for run in done])
    if rate and name != "no cache":
        report.add(f"{cell}: failures", "", [run.failures for run in done])
    if not all(run.finished for run in done):
        report.add(f"{cell}: not finished, tokens", "", [run.tokens for run in done])


def _add_ratios(report: Report, algorithms: Sequence[str], rates: Sequence[float], lengths: Sequence[int]) -> None:
    medians = report.medians
    for length in lengths:
        if 0.0 not in rates or "replay" not in algorithms:
            continue
        undisturbed = medians[_cell("replay", 0.0, length)]
        report.ratios[f"{_cell('replay', 0.0, length)} / local"] = undisturbed / medians[f"local, {length} tokens"]
        for name in algorithms:
            for rate in rates:
                if (name, rate) != ("replay", 0.0):
                    cell = _cell(name, rate, length)
                    report.ratios[f"{cell} / replay, p = 0"] = medians[cell] / undisturbed
    for rate, kept in PAPER.items():
        report.ratios[f"PETALS, BLOOM-7.1B, 1024 tokens: p = {rate:g} / p = 0"] = kept


def _cell(name: str, rate: float, length: int) -> str:
    return f"{name}, p = {rate:g}, {length} tokens"
