"""Where a running server takes its owner's wishes, from `swarm servers`, `pause` and `resume` on the same machine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from swarm.errors import ProtocolError, SwarmError, UsageError

from .logs import one_line
from .owner_folder import list_sockets, make_folder
from .owner_messages import MAX_LINE, Action, OwnerAnswer, OwnerRequest, ServerStatus, request_from_line, to_line

logger = logging.getLogger(__name__)

_REQUEST_TIMEOUT = 5.0  # seconds for a request to come, and for an answer to be taken
#: Look once in this many seconds whether the socket is still there: the folder of a user who logs out is removed.
_CHECK_PERIOD = 30.0


class Pausable(Protocol):
    """What the owner may do with a server. All of it on the server's loop, and harmless when repeated."""

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...


class OwnerDesk:
    """Does what the owner asks, one thing after the other."""

    def __init__(self, server: Pausable, describe: Callable[[], ServerStatus]):
        """describe: says how the server is now; asked from its first moment on, before it has a peer id or a model."""
        self._server = server
        self._describe = describe
        self._ready = False
        self._turn = asyncio.Lock()

    def open(self) -> None:
        """The server has started: from now on it can be paused."""
        self._ready = True

    @property
    def status(self) -> ServerStatus:
        status = self._describe()
        return status if self._ready else status.model_copy(update={"state": "starting"})

    async def answer(self, request: OwnerRequest) -> OwnerAnswer:
        """Returns once it is done, or could not be done."""
        try:
            await self._do(request.action)
        except SwarmError as error:
            return OwnerAnswer(server=self.status, error=one_line(error)[:2000])
        except Exception as error:
            logger.exception("could not %s", request.action)
            return OwnerAnswer(server=self.status, error=f"a bug, see the server's log: {error!r}"[:2000])
        return OwnerAnswer(server=self.status)

    async def _do(self, action: Action) -> None:
        if action is Action.STATUS:
            return
        if not self._ready:
            raise UsageError(f"it is still starting; {action} it once it is ready, or end it with SIGTERM")
        async with self._turn:
            await (self._server.pause() if action is Action.PAUSE else self._server.resume())


@asynccontextmanager
async def open_to_owner(desk: OwnerDesk) -> AsyncIterator[None]:
    """Keep a socket by which the owner reaches the desk, while the context lasts. A server serves without it, too."""
    counter = _Counter(desk)
    keeping = asyncio.create_task(counter.keep_open())
    try:
        yield
    finally:
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
        await counter.close()


class _Counter:
    """The socket of one process, and the callers at it."""

    def __init__(self, desk: OwnerDesk):
        self._desk = desk
        self._path: Path | None = None
        self._inode = 0
        self._server: asyncio.Server | None = None
        self._callers: set[asyncio.Task[None]] = set()
        self._complained = False

    async def keep_open(self) -> None:
        await asyncio.to_thread(list_sockets)  # tidies up after servers that were killed
        while True:
            if not self._is_there():
                self._stop_listening()
                try:
                    await self._listen()
                except (OSError, UsageError) as error:
                    if not self._complained:
                        self._complained = True
                        logger.warning("`swarm servers` and `swarm pause` will not find this server: %s", error)
            await asyncio.sleep(_CHECK_PERIOD)

    async def _listen(self) -> None:
        folder = make_folder()
        path, young = folder / f"{os.getpid()}.sock", folder / f"{os.getpid()}.sock.new"
        young.unlink(missing_ok=True)  # of a process that had our number, as below
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(os.fspath(young))
            undo.callback(young.unlink, missing_ok=True)
            young.chmod(0o600)
            listener.listen()
            inode = young.lstat().st_ino
            # Only now it has a name that others look for: whoever finds it can call, and if not, its process is dead.
            young.rename(path)
            self._path, self._inode = path, inode
            self._server = await asyncio.start_unix_server(self._take, sock=listener, limit=MAX_LINE)
            undo.pop_all()

    def _is_there(self) -> bool:
        try:
            return self._path is not None and self._path.lstat().st_ino == self._inode
        except OSError:
            return False

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def close(self) -> None:
        if self._is_there() and self._path is not None:
            self._path.unlink(missing_ok=True)
        self._stop_listening()
        for caller in self._callers:
            caller.cancel()
        await asyncio.gather(*self._callers, return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caller = asyncio.current_task()
        assert caller is not None
        self._callers.add(caller)
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError):
            pass  # the caller is gone, or does not talk
        except asyncio.CancelledError:
            pass  # this server ends; Python 3.11 would complain of a caller's task that was cancelled
        except ProtocolError as error:
            logger.warning("could not read a request of this server's owner: %s", error)
        finally:
            self._callers.discard(caller)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT):
                line = await reader.readline()
        except ValueError as error:
            raise ProtocolError(f"it is over the limit of {MAX_LINE} bytes") from error
        if not line:
            return  # somebody only looked whether we live
        # The caller may give up waiting; what it asked for is done all the same.
        answer = await self._desk.answer(request_from_line(line))
        writer.write(to_line(answer))
        async with asyncio.timeout(_REQUEST_TIMEOUT):
            await writer.drain()
