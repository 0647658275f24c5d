"""The one child process of a peer: p2pd, which speaks libp2p for it.

hivemind can start p2pd too, but then Ctrl-C reaches it before we have drained, and a peer killed early in its start
leaves it behind for half a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import hivemind
from hivemind.p2p import P2P
from hivemind.utils.multiaddr import Multiaddr

from .errors import NetworkError

logger = logging.getLogger(__name__)

AnyP2P = TypeVar("AnyP2P", bound=P2P)

_P2PD = Path(hivemind.__file__).parent / "hivemind_cli" / "p2pd"

# p2pd must die with us, SIGKILL included, from its first moment on. So the child asks the kernel for that
# (PR_SET_PDEATHSIG), makes sure that we were still there when it asked, and only then becomes p2pd. A preexec_fn would
# do the same but may deadlock in a process with threads. The signal comes when the *thread* that started p2pd ends, so
# the thread of the event loop must live as long as its node: without it the node could not work anyway.
_DIE_WITH_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)})
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

_TERMINATION_GRACE = 2.0  # seconds between SIGTERM and SIGKILL


class P2PDaemon:
    """A running p2pd in a session of its own, so that a terminal's Ctrl-C does not reach it.

    died: set when it exits though nobody asked it to; `death_message` then says how.
    """

    def __init__(self, process: asyncio.subprocess.Process):
        self.died = asyncio.Event()
        self.death_message = ""
        self._process = process
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = False
        self._last_line = "it printed nothing"
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, arguments: list[str], timeout: float) -> P2PDaemon:
        """Start p2pd and wait until its control socket works.

        timeout: seconds. Raises NetworkError with p2pd's last line if it exits or takes longer.
        """
        if not _P2PD.exists():
            raise NetworkError(f"{_P2PD} is missing: the installed hivemind package lacks its daemon; reinstall it")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), str(_P2PD), *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env=_environment(),
        )
        daemon = cls(process)
        try:
            await asyncio.wait_for(daemon._ready, timeout)
        except TimeoutError as error:
            await daemon.stop()
            raise NetworkError(f"p2pd did not start within {timeout:g} s: {daemon._last_line}") from error
        except BaseException:
            await daemon.stop()
            raise
        return daemon

    @property
    def pid(self) -> int:
        return self._process.pid

    async def stop(self) -> None:
        """End p2pd: SIGTERM, then SIGKILL after a grace period. Harmless when repeated."""
        self._stopping = True
        self._send(signal.SIGTERM)
        try:
            await asyncio.wait_for(asyncio.shield(self._watcher), _TERMINATION_GRACE)
        except TimeoutError:
            self._send(signal.SIGKILL)
            await asyncio.shield(self._watcher)

    def _send(self, signal_number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal_number)

    async def _watch(self) -> None:
        """Read what p2pd prints until it ends, then tell whoever waits for it."""
        assert self._process.stdout is not None
        while True:
            try:
                raw = await self._process.stdout.readline()
            except ValueError:  # a line beyond the reader's limit; its buffer is cleared
                continue
            if not raw:
                break
            line = raw.decode(errors="replace").strip()
            logger.debug("p2pd: %s", line)
            if line:
                self._last_line = line
            if line.startswith("Peer ID:") and not self._ready.done():
                self._ready.set_result(None)
        status = await self._process.wait()
        if self._stopping:
            return
        ending = f"by signal {-status}" if status < 0 else f"with status {status}"
        if not self._ready.done():
            self._ready.set_exception(NetworkError(f"p2pd did not start: {self._last_line}"))
            return
        self.death_message = f"p2pd ended {ending}: {self._last_line}"
        self.died.set()


def node_arguments(control: Path, identity: Path, idle_timeout: float, host_maddrs: Sequence[str]) -> list[str]:
    """For a p2pd that talks to nobody but those that it is told to.

    control: its socket. identity: the file with its key. idle_timeout: seconds for somebody to join it.
    host_maddrs: where to listen; nowhere if there are none.
    """
    arguments = {
        "listen": f"/unix{control}",
        "id": str(identity),
        "dhtServer" if host_maddrs else "dhtClient": "1",
        "idleTimeout": f"{idle_timeout:g}s",
        "connManager": "1",
        "tls": "1",
        "relay": "1",  # take part in relayed connections, at either end
        # Relays are left to `relay_service` and `reservations`.
        "relayService": "0",
        "relayDiscovery": "0",
        "autoRelay": "0",
        "natPortMap": "0",
        "autonat": "0",
        "b": "0",
    }
    arguments |= {"hostAddrs": ",".join(host_maddrs)} if host_maddrs else {"noListenAddrs": "1"}
    return [f"-{name}={value}" for name, value in arguments.items()]


async def join_daemon(kind: type[AnyP2P], folder: Path, control: Path) -> AnyP2P:
    """A P2P of this kind, connected to the p2pd behind the socket `control`.

    P2P puts the socket for incoming streams at a class-wide prefix; here it lies in `folder`.
    """
    in_folder: type[AnyP2P] = type("P2PInFolder", (kind,), {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/"})
    joined: AnyP2P = await in_folder.replicate(Multiaddr(f"/unix{control}"))
    return joined


def socket_root() -> str | None:
    """A folder whose name leaves room for a socket's: the kernel allows 107 bytes for the whole path."""
    return None if len(tempfile.gettempdir()) < 60 else "/tmp"


def _environment() -> dict[str, str]:
    return os.environ | {
        "GOLOG_LOG_LEVEL": os.environ.get("GOLOG_LOG_LEVEL", "error"),
        "GOLOG_LOG_FMT": "nocolor",
        # With SO_REUSEPORT two peers of one user could listen on the same port, each getting half of the connections.
        "LIBP2P_TCP_REUSEPORT": "false",
    }
