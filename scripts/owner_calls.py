"""How an owner's command finds the servers that this user runs on this machine, and asks them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from swarm.errors import NetworkError, PeerTimeout, ProtocolError, SwarmError, UsageError

from .owner_folder import list_sockets
from .owner_messages import MAX_LINE, Action, OwnerAnswer, OwnerRequest, ServerStatus, answer_from_line, to_line

#: Seconds for a server to say how it is; one that takes longer hangs.
STATUS_TIMEOUT = 5.0
#: Characters of a peer id that name a server.
_SHORTEST_PEER_ID = 4

OwnServer = tuple[Path, ServerStatus]


async def call(path: Path, action: Action, timeout: float) -> OwnerAnswer:
    """Ask the server behind this socket, and wait until it has done it.

    timeout: seconds. Raises PeerTimeout, NetworkError if the server ends meanwhile, or ProtocolError.
    """
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(os.fspath(path), limit=MAX_LINE)
            try:
                writer.write(to_line(OwnerRequest(action=action)))
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError as error:
        raise PeerTimeout(f"it was not done after {timeout:g} s") from error
    except ValueError as error:
        raise ProtocolError(f"its answer is over the limit of {MAX_LINE} bytes") from error
    except OSError as error:
        raise NetworkError(f"it cannot be reached: {error.strerror or error}") from error
    if not line:
        raise NetworkError("it ended meanwhile")
    return answer_from_line(line)


async def own_servers() -> list[OwnServer]:
    """The servers that this user runs here, each with its socket; in the state "hangs" or "unknown"
    if it does not answer, or not in a way that we understand."""
    found = await asyncio.gather(*map(_look, list_sockets()))
    return [server for server in found if server is not None]


async def _look(path: Path) -> OwnServer | None:
    try:
        return path, (await call(path, Action.STATUS, STATUS_TIMEOUT)).server
    except NetworkError:
        return None  # it ended at this moment
    except SwarmError as error:
        state = "hangs" if isinstance(error, PeerTimeout) else "unknown"
        return path, ServerStatus(pid=int(path.stem), state=state)


def choose_servers(servers: Sequence[OwnServer], which: str | None, everyone: bool) -> list[OwnServer]:
    """The servers meant by `which` (a process id, a public name, or the start or end of a peer id), or all, or the only
    one. Raises UsageError that lists them."""
    if which is not None and everyone:
        raise UsageError("name one server, or say --all, but not both")
    if not servers:
        raise UsageError("this user runs no servers on this machine")
    if everyone:
        return list(servers)
    found = [server for server in servers if which is None or _is_called(server[1], which)]
    if len(found) == 1:
        return found
    if which is None:
        raise UsageError(f"several servers run here: name one by its process id, or say --all ({_listed(servers)})")
    if not found:
        raise UsageError(f"no server here is called {which}; there are: {_listed(servers)}")
    raise UsageError(f"several servers here are called {which}: name one by its process id ({_listed(found)})")


def describe(server: ServerStatus) -> str:
    """A server in a few words: how to call it, and what it serves."""
    names = [name for name in (server.public_name, server.peer_id and f"...{server.peer_id[-8:]}") if name]
    return f"{server.pid} ({', '.join(names)})" if names else str(server.pid)


def _listed(servers: Iterable[OwnServer]) -> str:
    return "; ".join(f"{describe(server)} {server.state}" for _, server in servers)


def _is_called(server: ServerStatus, which: str) -> bool:
    part = which.removeprefix("...")  # tables show the end of a peer id so
    by_peer_id = len(part) >= _SHORTEST_PEER_ID and (server.peer_id.startswith(which) or server.peer_id.endswith(part))
    return which == str(server.pid) or (which != "" and which == server.public_name) or by_peer_id
