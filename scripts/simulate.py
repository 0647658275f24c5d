"""`swarm simulate`: thousands of servers in virtual time, through the very same placement, rebalancing and chain code.

Servers of unequal speed and memory join, settle, lose all holders of a block at once, and then come and go. Figures:
throughput (that of the weakest block, as in PETALS) beside an upper bound of every possible assignment, how long blocks
had no server, how often servers moved, and what clients in several regions found. The same seed gives the same figures.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.data_structures import MAX_BLOCKS

from .bench_report import MILLISECONDS, JsonFile, Report, check_writable
from .examples.loss_plot import check_plottable
from .sim_traces import DAY, HOUR, Trace

if TYPE_CHECKING:
    from .sim_phases import Outcome, Phase

#: What --quick makes of the defaults: seconds instead of minutes, and figures that say little.
_QUICK = {"servers": 50, "blocks": 32, "hours": 2.0}


def simulate(
    servers: Annotated[int | None, typer.Option(min=2, help="That the swarm has at first. [default: 1000]")] = None,
    blocks: Annotated[
        int | None, typer.Option(min=2, max=MAX_BLOCKS, help="Of the model that they serve. [default: 80]")
    ] = None,
    hours: Annotated[float | None, typer.Option(min=0.25, help="Of each trace of churn. [default: 24]")] = None,
    trace: Annotated[
        list[Trace] | None,
        typer.Option(help="How servers come and go; give it again for one after the other. [default: poisson]"),
    ] = None,
    churn: Annotated[float, typer.Option(min=0.0, max=10.0, help="Share of the servers that leaves in an hour.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Another one draws another swarm.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A small swarm and two hours, unless you say more.")] = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw throughput, bound and moves into this PNG.")] = None,
) -> None:
    """Thousands of servers in virtual time, by the real decisions."""
    from rich.console import Console

    from .sim_phases import Simulation
    from .sim_plot import plot_phases

    check_writable(json_file)
    if plot is not None:
        check_plottable(plot)
    defaults = _QUICK if quick else {"servers": 1000, "blocks": 80, "hours": DAY / HOUR}
    settings: dict[str, Any] = {
        "servers": defaults["servers"] if servers is None else servers,
        "blocks": defaults["blocks"] if blocks is None else blocks,
        "hours": defaults["hours"] if hours is None else hours,
        "traces": [one.value for one in trace or [Trace.POISSON]],
        "churn": churn,
        "seed": seed,
    }
    started = time.process_time()
    with Console(stderr=True).status("simulating") as status:
        simulation = Simulation(
            num_servers=settings["servers"],
            num_blocks=settings["blocks"],
            seed=seed,
            progress=lambda text: status.update(text),
        )
        outcome = simulation.run([Trace(one) for one in settings["traces"]], churn, settings["hours"] * HOUR)
    report = make_report(settings, outcome, time.process_time() - started)
    if plot is not None:
        title = f"{settings['servers']} servers, {settings['blocks']} blocks, churn {churn:.0%} an hour, seed {seed}"
        plot_phases(plot, list(outcome.phases.values()), title)
    report.publish(json_file)


def make_report(settings: dict[str, Any], outcome: Outcome, seconds: float) -> Report:
    """seconds: of one core that it took to compute."""
    report = Report("simulate", settings, title="swarm simulate")
    phases = outcome.phases
    report.add("joining: moves", "1/h", [phases["joining"].moves_per_hour])
    report.add("settling: last move after the last join", "s", [outcome.last_move])
    _add_phase(report, phases["steady"])
    report.add("loss: servers that died at once", "servers", [outcome.servers_lost])
    if outcome.uncovered is not None:
        report.add("loss: until all blocks had a server", "s", [outcome.uncovered])
    if outcome.healed is not None:
        report.add("loss: until 0.9 of the share of the bound before", "s", [outcome.healed])
    for name in settings["traces"]:
        _add_phase(report, phases[name])
    if outcome.gaps:
        report.add("churn: a block had no server for", "s", outcome.gaps)
    report.add("computing, on one core", "s", [seconds])
    for name in ("steady", "loss", *settings["traces"]):
        report.ratios[f"{name}: throughput / bound"] = phases[name].share
        report.ratios[f"{name}: time with all blocks covered"] = phases[name].covered
    report.records = [{"phase": phase.name, **asdict(sample)} for phase in phases.values() for sample in phase.samples]
    return report


def _add_phase(report: Report, phase: Phase) -> None:
    from .sim_clients import median_time

    samples = phase.samples
    report.add(f"{phase.name}: throughput", "tokens/s", [sample.throughput for sample in samples])
    report.add(f"{phase.name}: upper bound", "tokens/s", [sample.bound for sample in samples])
    report.add(f"{phase.name}: throughput / bound", "ratio", [sample.share for sample in samples])
    report.add(f"{phase.name}: servers", "servers", [sample.servers for sample in samples])
    report.add(f"{phase.name}: servers that left", "1/h", [phase.left / phase.hours])
    report.add(f"{phase.name}: moves", "1/h", [phase.moves_per_hour])
    report.add(f"{phase.name}: moves given up", "1/h", [phase.stayed / phase.hours])
    times = [median for found in phase.found if (median := median_time(found)) is not None]
    if times:
        report.add(f"{phase.name}: clients' step", "ms", [MILLISECONDS * seconds for seconds in times])
    if phase.found:
        works = [sum(route.works for route in found) / len(found) for found in phase.found]
        report.add(f"{phase.name}: clients' chains that work", "ratio", works)
