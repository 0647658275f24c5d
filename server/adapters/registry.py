"""Which adapters this server has: their files, which of them are in memory, and who uses them.

Adapters come from folders named at start, from folders of folders that are looked through again and again (so that one
can be put there, or taken away, while the server runs), and where the operator allows it from the hub when somebody
asks. Only what is asked for is loaded, only this span's part of it, and what was not used for longest makes room.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from pydantic import ByteSize

from swarm.adapter_hub import is_hub_name
from swarm.data_structures import MAX_ADAPTER_NAME, MAX_ANNOUNCED_ADAPTERS, AdapterInfo, is_adapter_name
from swarm.errors import AdapterError, AdapterNotHere, CacheFull, EngineError, SwarmError
from swarm.protocol import AdapterRef, RowAdapters

from ..kv_cache import KVCache
from ..recovery import is_out_of_memory
from .applied import Adapter, AppliedAdapters
from .base import BaseBlocks
from .downloads import Downloads
from .folders import FilesChanged, Manifests, import_unchanged
from .forms import AdapterForms
from .importing import Manifest

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Errands(Protocol):
    """What the registry needs of the engine."""

    def run_between(self, action: Callable[[], Result]) -> Future[Result]:
        """Run it on the engine's thread, between two batches."""


class _Place(NamedTuple):
    """Where files of an adapter lie. shelf: the folder of folders in which they were found, if they were."""

    folder: Path
    shelf: Path | None
    from_hub: bool = False


@dataclass(eq=False)
class _Entry:
    """One adapter. names: under which it can be asked for, each with a place of its own: the files may be there
    several times, and any of them may be taken away."""

    manifest: Manifest
    names: dict[str, _Place] = field(default_factory=dict)
    loaded: Adapter | None = None
    users: int = 0
    loading: asyncio.Task[None] | None = None


class Lease:
    """Adapters that stay in the blocks until `release`. rows: one entry for each row, None where it has none."""

    def __init__(self, rows: Sequence[Adapter | None], on_release: ExitStack):
        self.rows = rows
        self._on_release = on_release

    def release(self) -> None:
        """Twice does no harm."""
        self._on_release.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class AdapterRegistry:
    """For one event loop. Times nothing out by itself: whoever waits for a lease bounds his waiting."""

    def __init__(
        self,
        base: BaseBlocks,
        applied: AppliedAdapters,
        cache: KVCache,
        errands: Errands,
        *,
        max_bytes: int,
        max_adapter_bytes: int,
        fetch: Callable[[str, int], Path] | None = None,
        on_change: Callable[[], object] = lambda: None,
    ):
        """max_bytes: of all adapters in memory. max_adapter_bytes: of one, as a file.

        fetch: brings an adapter of the hub here, `fetch(name, max_adapter_bytes)`; None: that is not allowed.
        on_change: told when the list of adapters changes.
        """
        self._base = base
        self._applied = applied
        self._cache = cache
        self._errands = errands
        self._max_bytes = max_bytes
        self._max_adapter_bytes = max_adapter_bytes
        self._downloads = (
            None
            if fetch is None
            else Downloads(lambda name: fetch(name, max_adapter_bytes), partial(self.register, from_hub=True))
        )
        self._on_change = on_change
        self._by_name: dict[str, _Entry] = {}  # least recently used first
        self._by_digest: dict[str, _Entry] = {}
        self._bytes = 0
        self._useless: dict[str, str] = {}  # digests of adapters that cannot be used here, and why
        self._complaints: dict[str, str] = {}
        self._manifests = Manifests()
        # One at a time, on one core: loading must not take the others from the batches that run meanwhile.
        self._worker = ThreadPoolExecutor(1, "adapters", initializer=torch.set_num_threads, initargs=(1,))

    # --- what there is ---

    @property
    def infos(self) -> tuple[AdapterInfo, ...]:
        """What is announced: as many as a record holds, those that were used last."""
        newest = list(self._by_name.items())[-MAX_ANNOUNCED_ADAPTERS:]
        return tuple(AdapterInfo(name, entry.manifest.kind, entry.manifest.digest) for name, entry in newest)

    @property
    def fetches(self) -> bool:
        return self._downloads is not None

    @property
    def loaded_bytes(self) -> int:
        return self._bytes

    def names(self) -> list[str]:
        return list(self._by_name)

    async def check(self, name: str) -> None:
        """Load an adapter, so that one that does not fit is found out. Raises AdapterError."""
        ref = AdapterRef(name, self._by_name[name].manifest.digest)
        with ExitStack() as held:
            await self._acquire(ref, held)

    def names_from(self, shelf: Path) -> list[str]:
        """Names of the adapters that were found in this folder of folders."""
        return [name for name, entry in self._by_name.items() if entry.names[name].shelf == shelf]

    def complain(self, name: str, error: Exception) -> None:
        """Name a bad adapter in the log, once."""
        if self._complaints.get(name) != str(error):
            self._complaints[name] = str(error)
            logger.warning("left out adapter %s: %s", name, error)

    async def fetch(self, name: str) -> None:
        """Bring an adapter of the hub here. Raises AdapterError, AdapterNotHere where that is not allowed."""
        if self._downloads is None:
            raise AdapterNotHere(f"this server has no adapter {name!r}, and takes none from the hub")
        await self._downloads.bring(name)

    async def register(
        self, name: str, folder: Path, *, shelf: Path | None = None, from_hub: bool = False, try_first: bool = False
    ) -> None:
        """Make an adapter available. Raises AdapterError for files that cannot be one, or are too large, for an adapter
        that turned out to be of no use here, and for a name that is none, or that another one from elsewhere has.

        shelf: the folder of folders in which it was found. try_first: import one that is new here, so that nobody is
        offered what would then fail.
        """
        if not is_adapter_name(name):
            raise AdapterError(f"{name!r} is no name for an adapter: 1 to {MAX_ADAPTER_NAME} characters without spaces")
        manifest = await self._work(self._manifests.of, folder)
        if manifest.file_bytes > self._max_adapter_bytes:
            raise AdapterError(
                f"adapter {name!r} has {_shown(manifest.file_bytes)} of weights, more than the limit of "
                f"{_shown(self._max_adapter_bytes)} (--max-adapter-size)"
            )
        if manifest.digest in self._useless:
            raise AdapterError(self._useless[manifest.digest])
        if try_first and manifest.digest not in self._by_digest:
            try:
                self._check_size(await self._work(import_unchanged, [folder], manifest, self._base))
            except AdapterError as error:
                self._note_useless(manifest, error)
                raise
        known = self._by_name.get(name)
        if known is not None and known.manifest.digest == manifest.digest:
            if known.names[name].shelf == shelf:
                known.names[name] = _Place(folder, shelf, from_hub)
            return
        if known is not None and known.names[name].shelf != shelf:
            raise AdapterError(f"another adapter is called {name!r} already, the one in {known.names[name].folder}")
        if known is not None:
            self.unregister(name)
        entry = self._by_digest.setdefault(manifest.digest, _Entry(manifest))
        entry.names[name] = _Place(folder, shelf, from_hub)
        self._by_name[name] = entry
        logger.info("adapter %s: %s, %s", name, manifest.kind, manifest.digest)
        self._on_change()

    def unregister(self, name: str) -> None:
        """Take a name away. Rows that have the adapter keep it; its memory is free once they are gone."""
        entry = self._by_name.pop(name, None)
        if entry is None:
            return
        entry.names.pop(name, None)
        if not entry.names and not entry.users:
            self._forget(entry)
        self._on_change()

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    # --- who uses it ---

    async def lease(self, wanted: RowAdapters | None, num_rows: int) -> Lease:
        """The adapters of a session's rows, loaded if they were not.

        Raises AdapterNotHere, also for one that turns out to be of no use here; CacheFull while too many others are in
        use.
        """
        if wanted is None:
            return Lease([None] * num_rows, ExitStack())
        with ExitStack() as held:
            try:
                adapters = [await self._acquire(ref, held) for ref in wanted.adapters]
            except AdapterError as error:
                raise AdapterNotHere(str(error)) from error
            rows = [None if index < 0 else adapters[index] for index in wanted.rows]
            return Lease(rows, held.pop_all())

    async def _acquire(self, ref: AdapterRef, held: ExitStack) -> Adapter:
        entry = await self._find(ref)
        entry.users += 1  # before anything is waited for: nobody may take it away meanwhile
        held.callback(self._give_back, entry)
        for name in entry.names:
            self._by_name[name] = self._by_name.pop(name)
        if entry.loaded is None:
            if entry.loading is None:
                entry.loading = asyncio.create_task(self._load(ref.name, entry))
            await asyncio.shield(entry.loading)  # others may wait for it when this client has gone
        assert entry.loaded is not None
        return entry.loaded

    async def _find(self, ref: AdapterRef) -> _Entry:
        known = self._by_name.get(ref.name)
        if known is None and is_hub_name(ref.name):
            await self.fetch(ref.name)
        elif known is not None and known.manifest.digest != ref.digest and known.names[ref.name].from_hub:
            await self.fetch(ref.name)  # the hub may have news of it
        entry = self._by_name.get(ref.name)
        if entry is None:
            raise AdapterNotHere(f"this server has no adapter {ref.name!r}")
        if entry.manifest.digest != ref.digest:
            raise AdapterNotHere(
                f"this server's adapter {ref.name!r} is another one ({entry.manifest.digest}) than was asked for "
                f"({ref.digest})"
            )
        return entry

    def _give_back(self, entry: _Entry) -> None:
        entry.users -= 1
        if not entry.users and not entry.names:
            self._forget(entry)

    @property
    def idle_cache_tokens(self) -> int:
        """Tokens of the KV cache that prefixes take which nobody uses: `make_cache_room` gives them back."""
        return self._cache.page_size * sum(self._prefix_pages(entry) for entry in self._idle())

    async def make_cache_room(self, num_rows: int, max_length: int) -> bool:
        """Unload adapters whose prefixes stand where a session wants to. False if it does not fit even so."""
        lacking = self._cache.pages_lacking(num_rows, max_length)
        if self._cache.page_size * lacking > self.idle_cache_tokens:
            return False
        for entry in self._idle():
            if lacking > 0 and (pages := self._prefix_pages(entry)):
                self._unload(entry)
                lacking -= pages
        await asyncio.wrap_future(self._errands.run_between(lambda: None))  # once those are unloaded
        return True

    @staticmethod
    def _prefix_pages(entry: _Entry) -> int:
        row = None if entry.loaded is None else entry.loaded.prefix_row
        return 0 if row is None else len(row.pages)

    # --- memory ---

    async def _load(self, name: str, entry: _Entry) -> None:
        folders = list(dict.fromkeys(place.folder for place in entry.names.values()))
        try:
            forms = await self._work(import_unchanged, folders, entry.manifest, self._base)
            entry.loaded = await self._put_into_blocks(forms)
        except AdapterError as error:
            self._note_useless(entry.manifest, error)
            for other in list(entry.names):
                self.complain(other, error)
                self.unregister(other)
            raise AdapterError(f"adapter {name!r} cannot be used: {error}") from error
        except SwarmError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise CacheFull(
                    f"no memory is left to load adapter {name!r}; use another server, or try again later"
                ) from error
            logger.warning("loading adapter %s failed", name, exc_info=error)
            raise EngineError(f"loading adapter {name!r} failed: {type(error).__name__}: {error}") from error
        finally:
            entry.loading = None
            if not entry.names and not entry.users:  # nobody waited for it
                self._forget(entry)

    def _note_useless(self, manifest: Manifest, error: AdapterError) -> None:
        if not isinstance(error, FilesChanged):  # else it is not the adapter's fault
            self._useless[manifest.digest] = str(error)

    def _check_size(self, forms: AdapterForms) -> None:
        """Raises AdapterError for an adapter that never fits here."""
        if forms.nbytes > self._max_bytes:
            raise AdapterError(
                f"it takes {_shown(forms.nbytes)} here, more than all memory for adapters "
                f"({_shown(self._max_bytes)}, --adapter-memory)"
            )
        if forms.prefix is not None and forms.prefix.num_tokens > self._cache.num_pages * self._cache.page_size:
            raise AdapterError(
                f"its prefix of {forms.prefix.num_tokens} tokens is longer than the whole cache (--cache-tokens)"
            )

    async def _put_into_blocks(self, forms: AdapterForms) -> Adapter:
        self._check_size(forms)
        self._make_room(forms.nbytes)
        self._bytes += forms.nbytes
        try:
            while True:
                try:
                    adding = self._errands.run_between(lambda: self._applied.add(forms, self._cache))
                    return await asyncio.wrap_future(adding)
                except CacheFull:  # for its prefix
                    idle = next((entry for entry in self._idle() if self._prefix_pages(entry)), None)
                    if idle is None:
                        raise
                    self._unload(idle)
        except BaseException:
            self._bytes -= forms.nbytes
            raise

    def _make_room(self, wanted: int) -> None:
        """Raises CacheFull if what is in use leaves less."""
        idle = self._idle()
        while self._bytes + wanted > self._max_bytes:
            if not idle:
                raise CacheFull(
                    f"the adapters in use take {_shown(self._bytes)} of {_shown(self._max_bytes)}, and another one of "
                    f"{_shown(wanted)} does not fit beside them; use another server, or try again later"
                )
            self._unload(idle.pop(0))

    def _idle(self) -> list[_Entry]:
        """Those in memory that nobody uses, least recently used first."""
        entries = dict.fromkeys(self._by_name.values())
        return [entry for entry in entries if entry.loaded is not None and not entry.users]

    def _unload(self, entry: _Entry) -> None:
        adapter = entry.loaded
        if adapter is None:
            return
        entry.loaded = None
        self._bytes -= adapter.forms.nbytes
        logger.info("unloading adapter %s", entry.manifest.digest)
        self._errands.run_between(lambda: self._applied.remove(adapter, self._cache))

    def _forget(self, entry: _Entry) -> None:
        self._unload(entry)
        if self._by_digest.get(entry.manifest.digest) is entry:
            del self._by_digest[entry.manifest.digest]

    async def _work(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, lambda: function(*arguments))


def _shown(num_bytes: int) -> str:
    return ByteSize(num_bytes).human_readable(decimal=True)
