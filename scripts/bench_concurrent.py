"""`swarm bench concurrent`: many sessions on one server at once, beside one session, and beside plain transformers.

Two kinds of clients: sessions that only send a row back and forth, which show what the server's engine can do, and full
client processes that share this machine's cores with it, which show what people get here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_decode import choose_threads, even_spans, load_local
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
    from .bench_processes import ChildProcess

#: Tokens in a page of the cache of transformers' continuous batching. Its default, 256, is ten times slower here.
PAGE_SIZE = 32

Sessions = Annotated[list[int], typer.Option(min=1, help="Sessions at once that only echo; give it several times.")]


def concurrent(
    model: Model = None,
    sessions: Sessions = [1, 4, 8, 16],  # noqa: B006 (typer reads it, nobody writes it)
    clients: Annotated[int, typer.Option(min=1, help="Full client processes at once.")] = 8,
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 64,
    runs: Runs = 3,
    dtype: Precision = DType.FLOAT32,
    server_threads: ServerThreads = 1,
    json_file: JsonFile = None,
) -> None:
    """Aggregate speed of many sessions on one server, beside plain transformers on a batch of the same rows."""
    run_benchmark(
        measure,
        model,
        json_file,
        sessions=sorted({1, *sessions}),
        num_clients=clients,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        dtype=dtype.value,
        server_threads=server_threads,
    )


def measure(
    model: str,
    *,
    sessions: Sequence[int],
    num_clients: int,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    dtype: str,
    server_threads: int,
    progress: Callable[[str], None],
) -> Report:
    """Run the benchmark. Raises SwarmError if a client's tokens are not those of its solo run in plain transformers."""
    import torch

    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint

    from .bench_generation import generate, random_prompt, threads
    from .bench_processes import ChildProcess
    from .local_swarm import LocalSwarm

    checkpoint = open_checkpoint(model)
    report = Report(
        "concurrent",
        {
            "model": checkpoint.name,
            "dtype": dtype,
            "sessions": ", ".join(map(str, sessions)),
            "clients": num_clients,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "runs": runs,
            "server_threads": server_threads,
        },
    )
    flags = ["--dtype", dtype, "--threads", str(server_threads)]
    (whole,) = even_spans(num_blocks(checkpoint.config), 1)
    prompts = [random_prompt(checkpoint.config, prompt_tokens, seed) for seed in range(num_clients)]
    with ExitStack() as stack:
        progress("starting a server")
        swarm = stack.enter_context(LocalSwarm(model, [str(whole)], flags=flags))
        local, batching = load_local(checkpoint, dtype), load_local(checkpoint, dtype)
        progress("choosing the local model's threads")
        local_threads = choose_threads(report, lambda: generate(local, prompts[0], new_tokens))
        report.settings["local_threads"] = local_threads
        with threads(local_threads):
            expected = [generate(local, prompt, new_tokens).tokens for prompt in prompts]

        arguments = (dtype, str(prompt_tokens), str(new_tokens))
        progress("starting clients")
        echo = stack.enter_context(ChildProcess("echo", model, *arguments, *swarm.initial_peers))
        generators = [
            stack.enter_context(ChildProcess("generator", model, *arguments, str(seed), *swarm.initial_peers))
            for seed in range(num_clients)
        ]
        for child in (echo, *generators):
            child.wait_for("READY")

        rounds = []
        for number in range(runs + 1):
            progress(f"round {number} of {runs}" if number else "warming up")
            with threads(local_threads):
                figures = {
                    "local: 1 row": generate(local, prompts[0], new_tokens).speed,
                    f"local: a batch of {num_clients} rows": _batch_speed(local, torch.cat(prompts), new_tokens),
                    f"local: generate_batch of {num_clients} rows": _continuous_speed(batching, prompts, new_tokens),
                }
            for count in sessions:
                figures[f"echo: {count} session{'s'[: count > 1]}"] = _echo_speed(echo, count, new_tokens)
            for count in sorted({1, num_clients}):
                figures[f"clients: {count}"] = _client_speed(generators[:count], expected)
            rounds.append({(name, "tokens/s"): speed for name, speed in figures.items()})
    report.add_rounds(rounds[1:])  # the first warms up
    _add_ratios(report, sessions, num_clients)
    return report


def _add_ratios(report: Report, sessions: Sequence[int], num_clients: int) -> None:
    medians = report.medians
    for count in sessions[1:]:
        report.ratios[f"echo: {count} sessions / 1"] = medians[f"echo: {count} sessions"] / medians["echo: 1 session"]
    report.ratios["clients: 1 / local: 1 row"] = medians["clients: 1"] / medians["local: 1 row"]
    if num_clients > 1:
        many = f"clients: {num_clients}"
        report.ratios[f"{many} / 1"] = medians[many] / medians["clients: 1"]
        for other in (f"local: a batch of {num_clients} rows", f"local: generate_batch of {num_clients} rows"):
            report.ratios[f"{many} / {other}"] = medians[many] / medians[other]


def _batch_speed(local: Any, prompts: Any, new_tokens: int) -> float:
    """Tokens/s of one `generate` call on equally long prompts. prompts: int64 [rows, tokens]."""
    import torch

    with torch.inference_mode():
        started = time.perf_counter()
        local.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False)
        return len(prompts) * new_tokens / (time.perf_counter() - started)


def _continuous_speed(local: Any, prompts: Sequence[Any], new_tokens: int) -> float:
    """Tokens/s of transformers' own continuous batching, its cache as large as these rows need.

    prompts: each int64 [1, tokens].
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompt_tokens = prompts[0].shape[1]
    pages = -(-(prompt_tokens + new_tokens) // PAGE_SIZE) + 1
    started = time.perf_counter()
    outputs = local.generate_batch(
        inputs=[prompt[0].tolist() for prompt in prompts],
        generation_config=GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_SIZE, num_blocks=len(prompts) * pages, max_batch_tokens=len(prompts) * prompt_tokens
        ),
    )
    elapsed = time.perf_counter() - started
    return sum(len(output.generated_tokens) for output in outputs.values()) / elapsed


def _echo_speed(echo: ChildProcess, num_sessions: int, steps: int) -> float:
    """Rows/s that come back from the server, after the prefill."""
    echo.ask(str(num_sessions))
    seconds: float = echo.answer()["seconds"]
    return num_sessions * steps / seconds


def _client_speed(generators: Sequence[ChildProcess], expected: Sequence[Sequence[int]]) -> float:
    """Tokens/s of clients that begin together, prefill and opening their sessions included."""
    from .bench_generation import check_same

    started = time.perf_counter()
    for generator in generators:
        generator.ask("")
    tokens = [generator.answer()["tokens"] for generator in generators]
    elapsed = time.perf_counter() - started
    for ours, theirs in zip(tokens, expected, strict=False):
        check_same(ours, theirs)
    return sum(map(len, tokens)) / elapsed
