"""`swarm models`: the models of a swarm, a line each, and whether each is complete."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .logs import Verbose, set_up_logging
from .options import InitialPeers, SwarmKeyFile, required_peers

if TYPE_CHECKING:
    from rich.console import Console

    from swarm.monitor.picture import ModelPicture


def list_models(
    initial_peers: InitialPeers = None,
    swarm_key: SwarmKeyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """List the models of a swarm. Exits with 0 though some are incomplete; `swarm health --once` is the probe."""
    peers = required_peers(initial_peers)
    set_up_logging(verbose)
    import uvloop

    from swarm.node import NodeConfig

    from .health import look

    picture = uvloop.run(look(NodeConfig(initial_peers=tuple(peers), swarm_key=swarm_key, listen=False)))
    if as_json:
        print(json.dumps(to_json(picture.models)))
    else:
        print_table(picture.models)


def to_json(models: Sequence[ModelPicture]) -> dict[str, Any]:
    """servers: that are online and answer. replicas: of the block that fewest of them hold, at `weakest_blocks`."""
    from swarm.routing.snapshot import format_blocks

    return {
        "models": [
            {
                "name": one.model.name,
                "fingerprint": one.model.fingerprint,
                "num_blocks": one.model.num_blocks,
                "complete": one.complete,
                "covered_blocks": one.model.num_blocks - len(one.missing_blocks),
                "missing_blocks": format_blocks(one.missing_blocks),
                "servers": len(one.serving),
                "replicas": min(one.replicas),
                "weakest_blocks": format_blocks(one.weakest_blocks),
                "adapters": one.num_adapters,
            }
            for one in models
        ]
    }


def print_table(pictures: Sequence[ModelPicture], console: Console | None = None) -> None:
    """On stdout. Names come from strangers, so they are printed as text and never as markup."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from .tables import table_console

    console = console or table_console()
    models = to_json(pictures)["models"]
    if not models:
        console.print("no server of this swarm serves any model")
        return
    table = Table(box=SIMPLE_HEAD)
    for name in ("model", "fingerprint", "", "blocks", "missing"):
        table.add_column(name, overflow="fold")
    for name in ("servers", "least replicas", "adapters"):
        table.add_column(name, justify="right")
    for model in models:
        table.add_row(
            Text(model["name"]),
            Text(model["fingerprint"][:12]),
            Text("complete", "green") if model["complete"] else Text("incomplete", "bold red"),
            Text(f"{model['covered_blocks']} of {model['num_blocks']}"),
            Text(model["missing_blocks"] or "-", "bold red" if model["missing_blocks"] else ""),
            Text(str(model["servers"])),
            Text(f"{model['replicas']} (blocks {model['weakest_blocks']})" if model["complete"] else "0"),
            Text(str(model["adapters"])),
        )
    console.print(table)
