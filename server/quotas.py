"""What one peer may take of a server at once: sessions, streams, bytes in flight, requests per second.

More sessions or streams are refused; too many bytes or requests wait, and while they wait the caller reads nothing more
of that stream, so that the network holds the sender back. For one event loop; no thread but its own may call.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from swarm.errors import QuotaExceeded

#: Seconds, the resolution of uvloop's timers. A shorter sleep there is none, and would keep the event loop busy.
_SHORTEST_SLEEP = 1e-3


@dataclass(frozen=True)
class QuotaLimits:
    """For each peer; see `ServerConfig` for what they mean to an operator. All above 0.

    max_bytes_in_flight: bytes of tensors; max_kept_bytes: of those that stay with a session.
    requests_per_second: in the long run; request_burst: at once after a pause.
    """

    max_sessions: int = 256
    max_streams: int = 512
    max_bytes_in_flight: int = 128 * 2**20
    max_kept_bytes: int = 128 * 2**20
    requests_per_second: float = 10_000.0
    request_burst: int = 10_000


class Hold:
    """A part of a peer's quota, until it is released: by `release`, or at the end of a `with`. Twice does no harm."""

    def __init__(self, give_back: Callable[[], None]):
        self._give_back: Callable[[], None] | None = give_back

    @classmethod
    def of_nothing(cls) -> Hold:
        return cls(lambda: None)

    def release(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(slots=True)
class _Usage:
    """What a peer holds, and who waits for it to hold less.

    waiting: calls in the two lines below, and those at their heads. room: set when bytes are given back.
    bucket_full_at: when its token bucket is full again, by the clock of `PeerQuotas`.
    """

    sessions: int = 0
    streams: int = 0
    bytes_in_flight: int = 0
    kept_bytes: int = 0
    waiting: int = 0
    bucket_full_at: float = -math.inf
    byte_line: asyncio.Lock = field(default_factory=asyncio.Lock)
    request_line: asyncio.Lock = field(default_factory=asyncio.Lock)
    room: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def holds_nothing(self) -> bool:
        return not (self.sessions or self.streams or self.bytes_in_flight or self.kept_bytes or self.waiting)


class PeerQuotas:
    """Counts what each peer holds. Of peers that hold nothing it keeps nothing, once their token buckets are full.

    clock: seconds, never running backwards.
    """

    def __init__(self, limits: QuotaLimits, clock: Callable[[], float] = time.monotonic):
        self._limits = limits
        self._clock = clock
        self._peers: dict[str, _Usage] = {}
        # Peers that hold nothing but whose buckets were not full, in the order in which they came to that.
        self._resting: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        """Peers that are remembered."""
        self._forget_rested()
        return len(self._peers)

    def session(self, peer_id: str) -> Hold:
        """Count one session until the hold is released. Raises QuotaExceeded."""
        usage = self._usage(peer_id)
        if usage.sessions >= self._limits.max_sessions:
            raise QuotaExceeded(
                f"this peer has {usage.sessions} sessions open, as many as this server grants to one peer: "
                "close some, or go on elsewhere"
            )
        return self._hold(peer_id, usage, sessions=1)

    def stream(self, peer_id: str) -> Hold:
        """Count one stream until the hold is released. Raises QuotaExceeded.

        A stream may never become a session: the caller gives it a short time, and counts it meanwhile.
        """
        usage = self._usage(peer_id)
        if usage.streams >= self._limits.max_streams:
            raise QuotaExceeded(
                f"this peer has {usage.streams} streams open, as many as this server grants to one peer: "
                "close some, or go on elsewhere"
            )
        return self._hold(peer_id, usage, streams=1)

    def kept(self, peer_id: str, size: int) -> Hold:
        """Count bytes that a session keeps until the hold is released. Raises QuotaExceeded."""
        usage = self._usage(peer_id)
        if usage.kept_bytes + size > self._limits.max_kept_bytes:
            raise QuotaExceeded(
                f"this peer's sessions keep {usage.kept_bytes} bytes here, and {size} more are beyond the "
                f"{self._limits.max_kept_bytes} that this server grants to one peer: close some, or use shorter prompts"
            )
        return self._hold(peer_id, usage, kept=size)

    def check_prompts(self, size: int) -> None:
        """Raises QuotaExceeded for deep prompts of a pass that would be too large for a session, too.

        They stay for one pass alone, so they are not counted; but a single tensor may exceed all bytes in flight.
        """
        if size > self._limits.max_kept_bytes:
            raise QuotaExceeded(
                f"deep prompts of {size} bytes are beyond the {self._limits.max_kept_bytes} that this server grants to "
                "one peer: use shorter ones"
            )

    async def bytes(self, peer_id: str, size: int) -> Hold:
        """Wait until the peer has room for a tensor of this many bytes, then count it until the hold is released.

        First come, first served. More than the limit passes when nothing else of the peer is in flight. Who holds bytes
        may not ask for more for the same work: it could wait for itself. Cancellable, by `asyncio.timeout` too (but
        `asyncio.wait_for` may lose the hold).
        """
        usage = self._usage(peer_id)
        usage.waiting += 1
        try:
            async with usage.byte_line:  # only its head looks for room, so nobody overtakes
                while usage.bytes_in_flight and usage.bytes_in_flight + size > self._limits.max_bytes_in_flight:
                    usage.room.clear()
                    await usage.room.wait()
                return self._hold(peer_id, usage, size=size)
        finally:
            usage.waiting -= 1
            self._rest_if_idle(peer_id, usage)

    async def request(self, peer_id: str) -> None:
        """Wait until the peer may make one more request. First come, first served; a cancelled one does not count."""
        usage = self._usage(peer_id)
        usage.waiting += 1
        try:
            async with usage.request_line:
                while (delay := request_delay(usage.bucket_full_at, self._clock(), self._limits)) > 0:
                    await asyncio.sleep(max(delay, _SHORTEST_SLEEP))
                usage.bucket_full_at = bucket_after_request(usage.bucket_full_at, self._clock(), self._limits)
        finally:
            usage.waiting -= 1
            self._rest_if_idle(peer_id, usage)

    def _usage(self, peer_id: str) -> _Usage:
        self._forget_rested()
        self._resting.pop(peer_id, None)
        usage = self._peers.get(peer_id)
        if usage is None:
            usage = self._peers[peer_id] = _Usage()
        return usage

    def _hold(
        self, peer_id: str, usage: _Usage, *, sessions: int = 0, streams: int = 0, size: int = 0, kept: int = 0
    ) -> Hold:
        usage.sessions += sessions
        usage.kept_bytes += kept
        usage.streams += streams
        usage.bytes_in_flight += size

        def give_back() -> None:
            usage.sessions -= sessions
            usage.kept_bytes -= kept
            usage.streams -= streams
            usage.bytes_in_flight -= size
            if size:
                usage.room.set()
            self._rest_if_idle(peer_id, usage)

        return Hold(give_back)

    def _rest_if_idle(self, peer_id: str, usage: _Usage) -> None:
        if not usage.holds_nothing or self._peers.get(peer_id) is not usage:
            return
        if usage.bucket_full_at <= self._clock():
            del self._peers[peer_id]
        else:  # forgotten now, it would come back with a full bucket
            self._resting[peer_id] = None

    def _forget_rested(self) -> None:
        """Look at the longest resting only: a bucket is full after burst / rate seconds, so none behind it stays longer
        than that."""
        now = self._clock()
        while self._resting:
            peer_id = next(iter(self._resting))
            if self._peers[peer_id].bucket_full_at > now:
                return
            del self._resting[peer_id], self._peers[peer_id]


def request_delay(bucket_full_at: float, now: float, limits: QuotaLimits) -> float:
    """Seconds until a token bucket allows one more request; 0 or less: now.

    The bucket of `request_burst` tokens gains `requests_per_second`. When it will be full says all about it: this is
    the virtual scheduling algorithm of ITU-T I.371, annex A.
    """
    return bucket_after_request(bucket_full_at, now, limits) - now - limits.request_burst / limits.requests_per_second


def bucket_after_request(bucket_full_at: float, now: float, limits: QuotaLimits) -> float:
    """When the bucket is full again if a request takes a token `now`."""
    return max(bucket_full_at, now) + 1 / limits.requests_per_second
