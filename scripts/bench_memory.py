"""`swarm bench memory`: what a server and a client take at their peak, beside what their weights and imports take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from .bench_report import (
    MEGABYTE,
    DType,
    JsonFile,
    Model,
    NewTokens,
    Precision,
    PromptTokens,
    Report,
    Runs,
    run_benchmark,
)

#: What the two programs import before they read any weights.
SERVER_MODULES = ("swarm.scripts.main", "swarm.scripts.run_server", "swarm.scripts.serving", "swarm.server.server")
CLIENT_MODULES = ("swarm.client.model", "swarm.scripts.bench_generation")


def memory(
    model: Model = None,
    servers: Annotated[int, typer.Option(min=1, help="In the chain, with equal shares of the blocks.")] = 3,
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 64,
    runs: Runs = 5,
    dtype: Precision = DType.FLOAT32,
    json_file: JsonFile = None,
) -> None:
    """Peak memory of a server and of a client after a generation."""
    run_benchmark(
        measure,
        model,
        json_file,
        num_servers=servers,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        dtype=dtype.value,
    )


def measure(
    model: str,
    *,
    num_servers: int,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    dtype: str,
    progress: Callable[[str], None],
) -> Report:
    """Each run is a new swarm, a new client and one generation. The first server of the chain is the one measured."""
    from swarm.architectures import architecture_of, client_tensors, num_blocks, span_tensors
    from swarm.checkpoint import open_checkpoint
    from swarm.tensors import DTYPES

    from .bench_decode import even_spans
    from .bench_processes import client_process, peak_memory, peak_memory_of_children, peak_of_imports
    from .local_swarm import LocalSwarm

    checkpoint = open_checkpoint(model)
    architecture = architecture_of(checkpoint.config)
    names = checkpoint.tensor_names()
    spans = even_spans(num_blocks(checkpoint.config), num_servers)
    scale = DTYPES[dtype].itemsize / checkpoint.dtype.itemsize
    span_bytes = checkpoint.nbytes(span_tensors(architecture, names, spans[0])) * scale
    client_bytes = checkpoint.nbytes(client_tensors(architecture, names)) * scale

    peaks: dict[str, list[float]] = {}
    for number in range(1, runs + 1):
        progress(f"run {number} of {runs}")
        with LocalSwarm(model, [str(span) for span in spans], flags=["--dtype", dtype]) as swarm:
            server = swarm.servers[0].pid
            with client_process(
                model, swarm.initial_peers, dtype=dtype, prompt_tokens=prompt_tokens, new_tokens=new_tokens
            ) as client:
                client.wait_for("DONE")
                for name, peak in {
                    "server": peak_memory(server),
                    "server's p2pd": peak_memory_of_children(server),
                    "client": peak_memory(client.pid),
                    "client's p2pd": peak_memory_of_children(client.pid),
                }.items():
                    peaks.setdefault(name, []).append(peak)
        peaks.setdefault("server's imports alone", []).append(peak_of_imports(model, SERVER_MODULES))
        peaks.setdefault("client's imports alone", []).append(peak_of_imports(model, CLIENT_MODULES))

    report = Report(
        "memory",
        {
            "model": checkpoint.name,
            "server_blocks": str(spans[0]),
            "servers": len(spans),
            "dtype": dtype,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "runs": runs,
        },
    )
    results = {name: report.add(name, "MB", [peak / MEGABYTE for peak in found]) for name, found in peaks.items()}
    for peer in ("server", "client"):
        pairs = zip(peaks[peer], peaks[f"{peer}'s p2pd"], strict=True)
        report.add(f"{peer} with its p2pd", "MB", [sum(pair) / MEGABYTE for pair in pairs])
    for peer, what, size in (("server", "span", span_bytes), ("client", "embeddings and head", client_bytes)):
        weights = report.add(f"{peer}'s weights: {what}", "MB", [size / MEGABYTE])
        above = results[peer].median - results[f"{peer}'s imports alone"].median
        report.ratios[f"{peer} above its imports / its weights"] = above / weights.median
    return report
