"""`swarm health`: which models a swarm serves, by whom, and whether they are complete."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.errors import UsageError

from .logs import Verbose, set_up_logging
from .options import InitialPeers, SwarmKeyFile, required_peers

if TYPE_CHECKING:
    from swarm.node import Node, NodeConfig

    from .health_summary import ModelHealth

_PING_TIMEOUT = 5.0  # seconds
_PINGS_AT_ONCE = 64
_READS_AT_ONCE = 16


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

    from swarm.node import NodeConfig

    from .health_summary import problems, to_json

    summary = uvloop.run(look(NodeConfig(initial_peers=tuple(peers), swarm_key=swarm_key, listen=False)))
    found = problems(summary, model or ())
    if as_json:
        print(json.dumps(to_json(summary, found)))
    else:
        from .health_table import print_tables

        print_tables(summary)
    for problem in found:
        print(problem, file=sys.stderr)
    if found:
        raise typer.Exit(1)


async def look(config: NodeConfig) -> tuple[ModelHealth, ...]:
    """The health of every model of a swarm, seen from a node that joins for this purpose. Raises NetworkError."""
    from swarm.dht import Directory, ServerRecord
    from swarm.node import Node

    from .health_summary import summarize

    node = await Node.start(config)
    try:
        directory = Directory(node)
        models = await directory.models()
        reading = asyncio.Semaphore(_READS_AT_ONCE)

        async def read(fingerprint: str) -> list[ServerRecord]:
            async with reading:
                return await directory.servers(fingerprint)

        found = await asyncio.gather(*map(read, models))
        records = dict(zip(models, found, strict=True))
        peer_ids = {record.peer_id for servers in found for record in servers}
        return summarize(models.values(), records, await _measure(node, peer_ids))
    finally:
        await node.stop()


async def _measure(node: Node, peer_ids: set[str]) -> dict[str, float]:
    """Seconds of a round trip to each server that answers."""
    from swarm.errors import SwarmError
    from swarm.rpc import ping

    pinging = asyncio.Semaphore(_PINGS_AT_ONCE)
    round_trips = {}

    async def measure(peer_id: str) -> None:
        async with pinging:
            try:
                await ping(
                    node.p2p, peer_id, _PING_TIMEOUT
                )  # makes the connection, which takes longer than a round trip
                round_trips[peer_id] = await ping(node.p2p, peer_id, _PING_TIMEOUT)
            except SwarmError:
                pass  # the tables say so

    await asyncio.gather(*map(measure, peer_ids))
    return round_trips
