"""Looks at a swarm again and again: its records, and what each server says and how long it takes to say it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from swarm.data_structures import ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import NetworkError
from swarm.node import Node
from swarm.outage import Outage
from swarm.routing.snapshot import Snapshot

from .asking import Asker, AskLimits, end_tasks
from .picture import ModelPicture, Picture
from .sight import NodeSight, Sight

logger = logging.getLogger(__name__)

#: Models and servers that are watched at most: a stranger may announce as many as he makes keys.
MAX_MODELS = 256
MAX_SERVERS = 8192
#: Records of so many models are read at a time.
_READS_AT_ONCE = 16
#: Reading takes at most this part of our time. It is seconds of work where there are a thousand servers, whose records
#: change every 20 s only. Waiting for peers that do not answer is no work.
_READING_SHARE = 0.1
#: Seconds that `look` takes at most, if the records are read in time, and that it gives servers to answer in any case:
#: a peer that hangs holds up the reading of records, too.
_LOOK_TIME, _LEAST_PATIENCE = 6.0, 2.0
#: Seconds that the first picture of `run` waits for answers.
_FIRST_LOOK_TIME = 2.0
#: Seconds between two pictures at least.
_LEAST_PAUSE = 1.0
#: What people read; the reason may name addresses, so it is for the log alone.
_TROUBLE = "the records of the swarm could not be read, so what is shown may be old: the log of the monitor says why"


@dataclass(frozen=True)
class WatchSettings:
    """update_period: seconds between two readings of the records, between two questions to a server that answers, and
    between two pictures that differ in figures only. In large swarms readings and questions are less frequent.

    Five seconds: newcomers show as soon as clients find them (`routing.router.FRESH_TIME`), and a server that died
    shows long before its record expires, which takes a minute.
    """

    update_period: float = 5.0


class Watcher:
    """Keeps a picture of a swarm. For one asyncio loop, the node's own.

    Every server is asked how it is; whatever is newer counts, its record or its answer.
    """

    def __init__(
        self,
        node: Node,
        settings: WatchSettings | None = None,
        *,
        sight: Sight | None = None,
        limits: AskLimits | None = None,
        now: Callable[[], float] = time.time,
    ):
        """node: whose round trips count. sight: what is seen instead of what the node sees. limits: of the questions.
        now: Unix time."""
        self._settings = settings or WatchSettings()
        self._sight = sight or NodeSight(node)
        self._now = now
        self._asker = Asker(self._sight.ask, self._settings.update_period, self._note, limits)
        self._models: Mapping[str, ModelInfo] = {}
        self._records: Mapping[str, Sequence[ServerRecord]] = {}  # by fingerprint
        self._addresses: Mapping[str, tuple[str, ...]] = {}
        self._read_at = 0.0
        self._trouble: str | None = None
        self._outage = Outage(logger, "read the records of the swarm")
        self._too_many = Outage(logger, "show all of the swarm")
        self._tried_to_read = asyncio.Event()
        self._news = asyncio.Event()
        self._published = asyncio.Event()
        self._published_at = 0.0  # monotonic
        self._gist: Any = None
        self._picture = Picture()

    @property
    def picture(self) -> Picture:
        """The latest."""
        return self._picture

    async def changed(self, after: int, timeout: float) -> int:
        """The picture's revision, once it is greater than `after`, or when `timeout` seconds are over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._picture.revision <= after:
                    await self._published.wait()
        return self._picture.revision

    async def look(self) -> Picture:
        """Read all records and ask all servers, now; not beside `run`. Takes about 6 s if some of them hang.

        Raises NetworkError if the records cannot be read.
        """
        began = time.monotonic()
        await self._read()
        took = time.monotonic() - began
        await self._asker.ask_all(max(_LOOK_TIME - took, _LEAST_PATIENCE))
        self._publish()
        return self._picture

    async def run(self) -> None:
        """Keep the picture up to date for ever. To end it, cancel it: nothing of it is left then.

        When the records cannot be read the old ones stay until they expire, and the picture tells of the trouble.
        """
        rooms = (self._keep_reading(), self._asker.run(), self._keep_publishing())
        tasks = [asyncio.create_task(room) for room in rooms]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:  # none ends by itself, but for an error of ours
                task.result()
        finally:
            await end_tasks(tasks)

    async def _keep_reading(self) -> None:
        while True:
            began = time.process_time()
            try:
                await self._read()
            except NetworkError as error:
                self._outage.failed(error)
                self._trouble = _TROUBLE
            else:
                self._outage.worked()
                self._trouble = None
            self._tried_to_read.set()
            self._note()
            work = time.process_time() - began
            await asyncio.sleep(max(self._settings.update_period, work / _READING_SHARE - work))

    async def _keep_publishing(self) -> None:
        await self._tried_to_read.wait()
        await self._asker.all_asked(_FIRST_LOOK_TIME)  # else all of the swarm would seem to be down for a moment
        while True:
            await self._news.wait()
            self._news.clear()
            models = self._compose()
            age = time.monotonic() - self._published_at
            if _gist(models, self._trouble) != self._gist or age >= self._settings.update_period:
                self._publish(models)
            else:
                self._note()  # figures wait for their time
            await asyncio.sleep(_LEAST_PAUSE)

    def _note(self) -> None:
        self._news.set()

    async def _read(self) -> None:
        """Raises NetworkError if not all records could be read; what was read is taken all the same."""
        models = await self._sight.models()
        most = dict(list(models.items())[:MAX_MODELS])
        reading = asyncio.Semaphore(_READS_AT_ONCE)

        async def read(fingerprint: str) -> Sequence[ServerRecord] | NetworkError:
            async with reading:
                try:
                    return await self._sight.servers(fingerprint)
                except NetworkError as error:
                    return error

        found = dict(zip(most, await asyncio.gather(*map(read, most)), strict=True))
        errors = [records for records in found.values() if isinstance(records, NetworkError)]
        records = {
            fingerprint: self._records.get(fingerprint, ()) if isinstance(records, NetworkError) else records
            for fingerprint, records in found.items()
        }
        self._models, self._records = most, _one_each(records, self._asker.round_trips)
        peers = {record.peer_id for records in self._records.values() for record in records}
        self._tell_of_too_many(len(models), sum(map(len, records.values())))
        self._asker.take(peers)
        if errors:
            raise errors[0]
        self._read_at = self._now()
        self._addresses = await self._sight.addresses(peers)

    def _tell_of_too_many(self, models: int, servers: int) -> None:
        if models > MAX_MODELS or servers > MAX_SERVERS:
            self._too_many.failed(
                NetworkError(f"it has {models} models and {servers} servers, over {MAX_MODELS} and {MAX_SERVERS}")
            )
        else:
            self._too_many.worked()

    def _compose(self) -> tuple[ModelPicture, ...]:
        """All that is known. Models that no server serves any more are left out."""
        round_trips, noises, now = self._asker.round_trips, self._asker.noises, self._now()

        def is_there(record: ServerRecord) -> bool:
            """A record that could not be read anew is good for as long as its server answers."""
            alive = record.expires > now or round_trips.get(record.peer_id, math.inf) != math.inf
            return alive and record.info.state is not ServerState.OFFLINE

        found = []
        for fingerprint, records in self._records.items():
            newest = [_newest(record, self._asker.infos.get(record.peer_id)) for record in records]
            peers = {record.peer_id for record in records}
            model = self._models[fingerprint]
            snapshot = Snapshot.build(model.num_blocks, filter(is_there, newest), _of(round_trips, peers), 0.0)
            if snapshot.servers:
                found.append(ModelPicture(model, replace(snapshot, ping_noise=_of(noises, peers))))
        return tuple(sorted(found, key=lambda one: (one.model.name, one.model.fingerprint)))

    def _publish(self, models: tuple[ModelPicture, ...] | None = None) -> None:
        models = self._compose() if models is None else models
        self._gist = _gist(models, self._trouble)
        self._published_at = time.monotonic()
        self._picture = Picture(
            models, self._picture.revision + 1, self._now(), self._read_at, self._trouble, self._addresses
        )
        waiting, self._published = self._published, asyncio.Event()
        waiting.set()


def _newest(record: ServerRecord, answer: ServerInfo | None) -> ServerRecord:
    """With whatever the server said later, here or there, by its own clock."""
    if answer is None or (record.info.announced_at or 0) > (answer.announced_at or 0):
        return record
    return replace(record, info=answer)


def _of(figures: Mapping[str, float], peer_ids: Iterable[str]) -> dict[str, float]:
    return {peer_id: figures[peer_id] for peer_id in peer_ids if peer_id in figures}


def _one_each(
    found: Mapping[str, Sequence[ServerRecord]], round_trips: Mapping[str, float]
) -> dict[str, list[ServerRecord]]:
    """By fingerprint, one record of each server, and no more than MAX_SERVERS of them; known ones go first.

    A server serves one model: after a restart with another one, its record of before lives on for a while.
    """
    latest = dict[str, tuple[float, float, str, ServerRecord]]()
    for fingerprint, records in found.items():
        for record in records:
            mine = (record.info.announced_at or 0.0, record.expires, fingerprint, record)
            if record.peer_id not in latest or mine[:3] > latest[record.peer_id][:3]:
                latest[record.peer_id] = mine
    chosen = sorted(latest.items(), key=lambda item: item[0] not in round_trips)[:MAX_SERVERS]
    kept: dict[str, list[ServerRecord]] = {fingerprint: [] for fingerprint in found}
    for _, (_, _, fingerprint, record) in chosen:
        kept[fingerprint].append(record)
    return kept


def _gist(models: tuple[ModelPicture, ...], trouble: str | None) -> Any:
    """What somebody who looks must know at once if it changes; figures can wait."""
    return trouble, [
        (
            one.model,
            [(it.peer_id, it.info.state, it.info.span, one.answers(it.peer_id)) for it in one.snapshot.servers],
        )
        for one in models
    ]
