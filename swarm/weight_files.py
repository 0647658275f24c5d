"""The files that a checkpoint consists of: where they come from, and what their headers say."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from .errors import ModelNotFound
from .fingerprint import file_sha256
from .progress import Progress

#: A safetensors file begins with the length of its header.
LENGTH_BYTES = 8
#: The safetensors library refuses longer headers too.
_MAX_HEADER_BYTES = 100_000_000
#: Asked for more at once, the system reads only the beginning: as much as its read-ahead window holds, by default this.
_READ_AHEAD_BYTES = 2**17


class TensorEntry(NamedTuple):
    """What a safetensors header says about one tensor. dtype: the format's own name, for example "BF16".

    start, end: where its bytes [start, end) lie in the file.
    """

    dtype: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


Header = Mapping[str, TensorEntry]


class Files(Protocol):
    """Where the files of a checkpoint come from. Every method raises ModelNotFound, naming the file."""

    def path(self, file: str) -> Path:
        """A whole file, fetched if need be."""

    def header(self, file: str) -> Header: ...

    def digest(self, file: str) -> str: ...

    def fetch(self, wanted: Mapping[str, Collection[str]], progress: Progress) -> Mapping[str, Path]:
        """Local files from which these tensors can be read. wanted: names of tensors, by weight file.

        The files are whole or as long as the whole, and nothing but header and these tensors need be there.
        """

    def missing(self, wanted: Mapping[str, Collection[str]]) -> int:
        """Bytes of these tensors that `fetch` would have to fetch."""


@dataclass(frozen=True)
class FolderFiles:
    folder: Path
    _headers: dict[str, Header] = field(default_factory=dict)

    def path(self, file: str) -> Path:
        return self.folder / file

    def header(self, file: str) -> Header:
        if file not in self._headers:
            self._headers[file] = read_header(self.path(file))
        return self._headers[file]

    def digest(self, file: str) -> str:
        return digest_of(self.path(file))

    def fetch(self, wanted: Mapping[str, Collection[str]], progress: Progress) -> Mapping[str, Path]:
        return {file: self.path(file) for file in wanted}

    def missing(self, wanted: Mapping[str, Collection[str]]) -> int:
        return 0


def read_header(path: Path) -> Header:
    """The header of a local safetensors file: 8 bytes of length, JSON, then the tensors' bytes up to the end."""
    try:
        size = path.stat().st_size
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing beyond
            length = header_length(file.read(LENGTH_BYTES), size, str(path))
            return parse_header(file.read(length), size, str(path))
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from error


def read_ahead(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """Have the system read just these bytes [start, end) of a file that is mapped, before they are used.

    Where it finds a page missing on use, it reads megabytes around it. Returns at once. Raises OSError.
    """
    with open(path, "rb", buffering=0) as file:
        for start, end in ranges:
            for position in range(start, end, _READ_AHEAD_BYTES):
                length = min(_READ_AHEAD_BYTES, end - position)
                os.posix_fadvise(file.fileno(), position, length, os.POSIX_FADV_WILLNEED)


def header_length(first_bytes: bytes, size: int, label: str) -> int:
    """Bytes of JSON that follow the first 8 of a safetensors file of `size` bytes. Raises ModelNotFound."""
    length = int.from_bytes(first_bytes, "little")
    if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise ModelNotFound(f"{label} is truncated or no safetensors file")
    return length


def parse_header(text: bytes, size: int, label: str) -> Header:
    """What the JSON of a safetensors file of `size` bytes says, checked. Raises ModelNotFound, calling it `label`."""
    first = LENGTH_BYTES + len(text)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        header = {
            name: TensorEntry(str(entry["dtype"]), *(first + offset for offset in entry["data_offsets"]))
            for name, entry in entries.items()
        }
        end = max((entry.end for entry in header.values()), default=first)
        in_order = all(
            type(entry.start) is type(entry.end) is int and first <= entry.start <= entry.end
            for entry in header.values()
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ModelNotFound(f"{label} has a damaged header") from error
    if not in_order:
        raise ModelNotFound(f"{label} has a damaged header")
    if end != size:
        raise ModelNotFound(f"{label} is truncated: {size} bytes instead of {end}")
    return header


def digest_of(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from error


def first_line(error: BaseException) -> str:
    """What an error says, without the advice that libraries append."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
