"""`swarm health`: which models a swarm serves, by whom, and whether they are complete."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.errors import UsageError

from .logs import Verbose, set_up_logging
from .options import InitialPeers, SwarmKeyFile, required_peers

if TYPE_CHECKING:
    from swarm.monitor.picture import Picture
    from swarm.node import NodeConfig


def health(
    initial_peers: InitialPeers = None,
    swarm_key: SwarmKeyFile = None,
    once: Annotated[bool, typer.Option("--once", help="Look once and print what there is.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Also fail if this model is absent: its name or the start of its fingerprint.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Show models, blocks and servers of a swarm. Exits with 1 if a model is incomplete or absent."""
    if not once:
        raise UsageError("the web monitor is not part of this version: use --once for a table, --once --json for JSON")
    peers = required_peers(initial_peers)
    set_up_logging(verbose)
    import uvloop

    from swarm.monitor.summary import summarize
    from swarm.node import NodeConfig

    picture = uvloop.run(look(NodeConfig(initial_peers=tuple(peers), swarm_key=swarm_key, listen=False)))
    report = summarize(picture, model or ())
    if as_json:
        print(report.model_dump_json())
    else:
        from .health_table import print_tables

        print_tables(report.models)
    for problem in report.problems:
        print(problem, file=sys.stderr)
    if not report.healthy:
        raise typer.Exit(1)


async def look(config: NodeConfig) -> Picture:
    """A swarm, seen from a node that joins for this purpose. Raises NetworkError."""
    from swarm.monitor.watcher import Watcher
    from swarm.node import Node

    node = await Node.start(config)
    try:
        return await Watcher(node).look()
    finally:
        await node.stop()
