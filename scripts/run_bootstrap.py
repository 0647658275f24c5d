"""`swarm run-bootstrap`: a peer without blocks, through which others join the swarm."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.errors import NetworkError, UsageError

from .logs import LogJson, Verbose, adopt_loggers, set_up_logging
from .options import InitialPeers, SwarmKeyFile

if TYPE_CHECKING:
    from swarm.node import Node, NodeConfig


def run_bootstrap(
    initial_peers: InitialPeers = None,
    swarm_key: SwarmKeyFile = None,
    host_maddrs: Annotated[
        list[str] | None, typer.Option(help="Addresses to listen on.", metavar="ADDR...", show_default=False)
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="TCP port to listen on at all interfaces; 0: any free one.")
    ] = 0,
    announce_maddrs: Annotated[
        list[str] | None,
        typer.Option(help="Addresses for others to use instead.", metavar="ADDR...", show_default=False),
    ] = None,
    identity_path: Annotated[
        Path | None, typer.Option(help="Private key file that keeps the peer id; made if absent.", show_default=False)
    ] = None,
    serve_relay: Annotated[
        bool,
        typer.Option(
            "--serve-relay/--no-serve-relay", help="Relay to servers that cannot be reached.", show_default=False
        ),
    ] = True,
    stop_with_stdin: Annotated[
        bool,
        typer.Option("--stop-with-stdin", help="Also stop when standard input closes (for programs that start us)."),
    ] = False,
    verbose: Verbose = False,
    log_json: LogJson = False,
) -> None:
    """Run a peer without blocks. Without --initial-peers it starts a swarm. Prints `READY <address>`."""
    from .serving import StdinWatch, run_until_stopped

    set_up_logging(verbose, log_json)
    watch = StdinWatch() if stop_with_stdin else None
    from swarm.addresses import split_addresses
    from swarm.node import NodeConfig

    if host_maddrs and port:
        raise UsageError("--port and --host-maddrs exclude each other: write the port into the address")
    config = NodeConfig(
        initial_peers=tuple(split_addresses(initial_peers or [])),
        host_maddrs=tuple(split_addresses(host_maddrs or [])) or (f"/ip4/0.0.0.0/tcp/{port}",),
        announce_maddrs=tuple(split_addresses(announce_maddrs or [])),
        identity_path=identity_path,
        swarm_key=swarm_key,
        serve_relay=serve_relay,
    )
    run_until_stopped(lambda: _serve(config), watch)


async def _serve(config: NodeConfig) -> None:
    from .serving import serve

    await serve(Bootstrap(config))


class Bootstrap:
    """A node that only keeps DHT records, introduces peers to each other, and relays to those that need it."""

    def __init__(self, config: NodeConfig):
        self._config = config
        self._stop = asyncio.Event()
        self._node: Node

    async def start(self) -> str:
        from swarm.node import Node

        adopt_loggers()
        self._node = await Node.start(self._config)
        return await self._node.ready_address()

    def stop(self) -> None:
        self._stop.set()

    async def serve_until_stopped(self) -> None:
        """Raises NetworkError if p2pd dies."""
        stopping = asyncio.create_task(self._stop.wait())
        dying = asyncio.create_task(self._node.died.wait())
        try:
            await asyncio.wait({stopping, dying}, return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                raise NetworkError(f"the network daemon died, so this peer ends: {self._node.death_message}")
        finally:
            stopping.cancel()
            dying.cancel()
            await self._node.stop()
