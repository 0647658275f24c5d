"""`swarm bench overcommit`: more active sessions than a server's cache holds, beside as many as it holds.

The worst case for an overcommitted cache: nobody is ever idle, and everybody reaches the length that was declared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_decode import even_spans, load_local
from .bench_report import (
    DType,
    JsonFile,
    Model,
    NewTokens,
    Precision,
    PromptTokens,
    Report,
    Runs,
    ServerThreads,
    run_benchmark,
)

if TYPE_CHECKING:
    import torch

    from .bench_processes import ChildProcess


def overcommit(
    model: Model = None,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions whose whole length the cache holds.")] = 10,
    factor: Annotated[int, typer.Option(min=1, help="Overcommitment, and how many times as many sessions come.")] = 4,
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 112,
    runs: Runs = 1,
    dtype: Precision = DType.FLOAT32,
    server_threads: ServerThreads = 1,
    json_file: JsonFile = None,
) -> None:
    """Aggregate speed of four times the sessions that a cache holds, all active, beside as many as it holds."""
    run_benchmark(
        measure,
        model,
        json_file,
        num_sessions=sessions,
        factor=factor,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        dtype=dtype.value,
        server_threads=server_threads,
    )


def measure(
    model: str,
    *,
    num_sessions: int,
    factor: int,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    dtype: str,
    server_threads: int,
    progress: Callable[[str], None],
) -> Report:
    """Run the benchmark. Raises SwarmError if a session's tokens are not those of plain transformers."""
    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint
    from swarm.server.config import ServerConfig

    from .bench_generation import random_prompt
    from .bench_processes import ChildProcess
    from .local_swarm import LocalSwarm

    checkpoint = open_checkpoint(model)
    page_size = ServerConfig.model_fields["page_size"].default
    cache_tokens = num_sessions * -(-(prompt_tokens + new_tokens) // page_size) * page_size
    many = num_sessions * factor
    report = Report(
        "overcommit",
        {
            "model": checkpoint.name,
            "dtype": dtype,
            "sessions": f"{num_sessions}, {many}",
            "cache_tokens": cache_tokens,
            "overcommit": factor,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "runs": runs,
            "server_threads": server_threads,
        },
    )
    progress("generating with plain transformers")
    prompts = [random_prompt(checkpoint.config, prompt_tokens, seed) for seed in range(many)]
    reference = Reference(load_local(checkpoint, dtype), prompts, new_tokens)
    (whole,) = even_spans(num_blocks(checkpoint.config), 1)
    flags = ["--dtype", dtype, "--threads", str(server_threads)]
    flags += ["--cache-tokens", str(cache_tokens), "--cache-overcommit", str(factor)]
    progress("starting a server and clients")
    rounds = []
    with (
        LocalSwarm(model, [str(whole)], flags=flags) as swarm,
        ChildProcess("crowd", model, dtype, str(prompt_tokens), str(new_tokens), *swarm.initial_peers) as crowd,
    ):
        crowd.wait_for("READY")
        for number in range(1, runs + 1):
            figures: dict[tuple[str, str], float] = {}
            for count in (num_sessions, many):
                progress(f"run {number} of {runs}: {count} sessions")
                figures |= _run(crowd, count, new_tokens, reference)
            rounds.append(figures)
    report.add_rounds(rounds)
    medians = report.medians
    for name in ("speed", "longest gap between tokens"):
        ratio = medians[f"{many} sessions: {name}"] / medians[f"{num_sessions} sessions: {name}"]
        report.ratios[f"{name}: {many} sessions / {num_sessions}"] = ratio
    return report


def _run(crowd: ChildProcess, count: int, new_tokens: int, reference: Reference) -> dict[tuple[str, str], float]:
    """Figures of `count` sessions at once, by name and unit."""
    crowd.ask(str(count))
    answer = crowd.answer()
    reference.check(answer["tokens"])
    name = f"{count} sessions"
    return {
        (f"{name}: speed", "tokens/s"): count * new_tokens / answer["seconds"],
        (f"{name}: longest gap between tokens", "s"): max(answer["gaps"]),
        (f"{name}: longest wait for the first token", "s"): max(answer["firsts"]),
        (f"{name}: evictions", "sessions"): sum(answer["evictions"]),
    }


class Reference:
    """What plain transformers generates greedily. prompts: int64 [1, tokens], all of one length."""

    def __init__(self, local: Any, prompts: Sequence[torch.Tensor], new_tokens: int):
        import torch

        self._local, self._prompts, self._new_tokens = local, prompts, new_tokens
        self._tokens = self._generate(torch.cat(list(prompts)))

    def check(self, found: Sequence[Sequence[int]]) -> None:
        """Raises SwarmError if the tokens of the first prompts are others.

        Where a batch of rows rounds otherwise than the row alone, the row alone decides.
        """
        from .bench_generation import check_same

        for index, tokens in enumerate(found):
            if tokens != self._tokens[index]:
                self._tokens[index] = self._generate(self._prompts[index])[0]
            check_same(tokens, self._tokens[index])

    def _generate(self, prompts: torch.Tensor) -> list[list[int]]:
        import torch

        from .bench_generation import threads

        with threads(1), torch.inference_mode():  # two that share their cores with others wait for each other
            output = self._local.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=self._new_tokens, do_sample=False
            )
        new: list[list[int]] = output[:, prompts.shape[1] :].tolist()
        return new
