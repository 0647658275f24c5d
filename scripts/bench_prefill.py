"""`swarm bench prefill`: how fast a prompt is read, and what a long one does to others who watch their tokens come.

Two servers stand side by side, one as by default and one with `--max-stall 0`, which reads prompts in chunks as large
as its batches hold. Everything is measured on both, in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_decode import even_spans, load_local
from .bench_report import MILLISECONDS, DType, JsonFile, Model, Precision, Report, Runs, run_benchmark

if TYPE_CHECKING:
    import torch

    from .bench_processes import ChildProcess

#: The two servers, and what their flag is.
SERVERS = {"chunked": (), "unchunked": ("--max-stall", "0")}
#: Tokens generated after a prompt, to be compared with those of plain transformers.
NEW_TOKENS = 4
#: Length of the prompts of those who decode.
WATCHER_PROMPT = 16
#: A session's first gaps are left out: it was only opened.
WARM_UP_GAPS = 8


def prefill(
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the prompt that is timed by itself.")] = 512,
    long_prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the prompt that comes beside others.")] = 2000,
    sessions: Annotated[int, typer.Option(min=1, help="That decode beside it, of either kind.")] = 4,
    runs: Runs = 3,
    dtype: Precision = DType.FLOAT32,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of plain transformers and of each server.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Speed of reading a prompt beside plain transformers, and how far a long one holds up sessions that decode."""
    run_benchmark(
        measure,
        model,
        json_file,
        prompt_tokens=prompt_tokens,
        long_prompt_tokens=long_prompt_tokens,
        num_sessions=sessions,
        runs=runs,
        dtype=dtype.value,
        num_threads=threads,
    )


def measure(
    model: str,
    *,
    prompt_tokens: int,
    long_prompt_tokens: int,
    num_sessions: int,
    runs: int,
    dtype: str,
    num_threads: int,
    progress: Callable[[str], None],
) -> Report:
    """Run the benchmark. Raises SwarmError if any tokens are not those of plain transformers.

    A time to the first token is the user's: opening the session, embeddings and head included.
    """

    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint

    from .bench_generation import client, generate, random_prompt, threads
    from .bench_processes import ChildProcess
    from .bench_watchers import QUIET_TOKENS
    from .local_swarm import LocalSwarm

    checkpoint = open_checkpoint(model)
    settings = {
        "model": checkpoint.name,
        "dtype": dtype,
        "prompt_tokens": prompt_tokens,
        "long_prompt_tokens": long_prompt_tokens,
        "sessions": num_sessions,
        "runs": runs,
        "threads": num_threads,
    }
    report = Report("prefill", settings)
    (whole,) = even_spans(num_blocks(checkpoint.config), 1)
    short, long = (random_prompt(checkpoint.config, length) for length in (prompt_tokens, long_prompt_tokens))
    watched_prompt = random_prompt(checkpoint.config, WATCHER_PROMPT)
    with ExitStack() as stack:
        progress("computing what is right")
        local = load_local(checkpoint, dtype)
        with threads(num_threads):
            expected = {prompt: generate(local, prompt, NEW_TOKENS).tokens for prompt in (short, long)}
            watched = generate(local, watched_prompt, QUIET_TOKENS).tokens
        scenes = []
        for name, flag in SERVERS.items():
            progress(f"starting the {name} server and who watches it")
            flags = ["--dtype", dtype, "--threads", str(num_threads), *flag]
            peers = stack.enter_context(LocalSwarm(model, [str(whole)], flags=flags)).initial_peers
            remote = stack.enter_context(client(model, peers, dtype))
            arguments = (model, dtype, str(WATCHER_PROMPT))
            echo = stack.enter_context(ChildProcess("echo-watch", *arguments, str(num_sessions), *peers))
            clients = [
                stack.enter_context(ChildProcess("client-watch", *arguments, *peers)) for _ in range(num_sessions)
            ]
            for child in (echo, *clients):
                child.wait_for("READY")
            scenes.append(Scene(name, remote, {"echo": [echo], "clients": clients}, expected, watched))

        rounds = []
        for number in range(runs + 1):
            figures = {}
            progress(f"round {number} of {runs}" if number else "warming up")
            with threads(num_threads):
                first = generate(local, short, NEW_TOKENS).first
            figures[f"local: {prompt_tokens} tokens", "tokens/s"] = prompt_tokens / first
            with threads(1):
                figures[f"1 server: {prompt_tokens} tokens", "tokens/s"] = prompt_tokens / scenes[0].read(short)
                for scene in scenes:
                    figures |= scene.measure(long)
            rounds.append(figures)
    report.add_rounds(rounds[1:])  # the first warms up
    _add_ratios(report, prompt_tokens)
    return report


@dataclass
class Scene:
    """One server, a client with the prompt, and the child processes of each kind that decode beside it."""

    name: str
    remote: Any
    watchers: dict[str, list[ChildProcess]]
    expected: dict[torch.Tensor, list[int]]
    watched: list[int]

    def read(self, prompt: torch.Tensor) -> float:
        """Seconds to the first token after a prompt."""
        from .bench_generation import check_same, generate_remotely

        generation = generate_remotely(self.remote, prompt, NEW_TOKENS)
        check_same(generation.tokens, self.expected[prompt])
        return generation.first

    def measure(self, prompt: torch.Tensor) -> dict[tuple[str, str], float]:
        """Figures by name and unit: the prompt alone, and beside watchers of each kind."""
        from .bench_generation import check_same

        figures = {(f"{self.name}: first token, alone", "s"): self.read(prompt)}
        for kind, children in self.watchers.items():
            for child in children:
                child.ask("start")
            for child in children:
                child.wait_for("RUNNING")
            started = time.perf_counter()
            first = self.read(prompt)
            for child in children:
                child.ask("stop")
            answers = [child.answer() for child in children]
            for answer in answers:
                check_same(answer.get("tokens", self.watched)[: len(self.watched)], self.watched)
            stamps = [session for answer in answers for session in answer["stamps"]]
            before, beside = split_gaps(stamps, started, started + first)
            figures |= {
                (f"{self.name}: first token, beside {kind}", "s"): first,
                (f"{self.name}, {kind}: usual gap", "ms"): statistics.median(before) * MILLISECONDS,
                (f"{self.name}, {kind}: largest gap without", "ms"): max(before) * MILLISECONDS,
                (f"{self.name}, {kind}: largest gap with the prompt", "ms"): max(beside) * MILLISECONDS,
            }
        return figures


def split_gaps(stamps: Sequence[Sequence[float]], start: float, end: float) -> tuple[list[float], list[float]]:
    """The gaps between tokens of all sessions that ended before `start`, and those that overlap [start, end].

    stamps: for each session the times of its tokens. All times in seconds, on one clock.
    """
    before, beside = [], []
    for session in stamps:
        for earlier, later in zip(session[WARM_UP_GAPS:], session[WARM_UP_GAPS + 1 :], strict=False):
            if later <= start:
                before.append(later - earlier)
            elif earlier <= end:
                beside.append(later - earlier)
    return before, beside


def _add_ratios(report: Report, prompt_tokens: int) -> None:
    medians = report.medians
    speeds = (medians[f"{where}: {prompt_tokens} tokens"] for where in ("1 server", "local"))
    report.ratios["1 server / local"] = next(speeds) / next(speeds)
    for name in SERVERS:
        for kind in ("echo", "clients"):
            largest, usual = (
                medians[f"{name}, {kind}: largest gap with the prompt"],
                medians[f"{name}, {kind}: usual gap"],
            )
            report.ratios[f"{name}, {kind}: largest gap / usual"] = largest / usual
            beside, alone = medians[f"{name}: first token, beside {kind}"], medians[f"{name}: first token, alone"]
            report.ratios[f"{name}, {kind}: first token beside / alone"] = beside / alone
