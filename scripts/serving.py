"""How long-running peers live as commands: READY on stdout, SIGTERM, Ctrl-C or a closed stdin end them in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from .logs import say, say_error

#: After the parent is gone, an orderly end may take this many seconds.
ORPHAN_GRACE = 20.0

#: Once a peer has left the swarm, threads that still load something have this many seconds to end.
THREAD_GRACE = 5.0

#: Leaving takes a second or two, and each step of it gives up after some; this many seconds are more than all together.
LEAVE_GRACE = 60.0


class Peer(Protocol):
    """What `serve` runs: a server or a bootstrap node."""

    async def start(self) -> str: ...

    def stop(self) -> None: ...

    async def serve_until_stopped(self) -> None: ...


class StdinWatch:
    """Notices that standard input closed, from the first moment on: the program that started us is gone."""

    def __init__(self) -> None:
        self._on_close: Callable[[], None] | None = None
        self._closed = False
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="stdin", daemon=True).start()

    def on_close(self, action: Callable[[], None]) -> None:
        """Call `action` (from another thread) when it closes; at once if it did already."""
        with self._lock:
            self._on_close = action
            closed = self._closed
        if closed:
            action()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        _end_after(ORPHAN_GRACE, lambda: os._exit(1))
        with self._lock:
            self._closed = True
            action = self._on_close
        if action is not None:
            action()


def run_until_stopped(make: Callable[[], Coroutine[Any, Any, None]], watch: StdinWatch | None) -> None:
    """Run a peer's coroutine on a fresh event loop; signals and `watch` cancel it."""
    import uvloop

    async def main() -> threading.Timer:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(make())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        if watch is not None:
            watch.on_close(lambda: _ask_to_cancel(loop, task))
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)  # uvloop would leave its own behind, which does nothing any more
        return _end_after(THREAD_GRACE, lambda: os._exit(0))

    uvloop.run(main()).cancel()  # returns once the threads of its pool have ended


def _end_after(seconds: float, end: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def _ask_to_cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Future[None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: we are ending anyway
        loop.call_soon_threadsafe(task.cancel)


async def serve(peer: Peer, on_ready: Callable[[], None] = lambda: None, drain_time: float = 0.0) -> None:
    """Start a peer, say READY, serve. Being cancelled is how it is told to stop: it then ends in order.

    drain_time: seconds that its sessions may take to move. If it has not left LEAVE_GRACE seconds after those, the
    process ends all the same, with 1.
    """
    try:
        address = await peer.start()
    except asyncio.CancelledError:
        say("stopped while starting")
        raise
    on_ready()
    print(f"READY {address}", flush=True)
    serving = asyncio.ensure_future(peer.serve_until_stopped())
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        say("stopping")
        limit = _end_after(drain_time + LEAVE_GRACE, _give_up)
        peer.stop()
        # A second signal ends the drain.
        try:
            await serving
        finally:
            limit.cancel()


def _give_up() -> None:
    say_error("this peer could not leave the swarm in order, so it ends as it is")
    sys.stderr.flush()
    os._exit(1)
