"""How far the loading of a model is, for a person: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from swarm.progress import Progress

from .logs import say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

#: Seconds between lines, and before the first: what is done sooner needs none.
LINE_PERIOD = 10.0


@contextmanager
def shown(say: Callable[[str], None], console: Console) -> Iterator[Progress]:
    """Progress as a bar on `console` if that is a terminal, else in lines given to `say` (without a full stop)."""
    if not console.is_terminal:
        yield LoadingLines(say)
        return
    bars = LoadingBars(console)
    try:
        yield bars
    finally:
        bars.stop()


class LoadingLines(Progress):
    """A line every few seconds, and one of what was fetched in the end."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._said = time.monotonic()

    def fetched(self, done: int, total: int) -> None:
        if done == total > 0:
            self._say(f"fetched {_readable(total)} of weights")
        elif self._due():
            self._say(fetching_text(done, total))

    def loaded(self, done: int, total: int) -> None:
        if done < total and self._due():
            self._say(f"loaded {done} of {total} blocks")

    def _due(self) -> bool:
        now = time.monotonic()
        due = now - self._said >= LINE_PERIOD
        if due:
            self._said = now
        return due


class LoadingBars(Progress):
    """A bar that goes away when it is full, or when `stop` is called."""

    def __init__(self, console: Console):
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._make = lambda: Bars(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console, transient=True
        )
        self._bars: Bars | None = None
        self._lock = threading.Lock()

    def fetched(self, done: int, total: int) -> None:
        self._show(fetching_text(done, total), done, total)

    def loaded(self, done: int, total: int) -> None:
        self._show(f"loaded {done} of {total} blocks", done, total)

    def stop(self) -> None:
        with self._lock:
            self._end()

    def _show(self, text: str, done: int, total: int) -> None:
        with self._lock:
            if self._bars is None:
                self._bars = self._make()
                self._bars.add_task(text)
                self._bars.start()
            self._bars.update(self._bars.task_ids[0], description=text, completed=done, total=total or None)
            if done == total > 0:
                self._end()

    def _end(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class LoadingStatus(Progress):
    """In the status line of a command that has one already."""

    def __init__(self, status: Status):
        self._status = status
        self._before = status.status

    def fetched(self, done: int, total: int) -> None:
        self._status.update(self._before if done == total > 0 else fetching_text(done, total))


def of_client(status: Status, console: Console) -> Progress:
    """In the status line if `console` is a terminal, which shows it; else in lines on stderr."""
    if console.is_terminal:
        return LoadingStatus(status)
    return LoadingLines(say)


def fetching_text(done: int, total: int) -> str:
    """total: 0 if another process is fetching the same."""
    if total == 0:
        return "waiting for another process that fetches the same weights"
    return f"fetching weights: {_readable(done)} of {_readable(total)}"


def _readable(count: int) -> str:
    from pydantic import ByteSize

    return ByteSize(count).human_readable(decimal=True)
