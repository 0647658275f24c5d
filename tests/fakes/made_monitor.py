"""A monitor over made-up records: its web side, limits and figures without a swarm."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from swarm.data_structures import BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.monitor.monitor import Monitor, MonitorConfig
from swarm.monitor.picture import ModelPicture, Picture
from swarm.monitor.report import ReachabilityReport, TracedHop, TracedStep, TraceReport, TraceRequest
from swarm.routing.snapshot import Snapshot

NUM_BLOCKS = 8
ALICE_ADDRESS = "/ip4/203.0.113.7/tcp/31330"


def record(peer_id: str, start: int, end: int, **known: Any) -> ServerRecord:
    """Of a server as most are; `known` says what is different about this one."""
    usual: dict[str, Any] = {
        "state": ServerState.ONLINE,
        "throughput": 12.5,
        "numerics": "float32/none/cpu",
        "cache_tokens": 1000,
        "cache_tokens_left": 900,
        "decode_times": (0.08, 0.1, 0.2),
    }
    return ServerRecord(peer_id, ServerInfo(span=BlockSpan(start=start, end=end), **usual | known), expires=1e10)


def model_picture(
    records: Iterable[ServerRecord],
    name: str = "llama",
    fingerprint: str = "ab" * 32,
    num_blocks: int = NUM_BLOCKS,
    silent: Iterable[str] = (),
) -> ModelPicture:
    """silent: peer ids of servers that do not answer."""
    known = list(records)
    pings = {one.peer_id: math.inf if one.peer_id in silent else 0.01 for one in known}
    model = ModelInfo(name=name, fingerprint=fingerprint, num_blocks=num_blocks, hidden_size=64)
    return ModelPicture(model, Snapshot.build(num_blocks, known, pings, 0.0))


def usual_picture() -> Picture:
    """A complete model of two servers, and one that lacks blocks 4:8 since QmD does not answer."""
    alice = record("QmA", 0, 4, public_name="<script>alert(1)</script>", running_rows=2, waiting_rows=1)
    whole = model_picture([alice, record("QmB", 4, 8), record("QmJ", 0, 8, state=ServerState.JOINING)])
    broken = model_picture([record("QmC", 0, 4), record("QmD", 4, 8)], "mistral", "cd" * 32, silent=["QmD"])
    return Picture((whole, broken), 1, 1e9, 1e9, addresses={"QmA": (ALICE_ADDRESS,)})


def large_picture(num_servers: int = 1000, num_blocks: int = 80) -> Picture:
    """Servers of up to 20 blocks each, which all know some servers of the block after theirs."""
    rng = random.Random(0)
    spans = []
    for _ in range(num_servers):
        length = rng.randint(4, 20)
        start = rng.randint(0, num_blocks - length)
        spans.append((start, start + length))
    heads = [[f"QmS{number}" for number, span in enumerate(spans) if span[0] == end] for end in range(num_blocks + 1)]
    records = [
        record(
            f"QmS{number}",
            *span,
            next_pings={
                peer: rng.uniform(0.001, 0.1) for peer in rng.sample(heads[span[1]], min(8, len(heads[span[1]])))
            },
        )
        for number, span in enumerate(spans)
    ]
    return Picture((model_picture(records, "large", "ef" * 32, num_blocks),), 1, 1e9, 1e9)


class MadeWatcher:
    """Shows what it is given."""

    def __init__(self, picture: Picture):
        self.picture = picture
        self._news = asyncio.Condition()

    async def show(self, picture: Picture) -> None:
        """Instead of the last one, as the next revision."""
        async with self._news:
            self.picture = replace(picture, revision=self.picture.revision + 1)
            self._news.notify_all()

    async def changed(self, after: int, timeout: float) -> int:
        try:
            async with asyncio.timeout(timeout), self._news:
                await self._news.wait_for(lambda: self.picture.revision > after)
        except TimeoutError:
            pass
        return self.picture.revision

    async def run(self) -> None:
        await asyncio.Event().wait()


class MadeTracer:
    """Answers at once, or with `error`, or once `go` is set; remembers what it was asked."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.asked: list[tuple[str, TraceRequest]] = []

    async def trace(self, model: ModelPicture, request: TraceRequest) -> TraceReport:
        self.asked.append((model.model.fingerprint, request))
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return trace_report(model.model, request)


def trace_report(model: ModelInfo, request: TraceRequest) -> TraceReport:
    """A prompt of 0.2 s after 0.1 s of connecting, then tokens of 0.03 s each."""
    times = {"network": 0.01, "queued": 0.0, "computed": 0.015, "codec": 0.003, "other": 0.001}
    hop = TracedHop(peer_id="QmA", public_name="a", blocks=(0, model.num_blocks), pushed=False, **times)
    return TraceReport(
        model=model.name,
        fingerprint=model.fingerprint,
        made_at=1e9,
        prompt_tokens=request.prompt_tokens,
        connect_time=0.1,
        prompt=TracedStep(total=0.2, codec=0.01, hops=(hop,)),
        token=TracedStep(total=0.03, codec=0.001, hops=(hop,)),
        step_times=(0.03,) * request.new_tokens,
        time_to_first_token=0.3,
        time_per_output_token=0.03,
        predicted_step_time=0.025,
    )


class MadeMonitor(Monitor):
    """Its parts are `watcher`, `tracer`, and `reachability`: what is said of every peer."""

    def __init__(self, picture: Picture | None = None, config: MonitorConfig | None = None):
        self.watcher = MadeWatcher(picture or usual_picture())
        self.tracer = MadeTracer()
        self.reachability = ReachabilityReport(
            peer_id="QmA", reachable=True, way="direct", round_trip=0.01, step=None, reason=None
        )
        super().__init__(self.watcher, self.tracer, self._check, config or MonitorConfig(probe_period=0))

    async def _check(self, peer_id: str) -> ReachabilityReport:
        return self.reachability.model_copy(update={"peer_id": peer_id})


def write_page(folder: Path) -> Path:
    """A page of three files."""
    (folder / "index.html").write_text("<!doctype html><title>Swarm</title>" + "<p>text</p>" * 200)
    (folder / "style.css").write_text("body { color: black }")
    (folder / "app.js").write_text("export {}")
    return folder
