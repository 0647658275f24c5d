"""Where a token's time goes: network, queue, device, codec, hop by hop, from clock readings of everybody in the chain.

Nothing here is a remainder: each way between two peers is the difference of two readings, one at each end, by what
`PeerClock` knows of their clocks. Its error is at most half a round trip, and adds up to nothing around the chain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from statistics import fmean

from swarm.rpc import clock

from .block_client import Expected, SpanOutput
from .history import Step
from .pipeline import Hop

#: Steps that a report looks back on.
MAX_STEPS = 256
#: Latest steps of which copies may still be on their way.
MAX_PENDING = 16

SECOND = 1e6  # microseconds


@dataclass(frozen=True)
class HopTimes:
    """What one server took of one step, in seconds.

    network: from its sender to it; where the client takes its output, also from it to us.
    queued, computed, codec: by its own clock, waiting for the device, on the device, and (de)compressing.
    other: the rest of the time between a request's arrival and the answer's departure.
    """

    peer_id: str
    blocks: str
    pushed: bool
    network: float
    queued: float
    computed: float
    codec: float
    other: float

    @property
    def waited(self) -> float:
        """All of it."""
        return self.network + self.queued + self.computed + self.codec + self.other


@dataclass(frozen=True)
class StepTimes:
    """One step, in seconds. before: since the step before it, when the client worked. codec: the client's own part."""

    before: float
    codec: float
    total: float
    hops: tuple[HopTimes, ...]


@dataclass(frozen=True)
class Report:
    """Means over the latest steps of one token per row, in seconds. Steps in which a server was replaced do not count:
    see `InferenceSession.replacements`.

    steps: how many there were of which every server's answer is here. client: between two steps (embeddings, head,
    sampling). codec: the client's own part. total: of all this. unattributed: part of the total that no reading
    explains. pushes: times a server sent straight to the next.
    """

    steps: int
    client: float
    codec: float
    total: float
    hops: tuple[HopTimes, ...]
    pushes: int

    @property
    def unattributed(self) -> float:
        known = self.client + self.codec + sum(hop.waited - hop.other for hop in self.hops)
        return 1 - known / self.total if self.total else 0.0

    def __str__(self) -> str:
        if not self.steps:
            return "no token was generated yet"
        lines = [f"a token took {_ms(self.total)} (mean of {self.steps}), of which in ms:"]
        lines.append(f"{'':24}{'network':>9}{'queue':>9}{'compute':>9}{'codec':>9}{'other':>9}")
        for hop in self.hops:
            numbers = (hop.network, hop.queued, hop.computed, hop.codec, hop.other)
            name = f"{hop.blocks} ...{hop.peer_id[-6:]}{' pushed' if hop.pushed else ''}"
            lines.append(f"{name:24}" + "".join(f"{1e3 * number:9.2f}" for number in numbers))
        lines.append(f"client {_ms(self.client)}, its codec {_ms(self.codec)}, unattributed {self.unattributed:.1%}")
        return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


@dataclass(eq=False)
class StepRecord:
    """Clock readings of one step, in microseconds of our clock."""

    before: int
    started_at: int
    encoded_at: int = 0
    ended_at: int = 0
    counts: bool = False
    answers: list[tuple[Hop, Expected]] = field(default_factory=list)
    times: StepTimes | None = None

    def encoded(self) -> None:
        self.encoded_at = clock()

    def add(self, step: Step, hops: Sequence[Hop], answers: Sequence[Expected], *, disturbed: bool) -> None:
        """A part of the step went through these hops."""
        self.answers += zip(hops, answers, strict=True)
        self.counts = not disturbed and all(row.num_tokens == 1 for row in step.rows)

    def hop_times(self) -> tuple[HopTimes, ...]:
        """Of those whose readings are here: copies may come after the step is done."""
        times = []
        for index, (hop, answer) in enumerate(self.answers):
            if answer.output is None:
                continue
            before = self.answers[index - 1][0] if index else None
            following = self.answers[index + 1][1].output if index + 1 < len(self.answers) else None
            times.append(
                _hop_times(hop, answer.output, before, returns=following is None or not following.report.pushed)
            )
        return tuple(times)

    def freeze(self) -> bool:
        """Work out the times and let go of the tensors. False if some copies are not here yet."""
        if any(answer.output is None for _, answer in self.answers):
            return False
        self.compare_clocks()
        self.times = StepTimes(
            self.before / SECOND,
            (self.encoded_at - self.started_at) / SECOND,
            (self.before + self.ended_at - self.started_at) / SECOND,
            self.hop_times(),
        )
        self.answers = []
        return True

    def compare_clocks(self) -> None:
        """Learn from this step how far the servers' clocks are ahead, which is the same in all steps."""
        before: Hop | None = None
        for hop, answer in self.answers:
            if answer.output is not None:
                report, clock_there = answer.output.report, hop.span.clock
                clock_there.took(report.request_sent_at - _ahead(before, report.pushed), report.received_at)
                clock_there.gave(report.sent_at, answer.output.arrived_at)
            before = hop


def _hop_times(hop: Hop, output: SpanOutput, before: Hop | None, *, returns: bool) -> HopTimes:
    report, offset = output.report, hop.span.clock.ahead
    network = (report.received_at - offset) - (report.request_sent_at - _ahead(before, report.pushed))
    if returns:
        network += output.arrived_at - (report.sent_at - offset)
    inside = report.sent_at - report.received_at
    return HopTimes(
        hop.link.peer_id,
        str(hop.link.span),
        report.pushed,
        network / SECOND,
        report.queue_time / SECOND,
        report.compute_time / SECOND,
        report.codec_time / SECOND,
        (inside - report.queue_time - report.compute_time - report.codec_time) / SECOND,
    )


def _ahead(sender: Hop | None, pushed: bool) -> int:
    """Of the clock that read when a request was sent: ours, unless a server pushed it."""
    return sender.span.clock.ahead if pushed and sender is not None else 0


class Timeline:
    """The latest steps of a session."""

    def __init__(self) -> None:
        self._steps: deque[StepTimes] = deque(maxlen=MAX_STEPS)
        self._last: StepRecord | None = None
        self._pending: deque[StepRecord] = deque(maxlen=MAX_PENDING)

    @contextmanager
    def step(self) -> Iterator[StepRecord]:
        """Times what happens inside. A step that fails is forgotten."""
        now = clock()
        before = 0 if self._last is None else now - self._last.ended_at
        self._settle()
        record = StepRecord(before, now)
        yield record
        record.ended_at = clock()
        self._last = record
        self._pending.append(record)

    @property
    def last_times(self) -> tuple[HopTimes, ...]:
        if self._last is None:
            return ()
        return self._last.hop_times() if self._last.times is None else self._last.times.hops

    def report(self) -> Report:
        self._settle()
        if not self._steps:
            return Report(0, 0.0, 0.0, 0.0, (), 0)
        # a chain that changed has other hops: look at the steps since then
        names = [hop.peer_id for hop in self._steps[-1].hops]
        steps = [step for step in self._steps if [hop.peer_id for hop in step.hops] == names]
        return Report(
            len(steps),
            fmean(step.before for step in steps),
            fmean(step.codec for step in steps),
            fmean(step.total for step in steps),
            tuple(_mean(hops) for hops in zip(*(step.hops for step in steps), strict=True)),
            sum(hop.pushed for step in steps for hop in step.hops),
        )

    def _settle(self) -> None:
        """Take over the steps of which all is known by now."""
        for record in [record for record in self._pending if record.freeze()]:
            self._pending.remove(record)
            if record.counts and record.times is not None:
                self._steps.append(record.times)


def _mean(hops: Sequence[HopTimes]) -> HopTimes:
    seconds = {
        name: fmean(getattr(hop, name) for hop in hops)
        for name in (item.name for item in fields(HopTimes))
        if name not in ("peer_id", "blocks", "pushed")
    }
    return HopTimes(hops[-1].peer_id, hops[-1].blocks, hops[-1].pushed, **seconds)
