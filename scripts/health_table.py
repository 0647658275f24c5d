"""The tables of `swarm health`. Names come from strangers, so they are printed as text and never as markup."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from swarm.data_structures import ServerState
from swarm.monitor.report import ModelReport, ServerReport, SwarmReport
from swarm.routing.snapshot import format_blocks

from .tables import table_console

_STATE_STYLES = {ServerState.ONLINE: "green", ServerState.JOINING: "cyan", ServerState.DRAINING: "yellow"}
_NOTHING = Text("-")
#: Heading, whether figures stand there, and the least width if it may take several lines on a narrow terminal.
_COLUMNS: tuple[tuple[str, bool, int | None], ...] = (
    ("server", False, 8),
    ("peer", False, None),
    ("blocks", False, None),
    ("state", False, None),
    ("way", False, None),
    ("tokens\n/s", True, None),
    ("prompt\ntokens/s", True, None),
    ("network\nMB/s", True, None),
    ("numerics", False, 8),
    ("rows", True, None),
    ("cache\nused", True, None),
    ("adap-\nters", True, None),
    ("up", True, None),
    ("heard\nago", True, None),
    ("ping\nms", True, None),
    ("if it\nleaves", False, 8),
)


def print_tables(report: SwarmReport, console: Console | None = None) -> None:
    """On stdout."""
    (console or table_console()).print(tables(report))


def tables(report: SwarmReport) -> RenderableType:
    """A headline, a bar of blocks and a table of servers for each model."""
    parts: list[RenderableType] = []
    for model in report.models:
        parts += [_headline(model), Padding(_bar(model), (0, 0, 0, 2)), _table(model, report.made_at)]
    return Group(*parts)


def _headline(model: ModelReport) -> Text:
    verdict = Text("complete", "green") if model.complete else Text("incomplete", "bold red")
    line = Text.assemble(
        (model.name, "bold"), f"  fingerprint {model.fingerprint[:12]}, {model.num_blocks} blocks, ", verdict
    )
    if (best := model.best_chain) is not None:
        servers = "a server" if len(best.hops) == 1 else f"{len(best.hops)} servers"
        line.append(f", {best.tokens_per_second:.1f} tokens/s expected from here over {servers}")
    elif model.complete:
        line.append(", no chain of servers with room in their caches", "yellow")
    return line


def _bar(model: ModelReport) -> Text:
    """A character for each block: its number of replicas, + for more than 9."""
    bar = Text("replicas of each block: ")
    for count in model.replicas:
        style = "bold red" if count == 0 else "yellow" if count == 1 else "green"
        bar.append(str(count) if count <= 9 else "+", style)
    if model.missing_blocks:
        bar.append(f"  missing {format_blocks(model.missing_blocks)}", "bold red")
    return bar


def _table(model: ModelReport, now: float) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0)
    for name, is_figure, least in _COLUMNS:
        justify: JustifyMethod = "right" if is_figure else "left"
        table.add_column(name, justify=justify, no_wrap=least is None, min_width=least, overflow="fold")
    for server in model.servers:
        table.add_row(*_row(server, model, now))
    return table


def _row(server: ServerReport, model: ModelReport, now: float) -> list[Text]:
    return [
        Text(server.public_name or "-"),
        Text(f"...{server.peer_id[-8:]}"),
        Text("{}:{}".format(*server.span)),
        Text(server.state.value, _STATE_STYLES.get(server.state, "")),
        Text("relay", "yellow") if server.relayed else Text("direct"),
        Text(f"{server.throughput:.1f}"),
        _NOTHING if server.forward_rate is None else Text(f"{server.forward_rate:.0f}"),
        _NOTHING if server.network_rate is None else Text(f"{server.network_rate / 1e6:.1f}"),
        _numerics(server),
        Text(f"{server.running_rows}+{server.waiting_rows}"),  # running and waiting
        _cache(server),
        Text(str(len(server.adapters))) if server.adapters else _NOTHING,
        _since(server.started_at, now),
        _since(server.announced_at, now),
        _ping(server),
        _departure(server, model),
    ]


def _numerics(server: ServerReport) -> Text:
    if server.dtype is None or server.device is None:
        return Text(server.numerics)
    kind = server.dtype if server.quantization in (None, "none") else f"{server.dtype} {server.quantization}"
    return Text(f"{kind} {server.device}")


def _cache(server: ServerReport) -> Text:
    """Which part is taken, of how many tokens."""
    total, left = server.cache_tokens, server.cache_tokens_left
    if not total:
        return Text(f"{_short(left)} left")
    used = min(max(1 - left / total, 0.0), 1.0)
    return Text(f"{used:.0%}/{_short(total)}", "bold red" if not left else "yellow" if used > 0.9 else "")


def _short(count: int) -> str:
    for size, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= 10 * size:
            return f"{count / size:.0f}{letter}"
    return str(count)


def _since(moment: float | None, now: float) -> Text:
    """Clocks differ a little, so what a server says may lie in the future."""
    if moment is None:
        return _NOTHING
    seconds = max(now - moment, 0.0)
    for size, letter in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return Text(f"{seconds / size:.0f}{letter}")
    return Text(f"{seconds:.0f}s")


def _ping(server: ServerReport) -> Text:
    if server.round_trip is not None:
        return Text(f"{server.round_trip * 1000:.1f}")
    return Text("silent", "red") if server.answers is False else Text("?")


def _departure(server: ServerReport, model: ModelReport) -> Text:
    """What happens to the model: blocks that are lost, or how much slower a token gets."""
    leaving, best = server.departure, model.best_chain
    if leaving is None:
        return _NOTHING
    if leaving.lost_blocks:
        return Text(f"loses {format_blocks(leaving.lost_blocks)}", "bold red")
    if best is None:
        return _NOTHING
    if leaving.step_time is None:
        return Text("no chain left", "red")
    slower = leaving.step_time / best.step_time - 1
    return Text("no loss") if slower < 0.005 else Text(f"{slower:.0%} slower", "yellow")
