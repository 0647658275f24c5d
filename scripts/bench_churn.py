"""`swarm bench churn`: generation through servers that lose sessions at random, as in PETALS' experiment on failures
(Borzunov et al., NeurIPS'23, section 4).

Every activation that a server receives, from the client or pushed by the server before it, is with probability p not
answered: the connection of its session is dropped, and the session's cache with it. So a token has one transfer for
each stage that may fail; the last output's way back to the client never does by itself. Nobody else holds the blocks,
so the client has to go on with the same server. Three ways to do that:

- replay: this client. The lost stage reads again what it was sent; others keep their caches.
- restart: a client without histories, which opens a new chain and reads the text so far anew, on all stages.
- no cache: every token reads the whole text anew, so that there is no cache to lose.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from swarm.errors import SwarmError

from .bench_decode import choose_threads, even_spans, load_local
from .bench_report import DType, JsonFile, Model, Precision, Report, Runs, ServerThreads, run_benchmark

if TYPE_CHECKING:
    import torch

#: What PETALS kept of its steps/s without failures (BLOOM-7.1B, 1,024 tokens), by p.
PAPER = {1e-3: 0.73, 1e-2: 0.20}
PROMPT_TOKENS = 8
CALIBRATION_TOKENS = 32
WARM_UP_TOKENS = 8
ALGORITHMS = ("replay", "restart", "no cache")


def churn(
    model: Model = None,
    stages: Annotated[int, typer.Option(min=1, help="Servers of the chain, one for each part.")] = 4,
    rates: Annotated[
        list[float], typer.Option("--rate", min=0, max=1, help="Probability p; give it several times.")
    ] = [0.0, 1e-4, 1e-3, 1e-2],  # noqa: B006 (typer reads it, nobody writes it)
    lengths: Annotated[
        list[int], typer.Option("--length", min=PROMPT_TOKENS + 2, help="Of the text, prompt included; likewise.")
    ] = [128, 1024],  # noqa: B006
    limit: Annotated[float, typer.Option(min=1, help="Seconds of each run; what was done by then counts.")] = 180,
    runs: Runs = 3,
    seed: Annotated[int, typer.Option(help="Of the failures.")] = 0,
    dtype: Precision = DType.FLOAT32,
    server_threads: ServerThreads = 1,
    json_file: JsonFile = None,
) -> None:
    """Steps/s under failures: replay, restart from scratch and no cache, beside plain transformers."""
    run_benchmark(
        measure,
        model,
        json_file,
        stages=stages,
        rates=rates,
        lengths=lengths,
        limit=limit,
        runs=runs,
        seed=seed,
        dtype=dtype.value,
        server_threads=server_threads,
    )


@dataclass(frozen=True)
class Run:
    """Tokens generated, in how many seconds, and how often the way on was lost."""

    tokens: int
    seconds: float
    failures: int
    finished: bool

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


#: Gives a generator of one token after the other, without end; None stands for a failure on the way to the next.
Algorithm: TypeAlias = Callable[[], Generator[int | None]]


def measure(
    model: str,
    *,
    stages: int,
    rates: Sequence[float],
    lengths: Sequence[int],
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

    from .bench_generation import client, random_prompt, threads
    from .bench_server import bench_program
    from .local_swarm import LocalSwarm, ServerSpec

    checkpoint = open_checkpoint(model)
    settings = {
        "model": checkpoint.name,
        "dtype": dtype,
        "stages": stages,
        "rates": ", ".join(map(str, rates)),
        "lengths": ", ".join(map(str, lengths)),
        "limit": limit,
        "runs": runs,
        "seed": seed,
        "server_threads": server_threads,
    }
    report = Report("churn", settings)
    prompt = random_prompt(checkpoint.config, PROMPT_TOKENS)
    texts = _run_locally(report, load_local(checkpoint, dtype), prompt, lengths, runs, progress)
    spans = [str(span) for span in even_spans(num_blocks(checkpoint.config), stages)]
    for rate in rates:
        with ExitStack() as stack:
            progress(f"p = {rate:g}: starting {stages} servers")
            servers = [
                # the same seed for all would lose all stages at the same step
                ServerSpec(span, program=bench_program(drop_rate=rate, seed=seed * stages + number))
                for number, span in enumerate(spans)
            ]
            flags = ["--dtype", dtype, "--threads", str(server_threads)]
            swarm = stack.enter_context(LocalSwarm(model, servers, flags=flags))
            patient = stack.enter_context(client(model, swarm.initial_peers, dtype, max_retries=1000))
            forgetful = stack.enter_context(client(model, swarm.initial_peers, dtype, max_retries=0))
            stack.enter_context(threads(1))
            for remote in (patient, forgetful):
                timed(
                    restarted(remote, prompt, PROMPT_TOKENS + WARM_UP_TOKENS), texts[lengths[0]][:WARM_UP_TOKENS], limit
                )
            for length, text in texts.items():
                algorithms = (
                    replayed(patient, prompt, length),
                    restarted(forgetful, prompt, length),
                    without_cache(patient, prompt),
                )
                for name, algorithm in zip(ALGORITHMS, algorithms, strict=True):
                    progress(f"p = {rate:g}, {length} tokens, {name}")
                    _add(report, name, rate, length, [timed(algorithm, text, limit) for _ in range(runs)])
    _add_ratios(report, rates, lengths)
    return report


def _run_locally(
    report: Report,
    local: Any,
    prompt: torch.Tensor,
    lengths: Sequence[int],
    runs: int,
    progress: Callable[[str], None],
) -> dict[int, list[int]]:
    """Steps/s of plain transformers, and its tokens for each length."""
    from .bench_generation import generate, threads

    progress("choosing the local model's threads")
    local_threads = choose_threads(report, lambda: generate(local, prompt, CALIBRATION_TOKENS))
    report.settings["local_threads"] = local_threads
    texts = {}
    with threads(local_threads):
        for length in lengths:
            progress(f"the local model, {length} tokens")
            done = [generate(local, prompt, length - PROMPT_TOKENS) for _ in range(runs)]
            texts[length] = done[0].tokens
            report.add(f"local, {length} tokens", "steps/s", [run.speed for run in done])
    return texts


def greedy(model: Any, ids: torch.Tensor) -> Iterator[int]:
    """Token after token. ids: int64 [1, tokens], those that the model has not read. In an active session."""
    import torch

    while True:
        with torch.inference_mode():
            ids = model(ids, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        yield int(ids)


def replayed(remote: Any, prompt: torch.Tensor, length: int) -> Algorithm:
    """One session, whatever happens."""

    def tokens() -> Generator[int | None]:
        with remote.inference_session(max_length=length) as session:
            failures = 0
            for token in greedy(remote, prompt):
                yield from [None] * (len(session.replacements) - failures)
                failures = len(session.replacements)
                yield token

    return tokens


def restarted(remote: Any, prompt: torch.Tensor, length: int) -> Algorithm:
    """A new session after each failure. remote: a client that gives up at once."""

    def tokens() -> Generator[int | None]:
        text = prompt
        while True:
            try:
                with remote.inference_session(max_length=length):
                    for token in greedy(remote, text):
                        text = _longer(text, token)
                        yield token
            except SwarmError:
                yield None

    return tokens


def without_cache(remote: Any, prompt: torch.Tensor) -> Algorithm:
    """Every token in a call of its own. What fails in it is replayed as usual."""
    import torch

    def tokens() -> Generator[int | None]:
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
    failures = 0
    started = time.perf_counter()
    with contextlib.closing(algorithm()) as tokens:
        while len(found) < len(wanted) and time.perf_counter() - started < limit:
            token = next(tokens)
            if token is None:
                failures += 1
            else:
                found.append(token)
        seconds = time.perf_counter() - started
    check_same(found, wanted[: len(found)])
    return Run(len(found), seconds, failures, finished=len(found) == len(wanted))


def _add(report: Report, name: str, rate: float, length: int, done: Sequence[Run]) -> None:
    cell = _cell(name, rate, length)
    report.add(cell, "steps/s", [run.speed for run in done])
    if rate and name != "no cache":
        report.add(f"{cell}: failures", "", [run.failures for run in done])
    if not all(run.finished for run in done):
        report.add(f"{cell}: not finished, tokens", "", [run.tokens for run in done])


def _add_ratios(report: Report, rates: Sequence[float], lengths: Sequence[int]) -> None:
    medians = report.medians
    for length in lengths:
        if 0.0 not in rates:
            continue
        undisturbed = medians[_cell("replay", 0.0, length)]
        report.ratios[f"{_cell('replay', 0.0, length)} / local"] = undisturbed / medians[f"local, {length} tokens"]
        for name in ALGORITHMS:
            for rate in rates:
                if (name, rate) != ("replay", 0.0):
                    cell = _cell(name, rate, length)
                    report.ratios[f"{cell} / replay, p = 0"] = medians[cell] / undisturbed
    for rate, kept in PAPER.items():
        report.ratios[f"PETALS, BLOOM-7.1B, 1024 tokens: p = {rate:g} / p = 0"] = kept


def _cell(name: str, rate: float, length: int) -> str:
    return f"{name}, p = {rate:g}, {length} tokens"
