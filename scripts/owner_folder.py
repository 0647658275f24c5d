"""Where the servers of this user on this machine leave the sockets by which their owner reaches them.

The folder is private (0700), each socket in it is named by its server's process id. Whoever may write to a socket may
pause its server.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from swarm.errors import UsageError

#: The kernel allows this many bytes for the path of a socket.
_MAX_PATH_BYTES = 107
_SOCKET_NAME = re.compile(r"[1-9][0-9]{0,18}\.sock")
_PROBE_TIMEOUT = 1.0  # seconds; the kernel answers for the process


def folder_candidates() -> list[Path]:
    """Where sockets may lie, the best place first: $PETSWARM_RUNTIME alone if that is set.

    Servers and their owner need not have the same environment (one may be started at boot, where nobody is logged in),
    so a server takes the first of these that it can use, and the owner looks at all.
    """
    if chosen := os.environ.get("PETSWARM_RUNTIME"):
        return [Path(chosen).expanduser().absolute()]
    user = os.geteuid()
    candidates = [Path("/run/user") / str(user) / "petswarm", Path("/tmp") / f"petswarm-{user}"]
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        candidates.insert(0, Path(session).absolute() / "petswarm")
    return list(dict.fromkeys(candidates))


def make_folder() -> Path:
    """The first candidate that exists or can be made, and belongs to this user alone. Raises UsageError."""
    reasons = []
    for folder in folder_candidates():
        try:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            _check_private(folder)
            if len(os.fsencode(folder / f"{2**22}.sock.new")) > _MAX_PATH_BYTES:
                raise UsageError(f"{folder} is too long a name for a socket's folder")
            return folder
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
        except UsageError as error:
            reasons.append(str(error))
    raise UsageError(
        f"there is no private folder for this server's socket ({'; '.join(reasons)}); set PETSWARM_RUNTIME"
    )


def list_sockets() -> list[Path]:
    """The sockets of servers that run. Those that dead processes left behind are removed."""
    return [path for folder in folder_candidates() for path in _sockets_in(folder) if _is_alive(path)]


def _check_private(folder: Path) -> None:
    """Raises UsageError unless it is a folder (and no link to one) of this user, which nobody else may enter.

    Raises OSError if it cannot be looked at.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{folder} is not a folder")
    if status.st_uid != os.geteuid():
        raise UsageError(f"{folder} belongs to another user")
    if status.st_mode & 0o077:
        raise UsageError(f"{folder} is open to other users; make it private: chmod 700 {folder}")


def _sockets_in(folder: Path) -> Iterator[Path]:
    try:
        _check_private(folder)
        paths = sorted(folder.iterdir())
    except (OSError, UsageError):
        return  # no server of ours uses such a folder
    for path in paths:
        with contextlib.suppress(OSError):
            if _SOCKET_NAME.fullmatch(path.name) and stat.S_ISSOCK(path.lstat().st_mode):
                yield path


def _is_alive(path: Path) -> bool:
    """Whether a process listens on this socket; if not, it is removed."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_TIMEOUT)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            # A server listens before its socket has this name, so that nobody takes a young one for dead.
            path.unlink(missing_ok=True)
            return False
        except FileNotFoundError:
            return False
        except OSError:
            return True  # it is busy; whoever calls it will see
    return True
