"""A node in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

from .errors import NetworkError
from .node import Node, NodeConfig

Result = TypeVar("Result")


class NodeThread:
    """A node in a thread of its own, for callers without an event loop.

    p2pd ends when `stop` is called, when this object is collected, and when the process exits.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread, node: Node):
        """For `start` only."""
        self.loop = loop
        self.node = node
        self._finalizer = weakref.finalize(self, _end_thread, loop, thread, node)

    @classmethod
    def start(cls, config: NodeConfig) -> NodeThread:
        """Raises what `Node.start` raises."""
        started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, Node]] = concurrent.futures.Future()
        thread = threading.Thread(target=_run_thread, args=(config, started), name="petswarm-node", daemon=True)
        thread.start()
        loop, node = started.result()
        return cls(loop, thread, node)

    def run(self, coroutine: Coroutine[Any, Any, Result], timeout: float | None = None) -> Result:
        """The coroutine's result, computed in the node's loop. Not to be called from that loop itself.

        timeout: seconds. Raises TimeoutError (the coroutine is cancelled), or what the coroutine raises.
        """
        if not self._finalizer.alive:
            coroutine.close()
            raise NetworkError("this node was stopped")
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()  # also on Ctrl-C; without effect if the coroutine itself raised
            raise

    def stop(self) -> None:
        """End the node and its thread; harmless when repeated."""
        self._finalizer()


def _run_thread(config: NodeConfig, started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, Node]]) -> None:
    """Run a loop with a node in it until somebody stops the loop."""
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        try:
            node = loop.run_until_complete(Node.start(config))
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result((loop, node))
        loop.run_forever()
    finally:
        _cancel_everything(loop)
        loop.close()


def _cancel_everything(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=2.0))
    loop.run_until_complete(loop.shutdown_asyncgens())


def _end_thread(loop: asyncio.AbstractEventLoop, thread: threading.Thread, node: Node) -> None:
    """Stop the node, then its loop. Called once, from any thread: also from the loop's own by garbage collection."""

    async def stop() -> None:
        try:
            await node.stop()
        finally:
            loop.stop()

    with contextlib.suppress(RuntimeError):  # the loop is closed already
        asyncio.run_coroutine_threadsafe(stop(), loop)
    if thread is not threading.current_thread():
        thread.join(timeout=10.0)
