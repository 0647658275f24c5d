"""A simulated swarm as a picture: throughput beside the best possible one, and the moves that it took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .sim_phases import SAMPLE_TIME, Phase
from .sim_traces import HOUR

#: Of the picture, in inches at 100 dots each.
_SIZE = (10.0, 6.0)


def plot_phases(file: Path, phases: Sequence[Phase], title: str) -> None:
    """Write a PNG. Times without a server for some block are red."""
    from matplotlib.figure import Figure  # no display is needed, nor the state of pyplot

    samples = [sample for phase in phases for sample in phase.samples]
    hours = [sample.time / HOUR for sample in samples]
    figure = Figure(figsize=_SIZE, dpi=100, layout="constrained")
    figure.suptitle(title)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    upper.plot(hours, [sample.bound for sample in samples], color="0.6", label="upper bound of any assignment")
    upper.plot(hours, [sample.throughput for sample in samples], color="C0", label="throughput of the weakest block")
    for sample in samples:
        if sample.covered < 1:
            upper.axvspan((sample.time - SAMPLE_TIME) / HOUR, sample.time / HOUR, color="red", alpha=0.15, linewidth=0)
    upper.set(ylabel="tokens/s", ylim=(0, None))
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    lower.bar(hours, [sample.moves for sample in samples], width=-SAMPLE_TIME / HOUR, align="edge", color="C1")
    lower.set(xlabel="hours", ylabel=f"moves in {SAMPLE_TIME / 60:.0f} min")
    servers = lower.twinx()
    servers.plot(hours, [sample.servers for sample in samples], color="C2")
    servers.set(ylabel="servers", ylim=(0, None))
    servers.yaxis.label.set_color("C2")
    for phase in phases:
        for axes in (upper, lower):
            axes.axvline(phase.start / HOUR, color="0.8", linewidth=0.8)
        upper.annotate(
            phase.name, (phase.start / HOUR, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7
        )
    figure.savefig(file, format="png")
