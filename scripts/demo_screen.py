"""How the demo looks: one live line per server while the swarm starts, then the answers and the verdict."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from .demo_report import AnswerReport, DemoReport, Link


@dataclass
class _Line:
    """One line of the live table; times are of time.monotonic()."""

    name: str
    role: str
    doing: str = "waits"
    started: float | None = None
    ended: float | None = None

    @property
    def seconds(self) -> str:
        return "" if self.started is None else f"{(self.ended or time.monotonic()) - self.started:.1f} s"


class ProgressTable:
    """Lines of what happens side by side; told from any thread, drawn by rich."""

    def __init__(self, lines: Sequence[tuple[str, str]]):
        """lines: (name, role) of each."""
        self._lines = [_Line(name, role) for name, role in lines]
        self._lock = threading.Lock()

    def update(self, index: int, doing: str, *, done: bool = False) -> None:
        with self._lock:
            line, now = self._lines[index], time.monotonic()
            line.doing = doing
            line.started = line.started or now
            line.ended = now if done else None

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
        table.add_column("")
        table.add_column("")
        table.add_column("doing", min_width=36, no_wrap=True)
        table.add_column("", justify="right")
        with self._lock:
            for line in self._lines:
                style = "green" if line.ended is not None else "dim" if line.started is None else "yellow"
                table.add_row(line.name, line.role, f"[{style}]{escape(line.doing)}[/]", line.seconds)
        return table


class Screen:
    """Everything the demo prints, on standard output."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)

    def say(self, text: str) -> None:
        """One line, with rich's markup."""
        self.console.print(text, soft_wrap=True)

    def write(self, text: str) -> None:
        """A piece of an answer, as it is."""
        self.console.print(text, end="", markup=False, soft_wrap=True, style="cyan")

    def interrupt(self, text: str) -> None:
        """Something that happens in the middle of an answer."""
        self.console.print(f"[bold red] <{escape(text)}> [/]", end="", soft_wrap=True)

    @contextmanager
    def progress(self, table: ProgressTable) -> Iterator[None]:
        try:
            with Live(table, console=self.console, refresh_per_second=5):
                yield
        finally:
            if not self.console.is_terminal:  # rich ends the table's last line only for terminals
                self.console.line()

    def question(self, text: str) -> None:
        self.console.print(f"\n[bold]> {escape(text)}[/]")

    def route(self, answer: AnswerReport) -> None:
        self.say(
            f"[dim]chain {_describe(answer.chain)}\n"
            f"{len(answer.tokens)} tokens, {answer.tokens_per_second:.1f} tokens/s, "
            f"the first after {answer.first_token_seconds:.2f} s[/]"
        )

    def failover(self, report: DemoReport) -> None:
        """What the kill led to."""
        for replacement in report.replacements:
            self.say(
                f"[dim]lost {_describe([replacement.lost])}; {_describe(replacement.found)} took over: "
                f"{replacement.replayed_tokens} tokens replayed in {replacement.seconds:.2f} s[/]"
            )
        self.say(f"[dim]the text stood still for {report.answers[-1].longest_pause:.2f} s[/]\n")

    def verdict(self, report: DemoReport) -> None:
        for number, answer in enumerate(report.answers, 1):
            if answer.equal:
                self.say(f"answer {number}: all {len(answer.tokens)} tokens equal plain transformers")
        failures = report.failures()
        for failure in failures:
            self.say(f"[red]{escape(failure)}[/]")
        total = f"{report.seconds['total']:.0f} s in all"
        self.say(f"[bold red]FAILED[/] ({total})" if failures else f"[bold green]PASSED[/] ({total})")


def _describe(links: Sequence[Link]) -> str:
    return " -> ".join(f"{link.blocks} on ...{link.peer_id[-6:]}" for link in links)
