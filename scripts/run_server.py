"""`run-server` = `swarm run-server`: serve a span of a model's blocks until SIGTERM or Ctrl-C."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.errors import UsageError

from .logs import LogJson, Verbose, adopt_loggers, say, set_up_logging
from .options import InitialPeers, SwarmKeyFile

if TYPE_CHECKING:
    from swarm.server.config import ServerConfig
    from swarm.server.server import Server

    from .owner_messages import ServerStatus


class DType(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class QuantizationKind(StrEnum):
    AUTO = "auto"
    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


class RelayKind(StrEnum):
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def run_server(
    model: Annotated[str, typer.Argument(help="A local folder or a hub id.", show_default=False)],
    new_swarm: Annotated[bool, typer.Option("--new-swarm", help="Start a swarm of one's own.")] = False,
    initial_peers: InitialPeers = None,
    swarm_key: SwarmKeyFile = None,
    blocks: Annotated[str | None, typer.Option(help="Serve blocks A:B (B not included).", metavar="A:B")] = None,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, help="Serve this many blocks, where the swarm needs them most.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        DType,
        typer.Option(
            help="Of activations and unquantised weights; auto: bfloat16 where the device has it, else as stored."
        ),
    ] = DType.AUTO,
    quantization: Annotated[
        QuantizationKind, typer.Option(help="Of the weights, while they load; auto: nf4 on CUDA, none on a CPU.")
    ] = QuantizationKind.AUTO,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Of the device, for blocks, cache and activations: 8GB, 512MiB. Without it, what is free: give it "
            "where several servers share a machine.",
            metavar="SIZE",
            show_default=False,
        ),
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="KV cache budget in tokens, all sessions together. Without it, as the memory allows.",
            show_default=False,
        ),
    ] = None,
    cache_overcommit: Annotated[
        float,
        typer.Option(min=1, help="Let sessions reserve this many times the budget; the idle are evicted when it ends."),
    ] = 1.0,
    max_stall: Annotated[
        float,
        typer.Option(
            min=0, help="While a prompt is prefilled, others' tokens come at most about this many times slower; 0: off."
        ),
    ] = 3.0,
    max_pass_tokens: Annotated[
        int, typer.Option(min=1024, help="Tokens in one forward or backward pass for training; more are refused.")
    ] = 4096,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapters to serve: FOLDER, NAME=FOLDER, a folder of adapters (looked through again and again), or "
            "hub ids. May be repeated.",
            metavar="SOURCE",
            show_default=False,
        ),
    ] = None,
    adapters_from_hub: Annotated[
        bool, typer.Option("--adapters-from-hub", help="Load an adapter from the hub when somebody asks for it.")
    ] = False,
    adapter_memory: Annotated[
        str, typer.Option(help="For adapters; those that nobody uses make room.", metavar="SIZE")
    ] = "1GiB",
    max_adapter_size: Annotated[str, typer.Option(help="Of one adapter's weights.", metavar="SIZE")] = "512MiB",
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
    listen: Annotated[
        bool,
        typer.Option(
            "--listen/--no-listen",
            help="Accept connections; without it others come through relays.",
            show_default=False,
        ),
    ] = True,
    relay: Annotated[
        RelayKind,
        typer.Option(help="Have others come through relays; auto: if peers say that they cannot reach this server."),
    ] = RelayKind.AUTO,
    serve_relay: Annotated[
        bool,
        typer.Option(
            "--serve-relay/--no-serve-relay",
            help="Relay to servers that cannot be reached, if this one can.",
            show_default=False,
        ),
    ] = True,
    identity_path: Annotated[
        Path | None, typer.Option(help="Private key file that keeps the peer id; made if absent.", show_default=False)
    ] = None,
    public_name: Annotated[str, typer.Option(help="Shown in the list of servers.", show_default=False)] = "",
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub model.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the forward pass.", show_default=False)
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Figures for Prometheus at http://METRICS_HOST:METRICS_PORT/metrics; 0: any free port.",
            show_default=False,
        ),
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Where to listen for those who ask for them.")] = "127.0.0.1",
    announce_period: Annotated[float, typer.Option(min=0.5, help="Seconds between announcements.")] = 20.0,
    rebalance_period: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds between two looks whether the swarm needs this server at other blocks; 0: never move. "
            "--blocks never moves.",
        ),
    ] = 120.0,
    move_delay: Annotated[
        float, typer.Option(min=0.1, help="Seconds between the announcement of a move and the move.")
    ] = 10.0,
    session_idle_limit: Annotated[float, typer.Option(min=1, help="Seconds until an idle session is closed.")] = 600.0,
    max_sessions_per_peer: Annotated[
        int, typer.Option(min=1, help="Sessions that one peer may have open at once; it is refused more.")
    ] = 256,
    drain_time: Annotated[float, typer.Option(min=0.1, help="Seconds that sessions have to move on SIGTERM.")] = 15.0,
    stop_with_stdin: Annotated[
        bool,
        typer.Option(
            "--stop-with-stdin", help="Also stop when standard input closes (for programs that start servers)."
        ),
    ] = False,
    verbose: Verbose = False,
    log_json: LogJson = False,
) -> None:
    """Serve blocks of MODEL. Prints `READY <address>` when it can serve; SIGTERM drains and exits 0."""
    from .serving import StdinWatch, run_until_stopped

    set_up_logging(verbose, log_json)
    watch = StdinWatch() if stop_with_stdin else None
    peers = check_peers(new_swarm, initial_peers)
    from pydantic import ValidationError

    from swarm.addresses import split_addresses
    from swarm.data_structures import BlockSpan
    from swarm.protocol import explain
    from swarm.server.config import ServerConfig

    if host_maddrs and port:
        raise UsageError("--port and --host-maddrs exclude each other: write the port into the address")
    check_relay(listen, relay, new_swarm, bool(host_maddrs or port or announce_maddrs))
    if blocks is not None and num_blocks is not None:
        raise UsageError("--blocks and --num-blocks exclude each other")
    try:
        config = ServerConfig(
            model=model,
            revision=revision,
            initial_peers=peers,
            swarm_key=swarm_key,
            blocks=None if blocks is None else BlockSpan.parse(blocks),
            num_blocks=num_blocks,
            device=device,
            dtype=dtype.value,
            quantization=quantization.value,
            max_memory=max_memory,  # type: ignore[arg-type]  # parsed there
            cache_tokens=cache_tokens,
            cache_overcommit=cache_overcommit,
            max_stall=max_stall,
            max_pass_tokens=max_pass_tokens,
            adapters=tuple(adapters or ()),
            adapters_from_hub=adapters_from_hub,
            adapter_memory=adapter_memory,  # type: ignore[arg-type]  # parsed there
            max_adapter_size=max_adapter_size,  # type: ignore[arg-type]
            host_maddrs=tuple(split_addresses(host_maddrs or [])) or (f"/ip4/0.0.0.0/tcp/{port}",),
            announce_maddrs=tuple(split_addresses(announce_maddrs or [])),
            listen=listen,
            relay="always" if not listen else "never" if new_swarm else relay.value,
            serve_relay=serve_relay,
            identity_path=identity_path,
            public_name=public_name,
            threads=threads,
            metrics_port=metrics_port,
            metrics_host=metrics_host,
            announce_period=announce_period,
            rebalance_period=rebalance_period,
            move_delay=move_delay,
            session_idle_limit=session_idle_limit,
            max_sessions_per_peer=max_sessions_per_peer,
            drain_time=drain_time,
        )
    except ValidationError as error:
        raise UsageError(f"bad setting: {explain(error)}") from error
    run_until_stopped(lambda: _serve(config), watch)


def check_peers(new_swarm: bool, initial_peers: list[str] | None) -> tuple[str, ...]:
    """The peers to join, () for a new swarm. Raises UsageError if the flags say neither or both."""
    from swarm.addresses import split_addresses

    peers = tuple(split_addresses(initial_peers or []))
    if new_swarm and peers:
        raise UsageError("--new-swarm and --initial-peers exclude each other")
    if not new_swarm and not peers:
        raise UsageError("say which swarm: --initial-peers ADDR... to join one, or --new-swarm to start one")
    return peers


def check_relay(listen: bool, relay: RelayKind, new_swarm: bool, has_addresses: bool) -> None:
    """Raises UsageError if the flags say different things of how others reach this server."""
    if new_swarm and (not listen or relay is RelayKind.ALWAYS):
        raise UsageError("the first server of a swarm must be reached directly: leave --no-listen and --relay out")
    if not listen and relay is RelayKind.NEVER:
        raise UsageError("nobody can reach a server with --no-listen and --relay never: leave one of them out")
    if not listen and has_addresses:
        raise UsageError(
            "--no-listen excludes --host-maddrs, --port and --announce-maddrs: there is nothing to listen on"
        )


async def _serve(config: ServerConfig) -> None:
    from rich.console import Console

    from swarm.server.server import Server

    from .loading_progress import shown
    from .owner_desk import OwnerDesk, open_to_owner
    from .serving import serve

    adopt_loggers()
    with shown(say, Console(stderr=True)) as progress:
        server = Server(config, report=say, progress=progress)
        desk = OwnerDesk(server, lambda: _status(server))
        async with open_to_owner(desk):
            await serve(server, desk.open, config.drain_time)


def _status(server: Server) -> ServerStatus:
    """A server as its owner sees it; it learns its peer id, its model and its blocks while it starts."""
    from .owner_messages import ServerStatus

    node, model, span = (getattr(server, name, None) for name in ("node", "model", "span"))
    state = server.status()
    return ServerStatus(
        pid=os.getpid(),
        public_name=server.config.public_name[:64],
        peer_id="" if node is None else node.peer_id,
        model="" if model is None else model.name,
        span="" if span is None or state == "paused" else str(span),
        state=state,
        metrics_url=server.metrics_url or "",
    )
