"""Where a server's adapters come from: folders, folders of folders, and the hub."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.adapter_files import FORMATS
from swarm.data_structures import MAX_ADAPTER_NAME, is_adapter_name
from swarm.errors import AdapterError, SwarmError, UsageError

from .registry import AdapterRegistry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What an operator names: `NAME=FOLDER`, `FOLDER`, or the id of an adapter on the hub.

    name: None for a folder of adapters, each named like its own folder. folder: None for an adapter of the hub.
    """

    name: str | None
    folder: Path | None

    @classmethod
    def parse(cls, text: str) -> Source:
        """Raises UsageError for what is neither."""
        name, equals, place = text.rpartition("=")
        folder = Path(place).expanduser().resolve()
        if not folder.is_dir():
            if not equals and re.fullmatch(r"[\w.-]+/[\w.-]+", text):
                return cls(_checked(text, text), None)
            raise UsageError(f"--adapters {text}: there is no folder {place!r}; write FOLDER, NAME=FOLDER or a hub id")
        if not is_adapter(folder):
            if equals:
                raise UsageError(f"--adapters {text}: {place} holds no adapter ({' or '.join(FORMATS)})")
            return cls(None, folder)
        return cls(_checked(name if equals else folder.name, text), folder)


def _checked(name: str, text: str) -> str:
    if not is_adapter_name(name):
        raise UsageError(
            f"--adapters {text}: {name!r} is no name for an adapter: 1 to {MAX_ADAPTER_NAME} characters without spaces"
        )
    return name


def is_adapter(folder: Path) -> bool:
    return any((folder / config).is_file() for config in FORMATS)


async def register_all(registry: AdapterRegistry, sources: Sequence[Source]) -> None:
    """At start, where a bad adapter is an error: each is loaded once. Raises AdapterError or UsageError."""
    for source in sources:
        if source.name is None:
            await look_through(registry, source, strict=True)
        elif source.folder is not None:
            await registry.register(source.name, source.folder)
        elif not registry.fetches:
            raise UsageError(f"--adapters {source.name} is an adapter of the hub: allow that with --adapters-from-hub")
        else:
            await registry.fetch(source.name)
    for name in registry.names():
        await registry.check(name)


async def look_through(registry: AdapterRegistry, source: Source, *, strict: bool = False) -> None:
    """Adapters that came into a folder are available from now on, and those that were taken away are no more.

    strict: raise AdapterError for one that is bad, which else is named in the log and left out.
    """
    assert source.folder is not None
    found = await asyncio.to_thread(_adapters_in, source.folder)
    for name in registry.names_from(source.folder):
        if name not in found:
            logger.info("adapter %s was taken away", name)
            registry.unregister(name)
    for name, folder in found.items():
        try:
            await registry.register(name, folder, shelf=source.folder, try_first=not strict)
        except SwarmError as error:
            if strict:
                raise AdapterError(f"{folder}: {error}") from error
            registry.complain(name, error)
            if name in registry.names_from(source.folder):  # what it was before is gone
                registry.unregister(name)


async def look_again(registry: AdapterRegistry, source: Source) -> None:
    """An adapter named at start that turned out to be gone, or another one, is available once its files can be read."""
    assert source.name is not None and source.folder is not None
    if source.name not in registry.names():
        try:
            await registry.register(source.name, source.folder, try_first=True)
        except SwarmError as error:
            registry.complain(source.name, error)


async def keep_looking(registry: AdapterRegistry, sources: Sequence[Source], period: float) -> None:
    """Look through folders of adapters, and for adapters that went away, once in `period` seconds, for ever."""
    places = [source for source in sources if source.folder is not None]
    while places:
        await asyncio.sleep(period)
        for place in places:
            try:
                await (look_through if place.name is None else look_again)(registry, place)
            except OSError as error:
                logger.warning("cannot look through %s: %s", place.folder, error)
            except (RuntimeError, MemoryError):  # of one adapter, out of memory mostly: the next look may do better
                logger.exception("cannot look through %s", place.folder)


def _adapters_in(folder: Path) -> dict[str, Path]:
    return {entry.name: entry for entry in sorted(folder.iterdir()) if entry.is_dir() and is_adapter(entry)}
