"""The tables of `swarm health`. Names come from strangers, so they are printed as text and never as markup."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from swarm.data_structures import ServerState
from swarm.monitor.report import ModelReport, ServerReport

from .tables import table_console

_STATE_STYLES = {ServerState.ONLINE: "green", ServerState.JOINING: "cyan", ServerState.DRAINING: "yellow"}


def print_tables(models: Iterable[ModelReport], console: Console | None = None) -> None:
    """A headline, a bar of blocks and a table of servers for each model, on stdout."""
    console = console or table_console()
    for model in models:
        console.print(_headline(model))
        console.print(Padding(_bar(model.replicas), (0, 0, 0, 2)))
        console.print(_table(model))


def _headline(model: ModelReport) -> Text:
    verdict = Text("complete", "green") if model.complete else Text("incomplete", "bold red")
    return Text.assemble(
        (model.name, "bold"), f"  fingerprint {model.fingerprint[:12]}, {model.num_blocks} blocks, ", verdict
    )


def _bar(replicas: tuple[int, ...]) -> Text:
    """A character for each block: its number of replicas, + for more than 9."""
    bar = Text("replicas of each block: ")
    for count in replicas:
        style = "bold red" if count == 0 else "yellow" if count == 1 else "green"
        bar.append(str(count) if count <= 9 else "+", style)
    return bar


def _table(model: ModelReport) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in ("server", "peer", "blocks", "state"):
        table.add_column(name, overflow="fold")
    for name in ("tokens/s", "prompt tokens/s", "network"):
        table.add_column(name, justify="right")
    table.add_column("numerics", overflow="fold")
    for name in ("rows", "cache tokens left", "round trip"):
        table.add_column(name, justify="right")
    for server in model.servers:
        table.add_row(*_row(server))
    return table


def _row(server: ServerReport) -> list[Text]:
    rate = server.network_rate
    return [
        Text(server.public_name or "-"),
        Text(f"...{server.peer_id[-8:]}"),
        Text("{}:{}".format(*server.span)),
        Text(server.state.value, _STATE_STYLES.get(server.state, "")),
        Text(f"{server.throughput:.1f}"),
        Text("-" if server.forward_rate is None else f"{server.forward_rate:.0f}"),
        Text("-" if rate is None else f"{rate / 1e6:.1f} MB/s"),
        Text(server.numerics),
        Text(f"{server.running_rows} + {server.waiting_rows}"),  # running and waiting
        Text(str(server.cache_tokens_left)),
        Text("-", "red") if server.round_trip is None else Text(f"{server.round_trip * 1000:.1f} ms"),
    ]
