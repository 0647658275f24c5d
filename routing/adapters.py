"""Which servers have an adapter, and which of several contents of one name a client should take."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from swarm.adapter_hub import is_hub_name
from swarm.data_structures import AdapterRef, BlockSpan, ServerInfo, ServerState

from .cost import effective_throughput

if TYPE_CHECKING:
    from .snapshot import Snapshot

Floats: TypeAlias = npt.NDArray[np.float64]


def announces(info: ServerInfo, ref: AdapterRef) -> bool:
    """Whether a server has this very adapter: the name with these contents."""
    return any(adapter.name == ref.name and adapter.digest == ref.digest for adapter in info.adapters)


def may_serve(info: ServerInfo, ref: AdapterRef) -> bool:
    """Whether it has the adapter, or loads adapters of the hub when asked to and this one may be there."""
    return announces(info, ref) or (info.fetches_adapters and is_hub_name(ref.name))


def choose_adapter(snapshot: Snapshot, name: str, span: BlockSpan) -> AdapterRef | None:
    """Of the adapters of this name that are announced for every block of `span`: the one with most throughput.

    That is summed over the blocks and their servers; of equal ones the first by digest. None if none is complete.
    """
    rates: dict[str, Floats] = {}
    counts: dict[str, Floats] = {}
    for record in snapshot.servers:
        info = record.info
        if info.state is not ServerState.ONLINE:
            continue
        for digest in {adapter.digest for adapter in info.adapters if adapter.name == name}:
            if digest not in rates:
                rates[digest], counts[digest] = np.zeros(snapshot.num_blocks), np.zeros(snapshot.num_blocks)
            rates[digest][info.span.start : info.span.end] += effective_throughput(info)
            counts[digest][info.span.start : info.span.end] += 1
    within = slice(span.start, span.end)
    complete = [digest for digest in sorted(rates) if counts[digest][within].all()]
    if not complete:
        return None
    return AdapterRef(name, max(complete, key=lambda digest: float(rates[digest][within].sum())))
