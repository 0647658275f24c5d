"""Adapters that come from the hub while the server runs, one at a time, for whoever waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from swarm.errors import AdapterNotHere

#: Adapters that are fetched or wait for their turn; whoever wants another one goes elsewhere.
MAX_FETCHING = 16


class Downloads:
    """For one event loop."""

    def __init__(self, fetch: Callable[[str], Path], arrived: Callable[[str, Path], Awaitable[None]]):
        """fetch: brings an adapter here, in a thread. arrived: told its name and folder."""
        self._fetch = fetch
        self._arrived = arrived
        self._turn = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def bring(self, name: str) -> None:
        """Until it is here. Raises AdapterError, AdapterNotHere while too many others wait."""
        if name not in self._tasks:
            if len(self._tasks) >= MAX_FETCHING:
                raise AdapterNotHere(
                    f"this server fetches {MAX_FETCHING} adapters already; ask again later for {name!r}"
                )
            task = self._tasks[name] = asyncio.create_task(self._download(name))
            task.add_done_callback(lambda _: self._tasks.pop(name))
        await asyncio.shield(self._tasks[name])  # others may wait for it when this client has gone

    async def _download(self, name: str) -> None:
        """A slow hub holds up only who wants something of it, and no server that stops: a thread of a pool would."""
        async with self._turn:
            done = Future[Path]()
            done.set_running_or_notify_cancel()
            action = partial(self._fetch, name)
            threading.Thread(target=_settle, args=(done, action), name="adapter of the hub", daemon=True).start()
            folder = await asyncio.wrap_future(done)
        await self._arrived(name, folder)


def _settle(done: Future[Path], action: Callable[[], Path]) -> None:
    try:
        done.set_result(action())
    except BaseException as error:
        done.set_exception(error)
