"""`swarm health --watch`: the tables of a swarm, drawn anew whenever it changes, or a line of JSON each time."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING

from .health_node import end_with_daemon, joined
from .tables import table_console

if TYPE_CHECKING:
    from swarm.monitor.report import SwarmReport
    from swarm.monitor.watcher import WatchSettings
    from swarm.node import NodeConfig

#: Takes a report and shows it.
Show = Callable[["SwarmReport"], Awaitable[None]]

#: Seconds after which somebody who waits looks again whether anything changed; it only bounds the wait.
_WAIT = 60.0


async def watch(
    config: NodeConfig,
    settings: WatchSettings,
    wanted: Sequence[str],
    opened: Callable[[], AbstractContextManager[Show]],
) -> None:
    """Show the swarm until cancelled, or until nobody reads it any more. Raises NetworkError.

    opened: where reports are shown; opened once the swarm is joined.
    """
    from swarm.monitor.summary import summarize
    from swarm.monitor.watcher import Watcher

    async with joined(config) as node:
        watcher = Watcher(node, settings)

        async def show_changes() -> None:
            revision = 0
            with suppress(BrokenPipeError), opened() as show:
                while True:
                    if await watcher.changed(revision, _WAIT) > revision:
                        revision = watcher.picture.revision
                        await show(summarize(watcher.picture, wanted))

        await end_with_daemon(node, show_changes(), watcher.run())


@contextmanager
def on_terminal() -> Iterator[Show]:
    """On a screen of its own, which is gone at the end; what does not fit is cut off."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from .health_table import tables

    with Live(console=table_console(), screen=True, auto_refresh=False, vertical_overflow="ellipsis") as live:
        live.update(Text("looking at the swarm ..."), refresh=True)

        async def show(report: SwarmReport) -> None:
            notes = [Text(problem, "bold red") for problem in report.problems]
            if report.trouble is not None:
                notes.insert(0, Text(report.trouble, "yellow"))
            live.update(Group(*notes, tables(report)), refresh=True)

        yield show


@contextmanager
def as_lines() -> Iterator[Show]:
    """As JSON on stdout, a line each. Somebody who reads slowly gets fewer of them, and holds up nothing else."""

    async def show(report: SwarmReport) -> None:
        await asyncio.to_thread(print, report.model_dump_json(), flush=True)

    try:
        yield show
    except BrokenPipeError:
        # Python flushes stdout once more at its end, which shall not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
