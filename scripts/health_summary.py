"""What the records of a swarm say about its models: pure, for `swarm health` to print."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from swarm.data_structures import DECODE_ROWS, ModelInfo, ServerState
from swarm.dht import ServerRecord
from swarm.routing.snapshot import Snapshot, format_blocks


@dataclass(frozen=True)
class ModelHealth:
    """One model of a swarm.

    servers: in any state, sorted by span. round_trips: seconds from here, by peer id, of those that answered.
    """

    model: ModelInfo
    servers: tuple[ServerRecord, ...]
    round_trips: Mapping[str, float]

    @cached_property
    def serving(self) -> tuple[ServerRecord, ...]:
        """The servers that are online and answered. Others serve nobody here."""
        return tuple(
            server
            for server in self.servers
            if server.info.state is ServerState.ONLINE and server.peer_id in self.round_trips
        )

    @cached_property
    def replicas(self) -> tuple[int, ...]:
        """For each block: how many of the serving servers hold it."""
        holders = [0] * self.model.num_blocks
        for server in self.serving:
            for block in server.info.span.blocks():
                holders[block] += 1
        return tuple(holders)

    @property
    def num_adapters(self) -> int:
        """Different ones that the serving servers have, whether for all blocks or not."""
        return len({adapter.digest for server in self.serving for adapter in server.info.adapters})

    @property
    def missing_blocks(self) -> tuple[int, ...]:
        return tuple(block for block, count in enumerate(self.replicas) if not count)

    @property
    def complete(self) -> bool:
        return not self.missing_blocks

    def is_called(self, name: str) -> bool:
        """Whether `name` is the model's name or the start of its fingerprint."""
        return name == self.model.name or bool(name and self.model.fingerprint.startswith(name))


def summarize(
    models: Iterable[ModelInfo], records: Mapping[str, Iterable[ServerRecord]], round_trips: Mapping[str, float]
) -> tuple[ModelHealth, ...]:
    """The health of each model, sorted by name and fingerprint.

    records: by fingerprint. round_trips: seconds, by peer id, of the servers that answered.
    """
    return tuple(
        ModelHealth(
            model,
            Snapshot.build(model.num_blocks, records.get(model.fingerprint, ()), {}, 0.0).servers,
            round_trips,
        )
        for model in sorted(models, key=lambda model: (model.name, model.fingerprint))
    )


def problems(summary: Collection[ModelHealth], wanted: Iterable[str] = ()) -> list[str]:
    """What is wrong with the swarm, a sentence each: models that are incomplete, or absent though wanted.

    wanted: names of models, or starts of their fingerprints.
    """
    found = []
    if not summary:
        found.append("no server of this swarm serves any model")
    for health in summary:
        if not health.complete:
            found.append(
                f"{health.model.name} (fingerprint {health.model.fingerprint[:12]}) is incomplete: no server that "
                f"answers holds blocks {format_blocks(health.missing_blocks)} of {health.model.num_blocks}"
            )
    for name in wanted:
        if not any(health.is_called(name) for health in summary):
            found.append(f"no server of this swarm serves {name}")
    return found


def to_json(summary: Iterable[ModelHealth], found: list[str]) -> dict[str, Any]:
    """The summary and its problems for programs.

    Throughput and forward rate in tokens/s, network rate in bytes/s, round trips and decode times (by the number of
    rows) in seconds.
    """
    return {
        "healthy": not found,
        "problems": found,
        "models": [
            {
                "name": health.model.name,
                "fingerprint": health.model.fingerprint,
                "num_blocks": health.model.num_blocks,
                "complete": health.complete,
                "missing_blocks": list(health.missing_blocks),
                "replicas": list(health.replicas),
                "servers": [
                    _server_to_json(server, health.round_trips.get(server.peer_id)) for server in health.servers
                ],
            }
            for health in summary
        ],
    }


def _server_to_json(server: ServerRecord, round_trip: float | None) -> dict[str, Any]:
    info = server.info
    return {
        "peer_id": server.peer_id,
        "public_name": info.public_name,
        "span": [info.span.start, info.span.end],
        "state": info.state.value,
        "throughput": info.throughput,
        "decode_times": dict(zip(map(str, DECODE_ROWS), info.decode_times, strict=False)),
        "forward_rate": info.forward_rate,
        "network_rate": info.network_rate,
        "running_rows": info.running_rows,
        "waiting_rows": info.waiting_rows,
        "numerics": info.numerics,
        "cache_tokens_left": info.cache_tokens_left,
        "software": info.software,
        "round_trip": round_trip,
    }
