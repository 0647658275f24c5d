"""`swarm bench startup`: seconds until servers serve and a client has its first token, files cached."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from .bench_report import DType, JsonFile, Model, Precision, PromptTokens, Report, Runs, run_benchmark

#: The spans in which the model is served.
CHAIN_LENGTH = 3

START_TIMEOUT = 300.0  # seconds


def startup(
    model: Model = None,
    servers: Annotated[int, typer.Option(min=CHAIN_LENGTH - 1, help="Started at once, beside a first one.")] = 5,
    prompt_tokens: PromptTokens = 16,
    runs: Runs = 5,
    warm_up: Annotated[bool, typer.Option(help="One run more, not counted, so that files are cached.")] = True,
    dtype: Precision = DType.FLOAT32,
    json_file: JsonFile = None,
) -> None:
    """Time to READY of one server and of several at once, to a client's first token, and of `swarm --help`."""
    run_benchmark(
        measure,
        model,
        json_file,
        num_servers=servers,
        prompt_tokens=prompt_tokens,
        runs=runs,
        warm_up=warm_up,
        dtype=dtype.value,
    )


def measure(
    model: str,
    *,
    num_servers: int,
    prompt_tokens: int,
    runs: int,
    warm_up: bool,
    dtype: str,
    progress: Callable[[str], None],
) -> Report:
    """Each run: one server starts a swarm alone; others join it all at once; a client process generates; all end."""
    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint

    from .bench_decode import even_spans
    from .bench_processes import client_process
    from .local_swarm import LocalSwarm

    checkpoint = open_checkpoint(model)
    spans = [str(span) for span in even_spans(num_blocks(checkpoint.config), CHAIN_LENGTH)]
    alone, together, first_token, help_time = [], [], [], []
    for number in range(0 if warm_up else 1, runs + 1):
        progress(f"run {number} of {runs}" if number else "warming up")
        with LocalSwarm(model, spans[:1], flags=["--dtype", dtype], start_timeout=START_TIMEOUT) as swarm:
            alone.append(swarm.servers[0].seconds_to_ready)
            started = time.perf_counter()
            # The first of them holds the second span, so that the chain is whole as soon as possible.
            joining = [swarm.add(spans[index % len(spans)], wait=False) for index in range(1, num_servers + 1)]
            for server in joining:
                server.wait_until_ready(START_TIMEOUT)
            together.append(time.perf_counter() - started)
            with client_process(
                model, swarm.initial_peers, dtype=dtype, prompt_tokens=prompt_tokens, new_tokens=2
            ) as client:
                first_token.append(client.wait_for("TOKEN"))
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "swarm.scripts.main", "--help"], check=True, capture_output=True)
        help_time.append(time.perf_counter() - started)

    report = Report(
        "startup",
        {
            "model": checkpoint.name,
            "spans": ", ".join(spans),
            "servers_at_once": num_servers,
            "dtype": dtype,
            "prompt_tokens": prompt_tokens,
            "runs": runs,
            "warm_up": warm_up,
        },
    )
    for name, seconds in {
        "one server to READY": alone,
        f"{num_servers} servers at once to READY": together,
        "client process to its first token": first_token,
        "swarm --help": help_time,
    }.items():
        report.add(name, "s", seconds[-runs:])
    return report
