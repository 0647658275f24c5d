"""The files that a checkpoint consists of: where they come from, and what their headers say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from .errors import ModelNotFound
from .fingerprint import file_sha256

#: The safetensors library refuses longer headers too.
_MAX_HEADER_BYTES = 100_000_000


class TensorEntry(NamedTuple):
    """What a safetensors header says about one tensor. dtype: the format's own name, for example "BF16"."""

    dtype: str
    nbytes: int


Header = Mapping[str, TensorEntry]


class Files(Protocol):
    """Where the files of a checkpoint come from. Every method raises ModelNotFound, naming the file."""

    def path(self, file: str) -> Path: ...

    def header(self, file: str) -> Header: ...

    def digest(self, file: str) -> str: ...


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


def read_header(path: Path) -> Header:
    """The header of a local safetensors file: 8 bytes of length, JSON, then the tensors' bytes up to the end."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelNotFound(f"{path} is truncated or no safetensors file")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        header = {
            name: TensorEntry(str(entry["dtype"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in entries.items()
        }
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ModelNotFound(f"{path} has a damaged header") from error
    if 8 + length + end != size:
        raise ModelNotFound(f"{path} is truncated: {size} bytes instead of {8 + length + end}")
    return header


def digest_of(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from error


def first_line(error: BaseException) -> str:
    """What an error says, without the advice that libraries append."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
