"""What the owner of a monitor may set about its web side."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from .limits import Rate

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

# Somebody who tries things out is not held up, a script that asks all the time is.
_TRACES = Rate(per_minute=20, burst=6)
_TRACES_EACH = Rate(per_minute=10, burst=4)
_REACHABILITY = Rate(per_minute=30, burst=10)
_REACHABILITY_EACH = Rate(per_minute=15, burst=5)


@dataclass(frozen=True)
class WebSettings:
    """hosts: names under which the monitor may be asked, without port, lower case, IPv6 without brackets; None: any.

    Another name in a request means that somebody's name server points it here: his page could read the answers.
    traces, traces_each: test requests, of all callers together and of each. reachability, reachability_each: the same
    of checks whether a peer can be reached.
    max_streams: streams of events at a time.
    heartbeat: seconds after which such a stream says that it is still there.
    """

    hosts: frozenset[str] | None = LOCAL_HOSTS
    traces: Rate = _TRACES
    traces_each: Rate = _TRACES_EACH
    reachability: Rate = _REACHABILITY
    reachability_each: Rate = _REACHABILITY_EACH
    max_streams: int = 256
    heartbeat: float = 15.0

    @staticmethod
    def hosts_for(host: str) -> frozenset[str] | None:
        """What `hosts` should be if the monitor listens on `host`; any, if that stands for all addresses."""
        host = host.strip("[]").lower()
        try:
            ip = ip_address(host)
        except ValueError:  # a name
            return LOCAL_HOSTS | {host}
        return None if ip.is_unspecified else LOCAL_HOSTS | {host, str(ip)}  # browsers shorten IPv6
