"""What the monitor knows of a swarm at one moment: values, for pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from swarm.data_structures import ModelInfo, ServerState
from swarm.routing.snapshot import Snapshot

if TYPE_CHECKING:
    from swarm.dht import ServerRecord


@dataclass(frozen=True)
class ModelPicture:
    """One model and its servers. snapshot: its pings are infinite for a server that does not answer, and lack one that
    was not asked yet."""

    model: ModelInfo
    snapshot: Snapshot

    @cached_property
    def serving(self) -> tuple[ServerRecord, ...]:
        """The servers that are online and answer. Others serve nobody here."""
        return tuple(server for server in self.snapshot.servers if self.serves(server))

    def serves(self, server: ServerRecord) -> bool:
        return server.info.state is ServerState.ONLINE and self.answers(server.peer_id) is True

    def answers(self, peer_id: str) -> bool | None:
        """Whether a server answered when it was asked last; None: it was not asked yet."""
        round_trip = self.snapshot.pings.get(peer_id)
        return None if round_trip is None else round_trip != math.inf

    @cached_property
    def served(self) -> Snapshot:
        """Of the servers that serve alone."""
        return self.snapshot.only({server.peer_id for server in self.serving})

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
    def weakest_blocks(self) -> tuple[int, ...]:
        fewest = min(self.replicas)
        return tuple(block for block, count in enumerate(self.replicas) if count == fewest)

    @property
    def complete(self) -> bool:
        return not self.missing_blocks


@dataclass(frozen=True)
class Picture:
    """All models of a swarm, sorted by name and fingerprint.

    revision: grows with every change. made_at, read_at: Unix time of this picture, and of the last reading of records.
    trouble: why the records could not be read since, in a sentence; None: they could.
    addresses: multiaddresses without peer id, by peer id, as far as this node knows them.
    """

    models: tuple[ModelPicture, ...] = ()
    revision: int = 0
    made_at: float = 0.0
    read_at: float = 0.0
    trouble: str | None = None
    addresses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def model(self, name: str) -> ModelPicture | None:
        """The model of this fingerprint; else of this name; else one whose fingerprint starts so.

        Strangers may call theirs as they like, and make weights with a fingerprint that starts as they like: of
        several, the one counts that most servers serve.
        """

        def fits(one: ModelPicture) -> tuple[bool, bool, bool, int]:
            fingerprint = one.model.fingerprint
            printed = bool(name) and fingerprint.startswith(name)
            return fingerprint == name, one.model.name == name, printed, len(one.serving)

        best = max(self.models, key=fits, default=None)
        return best if best is not None and any(fits(best)[:3]) else None
