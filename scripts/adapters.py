"""`swarm adapters`: which adapters the servers of a model have, and through which blocks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.errors import ModelNotServed, UsageError

from .logs import Verbose, set_up_logging
from .options import InitialPeers, SwarmKeyFile, required_peers

if TYPE_CHECKING:
    from rich.console import Console

    from swarm.data_structures import ModelInfo
    from swarm.dht import ServerRecord
    from swarm.node import NodeConfig

#: Models named in an error message.
_MAX_MODELS_LISTED = 10


def adapters(
    model: Annotated[
        str,
        typer.Argument(help="A local folder, a model's name, or the start of its fingerprint.", show_default=False),
    ],
    initial_peers: InitialPeers = None,
    swarm_key: SwarmKeyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """List the adapters that the servers of a model have."""
    peers = required_peers(initial_peers)
    set_up_logging(verbose)
    import uvloop

    from swarm.node import NodeConfig

    name = _fingerprint_of(model) if Path(model).expanduser().is_dir() else model
    found, records = uvloop.run(
        _look(NodeConfig(initial_peers=tuple(peers), swarm_key=swarm_key, listen=False), model, name)
    )
    summary = summarize(found, records)
    if as_json:
        print(json.dumps(to_json(summary)))
    else:
        print_table(summary)


@dataclass(frozen=True)
class AdapterCover:
    """One adapter, and the online servers of a model that have it. blocks: that they hold."""

    name: str
    kind: str
    digest: str
    blocks: tuple[int, ...]
    servers: int


@dataclass(frozen=True)
class AdapterSummary:
    """The adapters of one model, by name and digest. fetching: blocks of servers that load adapters of the hub."""

    model: ModelInfo
    adapters: tuple[AdapterCover, ...]
    fetching: tuple[int, ...]

    def is_complete(self, blocks: Sequence[int]) -> bool:
        return len(blocks) == self.model.num_blocks


def summarize(model: ModelInfo, records: Iterable[ServerRecord]) -> AdapterSummary:
    """What the online servers announce. A kind that they disagree on is the one that most of them say."""
    from swarm.data_structures import ServerState
    from swarm.routing.snapshot import Snapshot

    servers = Snapshot.build(model.num_blocks, records, {}, 0.0).servers
    kinds: dict[tuple[str, str], Counter[str]] = {}
    blocks: dict[tuple[str, str], set[int]] = {}
    fetching: set[int] = set()
    for record in servers:
        info = record.info
        if info.state is not ServerState.ONLINE:
            continue
        if info.fetches_adapters:
            fetching.update(info.span.blocks())
        for adapter in set(info.adapters):
            key = adapter.name, adapter.digest
            kinds.setdefault(key, Counter())[adapter.kind] += 1
            blocks.setdefault(key, set()).update(info.span.blocks())
    covers = [
        AdapterCover(
            name,
            min(kinds[name, digest], key=lambda kind: (-kinds[name, digest][kind], kind)),
            digest,
            tuple(sorted(blocks[name, digest])),
            kinds[name, digest].total(),
        )
        for name, digest in sorted(kinds)
    ]
    return AdapterSummary(model, tuple(covers), tuple(sorted(fetching)))


def to_json(summary: AdapterSummary) -> dict[str, Any]:
    from swarm.routing.snapshot import format_blocks

    return {
        "model": summary.model.name,
        "fingerprint": summary.model.fingerprint,
        "num_blocks": summary.model.num_blocks,
        "adapters": [
            {
                "name": adapter.name,
                "kind": adapter.kind,
                "digest": adapter.digest,
                "blocks": format_blocks(adapter.blocks),
                "servers": adapter.servers,
                "complete": summary.is_complete(adapter.blocks),
            }
            for adapter in summary.adapters
        ],
        "fetching_blocks": format_blocks(summary.fetching),
    }


def print_table(summary: AdapterSummary, console: Console | None = None) -> None:
    """On stdout. Names come from strangers, so they are printed as text and never as markup."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from swarm.routing.snapshot import format_blocks

    from .tables import table_console

    console = console or table_console()
    model = summary.model
    console.print(Text(f"{model.name}  fingerprint {model.fingerprint[:12]}, {model.num_blocks} blocks"))
    if summary.adapters:
        table = Table(box=SIMPLE_HEAD)
        for name in ("adapter", "kind", "digest", "blocks"):
            table.add_column(name, overflow="fold")
        table.add_column("servers", justify="right")
        table.add_column("")
        for adapter in summary.adapters:
            complete = summary.is_complete(adapter.blocks)
            table.add_row(
                Text(adapter.name),
                Text(adapter.kind),
                Text(adapter.digest),
                Text(format_blocks(adapter.blocks)),
                Text(str(adapter.servers)),
                Text("complete", "green") if complete else Text("incomplete", "bold red"),
            )
        console.print(table)
    else:
        console.print(Text("no server has any adapter"))
    if summary.fetching:
        console.print(
            Text(f"servers of blocks {format_blocks(summary.fetching)} fetch adapters of the hub when asked to")
        )


def choose_model(models: Iterable[ModelInfo], given: str, name: str) -> ModelInfo:
    """The model with this name, or whose fingerprint begins so. given: as the user called it.

    Raises ModelNotServed, or UsageError if several are called so.
    """
    listed = sorted(models, key=lambda model: (model.name, model.fingerprint))
    found = [model for model in listed if name == model.name or (name and model.fingerprint.startswith(name))]
    if not found:
        others = ", ".join(model.name for model in listed[:_MAX_MODELS_LISTED]) or "none"
        raise ModelNotServed(f"no server in the swarm serves {given}; models in the swarm: {others}")
    if len(found) > 1:
        fingerprints = ", ".join(model.fingerprint[:12] for model in found[:_MAX_MODELS_LISTED])
        raise UsageError(
            f"several models in the swarm are called {given}: name one by its fingerprint ({fingerprints})"
        )
    return found[0]


def _fingerprint_of(folder: str) -> str:
    """Of a folder's weights. Raises ModelNotFound."""
    from swarm.checkpoint import open_checkpoint

    return open_checkpoint(folder).fingerprint()


async def _look(config: NodeConfig, given: str, name: str) -> tuple[ModelInfo, list[ServerRecord]]:
    """The model and the records of its servers, seen from a node that joins for this purpose. Raises NetworkError."""
    from swarm.dht import Directory
    from swarm.node import Node

    node = await Node.start(config)
    try:
        directory = Directory(node)
        model = choose_model((await directory.models()).values(), given, name)
        return model, list(await directory.servers(model.fingerprint))
    finally:
        await node.stop()
