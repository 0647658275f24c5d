"""Several server processes of one private swarm on this machine: for the demo, the benchmarks and the tests.

Every server ends with the program that started it, also if that is killed: it watches its standard input.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from swarm.errors import SwarmError

from .links import Link, LinkPorts, LinkProxy, direct_connections

LOOPBACK = "/ip4/127.0.0.1/tcp/0"

#: What a server's process runs, as `python -m` takes it; the model and the flags of `run-server` follow.
RUN_SERVER = ("swarm.scripts.main", "run-server")


class ServerFailed(SwarmError):
    """A server process ended, or was not ready in time; the message quotes its last words."""


@dataclass(frozen=True)
class ServerSpec:
    """One `run-server` process: its blocks "A:B", or "" to let it choose, and further flags.

    link: what stands between it and everybody else; None: the swarm's.
    program: see `RUN_SERVER`; None: the swarm's.
    listens: without that, others reach it through relays.
    """

    blocks: str
    flags: tuple[str, ...] = ()
    link: Link | None = None
    program: tuple[str, ...] | None = None
    listens: bool = True

    def __str__(self) -> str:
        return f"the server of blocks {self.blocks}" if self.blocks else "the server that chooses its blocks"


class ServerProcess:
    """One `run-server` process on loopback. `address` (of its link, if it has one) and `peer_id` are known once it is
    ready."""

    def __init__(
        self,
        model: str,
        spec: ServerSpec,
        log: Path,
        initial_peers: Sequence[str] = (),
        on_progress: Callable[[str], None] = lambda text: None,
        link: LinkPorts | None = None,
    ):
        """on_progress: told, from another thread, what the server says about its start."""
        self.spec = spec
        self.link = link
        self.address = ""
        self._log = log
        self._on_progress = on_progress
        self._started = time.monotonic()
        self._ready = threading.Event()
        self.seconds_to_ready = 0.0
        peers = ["--new-swarm"] if not initial_peers else ["--initial-peers", ",".join(initial_peers)]
        listen: tuple[str, ...] = ("--host-maddrs", LOOPBACK) if spec.listens else ("--no-listen",)
        if link is not None:
            listen = (*link.flags, "--relay", "never")  # calls back would be one more burden for the link
        command = [sys.executable, "-m", *(spec.program or RUN_SERVER), model, *peers]
        command += ["--blocks", spec.blocks] if spec.blocks else []
        command += [*listen, "--stop-with-stdin", *spec.flags]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us alone: we stop our servers
        )
        for stream, handle in ((self.process.stdout, self._read_stdout), (self.process.stderr, self._read_stderr)):
            threading.Thread(target=handle, args=(stream,), daemon=True).start()

    @property
    def peer_id(self) -> str:
        return self.address.rpartition("/p2p/")[2]

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until_ready(self, timeout: float) -> str:
        """The server's address. Raises ServerFailed if it ends or takes longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self._ready.wait(0.05):
            if self.process.poll() is not None:
                raise ServerFailed(f"{self.spec} ended: {self.last_words()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.spec} was not ready after {timeout:g} s: {self.last_words()}")
        return self.address

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout: float = 30.0) -> int:
        """SIGTERM, and the exit code; SIGKILL if it does not end in time."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return " | ".join(lines[-3:]) or "it said nothing"

    def _read_stdout(self, stream: object) -> None:
        for line in stream:  # type: ignore[attr-defined]
            if line.startswith("READY "):
                self.address = line.split()[1]
                self.seconds_to_ready = time.monotonic() - self._started
                self._ready.set()
                self._on_progress("ready")

    def _read_stderr(self, stream: object) -> None:
        with self._log.open("a") as log:
            for line in stream:  # type: ignore[attr-defined]
                log.write(line)
                log.flush()
                if line.rstrip().endswith("..."):
                    self._on_progress(line.rstrip()[:-3].rstrip())


class LocalSwarm:
    """A private swarm: the first server starts it, the others join. A context manager that leaves nothing behind."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        servers: Sequence[ServerSpec | str],
        *,
        flags: Sequence[str] = (),
        link: Link | None = None,
        program: tuple[str, ...] = RUN_SERVER,
        start_timeout: float = 120.0,
        on_progress: Callable[[int, str], None] = lambda index, text: None,
    ):
        """servers: a spec, or just blocks "A:B", for each. flags: for all of them.

        link, program: for each whose spec has none of its own; without a link a server is reached directly.
        """
        self.model = os.fspath(model)
        self._specs = [spec if isinstance(spec, ServerSpec) else ServerSpec(spec) for spec in servers]
        self._flags = tuple(flags)
        self._link = link
        self._program = program
        self._proxy: LinkProxy | None = None
        self._start_timeout = start_timeout
        self._on_progress = on_progress
        self._logs = tempfile.TemporaryDirectory(prefix="petswarm-logs-")
        self.servers: list[ServerProcess] = []

    @property
    def proxy(self) -> LinkProxy:
        """The process that carries the links of all servers, in the order in which those with a link were added."""
        if self._proxy is None:
            self._proxy = LinkProxy()
        return self._proxy

    @property
    def initial_peers(self) -> list[str]:
        """Addresses of the servers that still run."""
        return [server.address for server in self.servers if server.address and server.process.poll() is None]

    def start(self) -> None:
        """Start all servers; returns when all are ready. Raises ServerFailed, with nothing left running."""
        try:
            first, *others = self._specs
            self.add(first)
            for spec in others:
                self.add(spec, wait=False)
            for server in self.servers:
                server.wait_until_ready(self._start_timeout)
        except BaseException:
            self.stop()
            raise

    def add(self, spec: ServerSpec | str, *, wait: bool = True) -> ServerProcess:
        """Start one more server."""
        spec = spec if isinstance(spec, ServerSpec) else ServerSpec(spec)
        link = spec.link or self._link
        spec = replace(spec, flags=(*self._flags, *spec.flags), link=link, program=spec.program or self._program)
        index = len(self.servers)
        self._on_progress(index, "starting")
        server = ServerProcess(
            self.model,
            spec,
            Path(self._logs.name) / f"server-{index}.log",
            self.initial_peers,
            on_progress=lambda text: self._on_progress(index, text),
            link=None if link is None else self.proxy.add(link),
        )
        self.servers.append(server)
        if wait:
            server.wait_until_ready(self._start_timeout)
        return server

    def direct_connections(self) -> list[str]:
        """Connections of servers at this moment that by-pass their links, described. Each server must have a link."""
        ports = [server.link.server for server in self.servers if server.link is not None]
        assert len(ports) == len(self.servers), "not every server of this swarm has a link"
        return direct_connections(ports, self.proxy.pid)

    def by_peer_id(self, peer_id: str) -> ServerProcess:
        return next(server for server in self.servers if server.peer_id == peer_id)

    def stop(self) -> None:
        """End all servers, in order where they still can, by force after a few seconds. Never fails."""
        for server in self.servers:
            if server.process.poll() is None:
                server.process.terminate()
        deadline = time.monotonic() + 8.0
        for server in self.servers:
            try:
                server.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                server.kill()
        if self._proxy is not None:
            self._proxy.stop()
        self._logs.cleanup()

    def __enter__(self) -> LocalSwarm:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def assert_no_direct_connections(swarm: LocalSwarm) -> None:
    """For tests: whoever talks to a server of this swarm at this moment does so through its link."""
    direct = swarm.direct_connections()
    assert not direct, f"connections by-pass the links: {'; '.join(direct)}"
