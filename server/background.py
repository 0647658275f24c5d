"""Work that the end of the program does not wait for, and work that is not left half done."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


async def in_daemon_thread(function: Callable[[], Result]) -> Result:
    """What `function` returns or raises.

    Like `asyncio.to_thread`, for what may take minutes, such as loading a model: whoever is told to stop meanwhile
    ends at once, while the threads of asyncio's pool are waited for.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(resolve: Callable[[], None]) -> None:
        def unless_given_up() -> None:
            if not future.done():
                resolve()

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(unless_given_up)

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            settle(lambda error=error: future.set_exception(error))  # type: ignore[misc]
        else:
            settle(lambda: future.set_result(result))

    threading.Thread(target=run, name="background", daemon=True).start()
    return await future


async def uninterrupted(work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns or raises. Whoever cancels this waits until it is done; only twice is in earnest."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        try:
            await task
        except Exception as error:  # it must not take the place of the cancellation, which somebody waits for
            logger.error("what was to be done before the end failed: %r", error)
        raise
