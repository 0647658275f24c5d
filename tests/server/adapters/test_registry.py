"""Which adapters a server has: loaded once, counted, thrown out when room is needed and nobody uses them."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.data_structures import MAX_ANNOUNCED_ADAPTERS, AdapterRef
from swarm.errors import AdapterError, AdapterNotHere, CacheFull, EngineError, SwarmError, UsageError
from swarm.protocol import RowAdapters, row_adapters
from swarm.server.adapters import folders as folders_module
from swarm.server.adapters import sources as sources_module
from swarm.server.adapters.applied import Adapter
from swarm.server.adapters.downloads import MAX_FETCHING
from swarm.server.adapters.forms import AdapterForms, BlockForms, KeyValuePrefix, LinearForm
from swarm.server.adapters.importing import Manifest
from swarm.server.adapters.registry import AdapterRegistry, Lease
from swarm.server.adapters.sources import Source, keep_looking, look_again, look_through, register_all
from swarm.server.kv_cache import KVCache

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
CPU = torch.device("cpu")
PAGE = 4


def digest_of(text: str) -> str:
    return text.encode().hex()[:16].ljust(16, "0")


def ref(name: str, contents: str | None = None) -> AdapterRef:
    """contents: of its file; None: the name itself."""
    return AdapterRef(name, digest_of(name if contents is None else contents))


def write(folder: Path, contents: str | None = None, *, size: int = 100, prefix: int = 0, bad: str = "") -> Path:
    """An adapter of `size` bytes. bad: why it cannot be imported."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "petswarm_adapter.json").write_text(f"{contents or folder.name}|{size}|{prefix}|{bad}")
    return folder


def _parts(folder: Path) -> tuple[str, int, int, str]:
    contents, size, prefix, bad = (folder / "petswarm_adapter.json").read_text().split("|")
    return contents, int(size), int(prefix), bad


class FakeFiles:
    """Stands in for the importers: a folder's one file says everything."""

    def __init__(self) -> None:
        self.imported: list[str] = []
        self.manifests_read = 0
        self.gate: threading.Event | None = None  # closed: imports wait
        self.entered = threading.Semaphore(0)

    def read_manifest(self, folder: Path) -> Manifest:
        self.manifests_read += 1
        contents, size, _, _ = _parts(folder)
        if contents == "no manifest":
            raise AdapterError("no manifest")
        return Manifest("lora", digest_of(contents), size, "petswarm")

    def import_adapter(self, folder: Path, base: Any) -> AdapterForms:
        contents, size, prefix, bad = _parts(folder)
        self.imported.append(contents)
        self.entered.release()
        if self.gate is not None:
            assert self.gate.wait(LIMIT)
        if bad:
            raise AdapterError(bad)
        keys = torch.zeros(1, 1, prefix, 1, dtype=torch.uint8)
        form = LinearForm(bias_out=torch.zeros(size - 2 * prefix, dtype=torch.uint8))
        return AdapterForms([BlockForms(linear={"x": form})], KeyValuePrefix(keys, keys.clone()) if prefix else None)


class FakeEngine:
    """Errands are run at once, or fail."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def run_between(self, action: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            if self.error is not None:
                raise self.error
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)
        return future


class FakeBlocks:
    """Which adapters are in the blocks. Prefixes take pages of a real cache."""

    def __init__(self) -> None:
        self.present: list[Adapter] = []
        self.num_added = 0

    def add(self, forms: AdapterForms, cache: KVCache) -> Adapter:
        row = None
        if forms.prefix is not None:
            (row,) = cache.admit(1, forms.prefix.num_tokens, lasting=True)
            cache.grow(row, forms.prefix.num_tokens)
        adapter = Adapter(forms, row)
        self.present.append(adapter)
        self.num_added += 1
        return adapter

    def remove(self, adapter: Adapter, cache: KVCache) -> None:
        if adapter.prefix_row is not None:
            cache.release([adapter.prefix_row])
        self.present.remove(adapter)


class Fixture:
    """A registry for 350 bytes: three adapters of 100."""

    def __init__(self, files: FakeFiles, hub: Callable[[str, int], Path] | None = None):
        self.files, self.engine, self.blocks = files, FakeEngine(), FakeBlocks()
        self.cache = KVCache(1, 4 * PAGE, PAGE, CPU, torch.float32)
        self.changes = 0
        self.registry = AdapterRegistry(
            None,  # type: ignore[arg-type]
            self.blocks,  # type: ignore[arg-type]
            self.cache,
            self.engine,
            max_bytes=350,
            max_adapter_bytes=1000,
            fetch=hub,
            on_change=self._changed,
        )

    def _changed(self) -> None:
        self.changes += 1

    async def lease(self, *names: str | AdapterRef | None) -> Lease:
        refs = [ref(name) if isinstance(name, str) else name for name in names]
        async with asyncio.timeout(LIMIT):
            return await self.registry.lease(row_adapters(refs), len(refs))

    @property
    def announced(self) -> list[str]:
        return [info.name for info in self.registry.infos]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFiles]:
    files = FakeFiles()
    monkeypatch.setattr(folders_module, "read_manifest", files.read_manifest)
    monkeypatch.setattr(folders_module, "import_adapter", files.import_adapter)
    yield files
    if files.gate is not None:
        files.gate.set()


@pytest.fixture
def fake(files: FakeFiles) -> Iterator[Fixture]:
    fixture = Fixture(files)
    yield fixture
    fixture.registry.close()


async def register(fake: Fixture, folder: Path, *names: str, **settings: Any) -> None:
    for name in names:
        await fake.registry.register(name, write(folder / name, **settings))


# --- leases --------------------------------------------------------------------------------------------------------


async def test_an_adapter_is_loaded_when_it_is_asked_for_and_once(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a", "b")
    assert (fake.announced, fake.files.imported, fake.blocks.present) == (["a", "b"], [], [])
    with await fake.lease("b", None, "a", "b") as first, await fake.lease("a") as second:
        assert first.rows[0] is first.rows[3] is not None
        assert first.rows[1] is None
        assert first.rows[2] is second.rows[0]
    with await fake.lease("b"):
        assert sorted(fake.files.imported) == ["a", "b"]
    assert fake.registry.loaded_bytes == 200


async def test_rows_without_adapters_need_nothing(fake: Fixture) -> None:
    assert (await fake.registry.lease(None, 3)).rows == [None, None, None]
    assert (await fake.registry.lease(RowAdapters((), (-1, -1)), 2)).rows == [None, None]


async def test_what_was_not_used_for_longest_makes_room(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a", "b", "c", "d")
    adapters = {}
    for name in ("a", "b", "c", "a"):
        with await fake.lease(name) as lease:
            adapters[name] = lease.rows[0]
    with await fake.lease("d") as lease:
        assert fake.blocks.present == [adapters["a"], adapters["c"], lease.rows[0]]
    assert fake.registry.loaded_bytes == 300
    assert fake.announced == ["b", "c", "a", "d"]  # it can be loaded again
    with await fake.lease("b"):
        assert adapters["c"] not in fake.blocks.present


async def test_nothing_in_use_makes_room(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a", "b", "c", "d")
    held = [await fake.lease(name) for name in ("a", "b", "c")]
    again = await fake.lease("a")
    with pytest.raises(CacheFull, match=r"take 300 ?B of 350 ?B.*another one of 100 ?B does not fit"):
        await fake.lease("d")
    held[0].release()
    held[0].release()  # twice does no harm: `again` still has it
    with pytest.raises(CacheFull):
        await fake.lease("d")
    again.release()
    with await fake.lease("d"):
        assert len(fake.blocks.present) == 3
    assert fake.registry.loaded_bytes == 300


async def test_a_lease_that_fails_holds_nothing(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a", "b", "c", "d")
    with pytest.raises(AdapterNotHere, match="no adapter 'missing'"):
        await fake.lease("a", "b", "missing")
    with pytest.raises(CacheFull):
        await fake.lease("a", "b", "c", "d")
    with await fake.lease("d"), await fake.lease("c"), await fake.lease("b"):
        assert fake.registry.loaded_bytes == 300


async def test_other_contents_than_were_asked_for(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a")
    with pytest.raises(AdapterNotHere) as caught:
        await fake.lease(AdapterRef("a", "f" * 16))
    assert digest_of("a") in str(caught.value)
    assert "f" * 16 in str(caught.value)
    assert fake.files.imported == []


async def test_many_ask_at_once_while_it_is_loaded(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a")
    fake.files.gate = threading.Event()
    waiting = [asyncio.create_task(fake.lease("a")) for _ in range(5)]
    await asyncio.to_thread(fake.files.entered.acquire, timeout=LIMIT)
    waiting[0].cancel()  # the one who began it goes away
    await asyncio.wait(waiting[:1])
    fake.files.gate.set()
    leases = await asyncio.gather(*waiting[1:])
    assert len({id(lease.rows[0]) for lease in leases}) == 1
    assert fake.files.imported == ["a"]
    for lease in leases:
        lease.release()
    fake.registry.unregister("a")
    assert fake.blocks.present == []
    assert fake.registry.loaded_bytes == 0


async def test_all_who_waited_went_away_and_so_did_the_name(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a", "b")
    fake.files.gate = threading.Event()
    waiting = asyncio.create_task(fake.lease("a"))
    await asyncio.to_thread(fake.files.entered.acquire, timeout=LIMIT)
    waiting.cancel()
    await asyncio.wait([waiting])
    fake.registry.unregister("a")
    fake.files.gate.set()
    with await fake.lease("b") as lease:  # the one worker is done with "a" by then
        while fake.blocks.num_added < 2 or len(fake.blocks.present) > 1:
            await asyncio.sleep(0)
        assert fake.blocks.present == [lease.rows[0]]
        assert fake.registry.loaded_bytes == 100


# --- names ---------------------------------------------------------------------------------------------------------


async def test_an_adapter_that_is_taken_away_stays_for_those_who_have_it(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a")
    first, second = await fake.lease("a"), await fake.lease("a")
    changes = fake.changes
    fake.registry.unregister("a")
    assert (fake.announced, fake.changes) == ([], changes + 1)
    with pytest.raises(AdapterNotHere, match="no adapter 'a'"):
        await fake.lease("a")
    first.release()
    assert fake.blocks.present == [second.rows[0]]
    second.release()
    assert (fake.blocks.present, fake.registry.loaded_bytes) == ([], 0)
    fake.registry.unregister("a")  # twice does no harm
    assert fake.changes == changes + 1


async def test_an_adapter_that_comes_back_while_it_is_in_use_is_the_same(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a")
    with await fake.lease("a") as first:
        fake.registry.unregister("a")
        await register(fake, tmp_path, "a")
        with await fake.lease("a") as second:
            assert first.rows[0] is second.rows[0]
    assert len(fake.blocks.present) == 1


async def test_equal_contents_under_two_names_are_in_memory_once(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a", "b", contents="same")
    with await fake.lease(ref("a", "same"), ref("b", "same")) as lease:
        assert lease.rows[0] is lease.rows[1]
        assert fake.registry.loaded_bytes == 100
    fake.registry.unregister("a")
    assert len(fake.blocks.present) == 1
    with await fake.lease(ref("b", "same")):
        assert fake.files.imported == ["same"]


@pytest.mark.parametrize("in_use", [False, True])
async def test_files_of_one_of_two_names_are_taken_away(fake: Fixture, tmp_path: Path, in_use: bool) -> None:
    """The other one's are read where they are. Also those of a name that came when the first had gone already."""
    await register(fake, tmp_path, "a", contents="same")
    held = await fake.lease(ref("a", "same")) if in_use else None
    if in_use:  # the shelf was looked through in between
        fake.registry.unregister("a")
    await register(fake, tmp_path, "b", contents="same")
    (tmp_path / "a" / "petswarm_adapter.json").unlink()
    if held is not None:
        held.release()
    await register(fake, tmp_path, "x", "y", "z")
    for name in ("x", "y", "z"):  # whatever was in memory is not any more
        (await fake.lease(name)).release()
    with await fake.lease(ref("b", "same")) as lease:
        assert lease.rows[0] is not None


async def test_a_name_is_given_to_other_contents(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a")
    with await fake.lease("a") as old:
        await register(fake, tmp_path, "a", contents="new")
        with await fake.lease(ref("a", "new")) as new:
            assert old.rows[0] is not new.rows[0]
            assert len(fake.blocks.present) == 2
        with pytest.raises(AdapterNotHere, match="is another one"):
            await fake.lease("a")
    assert len(fake.blocks.present) == 1
    assert [info.digest for info in fake.registry.infos] == [digest_of("new")]


@pytest.mark.parametrize("name", ["", "a b", "ü", "n" * 65, "line\nbreak"])
async def test_names_that_cannot_be_announced(fake: Fixture, tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="is no name for an adapter"):
        await fake.registry.register(name, write(tmp_path / "a"))
    assert fake.announced == []


async def test_more_adapters_than_a_record_holds(fake: Fixture, tmp_path: Path) -> None:
    """Those used last are announced; all of them can be asked for."""
    names = [f"n{number}" for number in range(MAX_ANNOUNCED_ADAPTERS + 3)]
    await register(fake, tmp_path, *names)
    assert fake.announced == names[3:]
    (await fake.lease(names[0])).release()
    assert fake.announced == [*names[4:], names[0]]


# --- bad ones ------------------------------------------------------------------------------------------------------


async def test_an_adapter_that_cannot_be_used_is_no_longer_offered(
    fake: Fixture, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Source(None, tmp_path)
    await register(fake, tmp_path, "good")
    await register(fake, tmp_path, "wrong", bad="made for another base")
    with caplog.at_level(logging.WARNING, "swarm.server.adapters.registry"):
        with await fake.lease("good") as good:
            with pytest.raises(AdapterNotHere, match=r"adapter 'wrong' cannot be used: made for another base"):
                await fake.lease("wrong", "good")
            assert fake.announced == ["good"]
            assert fake.blocks.present == [good.rows[0]]
            changes = fake.changes
            for _ in range(3):
                await look_through(fake.registry, shelf)
        assert (fake.announced, fake.changes) == (["good"], changes), "it is not offered again and again"
        assert [record.message for record in caplog.records] == ["left out adapter wrong: made for another base"]
    write(tmp_path / "wrong", "repaired")
    await look_through(fake.registry, shelf)
    with await fake.lease(ref("wrong", "repaired")):
        assert fake.registry.loaded_bytes == 200


async def test_what_comes_while_the_server_serves_is_tried_before_it_is_offered(fake: Fixture, tmp_path: Path) -> None:
    shelf = Source(None, tmp_path)
    write(tmp_path / "a")
    await look_through(fake.registry, shelf)
    changes = fake.changes
    write(tmp_path / "large", size=351)
    write(tmp_path / "wrong", bad="made for another base")
    for _ in range(3):
        await look_through(fake.registry, shelf)
    assert (fake.announced, fake.changes) == (["a"], changes)
    assert fake.files.imported == ["a", "large", "wrong"]
    assert fake.blocks.present == [], "nothing had to make room for them"


async def test_an_adapter_larger_than_the_limits(fake: Fixture, tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match=r"1.0 ?KB of weights, more than the limit of 1.0 ?KB \(--max-adapter-size\)"
    ):
        await register(fake, tmp_path, "huge", size=1001)
    await register(fake, tmp_path, "large", size=351)  # as a file it is small enough
    with await register_and_lease(fake, tmp_path, "a"):
        with pytest.raises(AdapterNotHere, match="more than all memory for adapters"):
            await fake.lease("large")
        assert (len(fake.blocks.present), fake.registry.loaded_bytes) == (1, 100), "nobody had to make room for it"


async def register_and_lease(fake: Fixture, folder: Path, name: str) -> Lease:
    await register(fake, folder, name)
    return await fake.lease(name)


async def test_files_that_change_after_they_were_announced(fake: Fixture, tmp_path: Path) -> None:
    shelf = Source(None, tmp_path)
    write(tmp_path / "a")
    await look_through(fake.registry, shelf)
    write(tmp_path / "a", "new")
    with pytest.raises(AdapterNotHere, match="files changed or went away"):
        await fake.lease("a")
    assert fake.files.imported == ["a"]
    await look_through(fake.registry, shelf)
    (await fake.lease(ref("a", "new"))).release()
    write(tmp_path / "a")  # and back: it was the files' fault, not the adapter's
    await look_through(fake.registry, shelf)
    (await fake.lease("a")).release()


async def test_an_adapter_named_at_start_whose_files_went_away_and_come_back(
    fake: Fixture, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source("french", tmp_path / "a")
    await fake.registry.register("french", write(tmp_path / "a"))
    write(tmp_path / "a", "no manifest")
    with pytest.raises(AdapterNotHere, match="files changed or went away"):
        await fake.lease(ref("french", "a"))
    for _ in range(2):
        await look_again(fake.registry, source)
    assert fake.announced == []
    assert caplog.text.count("left out adapter french") == 2  # when it was asked for, and of the two looks one
    write(tmp_path / "a", "new")
    await look_again(fake.registry, source)
    (await fake.lease(ref("french", "new"))).release()


async def test_files_that_vanish_before_they_are_read(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a", "b")
    (tmp_path / "a" / "petswarm_adapter.json").unlink()
    with pytest.raises(AdapterNotHere, match="files changed or went away"):
        await fake.lease("a")
    with await fake.lease("b"):
        assert fake.announced == ["b"]


async def test_an_engine_that_ends_while_an_adapter_is_put_in(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a")
    fake.engine.error = EngineError("the server is stopping")
    with pytest.raises(EngineError):
        await fake.lease("a")
    assert fake.registry.loaded_bytes == 0
    fake.engine.error = None
    with await fake.lease("a"):
        assert fake.registry.loaded_bytes == 100


async def test_a_bug_becomes_one_clear_error(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a")
    fake.engine.error = ValueError("a bug")
    with pytest.raises(EngineError, match="loading adapter 'a' failed: ValueError: a bug"):
        await fake.lease("a")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), MemoryError("no memory"), OSError("no disk")])
@pytest.mark.parametrize("where", ["import", "blocks"])
async def test_trouble_that_is_not_the_adapters_fault(
    fake: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    """Who asked is told, nobody else is harmed, and the adapter stays on offer."""

    def fail(*_: Any) -> Any:
        raise error

    await register(fake, tmp_path, "a", "b")
    with await fake.lease("b"):
        with monkeypatch.context() as patch:
            if where == "import":
                patch.setattr(folders_module, "import_adapter", fail)
            else:
                patch.setattr(fake.blocks, "add", fail)
            with pytest.raises(SwarmError, match=r"no memory|files changed|no disk"):
                await fake.lease("a")
        assert fake.registry.loaded_bytes == 100
    if where == "blocks" or not isinstance(error, OSError):
        assert sorted(fake.announced) == ["a", "b"]
        (await fake.lease("a")).release()


async def test_looking_goes_on_whatever_happens(fake: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    errors: list[Exception] = [OSError("gone"), MemoryError(), RuntimeError("odd")]
    looked = asyncio.Event()

    async def look(*_: Any) -> None:
        if errors:
            raise errors.pop()
        looked.set()

    monkeypatch.setattr(sources_module, "look_through", look)
    looking = asyncio.create_task(keep_looking(fake.registry, [Source(None, shelf)], 0.0))
    async with asyncio.timeout(LIMIT):
        await looked.wait()
    looking.cancel()


# --- prefixes ------------------------------------------------------------------------------------------------------


async def test_a_prefix_that_nobody_uses_makes_room_for_another(fake: Fixture, tmp_path: Path) -> None:
    """They take pages of the cache as well."""
    await register(fake, tmp_path, "a", "b", "c", prefix=2 * PAGE)
    first, second = await fake.lease("a"), await fake.lease("b")
    assert fake.cache.tokens_left == 0
    with pytest.raises(CacheFull):
        await fake.lease("c")
    assert fake.registry.loaded_bytes == 200
    first.release()
    with await fake.lease("c") as third:
        assert fake.blocks.present == [second.rows[0], third.rows[0]]
    assert fake.registry.loaded_bytes == 200
    fake.registry.unregister("c")
    assert fake.cache.tokens_left == 2 * PAGE


async def test_prefixes_that_nobody_uses_make_room_for_sessions(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a", "b", "c", prefix=PAGE)
    for name in ("a", "b", "c"):
        (await fake.lease(name)).release()
    with await fake.lease("b"):
        assert (fake.cache.tokens_left, fake.registry.idle_cache_tokens) == (PAGE, 2 * PAGE)
        assert not await fake.registry.make_cache_room(1, 3 * PAGE + 1)
        assert fake.registry.loaded_bytes == 300, "nothing is given up in vain"
        assert await fake.registry.make_cache_room(2, PAGE)
        assert (fake.cache.tokens_left, fake.registry.idle_cache_tokens) == (2 * PAGE, PAGE)
        assert await fake.registry.make_cache_room(1, 3 * PAGE)
        assert (fake.cache.tokens_left, fake.registry.idle_cache_tokens) == (3 * PAGE, 0)
        assert fake.registry.loaded_bytes == 100
    (await fake.lease("a")).release()


async def test_a_prefix_longer_than_the_cache_never_fits(fake: Fixture, tmp_path: Path) -> None:
    await register(fake, tmp_path, "a", prefix=4 * PAGE + 1)
    with pytest.raises(AdapterNotHere, match="prefix of 17 tokens is longer than the whole cache"):
        await fake.lease("a")


# --- shelves and the hub -------------------------------------------------------------------------------------------


async def test_a_shelf_is_looked_through(fake: Fixture, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Source(None, tmp_path)
    write(tmp_path / "a")
    write(tmp_path / "bad", "no manifest")
    write(tmp_path / "no name")
    (tmp_path / "no adapter").mkdir()
    (tmp_path / "a file").write_text("")
    with caplog.at_level(logging.WARNING, "swarm.server.adapters.registry"):
        for _ in range(3):
            await look_through(fake.registry, shelf)
    assert fake.announced == ["a"]
    assert len(caplog.records) == 2, "each bad one is named once"
    assert "no name for an adapter" in caplog.text
    assert "left out adapter bad: no manifest" in caplog.text
    read, changes = fake.files.manifests_read, fake.changes
    write(tmp_path / "b")
    (tmp_path / "a" / "petswarm_adapter.json").unlink()
    await look_through(fake.registry, shelf)
    assert (fake.announced, fake.changes) == (["b"], changes + 2)
    assert fake.files.manifests_read == read + 2 + 1, "only what is new is read, and what is bad anyway"


async def test_contents_of_a_shelf_that_become_bad(fake: Fixture, tmp_path: Path) -> None:
    shelf = Source(None, tmp_path)
    write(tmp_path / "a")
    await look_through(fake.registry, shelf)
    with await fake.lease("a") as lease:
        write(tmp_path / "a", "no manifest")
        await look_through(fake.registry, shelf)
        assert fake.announced == []
        assert fake.blocks.present == [lease.rows[0]]


async def test_a_name_that_two_shelves_have(fake: Fixture, tmp_path: Path) -> None:
    """It does not change hands each time that one of them is looked through."""
    first, second = (Source(None, tmp_path / name) for name in ("first", "second"))
    write(tmp_path / "first" / "a", "one")
    write(tmp_path / "second" / "a", "two")
    write(tmp_path / "second" / "b")
    for _ in range(2):
        for shelf in (first, second):
            await look_through(fake.registry, shelf)
        assert [(info.name, info.digest) for info in fake.registry.infos] == [
            ("a", digest_of("one")),
            ("b", ref("b").digest),
        ]
    with pytest.raises(AdapterError, match="another adapter is called 'a' already"):
        await look_through(fake.registry, second, strict=True)
    (tmp_path / "first" / "a" / "petswarm_adapter.json").unlink()
    for shelf in (first, second):
        await look_through(fake.registry, shelf)
    assert {info.digest for info in fake.registry.infos if info.name == "a"} == {digest_of("two")}


async def test_at_start_a_bad_adapter_is_an_error(fake: Fixture, tmp_path: Path) -> None:
    write(tmp_path / "a")
    await register_all(fake.registry, [Source(None, tmp_path)])
    assert fake.files.imported == ["a"]
    write(tmp_path / "b", bad="wrong base")
    with pytest.raises(AdapterError, match="adapter 'b' cannot be used: wrong base"):
        await register_all(fake.registry, [Source(None, tmp_path)])
    write(tmp_path / "b", "no manifest")
    with pytest.raises(AdapterError, match="b: no manifest"):
        await register_all(fake.registry, [Source(None, tmp_path)])


async def test_more_adapters_at_start_than_memory_holds(fake: Fixture, tmp_path: Path) -> None:
    """Each is tried; those tried first make room."""
    for name in "abcdef":
        write(tmp_path / name)
    await register_all(fake.registry, [Source(None, tmp_path)])
    assert fake.announced == list("abcdef")
    assert fake.registry.loaded_bytes == 300


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{folder}/a", ("a", "a")),
        ("name={folder}/a", ("name", "a")),
        ("{folder}", (None, ".")),
        ("org/name.v-1", ("org/name.v-1", None)),
    ],
)
def test_what_an_operator_names(tmp_path: Path, text: str, expected: tuple[str | None, str | None]) -> None:
    write(tmp_path / "a")
    source = Source.parse(text.format(folder=tmp_path))
    name, place = expected
    assert source == Source(name, None if place is None else (tmp_path / place).resolve())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{folder}/missing", "there is no folder"),
        ("name={folder}/missing", "there is no folder"),
        ("name=org/name", "there is no folder"),
        ("name={folder}", "holds no adapter"),
        ("two words={folder}/a", "is no name"),
        ("={folder}/a", "is no name"),
        ("{folder}/b c", "is no name"),
        ("one/two/three", "there is no folder"),
        ("org/" + "n" * 61, "is no name"),
    ],
)
def test_what_an_operator_cannot_name(tmp_path: Path, text: str, reason: str) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b c")
    with pytest.raises(UsageError, match=reason):
        Source.parse(text.format(folder=tmp_path))


async def test_an_adapter_of_the_hub_comes_when_it_is_asked_for(files: FakeFiles, tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def fetch(name: str, max_bytes: int) -> Path:
        asked.append((name, max_bytes))
        if name == "org/none":
            raise AdapterError("there is no org/none on the hub")
        return write(tmp_path / name)

    fake = Fixture(files, fetch)
    name = AdapterRef("org/a", digest_of("a"))
    with await fake.lease(name), await fake.lease(name, None):
        assert asked == [("org/a", 1000)]
        assert fake.announced == ["org/a"]
    with pytest.raises(AdapterNotHere, match="there is no org/none on the hub"):
        await fake.lease("org/none")
    with pytest.raises(AdapterNotHere, match="no adapter 'local'"):  # names of the hub have a slash
        await fake.lease("local")
    with pytest.raises(AdapterNotHere, match="is another one"):
        await fake.lease(AdapterRef("org/b", "f" * 16))
    fake.registry.close()


async def test_an_adapter_that_changed_on_the_hub_is_fetched_anew(files: FakeFiles, tmp_path: Path) -> None:
    contents = "old"

    def fetch(name: str, max_bytes: int) -> Path:
        return write(tmp_path / contents, contents)

    fake = Fixture(files, fetch)
    old, new = (AdapterRef("org/a", digest_of(each)) for each in ("old", "new"))
    with await fake.lease(old):
        contents = "new"
        with await fake.lease(new):
            assert [info.digest for info in fake.registry.infos] == [digest_of("new")]
            assert len(fake.blocks.present) == 2  # who had the old one keeps it
        with pytest.raises(AdapterNotHere, match="is another one"):
            await fake.lease(old)
    # What the operator put here under such a name stays.
    await fake.registry.register("org/mine", write(tmp_path / "mine"))
    with pytest.raises(AdapterNotHere, match="is another one"):
        await fake.lease(AdapterRef("org/mine", digest_of("new")))
    fake.registry.close()


async def test_the_hub_is_not_asked_unless_the_operator_allows_it(fake: Fixture) -> None:
    assert not fake.registry.fetches
    with pytest.raises(AdapterNotHere, match="takes none from the hub"):
        await fake.lease("org/a")
    with pytest.raises(UsageError, match="--adapters-from-hub"):
        await register_all(fake.registry, [Source("org/a", None)])


async def test_a_slow_hub_holds_up_nobody_else(files: FakeFiles, tmp_path: Path) -> None:
    entered, gate = threading.Semaphore(0), threading.Event()

    def fetch(name: str, max_bytes: int) -> Path:
        entered.release()
        assert gate.wait(LIMIT)
        return write(tmp_path / name)

    fake = Fixture(files, fetch)
    await register(fake, tmp_path, "local")
    slow = [asyncio.create_task(fake.lease(AdapterRef("org/a", digest_of("a")))) for _ in range(2)]
    try:
        await asyncio.to_thread(entered.acquire, timeout=LIMIT)
        with await fake.lease("local") as lease:
            assert lease.rows[0] is not None
    finally:
        gate.set()
    first, second = await asyncio.gather(*slow)
    assert first.rows[0] is second.rows[0]
    fake.registry.close()


async def test_downloads_come_one_at_a_time_also_when_nobody_waits_any_more(files: FakeFiles, tmp_path: Path) -> None:
    entered, gate = threading.Semaphore(0), threading.Event()
    running: list[str] = []
    most: list[int] = []

    def fetch(name: str, max_bytes: int) -> Path:
        running.append(name)
        most.append(len(running))
        entered.release()
        assert gate.wait(LIMIT)
        running.remove(name)
        return write(tmp_path / name)

    fake = Fixture(files, fetch)
    impatient = asyncio.create_task(fake.lease(AdapterRef("org/a", digest_of("a"))))
    await asyncio.to_thread(entered.acquire, timeout=LIMIT)
    impatient.cancel()
    await asyncio.wait([impatient])
    many = [asyncio.create_task(fake.lease(AdapterRef(f"org/{n}", digest_of(str(n))))) for n in range(1, MAX_FETCHING)]
    await asyncio.sleep(0)
    with pytest.raises(AdapterNotHere, match="fetches 16 adapters already"):
        await fake.lease(AdapterRef("org/more", digest_of("more")))
    for task in many[3:]:
        task.cancel()
    gate.set()
    for lease in await asyncio.gather(*many[:3]):
        assert lease.rows[0] is not None
    assert max(most) == 1
    fake.registry.close()


def test_a_server_ends_while_it_downloads() -> None:
    """However slow the hub is."""
    program = """
        import asyncio, threading
        from no_adapters import empty_registry

        async def main():
            started = threading.Event()
            registry = empty_registry(fetch=lambda *_: (started.set(), threading.Event().wait()))
            fetching = asyncio.create_task(registry.fetch("org/a"))
            await asyncio.to_thread(started.wait)
            fetching.cancel()
            registry.close()

        asyncio.run(main())
    """
    path = os.pathsep.join([str(Path(__file__).parents[2] / "fakes"), *sys.path])
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": path},
    )
