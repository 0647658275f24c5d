"""`swarm bench pets`: many tasks on one base, measured as PetS (Zhou et al., USENIX ATC'22) does, but on a decoder.

All blocks of the model run as one span in this process. The tasks are of five kinds in turn (see `made_adapters`), the
queries of random tasks, with lengths N(32, sigma), and all of them wait at once. The systems:

- SeqS: a full model for each task, one task after the other. Full models cost the same time to run whatever their
  numbers, so the plain base stands for each of them. Where they do not all fit into the memory, it is shown besides
  with the time in which each of the others is loaded in its turn.
- shared base, task by task: one base, its tasks one after the other.
- fixed batches, ignoring adapters, two-pass: one base, batches of several tasks, formed without looking at costs, or by
  PetS' own scheduler.
- joint, online: ours, planned for all that waits, or batch by batch as the engine does.

Batches are flattened for every system, so none of them pays for padding.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .bench_report import JsonFile, Model, Report, Runs, check_writable, run_benchmark
from .pets_figures import (
    DECODE_TASKS,
    ONLINE,
    SEQS,
    TASK_BY_TASK,
    Copies,
    add_memory,
    add_workload,
    draw,
    measure_order,
    measure_rows,
    measure_serving,
    measure_stalls,
)

if TYPE_CHECKING:
    from swarm.server.adapters.scheduling import Query
    from swarm.server.span import Span

    from .pets_rig import Rig, Timing

#: (queries of each task, tokens of each): PetS' comparison with SeqS.
SERVING = ((1, 128), (1, 64), (2, 64), (2, 32), (4, 32), (4, 16))
#: Decode steps of which the median counts.
STEPS = 8


class DType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Base(StrEnum):
    NONE = "none"
    INT8 = "int8"


def pets(
    model: Model = None,
    tasks: Annotated[list[int] | None, typer.Option(min=1, help="How many; may be repeated. 32, 64 and 128.")] = None,
    sigma: Annotated[
        list[float] | None, typer.Option(min=0, help="Of the lengths; may be repeated. 1, 2, 4 and 8.")
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="Of all tasks together.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=0, help="Generated after each query. 0: as in the paper.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a batch; the server's default.")] = 1024,
    base: Annotated[Base, typer.Option(help="How the base's weights are held.")] = Base.NONE,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[DType, typer.Option(help="Of activations and unquantised weights.")] = DType.FLOAT32,
    runs: Runs = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few tasks and queries, to see that it works.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the throughputs into this file (PNG, SVG or PDF).")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Many fine-tuned tasks on one base: throughput, latency, memory, beside full models and other schedulers."""
    check_writable(plot)
    run_benchmark(
        measure,
        model,
        json_file,
        tasks=tasks or ([5] if quick else [32, 64, 128]),
        sigmas=sigma or ([4.0] if quick else [1.0, 2.0, 4.0, 8.0]),
        num_queries=min(queries, 20) if quick else queries,
        new_tokens=new_tokens,
        max_tokens=max_tokens,
        base=base.value,
        device=device,
        dtype=dtype.value,
        runs=runs,
        threads=threads,
        serving=SERVING[-1:] if quick else SERVING,
        rows=8 if quick else DECODE_TASKS,
        steps=2 if quick else STEPS,
        plot=plot,
    )


def measure(
    model: str,
    *,
    tasks: Sequence[int],
    sigmas: Sequence[float],
    num_queries: int,
    new_tokens: int,
    max_tokens: int,
    base: str,
    device: str,
    dtype: str,
    runs: int,
    threads: int,
    serving: Sequence[tuple[int, int]],
    rows: int,
    steps: int,
    plot: Path | None,
    progress: Callable[[str], None],
) -> Report:
    """Every run measures all systems in turn, so a machine that slows down or speeds up does so for all alike.

    rows, steps: of the comparison of decode steps.
    """
    import torch

    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint
    from swarm.data_structures import BlockSpan
    from swarm.server.adapters.costs import profile
    from swarm.server.loader import load_span, loaded_bytes
    from swarm.server.memory import usable_memory
    from swarm.tensors import DTYPES

    from .made_adapters import KINDS, made_adapter
    from .pets_rig import Rig, made_queries

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    report = Report(
        "pets",
        {
            "model": checkpoint.name,
            "tasks": list(tasks),
            "sigmas": list(sigmas),
            "queries": num_queries,
            "new_tokens": new_tokens,
            "max_tokens": max_tokens,
            "base": base,
            "device": device,
            "dtype": dtype,
            "threads": threads,
            "runs": runs,
        },
    )
    blocks = BlockSpan(start=0, end=num_blocks(checkpoint.config))

    def load(quantization: str) -> Span:
        progress(f"loading the base, {quantization}")
        return load_span(
            checkpoint,
            blocks,
            dtype=DTYPES[dtype],
            quantization=quantization,  # type: ignore[arg-type]
            device=torch.device(device),
        )

    int8_bytes = loaded_bytes(load("int8"))
    memory = usable_memory(torch.device(device), None)
    started = time.perf_counter()
    span = load(base)
    seconds_to_load = time.perf_counter() - started
    base_bytes = loaded_bytes(span)
    copies = Copies(memory // base_bytes, seconds_to_load)
    report.add("full models that fit into the memory", "tasks", [copies.fitting])
    report.add("loading one, its file in the memory", "s", [seconds_to_load])
    progress("measuring costs")
    started = time.perf_counter()
    costs = profile(span, max_tokens)
    report.add("profile: time", "s", [time.perf_counter() - started])
    rig = Rig(span, costs)

    progress(f"making {max(tasks)} adapters")
    made = [made_adapter(span, KINDS[number % len(KINDS)], number) for number in range(max(tasks))]
    adapters = [span.adapters.add(forms) for forms in made]
    for tokens in (1, 8):  # pools are filled, with what few tokens need and with what many do
        rig.passes([(tokens, adapter) for adapter in adapters])
    pool_bytes = span.adapters.nbytes

    progress("rows of a task each")
    own = list(itertools.islice(itertools.cycle(adapters), rows))
    measure_rows(report, rig, own, adapters[: len(KINDS)], steps, runs)
    progress("the order of operations")
    measure_order(report, rig, own, steps, runs)
    progress("adapters that come in")
    measure_stalls(report, rig, own[: rows // 4], made[: len(KINDS)], runs)
    for num_tasks in tasks:
        progress(f"{num_tasks} tasks: serving")
        measure_serving(report, rig, adapters[:num_tasks], serving, max_tokens, runs)
    for num_tasks, sigma in itertools.product(tasks, sigmas):
        timings: dict[str, list[Timing]] = {}
        choices: list[float] = []
        for number in range(1, runs + 1):
            waiting = made_queries(num_queries, adapters[:num_tasks], sigma, seed=number)
            progress(f"{num_tasks} tasks, sigma {sigma:g}: run {number} of {runs}")
            found, slowest = _systems(rig, waiting, max_tokens, new_tokens)
            choices.append(slowest)
            for system, timing in found.items():
                timings.setdefault(system, []).append(timing)
        name, loading = f"{num_tasks} tasks, sigma {sigma:g}", copies.loading(num_tasks)
        add_workload(report, name, num_queries, timings, choices, loading)
    kinds = {kind: made[number :: len(KINDS)] for number, kind in enumerate(KINDS)}
    add_memory(report, kinds, base_bytes, int8_bytes, pool_bytes)
    if plot is not None:
        draw(report, plot)
    return report


def _systems(rig: Rig, queries: Sequence[Query], max_tokens: int, new_tokens: int) -> tuple[dict[str, Timing], float]:
    """Also the longest choice of a batch, in seconds."""
    from swarm.server.adapters.plans import STRATEGIES

    plans = {name: strategy(queries, rig.costs, max_tokens) for name, strategy in STRATEGIES.items()}
    plans[SEQS] = plans[TASK_BY_TASK] = plans.pop("by adapter")
    plans[ONLINE], slowest = rig.plan_by_choice(queries, max_tokens)
    return rig.run_in_turn(plans, queries, new_tokens=new_tokens, without=[SEQS]), slowest
