"""The tables of `swarm health`. Names come from strangers, so they are printed as text and never as markup."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from swarm.data_structures import ServerState
from swarm.dht import ServerRecord

from .health_summary import ModelHealth
from .tables import table_console

_STATE_STYLES = {ServerState.ONLINE: "green", ServerState.JOINING: "cyan", ServerState.DRAINING: "yellow"}


def print_tables(summary: Iterable[ModelHealth], console: Console | None = None) -> None:
    """A headline, a bar of blocks and a table of servers for each model, on stdout."""
    console = console or table_console()
    for health in summary:
        console.print(_headline(health))
        console.print(Padding(_bar(health.replicas), (0, 0, 0, 2)))
        console.print(_table(health))


def _headline(health: ModelHealth) -> Text:
    model = health.model
    verdict = Text("complete", "green") if health.complete else Text("incomplete", "bold red")
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


def _table(health: ModelHealth) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in ("server", "peer", "blocks", "state"):
        table.add_column(name, overflow="fold")
    for name in ("tokens/s", "prompt tokens/s", "network"):
        table.add_column(name, justify="right")
    table.add_column("numerics", overflow="fold")
    for name in ("rows", "cache tokens left", "round trip"):
        table.add_column(name, justify="right")
    for server in health.servers:
        table.add_row(*_row(server, health.round_trips.get(server.peer_id)))
    return table


def _row(server: ServerRecord, round_trip: float | None) -> list[Text]:
    info = server.info
    return [
        Text(info.public_name or "-"),
        Text(f"...{server.peer_id[-8:]}"),
        Text(str(info.span)),
        Text(info.state.value, _STATE_STYLES.get(info.state, "")),
        Text(f"{info.throughput:.1f}"),
        Text("-" if info.forward_rate is None else f"{info.forward_rate:.0f}"),
        Text("-" if info.network_rate is None else f"{info.network_rate / 1e6:.1f} MB/s"),
        Text(info.numerics),
        Text(f"{info.running_rows} + {info.waiting_rows}"),  # running and waiting
        Text(str(info.cache_tokens_left)),
        Text("-", "red") if round_trip is None else Text(f"{round_trip * 1000:.1f} ms"),
    ]
