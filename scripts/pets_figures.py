"""The figures of `swarm bench pets`: what is measured on a rig, and how it is put into the report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.errors import UsageError

from .bench_report import MEGABYTE, MILLISECONDS, Report

if TYPE_CHECKING:
    from swarm.server.adapters.applied import Adapter
    from swarm.server.adapters.forms import AdapterForms
    from swarm.server.adapters.operators import Order

    from .pets_rig import Rig, Timing

SEQS = "SeqS"
TASK_BY_TASK = "shared base, task by task"
JOINT = "joint"
ONLINE = "online"
#: Rows of the comparison of decode steps, with a task each, and what is cached for each of them.
DECODE_TASKS = 32
CONTEXT = 32
GIGABYTE = 1e9


@dataclass(frozen=True)
class Copies:
    """Full models of tasks: so many fit into the memory here, and each of the others is loaded in its turn."""

    fitting: int
    seconds_to_load: float

    def loading(self, num_tasks: int) -> float:
        """Seconds for those that do not fit."""
        return self.seconds_to_load * max(0, num_tasks - self.fitting)


def add_workload(
    report: Report,
    workload: str,
    num_queries: int,
    timings: Mapping[str, Sequence[Timing]],
    choices: Sequence[float],
    loading: float,
) -> None:
    """Figures of every system on one workload, and how ours compare with the others.

    choices: the longest, seconds. loading: seconds in which SeqS loads models that do not fit into the memory.
    """
    for system, runs in timings.items():
        name = f"{workload}, {system}"
        report.add(f"{name}: throughput", "queries/s", [num_queries / timing.total for timing in runs])
        report.add(f"{name}: p50 latency", "s", [timing.quantile(0.5) for timing in runs])
        report.add(f"{name}: p99 latency", "s", [timing.quantile(0.99) for timing in runs])
        errors = [statistics.median(timing.errors) for timing in runs]
        report.add(f"{name}: median error of predictions", "%", [100 * error for error in errors])
    speed = {system: report.medians[f"{workload}, {system}: throughput"] for system in timings}
    best = max(speed[system] for system in timings if system not in (SEQS, JOINT, ONLINE))
    for ours in (JOINT, ONLINE):
        report.ratios[f"{workload}: {ours} / {SEQS}"] = speed[ours] / speed[SEQS]
        report.ratios[f"{workload}: {ours} / best other on the shared base"] = speed[ours] / best
    if loading:
        with_loading = [num_queries / (timing.total + loading) for timing in timings[SEQS]]
        report.add(f"{workload}, {SEQS} that loads what does not fit: throughput", "queries/s", with_loading)
        ratio = speed[ONLINE] / statistics.median(with_loading)
        report.ratios[f"{workload}: {ONLINE} / {SEQS} that loads what does not fit"] = ratio
    report.add(
        f"{workload}, {ONLINE}: longest choice of a batch", "ms", [MILLISECONDS * longest for longest in choices]
    )


def measure_serving(
    report: Report, rig: Rig, adapters: Sequence[Adapter], cells: Sequence[tuple[int, int]], max_tokens: int, runs: int
) -> None:
    """PetS' comparison with SeqS: so many queries of each task at once, all of one length."""
    from swarm.server.adapters.plans import by_adapter, joint
    from swarm.server.adapters.scheduling import Query

    for each, tokens in cells:
        queries = [Query(tokens, adapter) for adapter in adapters for _ in range(each)]
        name = f"{len(adapters)} tasks, {each} x {tokens} tokens"
        plans = {SEQS: by_adapter(queries, rig.costs, max_tokens), JOINT: joint(queries, rig.costs, max_tokens)}
        times: dict[str, list[float]] = {SEQS: [], JOINT: []}
        for _ in range(runs):
            for system, timing in rig.run_in_turn(plans, queries, without=[SEQS]).items():
                times[system].append(timing.total)
        for system, found in times.items():
            report.add(f"{name}, {system}: throughput", "queries/s", [len(queries) / seconds for seconds in found])
        report.ratios[f"{name}: {JOINT} / {SEQS}"] = statistics.median(times[SEQS]) / statistics.median(times[JOINT])


def measure_rows(
    report: Report, rig: Rig, own: Sequence[Adapter], kinds: Sequence[Adapter], steps: int, runs: int
) -> None:
    """Rows with a task each, beside the same rows task by task and on a single task (the mean over the kinds).

    own: the task of each row. kinds: a task of each kind.
    """
    work: dict[str, Callable[[Sequence[Adapter | None]], float]] = {
        "decode": lambda rows: rig.decode_step(rows, CONTEXT, steps),
        "prefill": lambda rows: min(rig.passes([(CONTEXT, adapter) for adapter in rows])[0] for _ in range(2)),
    }
    for what, seconds_of in work.items():
        times: dict[str, list[float]] = {
            "all in one batch": [],
            "task by task": [],
            "single task": [],
            "no adapters": [],
        }
        for _ in range(runs):
            times["all in one batch"].append(seconds_of(own))
            times["task by task"].append(sum(seconds_of([adapter]) for adapter in own))
            alone = [seconds_of([adapter] * len(own)) for adapter in kinds]
            times["single task"].append(statistics.fmean(alone))
            times["no adapters"].append(seconds_of([None] * len(own)))
        name = f"{what}, {len(own)} rows"
        for system, found in times.items():
            report.add(f"{name}, {system}", "ms", [MILLISECONDS * seconds for seconds in found])
        together = statistics.median(times.pop("all in one batch"))
        for system, found in times.items():
            report.ratios[f"{name}: all in one batch / {system}"] = statistics.median(found) / together


def measure_order(report: Report, rig: Rig, own: Sequence[Adapter], steps: int, runs: int) -> None:
    """What the order of the adapters' operations at a module changes, and on a GPU what streams of their own do."""
    adapters = rig.span.adapters
    ways: dict[str, tuple[Order, bool]] = {"by form": ("form", False), "by intensity": ("intensity", False)}
    if rig.span.device.type == "cuda":
        ways["by intensity, on streams"] = ("intensity", True)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, (adapters.order, adapters.streams) in ways.items():
            times[way].append(rig.decode_step(own, CONTEXT, steps))
    adapters.order, adapters.streams = "form", False
    for way, found in times.items():
        report.add(f"decode, {len(own)} rows, {way}", "ms", [MILLISECONDS * seconds for seconds in found])
        if way != "by form":
            ratio = statistics.median(times["by form"]) / statistics.median(found)
            report.ratios[f"decode: {way} / by form"] = ratio


def measure_stalls(
    report: Report, rig: Rig, own: Sequence[Adapter], newcomers: Sequence[AdapterForms], runs: int
) -> None:
    """Rows that decode while adapters of every kind come in, each used at once."""
    found = [rig.stalls(newcomers, own, CONTEXT) for _ in range(runs)]
    report.add(f"decode, {len(own)} rows: a step", "ms", [MILLISECONDS * usual for usual, _ in found])
    report.add(
        f"decode, {len(own)} rows: longest, with an adapter loaded before it",
        "ms",
        [MILLISECONDS * gap for _, gap in found],
    )
    report.ratios["stall by an adapter that is loaded / a step"] = statistics.median(
        (gap - usual) / usual for usual, gap in found
    )


def add_memory(
    report: Report, made: Mapping[str, Sequence[AdapterForms]], base_bytes: int, int8_bytes: int, pool_bytes: int
) -> None:
    """made: by kind. pool_bytes: of all adapters at once in use; only those in a batch lately have any."""
    kinds = {kind: statistics.fmean(forms.nbytes for forms in several) for kind, several in made.items() if several}
    for kind, size in kinds.items():
        report.add(f"{kind}: bytes of a task", "MB", [size / MEGABYTE])
    task, num_tasks = statistics.fmean(kinds.values()), sum(len(several) for several in made.values())
    in_use = task + pool_bytes / num_tasks
    report.add("a task, mean of the kinds", "MB", [task / MEGABYTE])
    report.add("a task in use, with its part of the pools", "MB", [in_use / MEGABYTE])
    report.add("the base", "MB", [base_bytes / MEGABYTE])
    report.add("a full int8 copy", "MB", [int8_bytes / MEGABYTE])
    report.add("tasks per GB beside the base", "tasks", [GIGABYTE / task])
    report.add("tasks in use per GB beside the base", "tasks", [GIGABYTE / in_use])
    report.ratios["tasks in the memory of full int8 copies"] = int8_bytes / task
    report.ratios["tasks in use in the memory of full int8 copies"] = int8_bytes / in_use
    copies = DECODE_TASKS  # the base beside them takes as much as one or a few
    whole = (copies * int8_bytes - base_bytes) / task
    report.ratios[f"tasks in the memory of {copies} full int8 copies, the base included / {copies}"] = whole / copies


def draw(report: Report, file: Path) -> None:
    """The throughputs of all systems, a group for each workload. Raises UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("a plot needs matplotlib; run: pip install 'petswarm[plot]'") from error
    speeds: dict[str, dict[str, float]] = {}
    for result in report.results:
        name, _, what = result.name.rpartition(": ")
        if what == "throughput" and "sigma" in name:
            tasks, sigma, system = name.split(", ", 2)
            speeds.setdefault(system, {})[f"{tasks}\n{sigma}"] = result.median
    workloads = list(next(iter(speeds.values())))
    figure = Figure(figsize=(max(6.0, 1.2 * len(workloads)), 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(speeds)
    for number, (system, found) in enumerate(speeds.items()):
        places = [place + number * width for place in range(len(workloads))]
        axes.bar(places, [found.get(workload, 0.0) for workload in workloads], width, label=system)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(workloads))], workloads, fontsize=8)
    axes.set_ylabel("queries/s")
    figure.legend(loc="outside upper center", fontsize=8, ncols=4)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot draw into {file}: {error}") from error
