"""`swarm servers`: the servers that this user runs on this machine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from .owner_messages import ServerStatus


def servers(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the servers that you run on this machine: for `swarm pause` and `swarm resume`."""
    from .owner_calls import own_servers

    found = [status for _, status in asyncio.run(own_servers())]
    if as_json:
        print(json.dumps({"servers": [status.model_dump() for status in found]}))
    else:
        print_table(found)


def print_table(found: Sequence[ServerStatus], console: Console | None = None) -> None:
    """On stdout."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from .tables import table_console

    console = console or table_console()
    if not found:
        console.print("this user runs no servers on this machine")
        return
    table = Table(box=SIMPLE_HEAD)
    table.add_column("process", justify="right")
    columns = ["name", "peer", "model", "blocks", "state"]
    if any(status.metrics_url for status in found):
        columns.append("metrics")
    for name in columns:
        table.add_column(name, overflow="fold")
    for status in found:
        fields = (status.public_name, status.peer_id, status.model, status.span, status.state, status.metrics_url)
        table.add_row(Text(str(status.pid)), *(Text(field or "-") for field in fields[: len(columns)]))
    console.print(table)
