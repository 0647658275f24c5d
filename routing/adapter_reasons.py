"""Why no chain serves an adapter, in words that help."""

from __future__ import annotations

from collections.abc import Collection

from swarm.adapter_hub import is_hub_name
from swarm.data_structures import AdapterRef, BlockSpan, ServerState
from swarm.errors import AdapterNotServed

from .adapters import may_serve
from .snapshot import Snapshot, format_blocks

#: Adapters named in an error message.
MAX_ADAPTERS_LISTED = 10


def blocks_without(snapshot: Snapshot, span: BlockSpan, ref: AdapterRef) -> tuple[int, ...]:
    """The blocks of `span` that no online server can run with this adapter."""
    able = {record.peer_id for record in snapshot.servers if may_serve(record.info, ref)}
    return snapshot.only(able).missing_blocks(span)


def explain_adapters(
    everyone: Snapshot, usable: Snapshot, span: BlockSpan, refs: Collection[AdapterRef]
) -> AdapterNotServed:
    """Why there is no chain with these adapters where there is one without. usable: servers that would do but for the
    adapters."""
    lacks = [_describe_lack(everyone, ref, blocks) for ref in refs if (blocks := blocks_without(usable, span, ref))]
    if lacks:
        return AdapterNotServed("; ".join(lacks[:MAX_ADAPTERS_LISTED]))
    names = ", ".join(repr(ref.name) for ref in list(refs)[:MAX_ADAPTERS_LISTED])
    return AdapterNotServed(
        f"no chain through blocks {span} consists of servers that have each of the adapters {names}: put rows with "
        "different adapters into different calls"
    )


def explain_name(snapshot: Snapshot, span: BlockSpan, name: str) -> AdapterNotServed:
    """Why no adapter of this name can be used, as far as it can be found in the swarm."""
    refs = [AdapterRef(name, digest) for digest in sorted(_blocks_by_digest(snapshot, name))]
    if refs:
        best = min(refs, key=lambda ref: len(blocks_without(snapshot, span, ref)))
        return AdapterNotServed(_describe_lack(snapshot, best, blocks_without(snapshot, span, best)))
    known = sorted({adapter.name for record in snapshot.servers for adapter in record.info.adapters})
    listed = ", ".join(map(repr, known[:MAX_ADAPTERS_LISTED]))
    more = f" and {len(known) - MAX_ADAPTERS_LISTED} more" if len(known) > MAX_ADAPTERS_LISTED else ""
    others = f"adapters that are there: {listed}{more}" if known else "no server has any adapter"
    hub = ", and none fetches adapters of the hub" if is_hub_name(name) else ""
    return AdapterNotServed(f"no server has an adapter named {name!r}{hub}; {others}")


def _describe_lack(snapshot: Snapshot, ref: AdapterRef, blocks: Collection[int]) -> str:
    places = _blocks_by_digest(snapshot, ref.name)
    own = places.pop(ref.digest, set())
    text = f"blocks {format_blocks(blocks)} have no server with adapter {ref.name!r} (digest {ref.digest}); "
    text += f"servers of blocks {format_blocks(own)} have it" if own else "nobody announces it"
    if own.intersection(blocks):
        text += ", but some of these cannot be used now"
    for digest, others in sorted(places.items())[:MAX_ADAPTERS_LISTED]:
        text += f", those of blocks {format_blocks(others)} have another one of that name (digest {digest})"
    return text


def _blocks_by_digest(snapshot: Snapshot, name: str) -> dict[str, set[int]]:
    """Where adapters of this name are announced."""
    places: dict[str, set[int]] = {}
    for record in snapshot.servers:
        if record.info.state is ServerState.ONLINE:
            for adapter in record.info.adapters:
                if adapter.name == name:
                    places.setdefault(adapter.digest, set()).update(record.info.span.blocks())
    return places
