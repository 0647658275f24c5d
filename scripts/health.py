"""`swarm health`: which models a swarm serves, by whom, and whether they are complete."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.errors import UsageError

from .logs import LogJson, Verbose, set_up_logging
from .options import InitialPeers, SwarmKeyFile, required_peers

if TYPE_CHECKING:
    from swarm.monitor.picture import Picture
    from swarm.node import NodeConfig

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8700
DEFAULT_UPDATE_PERIOD, DEFAULT_PROBE_PERIOD = 5.0, 60.0


def health(
    initial_peers: InitialPeers = None,
    swarm_key: SwarmKeyFile = None,
    once: Annotated[bool, typer.Option("--once", help="Look once and print what there is.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Print what there is, and again when it changes.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --once or --watch: print JSON instead of tables, a line each time.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Also fail, or say so, if this model is absent: its name or the start of its fingerprint.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Of the web monitor: the address or name to listen on.", show_default=DEFAULT_HOST),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Of the web monitor: TCP port; 0: any free one.", show_default=str(DEFAULT_PORT)
        ),
    ] = None,
    show_addresses: Annotated[
        bool, typer.Option("--show-addresses", help="Of the web monitor: also show the addresses of peers.")
    ] = False,
    update_period: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            max=3600.0,
            help="Seconds between two looks at the swarm, unless with --once.",
            show_default=f"{DEFAULT_UPDATE_PERIOD:g}",
        ),
    ] = None,
    probe_period: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=86_400.0,
            help="Of the web monitor: seconds between two small test requests through each complete model, whose times "
            "/metrics has; 0: none but those that somebody asks for.",
            show_default=f"{DEFAULT_PROBE_PERIOD:g}",
        ),
    ] = None,
    stop_with_stdin: Annotated[
        bool,
        typer.Option(
            "--stop-with-stdin", help="Also stop when standard input closes (for programs that start monitors)."
        ),
    ] = False,
    verbose: Verbose = False,
    log_json: LogJson = False,
) -> None:
    """Serve a web page that shows models, blocks and servers of a swarm; its address follows the word READY.

    With --once print them instead, and exit with 1 if a model is incomplete or absent. --watch prints until Ctrl-C.
    """
    from .serving import StdinWatch, run_until_stopped, serve

    if once and stop_with_stdin:
        raise UsageError("--once ends by itself: leave --stop-with-stdin out")
    stdin = StdinWatch() if stop_with_stdin else None
    web_options: dict[str, object] = {"--host": host, "--port": port, "--probe-period": probe_period}
    given = [name for name, value in web_options.items() if value is not None]
    _check_options(once, watch, as_json, update_period, given + ["--show-addresses"] * show_addresses)
    peers = required_peers(initial_peers)
    set_up_logging(verbose, log_json)
    from swarm.monitor.watcher import WatchSettings
    from swarm.node import NodeConfig

    config = NodeConfig(initial_peers=tuple(peers), swarm_key=swarm_key, listen=False)
    wanted = tuple(model or ())
    if once:
        _print_once(config, wanted, as_json)
        return
    settings = WatchSettings(DEFAULT_UPDATE_PERIOD if update_period is None else update_period)
    if watch:
        from . import health_watch

        opened = health_watch.as_lines if as_json else health_watch.on_terminal
        run_until_stopped(lambda: health_watch.watch(config, settings, wanted, opened), stdin)
        return
    from .health_web import Listener, WebMonitor

    listener = Listener.open(host or DEFAULT_HOST, DEFAULT_PORT if port is None else port)
    monitor = WebMonitor(
        config,
        settings,
        listener,
        wanted=wanted,
        show_addresses=show_addresses,
        probe_period=DEFAULT_PROBE_PERIOD if probe_period is None else probe_period,
    )
    run_until_stopped(lambda: serve(monitor), stdin)


def _check_options(once: bool, watch: bool, as_json: bool, update_period: float | None, web_options: list[str]) -> None:
    """Raises UsageError for options that do not go together. web_options: those that were given."""
    if once and watch:
        raise UsageError("--once and --watch exclude each other: look once, or go on looking")
    if as_json and not (once or watch):
        raise UsageError("--json goes with --once or --watch; the web monitor has its JSON under /api/v1/state")
    if once and update_period is not None:
        raise UsageError("--update-period says how often to look, but --once looks once: leave one of them out")
    if (once or watch) and web_options:
        flag = "--once" if once else "--watch"
        raise UsageError(f"{web_options[0]} is an option of the web monitor, which {flag} does not start: leave it out")
    if watch and not as_json and not sys.stdout.isatty():
        raise UsageError("--watch draws on a terminal, which standard output is not: add --json for a line each time")


def _print_once(config: NodeConfig, wanted: tuple[str, ...], as_json: bool) -> None:
    import uvloop

    from swarm.monitor.summary import summarize

    report = summarize(uvloop.run(look(config)), wanted)
    if as_json:
        print(report.model_dump_json())
    else:
        from .health_table import print_tables

        print_tables(report)
    for problem in report.problems:
        print(problem, file=sys.stderr)
    if not report.healthy:
        raise typer.Exit(1)


async def look(config: NodeConfig) -> Picture:
    """A swarm, seen from a node that joins for this purpose. Raises NetworkError."""
    from swarm.monitor.watcher import Watcher

    from .health_node import joined

    async with joined(config) as node:
        return await Watcher(node).look()
