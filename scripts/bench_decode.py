"""`swarm bench decode`: one client's greedy generation over one server and over several, beside plain transformers.

Everything runs once per round, in turn, so a machine that slows down or speeds up does so for all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.data_structures import BlockSpan

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

if TYPE_CHECKING:
    from swarm.checkpoint import Checkpoint
    from swarm.server.config import Quantization

    from .bench_generation import Generation

#: Thread counts that the baseline may choose from, and runs of each before it chooses.
LOCAL_THREADS = (1, 2)
CALIBRATION_RUNS = 3
#: Families whose plain models are right with transformers' eager attention only.
_EAGER = frozenset({"bloom", "gemma2", "gpt_oss"})


def decode(
    model: Model = None,
    servers: Annotated[int, typer.Option(min=2, help="In the longer chain; one server is always measured too.")] = 3,
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 64,
    runs: Runs = 5,
    dtype: Precision = DType.FLOAT32,
    client_threads: Annotated[int, typer.Option(min=1, help="CPU threads of the client.")] = 1,
    server_threads: ServerThreads = 1,
    json_file: JsonFile = None,
) -> None:
    """Decode speed of one server and of a chain, beside plain transformers in the same run."""
    run_benchmark(
        measure,
        model,
        json_file,
        num_servers=servers,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        dtype=dtype.value,
        client_threads=client_threads,
        server_threads=server_threads,
    )


def measure(
    model: str,
    *,
    num_servers: int,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    dtype: str,
    client_threads: int,
    server_threads: int,
    progress: Callable[[str], None],
) -> Report:
    """Run the benchmark. Raises SwarmError if the swarm's tokens are not those of the local model."""

    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint

    from .bench_generation import check_tokens, client, generate, generate_remotely, random_prompt, threads
    from .local_swarm import LocalSwarm

    checkpoint = open_checkpoint(model)
    report = Report(
        "decode",
        {
            "model": checkpoint.name,
            "blocks": num_blocks(checkpoint.config),
            "dtype": dtype,
            "servers": num_servers,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "runs": runs,
            "client_threads": client_threads,
            "server_threads": server_threads,
        },
    )
    prompt = random_prompt(checkpoint.config, prompt_tokens)
    flags = ["--dtype", dtype, "--threads", str(server_threads)]
    chains = [even_spans(num_blocks(checkpoint.config), count) for count in (1, num_servers)]
    with ExitStack() as stack:
        swarms = []
        for chain in chains:
            progress(f"starting a swarm of {name_of(chain)}")
            swarms.append(stack.enter_context(LocalSwarm(model, [str(span) for span in chain], flags=flags)))
        progress("loading the whole model")
        local = load_local(checkpoint, dtype)
        clients = [stack.enter_context(client(model, swarm.initial_peers, dtype)) for swarm in swarms]

        progress("choosing the local model's threads")
        local_threads = choose_threads(report, lambda: generate(local, prompt, new_tokens))
        report.settings["local_threads"] = local_threads
        rounds = []
        for number in range(runs + 1):
            progress(f"round {number} of {runs}" if number else "warming up")
            with threads(local_threads):
                generations = [generate(local, prompt, new_tokens)]
            with threads(client_threads):
                generations += [generate_remotely(remote, prompt, new_tokens) for remote in clients]
            check_tokens(generations)
            rounds.append(generations)
    summarize(report, chains, rounds[1:])
    return report


def summarize(report: Report, chains: Sequence[Sequence[BlockSpan]], rounds: Sequence[Sequence[Generation]]) -> None:
    """Turn rounds of (local, one server, several servers) into results and ratios. chains: of the two swarms.

    How many servers there are is not taken from the times of a step: on a busy machine some of these come late.
    """
    names = [name_of(chain) for chain in chains]
    local, one, several = (list(column) for column in zip(*rounds, strict=True))
    for name, column in (("local", local), *zip(names, (one, several), strict=True)):
        report.add(f"{name}: decode", "tokens/s", [run.decode_speed for run in column])
        report.add(f"{name}: end to end", "tokens/s", [run.speed for run in column])
        report.add(f"{name}: first token", "s", [run.first for run in column])
        report.add(f"{name}: step", "ms", [run.step_time * MILLISECONDS for run in column])
    for name, chain, column in zip(names, chains, (one, several), strict=True):
        waited = [run.per_step(lambda hop: hop.waited) * MILLISECONDS for run in column]
        computed = [run.per_step(lambda hop: hop.computed) * MILLISECONDS for run in column]
        queued = [run.per_step(lambda hop: hop.queued) * MILLISECONDS for run in column]
        report.add(f"{name}: computed by servers", "ms", computed)
        report.add(f"{name}: queued at servers", "ms", queued)
        beyond = [whole - own for whole, own in zip(waited, computed, strict=True)]
        report.add(f"{name}: beyond compute, each hop", "ms", [value / len(chain) for value in beyond])

    extra = len(chains[1]) - len(chains[0])
    report.add(
        "an extra hop, all of it",
        "ms",
        [(long.step_time - short.step_time) / extra * MILLISECONDS for short, long in zip(one, several, strict=True)],
    )
    report.add(
        "an extra hop, beyond compute",
        "ms",
        [
            (_beyond_compute(long) - _beyond_compute(short)) / extra * MILLISECONDS
            for short, long in zip(one, several, strict=True)
        ],
    )
    medians = report.medians
    for name in names:
        for kind in ("decode", "end to end"):
            report.ratios[f"{name} / local: {kind}"] = medians[f"{name}: {kind}"] / medians[f"local: {kind}"]


def _beyond_compute(run: Generation) -> float:
    """Seconds of a whole step, the client's own part included, in which no server computed."""
    return run.step_time - run.per_step(lambda hop: hop.computed)


def choose_threads(report: Report, run: Callable[[], Generation]) -> int:
    """The thread count with which the local model decodes fastest."""
    from .bench_generation import threads

    speeds: dict[int, list[float]] = {count: [] for count in LOCAL_THREADS}
    for number in range(CALIBRATION_RUNS + 1):
        for count in LOCAL_THREADS:
            with threads(count):
                generation = run()
            if number:  # the first warms up
                speeds[count].append(generation.decode_speed)
    results = {
        count: report.add(f"local with {count} thread{'s'[: count > 1]}: decode", "tokens/s", speeds[count])
        for count in LOCAL_THREADS
    }
    return max(LOCAL_THREADS, key=lambda count: results[count].median)


def load_local(checkpoint: Checkpoint, dtype: str, quantization: Quantization = "none", device: str = "cpu") -> Any:
    """Plain transformers with these weights, quantised as servers do it.

    With PyTorch's fused attention, but for families that lack it or lose something by it (soft caps, sinks).
    """
    from transformers import AutoModelForCausalLM

    from swarm.quiet import quiet_loading
    from swarm.server.quantization import quantization_config
    from swarm.tensors import DTYPES

    from .bench_generation import never_ending

    config, options = checkpoint.config, dict[str, Any]()
    if quantization != "none":
        options["quantization_config"] = quantization_config(quantization, DTYPES[dtype])
    if quantization != "none" or device != "cpu":
        options["device_map"] = device
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.source,
            revision=checkpoint.revision,
            dtype=DTYPES[dtype],
            attn_implementation="eager" if config.model_type in _EAGER else "sdpa",
            **options,
        )
    return never_ending(model.eval())


def even_spans(num_blocks: int, count: int) -> list[BlockSpan]:
    """`count` spans of a model, as equal as possible; never more than there are blocks."""
    count = min(count, num_blocks)
    bounds = [num_blocks * index // count for index in range(count + 1)]
    return [BlockSpan(start=start, end=end) for start, end in pairwise(bounds)]


def name_of(chain: Sequence[BlockSpan]) -> str:
    return "1 server" if len(chain) == 1 else f"{len(chain)} servers"
