"""The monitor of a swarm: its picture, the report of that, test requests on demand and by itself, reachability."""

from __future__ import annotations

import asyncio
import logging
import threading
from bisect import bisect_left
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from swarm.errors import ModelNotServed, SwarmError

from .calibration import Calibration
from .latencies import Latencies
from .picture import ModelPicture, Picture
from .report import ReachabilityReport, SwarmReport, TraceReport, TraceRequest
from .summary import summarize

_logger = logging.getLogger(__name__)

#: Steps of a probe: enough for a time per token that one slow step does not decide.
PROBE_PROMPT_TOKENS = 4
PROBE_NEW_TOKENS = 4
#: Strangers may announce any number of models; those that one round leaves out come first in the next.
PROBES_A_ROUND = 16


class PictureSource(Protocol):
    """What keeps the picture up to date: `watcher.Watcher`."""

    @property
    def picture(self) -> Picture: ...

    async def changed(self, after: int, timeout: float) -> int: ...

    async def run(self) -> None: ...


class Tracer(Protocol):
    """What makes test requests: one at a time, others wait. Each is bounded in time. Raises SwarmError."""

    async def trace(self, model: ModelPicture, request: TraceRequest) -> TraceReport: ...


@dataclass(frozen=True)
class MonitorConfig:
    """wanted: names of models, or starts of their fingerprints, that should be there.

    show_addresses: whether reports and errors may tell addresses of peers.
    probe_period: seconds between rounds of small test requests through every complete model; 0: none.
    """

    wanted: tuple[str, ...] = ()
    show_addresses: bool = False
    probe_period: float = 60.0


class Monitor:
    """What the API and the metrics read. For one asyncio loop, the node's own; only `report` is for any thread."""

    def __init__(
        self,
        watcher: PictureSource,
        tracer: Tracer,
        check_reachable: Callable[[str], Awaitable[ReachabilityReport]],
        config: MonitorConfig = MonitorConfig(),
    ):
        """check_reachable: tells whether a peer of this id can be reached; bounded in time; raises SwarmError."""
        self.config = config
        self.latencies = Latencies()
        self._calibration = Calibration()
        self._watcher = watcher
        self._tracer = tracer
        self._check_reachable = check_reachable
        self._reported: tuple[Picture, SwarmReport] | None = None
        self._reporting = threading.Lock()
        self._closed = asyncio.Event()
        self._next_probe = ""

    @property
    def picture(self) -> Picture:
        """The latest."""
        return self._watcher.picture

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Wake those who wait for a change, so that streams of events end. Call it before the web server stops."""
        self._closed.set()

    def report(self) -> SwarmReport:
        """What there is to say about the latest picture. Made once for each: a large swarm's takes a while."""
        with self._reporting:
            picture = self.picture
            if self._reported is None or self._reported[0] is not picture:
                report = summarize(
                    picture,
                    self.config.wanted,
                    show_addresses=self.config.show_addresses,
                    corrections=self._calibration.factors(),
                )
                self._reported = (picture, report)
            return self._reported[1]

    async def changed(self, after: int, timeout: float) -> int:
        """The picture's revision, once it is greater than `after`, or after `timeout` seconds, or at the end."""
        change = asyncio.ensure_future(self._watcher.changed(after, timeout))
        end = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait((change, end), return_when=asyncio.FIRST_COMPLETED)
            return change.result() if change.done() else self.picture.revision
        finally:
            change.cancel()
            end.cancel()

    async def trace(self, request: TraceRequest) -> TraceReport:
        """Make a test request. Raises SwarmError, UsageError for a bad request."""
        model = self.picture.model(request.model)
        if model is None:
            raise ModelNotServed(f"no server of this swarm serves {request.model}: choose one of /api/v1/models")
        return await self._trace(model, request)

    async def _trace(self, model: ModelPicture, request: TraceRequest) -> TraceReport:
        report = await self._tracer.trace(model, request)
        correction = self._calibration.factors().get(report.fingerprint, 1.0)
        if request.peers is None:  # what a client would meet; a chosen chain may be slow on purpose
            self.latencies.observe(report)
            self._calibration.observe(report)
        expected = report.predicted_step_time
        return report.model_copy(update={"predicted_step_time": None if expected is None else correction * expected})

    async def is_reachable(self, peer_id: str) -> ReachabilityReport:
        """Whether a peer can be reached from here, and if not, why. Raises SwarmError, UsageError for a bad peer id."""
        return await self._check_reachable(peer_id)

    async def run(self) -> None:
        """Watch and probe, forever. Raises what the watcher raises when it cannot go on."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watcher.run(), name="watcher")
            if self.config.probe_period > 0:
                tasks.create_task(self._probe_forever(), name="probes")

    async def _probe_forever(self) -> None:
        while not self.closed:
            if any(model.complete for model in self.picture.models):
                await self.probe()
                await asyncio.sleep(self.config.probe_period)
            else:
                await self.changed(self.picture.revision, self.config.probe_period)

    async def probe(self) -> None:
        """One round of small test requests through complete models, one after the other."""
        complete = sorted((one for one in self.picture.models if one.complete), key=_fingerprint)
        late = bisect_left(complete, self._next_probe, key=_fingerprint)
        turn = complete[late:] + complete[:late]
        self._next_probe = _fingerprint(turn[PROBES_A_ROUND]) if len(turn) > PROBES_A_ROUND else ""
        for model in turn[:PROBES_A_ROUND]:
            request = TraceRequest(
                model=_fingerprint(model), prompt_tokens=PROBE_PROMPT_TOKENS, new_tokens=PROBE_NEW_TOKENS
            )
            try:
                await self._trace(model, request)
            except SwarmError as error:
                _logger.info("a probe of %s failed: %s", model.model.name, error)
                self.latencies.failed(_fingerprint(model))
            except Exception:  # a bug of ours; what strangers announce may find it, and shall not end the monitor
                _logger.exception("a probe of %s failed", model.model.name)
                self.latencies.failed(_fingerprint(model))


def _fingerprint(model: ModelPicture) -> str:
    return model.model.fingerprint
