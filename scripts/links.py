"""The links of a local swarm, seen from the program that starts it: the proxy's process, ports, bytes, by-passes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from swarm.errors import SwarmError

from .link_line import Link
from .link_proxy import LOCALHOST, request_for

__all__ = ["Link", "LinkBytes", "LinkPorts", "LinkProxy", "direct_connections"]


@dataclass(frozen=True)
class LinkPorts:
    """server: where the server listens. proxy: what it shall announce. Both on 127.0.0.1."""

    server: int
    proxy: int

    @property
    def flags(self) -> tuple[str, ...]:
        """Of `run-server`."""
        address = f"/ip4/{LOCALHOST}/tcp/"
        return "--host-maddrs", f"{address}{self.server}", "--announce-maddrs", f"{address}{self.proxy}"


@dataclass(frozen=True)
class LinkBytes:
    """Delivered so far, each way of one link or of several together. Who connected to a server's link later also hears
    from it through this link: a direction says little about who began."""

    to_server: int = 0
    from_server: int = 0

    @property
    def both(self) -> int:
        return self.to_server + self.from_server

    def __add__(self, other: LinkBytes) -> LinkBytes:
        return LinkBytes(self.to_server + other.to_server, self.from_server + other.from_server)

    def __sub__(self, other: LinkBytes) -> LinkBytes:
        return LinkBytes(self.to_server - other.to_server, self.from_server - other.from_server)


class LinkProxy:
    """The process that carries all links of one swarm. It ends with `stop`, or with this process. From any thread."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "swarm.scripts.link_proxy"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us alone
        )
        self._reserved: list[socket.socket] = []
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    def add(self, link: Link) -> LinkPorts:
        """A new link, with a port for its server that nobody else gets while this proxy lives."""
        reserved = socket.socket()
        # Who sets this option too may listen on a port that others hold without listening; libp2p and ours do.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind((LOCALHOST, 0))
        self._reserved.append(reserved)
        port: int = reserved.getsockname()[1]
        return LinkPorts(port, int(self._ask(request_for(link, port))))

    def counters(self) -> list[LinkBytes]:
        """Of every link, in the order of their making."""
        return [LinkBytes(*both) for both in self._ask("counters")]

    def total(self) -> LinkBytes:
        """Of all links together."""
        return sum(self.counters(), LinkBytes())

    def stop(self) -> None:
        """End the process and all its connections. Harmless when repeated."""
        if self._process.poll() is None:
            self._process.kill()  # it has nothing to tidy up
        self._process.communicate()
        for reserved in self._reserved:
            reserved.close()

    def _ask(self, request: object) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            try:
                print(json.dumps(request), file=self._process.stdin, flush=True)
                answer = self._process.stdout.readline()
            except OSError as error:
                raise SwarmError(f"the link proxy's process ended: {error}") from error
        if not answer:
            raise SwarmError("the link proxy's process ended; its last words are on stderr")
        return json.loads(answer)


def direct_connections(ports: Sequence[int], proxy_pid: int) -> list[str]:
    """Established connections of the servers' own ports that by-pass the proxy, described; each as both ends hold it.

    ports: where the servers listen on this machine. A server also dials from its port; that is no by-pass as long as
    the proxy is at the other end.
    """
    connections = [
        (frozenset((tuple(connection.laddr), tuple(connection.raddr))), connection.pid)
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED
    ]
    proxied = {ends for ends, pid in connections if pid == proxy_pid}
    return sorted(
        f"{' and '.join(f'{host}:{port}' for host, port in sorted(ends))}, held by process {pid}"
        for ends, pid in connections
        if ends not in proxied and any(port in ports for _, port in ends)
    )
