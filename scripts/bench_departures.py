"""`swarm bench departures`: is it true what the monitor says about a server's leaving? Each is killed in turn.

Swarms drawn at random (see drawn_swarm.py): unequal servers with overlapping spans behind unequal links, some blocks
held by one of them alone, while users' sessions go on and move when their server is gone. Before a kill stands what
the monitor predicts: the blocks that nobody else holds, and the time of a token through the best chain of the others.
Test requests correct both, as they do in the monitor (`swarm.monitor.calibration`).
Then the server gets SIGKILL, as a power cut would have it; once the monitor sees that it is gone, its picture tells
the blocks, and steps of a new session on the chain that is best by then tell the time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .bench_report import MILLISECONDS, JsonFile, Model, Report, Runs, run_benchmark

if TYPE_CHECKING:
    from .departures_scene import Departed

#: Of the predicted time: how much the measured one may differ.
TOLERANCE = 0.25


def departures(
    model: Model = None,
    swarms: Annotated[int, typer.Option(min=1, help="How many are drawn and measured, one after another.")] = 2,
    servers: Annotated[int, typer.Option(min=4, help="Of each swarm; each of them is killed once.")] = 6,
    users: Annotated[int, typer.Option(min=0, help="Sessions that go on all the time.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 16,
    runs: Runs = 3,
    seed: Annotated[int, typer.Option(help="Of the first swarm; the others count on.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """What the monitor predicts for every server's leaving, beside what happens when it is killed."""
    run_benchmark(
        measure,
        model,
        json_file,
        num_swarms=swarms,
        num_servers=servers,
        num_users=users,
        steps=steps,
        runs=runs,
        seed=seed,
    )


def measure(
    model: str,
    *,
    num_swarms: int,
    num_servers: int,
    num_users: int,
    steps: int,
    runs: int,
    seed: int,
    progress: Callable[[str], None],
) -> Report:
    """Run the benchmark. Raises SwarmError if the monitor does not see a server come or go."""
    from swarm.checkpoint import open_checkpoint

    from .bench_generation import threads
    from .departures_scene import measure_swarm

    settings = {
        "model": open_checkpoint(model).name,
        "servers": num_servers,
        "users": num_users,
        "steps": steps,
        "runs": runs,
        "seeds": list(range(seed, seed + num_swarms)),
    }
    report = Report("departures", settings)
    found: list[Departed] = []
    for number in range(seed, seed + num_swarms):

        def show(text: str, number: int = number) -> None:
            progress(f"swarm {number}: {text}")

        with threads(1):
            found += measure_swarm(model, number, num_servers, num_users, steps, runs, show)
    add_results(report, found)
    return report


def add_results(report: Report, found: Sequence[Departed]) -> None:
    """Also which part of the predictions holds."""
    deviations, uncorrected = [], []
    for one in found:
        name = f"swarm {one.swarm}, server {one.server} ({one.blocks})"
        report.add(f"{name}: blocks lost", "blocks", [len(one.lost)])
        for title, predicted, measured in (
            ("before", one.present, one.measured_before),
            ("after", one.predicted, one.measured),
        ):
            if predicted is None or not measured:
                continue
            report.add(f"{name}: predicted, {title}", "ms", [MILLISECONDS * one.correction * predicted])
            report.add(f"{name}: measured, {title}", "ms", [MILLISECONDS * step for step in measured])
            ratio = statistics.median(measured) / predicted
            report.ratios[f"{name}: measured / predicted, {title}"] = ratio / one.correction
            if title == "after":
                deviations.append(abs(ratio / one.correction - 1))
                uncorrected.append(abs(ratio - 1))
    report.ratios["blocks as predicted"] = sum(one.as_predicted for one in found) / len(found)
    for title, found_deviations in (("prediction", deviations), ("prediction before its correction", uncorrected)):
        if found_deviations:
            within = sum(deviation <= TOLERANCE for deviation in found_deviations) / len(found_deviations)
            report.ratios[f"time after within {TOLERANCE:.0%} of the {title}"] = within
            report.ratios[f"time after: largest deviation from the {title}"] = max(found_deviations)
    report.records = [asdict(one) for one in found]
