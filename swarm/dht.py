"""Announce and read records: which servers serve a model, and which models a swarm serves.

A server's record lies under the key `petswarm.{fingerprint}.{shard}`, a model's under `petswarm.models.{shard}`, the
shard chosen by the peer id: thousands of records under one key would not be read back in full. The subkey is the
announcing peer's public key, so that hivemind lets nobody else write it and the peer id follows from it. One record
per server, not per block: a signed one takes about 900 bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hivemind.utils import get_dht_time

from .data_structures import ModelInfo, ServerInfo, ServerState
from .errors import NetworkError
from .node import Node
from .records import (
    MAX_RECORD_BYTES,
    MAX_TTL,
    NUM_SHARDS,
    BadRecord,
    Info,
    describe,
    owner_of,
    read_record,
    shard_of,
    write_record,
)

logger = logging.getLogger(__name__)

_TIMEOUT = 20.0  # seconds for one reading or announcing; a healthy swarm needs well under one
_STORE_ATTEMPTS = 3  # within that time
_MODELS = "models"
_WITHDRAWN = b""


@dataclass(frozen=True)
class ServerRecord:
    """One server as announced. expires: Unix time in seconds."""

    peer_id: str
    info: ServerInfo
    expires: float


class Directory:
    """The records of a swarm, seen from one node.

    dropped: how many records were refused or skipped, by reason.
    """

    def __init__(self, node: Node):
        self._node = node
        self._complaints = node.complaints

    @property
    def dropped(self) -> Counter[str]:
        return self._complaints.counts

    async def announce(self, model: ModelInfo, info: ServerInfo, ttl: float) -> None:
        """Store or renew this node's records; with state OFFLINE, withdraw them.

        ttl: seconds until they expire. A first peer that is still alone stores them itself. Raises NetworkError if
        nobody stored them, or not in time.
        """
        self._node.check()
        if not 0 < ttl <= MAX_TTL:
            raise ValueError(f"ttl must lie between 0 and {MAX_TTL:g} s, but is {ttl:g}")
        content = write_record(info)
        if len(content) > MAX_RECORD_BYTES:
            raise ValueError(f"a record of {len(content)} bytes is over the limit of {MAX_RECORD_BYTES}")
        shard = shard_of(self._node.peer_id)
        keys = [_key(model.fingerprint, shard), _key(_MODELS, shard)]
        contents = [content, _WITHDRAWN if info.state == ServerState.OFFLINE else write_record(model)]
        try:
            # Not wait_for, here and elsewhere: in Python 3.11 it may swallow a cancellation.
            async with asyncio.timeout(_TIMEOUT):
                for _ in range(_STORE_ATTEMPTS):
                    if await self._store(keys, contents, ttl):
                        return
                    await self.own(model.fingerprint)  # an earlier life may have left a record that expires later
        except Exception as error:
            raise NetworkError(f"could not announce this server: {_reason(error)}") from error
        raise NetworkError("could not announce this server: no peer of the swarm took its record")

    async def _store(self, keys: list[str], contents: list[bytes], ttl: float) -> bool:
        """Whether the peers took it. hivemind tells only the last answer, and that may be a no from a peer that has the
        very same record already: peers hand records on to those that join."""
        # A peer keeps the record that expires last, so news must always expire later than what it replaces.
        expires = max(get_dht_time() + ttl, self._node.last_expiration + 1e-3)
        self._node.last_expiration = expires
        subkeys = [self._node.validator.local_public_key] * len(keys)
        stored = await self._node.dht.store_many(
            keys, contents, expires, subkeys=subkeys, exclude_self=not self._node.stores_records
        )
        return all(stored.values())

    async def servers(self, fingerprint: str) -> list[ServerRecord]:
        """The servers of the model with these weights that are not offline, as they announced themselves last.

        Raises NetworkError if the swarm does not answer in time.
        """
        records = []
        for peer_id, info, expires in await self._read(fingerprint, ServerInfo):
            if info.state == ServerState.OFFLINE:
                self.dropped["offline"] += 1
            else:
                self._node.p2p.learn_relays(peer_id, info.relays)
                records.append(ServerRecord(peer_id, info, expires))
        return records

    async def own(self, fingerprint: str) -> ServerRecord | None:
        """This node's own record, also if it is from before a restart, or says that the server is offline.

        Raises NetworkError like `servers`.
        """
        mine = self._node.peer_id
        for peer_id, info, expires in await self._read(fingerprint, ServerInfo, [shard_of(mine)]):
            if peer_id == mine:
                self._node.last_expiration = max(self._node.last_expiration, expires)
                return ServerRecord(peer_id, info, expires)
        return None

    async def model_servers(self) -> dict[str, ModelInfo]:
        """Which model each server says it serves, by peer id. Raises NetworkError like `servers`."""
        return {peer_id: model for peer_id, model, _ in await self._read(_MODELS, ModelInfo)}

    async def models(self) -> dict[str, ModelInfo]:
        """The models that somebody serves, by fingerprint; where servers disagree about one, what most of them say.

        Those that most servers say they serve come first. Raises NetworkError like `servers`.
        """
        said: defaultdict[str, Counter[ModelInfo]] = defaultdict(Counter)
        for model in (await self.model_servers()).values():
            said[model.fingerprint][model] += 1
        most_first = sorted(said.items(), key=lambda item: -item[1].total())
        return {fingerprint: votes.most_common(1)[0][0] for fingerprint, votes in most_first}

    async def _read(
        self, prefix: str, info_type: type[Info], shards: Sequence[int] = range(NUM_SHARDS)
    ) -> list[tuple[str, Info, float]]:
        """(peer id, content, expiration) of every acceptable record under a prefix."""
        found = []
        for shard, subkey, content, expires in await self._fetch(prefix, shards):
            if content == _WITHDRAWN:
                continue
            try:
                peer_id = owner_of(subkey)
                right_shard = shard_of(peer_id)
                if shard != right_shard:
                    raise BadRecord("wrong shard", f"it lies in shard {shard}, not in its peer's shard {right_shard}")
                found.append((peer_id, read_record(content, info_type), expires))
            except BadRecord as error:
                self._complaints.add(describe(subkey), error)
        return found

    async def _search(self, keys: list[str]) -> dict[str, Any]:
        """What hivemind finds under these keys. Raises NetworkError if nobody answers, or not in time."""
        self._node.check()
        for _ in range(2):
            if not self._node.stores_records and not self._node.knows_others():
                await self._node.rejoin()  # who stores nothing for others would, alone, see an empty swarm
            try:
                # NaN: no expiration is late enough to end the search early, not even the infinite one that a stranger's
                # reply may claim; so every peer near the key is asked and the latest record of each server wins.
                async with asyncio.timeout(_TIMEOUT):
                    found: dict[str, Any] = await self._node.dht.get_many(keys, sufficient_expiration_time=float("nan"))
            except Exception as error:
                raise NetworkError(f"could not read the records of the swarm: {_reason(error)}") from error
            if self._node.stores_records or self._node.knows_others():
                return found
        raise NetworkError("could not read the records of the swarm: none of the peers that we know answers")

    async def _fetch(self, prefix: str, shards: Sequence[int]) -> list[tuple[int, Any, Any, float]]:
        """(shard, subkey, content, expiration) of all records under a prefix, signatures checked, nothing else."""
        shard_of_key = {_key(prefix, shard): shard for shard in shards}
        values = await self._search(list(shard_of_key))
        return [(shard_of_key[key], *entry) for key, value in values.items() for entry in _entries(value)]


def _key(prefix: str, shard: int) -> str:
    return f"petswarm.{prefix}.{shard}"


def _entries(value: Any) -> Iterator[tuple[Any, Any, float]]:
    """(subkey, content, expiration) of what hivemind found under one key; nothing if it is not a dictionary."""
    if value is not None and isinstance(value.value, dict):
        for subkey, (content, expires) in value.value.items():
            yield subkey, content, expires


def _reason(error: Exception) -> str:
    return f"no answer within {_TIMEOUT:g} s" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
