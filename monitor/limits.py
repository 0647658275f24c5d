"""How often strangers may have the monitor do something that costs servers time."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

#: Callers that are told apart at a time; of more, those that called last.
MAX_CALLERS = 1024


class TooOften(Exception):
    """Refused for now. retry_after: seconds until it may be admitted."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Rate:
    """So many in a minute, evenly, and `burst` at once after a while without any.

    Raises ValueError unless per_minute > 0 and burst >= 1.
    """

    per_minute: float
    burst: int

    def __post_init__(self) -> None:
        if not self.per_minute > 0 or self.burst < 1:
            raise ValueError(f"per_minute {self.per_minute} must be positive, burst {self.burst} at least 1")


class TokenBucket:
    """Holds up to `rate.burst` tokens and gains `rate.per_minute` in a minute."""

    def __init__(self, rate: Rate, clock: Callable[[], float]):
        self._rate = rate
        self._clock = clock
        self._tokens = float(rate.burst)
        self._at = clock()

    def wait(self) -> float:
        """Seconds until a token is there; 0: it is."""
        now = self._clock()
        self._tokens = min(self._rate.burst, self._tokens + (now - self._at) * self._rate.per_minute / 60)
        self._at = now
        return max(0.0, 1 - self._tokens) * 60 / self._rate.per_minute

    def take(self) -> None:
        """Only after `wait` said 0."""
        self._tokens -= 1


class Turnstile:
    """Lets one through at a time, and so many in a minute: of all callers together, and of each.

    Not for several threads.
    """

    def __init__(self, total: Rate, each: Rate, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._each = each
        self._total = TokenBucket(total, clock)
        self._callers = OrderedDict[str, TokenBucket]()
        self._busy = False

    @contextmanager
    def admit(self, address: str) -> Iterator[None]:
        """For the time of the work. address: the caller's ip. Raises TooOften, which costs the caller nothing."""
        if self._busy:
            raise TooOften("another one is under way: try again when it has ended", 1.0)
        caller = self._caller(address)
        own_wait, total_wait = caller.wait(), self._total.wait()
        if own_wait or total_wait:
            who = "you have asked" if own_wait >= total_wait else "all callers together have asked"
            wait = max(own_wait, total_wait)
            raise TooOften(f"{who} too often: try again in {math.ceil(wait)} s", wait)
        caller.take()
        self._total.take()
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _caller(self, address: str) -> TokenBucket:
        name = _network_of(address)
        bucket = self._callers.pop(name, None) or TokenBucket(self._each, self._clock)
        self._callers[name] = bucket
        if len(self._callers) > MAX_CALLERS:
            self._callers.popitem(last=False)
        return bucket


def _network_of(address: str) -> str:
    """Who has one IPv6 address has all of its /64."""
    try:
        ip = ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is None:
        return str(int(ip) >> 64)
    return str(ip)
