"""The result of a benchmark: a table on the screen, and the JSON that all benchmarks share."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

import swarm
from swarm.errors import UsageError
from swarm.processor import processor_name

#: Libraries whose version may change a figure.
LIBRARIES = ("torch", "transformers", "hivemind")

MILLISECONDS = 1000.0  # in a second
MEGABYTE = 1e6  # bytes


class DType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Model = Annotated[str | None, typer.Option(help="A local folder or hub id instead of the demo's SmolLM2.")]
Runs = Annotated[int, typer.Option(min=1, help="Measured runs of everything; the median counts.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Length of the random prompt.")]
NewTokens = Annotated[int, typer.Option(min=2, help="Generated after it, greedily.")]
Precision = Annotated[DType, typer.Option(help="Of weights and activations everywhere.")]
ServerThreads = Annotated[int, typer.Option(min=1, help="CPU threads of each server.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]


@dataclass(frozen=True)
class Result:
    """One quantity, once per run."""

    name: str
    unit: str
    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "unit": self.unit, "runs": list(self.runs), "median": self.median}


@dataclass
class Report:
    """What one benchmark found. Ratios are of medians.

    records: of single events, where results would not tell which figures belong together; left out of the JSON if none.
    title: of the table on the screen, unless it is that of `swarm bench`.
    """

    benchmark: str
    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())
    title: str | None = None

    def add(self, name: str, unit: str, runs: Sequence[float]) -> Result:
        result = Result(name, unit, tuple(runs))
        self.results.append(result)
        return result

    def add_rounds(self, rounds: Sequence[Mapping[tuple[str, str], float]]) -> None:
        """Add what every round measured: figures by name and unit."""
        for name, unit in rounds[0]:
            self.add(name, unit, [figures[name, unit] for figures in rounds])

    @property
    def medians(self) -> dict[str, float]:
        """Of all results so far, by name."""
        return {result.name: result.median for result in self.results}

    def as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "machine": self.machine,
            "versions": versions(),
            "settings": self.settings,
            "results": [result.as_dict() for result in self.results],
            "ratios": self.ratios,
            **({"records": self.records} if self.records else {}),
        }

    def publish(self, file: Path | None) -> None:
        """Write the JSON to `file`, and show the table on stdout. Raises UsageError if the file cannot be written."""
        try:
            if file is not None:
                file.write_text(json.dumps(self.as_dict(), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {file}: {error.strerror}") from error
        finally:
            self.show()

    def show(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.title or f"swarm bench {self.benchmark}", title_justify="left")
        table.add_column("")
        for name in ("median", "lowest", "highest"):
            table.add_column(name, justify="right")
        table.add_column("unit")
        for result in self.results:
            figures = (result.median, min(result.runs), max(result.runs))
            table.add_row(result.name, *(_rounded(figure) for figure in figures), result.unit)
        table.add_section()
        for name, ratio in self.ratios.items():
            table.add_row(name, _rounded(ratio), "", "", "ratio")
        console = Console()
        console.print(table)
        console.print(
            ", ".join(f"{name} {value}" for name, value in self.settings.items()), highlight=False, markup=False
        )


def _rounded(figure: float) -> str:
    return f"{figure:.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"


def run_benchmark(measure: Callable[..., Report], model: str | None, json_file: Path | None, **settings: Any) -> None:
    """Call `measure(model, progress=..., **settings)` and publish its report. model: None is the demo's.

    What it is doing stands on the screen meanwhile.
    """
    from rich.console import Console

    from .models import demo_model_folder

    check_writable(json_file)
    with Console(stderr=True).status("preparing the model") as status:
        report = measure(
            str(demo_model_folder()) if model is None else model,
            progress=lambda text: status.update(text),
            **settings,
        )
    report.publish(json_file)


def check_writable(file: Path | None) -> None:
    """Raises UsageError now rather than after the measurement if there is no folder to write `file` into."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UsageError(f"cannot write {file}: name a file in a folder that exists")


def describe_machine() -> dict[str, Any]:
    """load: processes that wanted a core in the last minute before we began; other work spoils figures."""
    return {
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "load": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    return {
        "petswarm": swarm.__version__,
        "python": platform.python_version(),
        **{library: importlib.metadata.version(library) for library in LIBRARIES},
    }
