"""The parts of a hub model's weight files that this machine needs, kept in the cache folder and added to over time.

A part has no hash that it could be checked against, so it is as trustworthy as the connection to the hub; headers and
lengths are checked. A file that has become whole is checked against the sha256 that the hub says.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import ByteSize

from .byte_ranges import ByteRange, bridged, cut, missing, nbytes, union
from .cache_folder import cache_folder, replace_file
from .errors import DownloadFailed, ModelNotFound
from .partial_file import FileBusy, PartialFile, PartialWriter
from .progress import QUIET, Progress
from .range_download import LONGEST_WAIT, REQUEST_BYTES, Piece, download
from .weight_files import LENGTH_BYTES, Header, header_length, parse_header

logger = logging.getLogger(__name__)

#: Of the bytes that are needed, this part may be fetched besides, if that saves requests.
_SLACK = 1 / 50
#: Wait for another process that downloads the same file, as long as something comes within this many seconds.
_PATIENCE = LONGEST_WAIT + 60.0
_REPORT_PERIOD = 0.1  # seconds
_SHA256 = re.compile(r"[0-9a-f]{64}")


class RemoteFile(NamedTuple):
    """What the hub says of a file. size: in bytes. sha256: in hex digits; None for a small file."""

    size: int
    sha256: str | None


Listing = Mapping[str, RemoteFile]
#: Parts of weight files, by name.
FileRanges = dict[str, tuple[RemoteFile, Sequence[ByteRange]]]


@dataclass(frozen=True)
class HubParts:
    """Parts of the files of one commit. url: of a file. headers: of every request."""

    model: str
    commit: str
    url: Callable[[str], str]
    headers: Mapping[str, str]

    def header(self, file: str, remote: RemoteFile) -> Header:
        """What the header of a weight file says; fetches no more than that. Raises ModelNotFound."""
        label = f"{file} of the hub model {self.model}"
        first_bytes = self._bytes(file, remote, (0, LENGTH_BYTES))
        try:
            end = LENGTH_BYTES + header_length(first_bytes, remote.size, label)
        except ModelNotFound:
            self._discard(file, remote)
            raise
        text = self._bytes(file, remote, (LENGTH_BYTES, end))
        try:
            return parse_header(text, remote.size, label)
        except ModelNotFound:
            self._discard(file, remote)
            raise

    def fetch(self, wanted: FileRanges, progress: Progress) -> dict[str, Path]:
        """Bring these ranges of files here, several at a time, as far as they are not. Returns where the files are.

        Raises DownloadFailed; what has come until then is kept.
        """
        partials = {file: self._partial(file, remote) for file, (remote, _) in wanted.items()}
        with self._disk_errors():
            planned: dict[str, int] = {}
            for file, (_, ranges) in wanted.items():
                absent = _to_fetch(ranges, partials[file].parts())
                if absent or partials[file].wants_check:
                    planned[file] = nbytes(absent)
            meter = _Meter(progress, sum(planned.values()))
            # One file after the other: whoever waits for another process sees that it makes progress with this file.
            for file in sorted(planned):
                remote, ranges = wanted[file]
                with self._locked(partials[file], file, meter.wait) as writer:
                    pieces = self._pieces(file, remote, ranges, writer, meter)
                    meter.expect(nbytes(piece.range for piece in pieces), planned[file])
                    if pieces:
                        self._check_room(meter.left)
                        meter.tick()
                        download(pieces, self.headers)
                        writer.record()
                    self._check_whole(file, remote, writer)
        return {file: partial.path for file, partial in partials.items()}

    def missing(self, wanted: FileRanges) -> int:
        """Bytes of these ranges that are not here."""
        with self._disk_errors():
            return sum(
                nbytes(missing(ranges, self._partial(file, remote).parts()))
                for file, (remote, ranges) in wanted.items()
            )

    def _pieces(
        self, file: str, remote: RemoteFile, ranges: Sequence[ByteRange], writer: PartialWriter, meter: _Meter
    ) -> list[Piece]:
        def write(start: int, data: bytes) -> None:
            with self._disk_errors():
                writer.write(start, data)
            meter.add(len(data))

        def done() -> None:
            with self._disk_errors():
                writer.record()

        return [
            Piece(self.model, file, self.url(file), remote.size, piece, write, done)
            for piece in cut(_to_fetch(ranges, writer.file.parts()), REQUEST_BYTES)
        ]

    def _bytes(self, file: str, remote: RemoteFile, wanted: ByteRange) -> bytes:
        partial = self._partial(file, remote)
        if missing([wanted], partial.parts()):
            self.fetch({file: (remote, [wanted])}, QUIET)
        with self._disk_errors(), open(partial.path, "rb") as data:
            data.seek(wanted[0])
            return data.read(wanted[1] - wanted[0])

    def _discard(self, file: str, remote: RemoteFile) -> None:
        """Of a file whose header is damaged: if it is sound on the hub, the next attempt finds it so."""
        with self._disk_errors(), self._locked(self._partial(file, remote), file) as writer:
            writer.discard()

    def _check_whole(self, file: str, remote: RemoteFile, writer: PartialWriter) -> None:
        """A file of which every part is here: are they the right ones? Raises DownloadFailed."""
        if not writer.file.wants_check:
            return
        if writer.sha256() == remote.sha256:
            writer.mark_checked()
            return
        writer.discard()
        raise DownloadFailed(
            f"what was downloaded of {file} of {self.model} is damaged (its sha256 is not the hub's), and was removed; "
            "try again"
        )

    def _check_room(self, wanted: int) -> None:
        folder = _folder(self.model)
        free = shutil.disk_usage(folder).free
        if wanted > free:
            raise _no_room(folder, f"{_readable(wanted)} are needed, {_readable(free)} are free")

    def _partial(self, file: str, remote: RemoteFile) -> PartialFile:
        return PartialFile(_folder(self.model) / f"{remote.sha256}-{file}", remote.size)

    def _locked(self, partial: PartialFile, file: str, waiting: Callable[[], None] = lambda: None) -> PartialWriter:
        try:
            return partial.lock(_PATIENCE, waiting)
        except FileBusy:
            raise DownloadFailed(
                f"another process has been downloading {file} of {self.model} without any progress for "
                f"{_PATIENCE:g} s; end it, then try again"
            ) from None

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Translate the errors of our own files."""
        try:
            yield
        except OSError as error:
            folder = _folder(self.model)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_room(folder, "the disk is full") from error
            raise DownloadFailed(f"cannot keep parts of {self.model} in {folder}: {error.strerror}") from error


class _Meter:
    """Counts what comes and tells of it, not too often."""

    def __init__(self, progress: Progress, total: int):
        self._total = total
        self._progress = progress
        self._done = 0
        self._told = float("-inf")
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        with self._lock:
            return self._total - self._done

    def expect(self, count: int, planned: int) -> None:
        """So many bytes of a file are fetched, where so many were planned: the rest has come by another process."""
        if count != planned:
            with self._lock:
                self._done += max(0, planned - count)
                self._total += max(0, count - planned)
                self._tell(self._total, final=self._done >= self._total)

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._tell(self._total, final=self._done >= self._total)

    def tick(self) -> None:
        """Nothing came, but this may be the moment to end."""
        with self._lock:
            self._tell(self._total)

    def wait(self) -> None:
        """The same while another process fetches."""
        with self._lock:
            self._tell(0)

    def _tell(self, total: int, *, final: bool = False) -> None:
        now = time.monotonic()
        if final or now - self._told >= _REPORT_PERIOD:
            self._told = now
            self._progress.fetched(self._done, total)


def _to_fetch(wanted: Sequence[ByteRange], present: Sequence[ByteRange]) -> list[ByteRange]:
    """What is missing, with small gaps filled."""
    absent = missing(wanted, present)
    return bridged(absent, int(nbytes(absent) * _SLACK))


def tensor_ranges(header: Header, names: Collection[str]) -> list[ByteRange]:
    """Where these tensors lie in their file, its header included. Raises KeyError."""
    first = min((entry.start for entry in header.values()), default=0)
    return union([(0, first), *((header[name].start, header[name].end) for name in names)])


def save_listing(model: str, commit: str, listing: Listing) -> None:
    """Note what the hub said of a commit, so that the parts that are here can be used while it is away."""
    path = _folder(model) / f"{commit}.json"
    text = json.dumps({file: [remote.size, remote.sha256] for file, remote in listing.items()}, indent=0)
    try:
        if not path.exists() or path.read_text() != text:
            replace_file(path, text)
    except OSError as error:
        logger.warning("cannot write %s, so %s will need the hub next time: %s", path, model, error.strerror)


def saved_listing(model: str, commit: str) -> Listing:
    """What `save_listing` noted; empty if it never did."""
    try:
        entries = json.loads((_folder(model) / f"{commit}.json").read_text())
        return {str(file): remote_file(size, sha256) for file, (size, sha256) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remote_file(size: object, sha256: object) -> RemoteFile:
    """Checked. Raises ValueError for what is no size."""
    if not isinstance(size, int) or not 0 <= size < 2**63:
        raise ValueError(f"{size!r} is no size of a file")
    return RemoteFile(size, sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None)


def _folder(model: str) -> Path:
    return cache_folder() / "hub" / model.replace("/", "--")


def _no_room(folder: Path, reason: str) -> DownloadFailed:
    return DownloadFailed(
        f"no room for the model's weights in {folder}: {reason}; make room, or set PETSWARM_CACHE to another folder"
    )


def _readable(count: int) -> str:
    return ByteSize(count).human_readable(decimal=True)
