"""`swarm bench push`: a token's way through servers that are far from each other, pushed on and through the client.

Each server stands behind a proxy with a delay (see links.py), and no connection by-passes it. The best that a step can
take is the delay of a link to each server and of one from the last back to the client, and what all peers compute. The
latter is measured in the same steps: the servers report theirs, and the client's own is what passes between two steps,
and its codec. Through the client a step passes two links for each server, and is compared with the same best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.errors import SwarmError

from .bench_decode import even_spans, load_local
from .bench_report import (
    MILLISECONDS,
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
from .link_line import Link

if TYPE_CHECKING:
    import torch

    from .local_swarm import LocalSwarm

#: Whether outputs go straight to the next server, by what a row of the report is called.
WAYS = {"pushed": True, "through the client": False}


def push(
    model: Model = None,
    servers: Annotated[int, typer.Option(min=1, help="In the chain.")] = 3,
    delay: Annotated[float, typer.Option(min=0, help="Seconds one way, of the link before each server.")] = 0.05,
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 16,
    runs: Runs = 5,
    dtype: Precision = DType.FLOAT32,
    server_threads: ServerThreads = 1,
    json_file: JsonFile = None,
) -> None:
    """Time per token over servers far apart, pushed and not, beside delays + compute."""
    run_benchmark(
        measure,
        model,
        json_file,
        num_servers=servers,
        delay=delay,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        dtype=dtype.value,
        server_threads=server_threads,
    )


@dataclass(frozen=True)
class PushRun:
    """Means over the steps of one generation, in seconds.

    servers, client: what they computed. network, other: of all servers, as `HopTimes` has them.
    """

    step: float
    servers: float
    client: float
    network: float
    other: float


def measure(
    model: str,
    *,
    num_servers: int,
    delay: float,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    dtype: str,
    server_threads: int,
    progress: Callable[[str], None],
) -> Report:
    """Run the benchmark. Raises SwarmError if tokens are not the local model's, or a connection by-passes a link."""
    from contextlib import ExitStack

    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint

    from .bench_generation import client, generate, random_prompt, threads
    from .local_swarm import LocalSwarm

    checkpoint = open_checkpoint(model)
    settings = {
        "model": checkpoint.name,
        "dtype": dtype,
        "servers": num_servers,
        "one_way_delay": delay,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "runs": runs,
        "server_threads": server_threads,
    }
    report = Report("push", settings)
    prompt = random_prompt(checkpoint.config, prompt_tokens)
    progress("computing what is right")
    with threads(1):
        expected = generate(load_local(checkpoint, dtype), prompt, new_tokens).tokens
    spans = [str(span) for span in even_spans(num_blocks(checkpoint.config), num_servers)]
    found: dict[str, list[PushRun]] = {way: [] for way in WAYS}
    with ExitStack() as stack, threads(1):
        progress(f"starting {num_servers} servers behind links of {delay:g} s")
        flags = ["--dtype", dtype, "--threads", str(server_threads)]
        swarm = stack.enter_context(LocalSwarm(model, spans, flags=flags, link=Link(one_way_delay_s=delay)))
        remotes = {
            way: stack.enter_context(
                client(model, swarm.initial_peers, dtype, direct_push=direct_push, compression="none")
            )
            for way, direct_push in WAYS.items()
        }
        for number in range(runs + 1):
            for way, remote in remotes.items():
                progress(f"{way}, {f'round {number} of {runs}' if number else 'warming up'}")
                run = one_run(swarm, remote, prompt, expected)
                if number:
                    found[way].append(run)
    add_results(report, found, delays=(num_servers + 1) * delay)
    return report


def one_run(swarm: LocalSwarm, remote: Any, prompt: torch.Tensor, expected: list[int]) -> PushRun:
    """One generation. Raises SwarmError as `measure` does."""
    from .bench_generation import check_same, generate

    with remote.inference_session(max_length=prompt.shape[1] + len(expected)) as session:
        generation = generate(remote, prompt, len(expected), session)
        check_same(generation.tokens, expected)
        if by_passes := swarm.direct_connections():
            raise SwarmError(f"connections by-pass the links: {'; '.join(by_passes)}")
        times = session.report()
    return PushRun(
        step=generation.step_time,
        servers=sum(hop.computed for hop in times.hops),
        client=times.client + times.codec,
        network=sum(hop.network for hop in times.hops),
        other=sum(hop.queued + hop.codec + hop.other for hop in times.hops),
    )


def add_results(report: Report, found: dict[str, list[PushRun]], delays: float) -> None:
    """What steps took either way. delays: seconds, of the links that a pushed step passes."""
    for way, runs in found.items():
        best = [delays + run.servers + run.client for run in runs]
        for name, seconds in (
            ("a token", [run.step for run in runs]),
            ("delays + compute", best),
            ("computed by servers", [run.servers for run in runs]),
            ("computed by the client", [run.client for run in runs]),
            ("network, measured", [run.network for run in runs]),
            ("queue, codec and handling", [run.other for run in runs]),
        ):
            report.add(f"{way}: {name}", "ms", [MILLISECONDS * value for value in seconds])
    medians = report.medians
    for way in found:
        ratio = medians[f"{way}: a token"] / medians[f"{way}: delays + compute"]
        report.ratios[f"{way}: a token / (delays + compute)"] = ratio
