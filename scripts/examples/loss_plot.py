"""The curves of a training as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from swarm.errors import UsageError

#: Of the picture, in inches at 100 dots each.
_SIZE = (8.0, 4.5)


def check_plottable(file: Path) -> None:
    """Raises UsageError now rather than after the training if `file` cannot be drawn or written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the plot needs matplotlib, which is not installed; run: pip install 'petswarm[plot]'")
    if file.suffix.lower() != ".png":
        raise UsageError(f"the plot is a PNG file: name it so, like {file.with_suffix('.png')}")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UsageError(f"cannot write {file}: name a file in a folder that exists")


def plot_losses(file: Path, losses: Mapping[str, Sequence[float]], title: str) -> None:
    """Write a PNG with the loss of every step, one curve for each name. Curves that are the same lie on each other, so
    every later one is drawn thinner."""
    from matplotlib.figure import Figure  # no display is needed, nor the state of pyplot

    figure = Figure(figsize=_SIZE, dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(losses.items()):
        width = 5.0 / (number + 1) ** 1.5
        axes.plot(range(1, len(values) + 1), values, linewidth=width, label=name, alpha=0.6 if number == 0 else 1.0)
    axes.set(title=title, xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, format="png")
