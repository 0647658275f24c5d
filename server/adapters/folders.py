"""The files of adapters between the time when they are announced and the time when they are needed: they may change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from swarm.errors import AdapterError

from .base import BaseBlocks
from .forms import AdapterForms
from .importing import Manifest, import_adapter, read_manifest

#: (name, bytes, nanoseconds of the last change) of each file in a folder.
Stamp = tuple[tuple[str, int, int], ...]


class Manifests:
    """Of folders, read anew where files changed. For one thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, Stamp], Manifest] = {}

    def of(self, folder: Path) -> Manifest:
        """Raises AdapterError."""
        key = folder, _stamp_of(folder)
        if key not in self._known:
            self._known = {known: each for known, each in self._known.items() if known[0] != folder}
            self._known[key] = read_manifest(folder)
        return self._known[key]


def _stamp_of(folder: Path) -> Stamp:
    """Changes when a file does. Raises AdapterError if the folder is gone."""
    try:
        return tuple(
            (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
            for entry in sorted(folder.iterdir())
            if entry.is_file()
        )
    except OSError as error:
        raise AdapterError(f"cannot read {folder}: {error.strerror}") from error


class FilesChanged(AdapterError):
    """They are not those that were announced. Others with the same contents may come."""


def import_unchanged(folders: Sequence[Path], manifest: Manifest, base: BaseBlocks) -> AdapterForms:
    """From the first folder that holds what was announced. Raises AdapterError."""
    why: Exception | None = None
    for folder in folders:
        try:
            if read_manifest(folder).digest == manifest.digest:
                return import_adapter(folder, base)
        except OSError as error:
            why = error
        except AdapterError as error:
            if _is_unchanged(folder, manifest):
                raise
            why = error
    raise FilesChanged("its files changed or went away after it was announced") from why


def _is_unchanged(folder: Path, manifest: Manifest) -> bool:
    try:
        return read_manifest(folder).digest == manifest.digest
    except (AdapterError, OSError):
        return False
