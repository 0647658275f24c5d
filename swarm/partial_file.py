"""Some parts of a large file that lies elsewhere: each at its own place in a sparse file as long as the whole.

Programs that map the file find every part where its header says; what is not here reads as zeros. Beside it lies a list
of the parts that are here, one line "START END" each, appended to once they are on the disk. So a process that is
killed, or a power cut, loses what came since the last line and nothing else. Whoever fetches locks the list, so that
several processes do not fetch the same.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .byte_ranges import ByteRange, union

#: Seconds between lines of the list: the most work that is lost when the process is killed.
RECORD_PERIOD = 1.0

_LINE = re.compile(r"(\d{1,18}) (\d{1,18})\n")
_CHECKED = "checked\n"
_POLL = 0.2  # seconds


class FileBusy(Exception):
    """Another process has been fetching this file, and nothing of it came."""


class PartialFile:
    """path: of the sparse file. size: of the whole, in bytes. Every method raises OSError."""

    def __init__(self, path: Path, size: int):
        self.path = path
        self.size = size
        self._list = path.with_name(f"{path.name}.parts")

    def parts(self) -> list[ByteRange]:
        """What is here, as `byte_ranges.union` gives it."""
        try:
            # What was cut short, or belongs to another version of the file, counts as absent.
            if self.path.stat().st_size != self.size:
                return []
            return _parse(self._list.read_text(), self.size)
        except (FileNotFoundError, UnicodeDecodeError):
            return []

    @property
    def checked(self) -> bool:
        """Whether the whole file was here and had the right sha256."""
        with suppress(FileNotFoundError, UnicodeDecodeError):
            return _CHECKED in self._list.read_text()
        return False

    @property
    def wants_check(self) -> bool:
        """Whether the whole file is here and its sha256 was not looked at."""
        return self.parts() == [(0, self.size)] and not self.checked

    def lock(self, patience: float, waiting: Callable[[], None] = lambda: None) -> PartialWriter:
        """To write to it. Waits as long as another process makes progress with it.

        patience: seconds without any until FileBusy is raised. waiting: called several times a second; may raise.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._list, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            length, since = -1, time.monotonic()
            while not _try_lock(descriptor):
                if (now := os.fstat(descriptor).st_size) != length:
                    length, since = now, time.monotonic()
                elif time.monotonic() - since > patience:
                    raise FileBusy
                waiting()
                time.sleep(_POLL)
            return PartialWriter(self, descriptor)
        except BaseException:
            os.close(descriptor)
            raise


class PartialWriter:
    """The only one that writes to a partial file. A context manager; `write` may be called from several threads."""

    def __init__(self, file: PartialFile, list_descriptor: int):
        """Made by `PartialFile.lock`."""
        self.file = file
        self._list = list_descriptor
        self._pending: list[ByteRange] = []
        self._recorded = time.monotonic()
        self._lock = threading.Lock()
        self._closed = False
        if not self.file.parts():
            os.ftruncate(self._list, 0)
            file.path.unlink(missing_ok=True)  # and not emptied: somebody may have mapped it
        self._data = os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(self._data, file.size)
        except BaseException:
            os.close(self._data)
            raise

    def write(self, start: int, data: bytes) -> None:
        """Put bytes in their place. They count as present at the latest when the writer is closed."""
        with self._lock:
            if self._closed:  # its descriptor may be another file's by now
                raise ValueError("write to a closed file")
            end = start
            view = memoryview(data)
            while view:
                written = os.pwrite(self._data, view, end)
                end += written
                view = view[written:]
            self._pending.append((start, end))
            due = time.monotonic() - self._recorded > RECORD_PERIOD
            if due:
                self._recorded = time.monotonic()
        if due:
            self.record()

    def record(self) -> None:
        """Note what was written as present, now that it is on the disk."""
        with self._lock:
            pending, self._pending = union(self._pending), []
        if pending:
            os.fdatasync(self._data)
            self._append("".join(f"{start} {end}\n" for start, end in pending))

    def sha256(self) -> str:
        """Of all bytes, in hex digits."""
        with open(self.file.path, "rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()

    def mark_checked(self) -> None:
        self._append(_CHECKED)

    def discard(self) -> None:
        """Forget all that is here."""
        with self._lock:
            self._pending = []
        os.ftruncate(self._list, 0)
        self.file.path.unlink(missing_ok=True)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        try:
            self.record()
        finally:
            os.close(self._data)
            os.close(self._list)

    def __enter__(self) -> PartialWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, text: str) -> None:
        line = text.encode()
        if os.write(self._list, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _parse(text: str, size: int) -> list[ByteRange]:
    """The ranges in a list of parts. A line that was cut short in a power cut is left out."""
    ranges = []
    for line in text.splitlines(keepends=True):
        if (match := _LINE.fullmatch(line)) is not None and int(match[1]) < int(match[2]) <= size:
            ranges.append((int(match[1]), int(match[2])))
    return union(ranges)
