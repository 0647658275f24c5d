"""Of a hub model only the bytes that are needed are fetched, and kept."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
from fake_hub import COMMIT, ask
from hub_checks import INDEX, NOWHERE, SINGLE, assert_equal, block, header_bytes, parts_of, refusal, shard_of

from swarm import hub_parts
from swarm.adapter_files import adapter_digest
from swarm.adapter_hub import find_adapter
from swarm.architectures import architecture_of, span_tensors
from swarm.cache_folder import cache_folder
from swarm.checkpoint import open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.errors import DownloadFailed
from swarm.progress import Progress, StoppableProgress, Stopped
from swarm.server.adapters.fetching import fetch_adapter
from swarm.server.config import ServerConfig
from swarm.server.server import Server

pytestmark = pytest.mark.usefixtures("hub_places")


def test_only_the_bytes_needed_are_fetched(sharded, use_hub):
    hub = use_hub(sharded)
    remote = open_checkpoint("org/tiny")
    names = [*block(3), "model.embed_tokens.weight"]
    assert_equal(remote.read(names), open_checkpoint(str(sharded)).read(names))
    headers = sum(header_bytes(hub.files[shard]) for shard in {shard_of(sharded, name) for name in names})
    assert remote.nbytes(names) + headers <= hub.sent() <= 1.05 * remote.nbytes(names) + headers
    assert not any(file.endswith(".safetensors") for file in hub.whole_files())


def test_another_span_fetches_only_what_is_missing(folder, use_hub):
    hub = use_hub(folder)
    open_checkpoint("org/tiny").fetch([*block(1), *block(2)])
    before = hub.sent()
    again = open_checkpoint("org/tiny")
    again.fetch([*block(1), *block(2)])
    assert hub.sent() == before
    again.fetch([*block(2), *block(3)])
    assert before + again.nbytes(block(3)) <= hub.sent() <= before + 1.05 * again.nbytes(block(3))
    names = [*block(1), *block(2), *block(3)]
    assert_equal(again.read(names), open_checkpoint(str(folder)).read(names))


def test_neighbours_are_fetched_in_one_request(folder, use_hub):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    before = len(hub.large_requests())
    checkpoint.fetch(name for name in checkpoint.tensor_names() if name.startswith("model.layers.2."))
    assert len(hub.large_requests()) == before + 1


def test_a_long_range_goes_over_several_connections(folder, use_hub, monkeypatch):
    monkeypatch.setattr(hub_parts, "REQUEST_BYTES", 10_000)
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    checkpoint.fetch(checkpoint.tensor_names())
    assert len(hub.large_requests()) > len(hub.files[SINGLE]) / 10_000
    assert hub.sent() == len(hub.files[SINGLE])
    assert_equal(checkpoint.read(block(1)), open_checkpoint(str(folder)).read(block(1)))


def test_two_files_with_the_same_contents(sharded, use_hub):
    hub = use_hub(sharded)
    shard = shard_of(sharded, block(3)[0])
    names = [name for name in block(3) if shard_of(sharded, name) == shard]
    hub.files["copy.safetensors"] = hub.files[shard]
    index = json.loads(hub.files[INDEX])
    other = next(name for name, file in index["weight_map"].items() if file == shard and name not in names)
    index["weight_map"][other] = "copy.safetensors"
    hub.files[INDEX] = json.dumps(index).encode()
    assert_equal(open_checkpoint("org/tiny").read([*names, other]), open_checkpoint(str(sharded)).read([*names, other]))


def test_progress_counts_the_bytes_that_were_missing(folder, use_hub):
    hub = use_hub(folder)
    told: list[tuple[int, int]] = []

    class Told(Progress):
        def fetched(self, done: int, total: int) -> None:
            told.append((done, total))

    checkpoint = open_checkpoint("org/tiny")
    before = hub.sent()
    checkpoint.fetch(block(1), Told())
    assert told == sorted(told)
    assert told[-1] == (hub.sent() - before, hub.sent() - before)
    told.clear()
    checkpoint.fetch(block(1), Told())
    assert told == []
    checkpoint.fetch(checkpoint.tensor_names(), Told())  # it is whole now, so it is hashed
    assert [done for done, total in told].count(told[-1][1]) == 1


def test_whoever_watches_can_end_the_download(folder, use_hub):
    hub = use_hub(folder)

    class Impatient(Progress):
        def fetched(self, done: int, total: int) -> None:
            raise KeyboardInterrupt

    checkpoint = open_checkpoint("org/tiny")
    with pytest.raises(KeyboardInterrupt):
        checkpoint.fetch(block(1), Impatient())
    checkpoint.fetch(block(1))
    assert hub.sent() <= header_bytes(hub.files[SINGLE]) + 2 * checkpoint.nbytes(block(1))


def test_what_the_hub_library_has_whole_is_read_there(sharded, use_hub, hashed, tmp_path):
    hub = use_hub(sharded)
    shard = shard_of(sharded, block(3)[0])
    huggingface_hub.hf_hub_download("org/tiny", shard)
    before = hub.sent()
    remote = open_checkpoint("org/tiny")
    names = [name for name in block(3) if shard_of(sharded, name) == shard]
    assert_equal(remote.read(names), open_checkpoint(str(sharded)).read(names))
    assert hub.sent() == before
    for other in sorted(set(json.loads((sharded / INDEX).read_text())["weight_map"].values())):
        huggingface_hub.hf_hub_download("org/tiny", other)
    huggingface_hub.hf_hub_download("org/tiny", INDEX)
    (snapshot,) = (tmp_path / "hub_cache").glob("models--org--tiny/snapshots/*")
    shutil.rmtree(cache_folder(), ignore_errors=True)
    assert open_checkpoint(str(snapshot)).fingerprint() == remote.fingerprint()
    assert hashed == []


def test_a_model_used_before_works_while_the_hub_is_away(sharded, use_hub, monkeypatch, caplog):
    use_hub(sharded)
    before = open_checkpoint("org/tiny")
    expected = before.read(block(3))
    ask(NOWHERE, monkeypatch)
    offline = open_checkpoint("org/tiny")
    assert "using what was downloaded" in caplog.text
    assert offline.fingerprint() == before.fingerprint()
    assert offline.revision == COMMIT
    assert_equal(offline.read(block(3)), expected)
    with pytest.raises(DownloadFailed, match=r"cannot fetch model-.*\.safetensors of org/tiny from the hub"):
        offline.read(block(5))


def test_a_model_of_one_file_works_while_the_hub_is_away(folder, use_hub, monkeypatch):
    hub = use_hub(folder)
    hub.hashes_known = False
    before = open_checkpoint("org/tiny")
    expected = before.read(block(3))
    ask(NOWHERE, monkeypatch)
    offline = open_checkpoint("org/tiny")
    assert offline.fingerprint() == before.fingerprint()
    assert_equal(offline.read(block(3)), expected)


def test_the_librarys_offline_mode_asks_nobody(folder, use_hub, monkeypatch):
    hub = use_hub(folder)
    open_checkpoint("org/tiny").read(block(3))
    before = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = open_checkpoint("org/tiny")
    assert offline.read(block(3)).keys() == set(block(3))
    with pytest.raises(DownloadFailed, match="HF_HUB_OFFLINE"):
        offline.read(block(4))
    assert len(hub.requests) == before


def test_a_whole_file_is_checked_once(folder, use_hub, monkeypatch):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    checkpoint.fetch(checkpoint.tensor_names())
    partial = parts_of(hub.files[SINGLE])
    assert partial.checked
    assert partial.path.read_bytes() == hub.files[SINGLE]
    monkeypatch.setattr("swarm.partial_file.PartialWriter.sha256", lambda *args: pytest.fail("checked again"))
    open_checkpoint("org/tiny").fetch(checkpoint.tensor_names())


def test_a_whole_file_that_was_not_checked_is_checked_the_next_time(folder, use_hub, monkeypatch):
    """The process was ended while it hashed the file."""
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    with monkeypatch.context() as patch:
        patch.setattr(
            "swarm.partial_file.PartialWriter.sha256", lambda writer: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            checkpoint.fetch(checkpoint.tensor_names())
    partial = parts_of(hub.files[SINGLE])
    assert checkpoint.missing(checkpoint.tensor_names()) == 0 and not partial.checked
    before = hub.sent()
    checkpoint.fetch(block(1))
    assert partial.checked
    assert hub.sent() == before


def test_a_whole_file_that_is_damaged_is_removed(folder, use_hub):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    checkpoint.fetch(block(1))
    partial = parts_of(hub.files[SINGLE])
    entry = checkpoint._files.header(SINGLE)[block(1)[0]]
    with partial.path.open("r+b") as file:
        file.seek(entry.start)
        file.write(b"!")
    with pytest.raises(DownloadFailed, match=r"damaged \(its sha256 is not the hub's\), and was removed; try again"):
        checkpoint.fetch(checkpoint.tensor_names())
    assert not partial.path.exists()
    again = open_checkpoint("org/tiny")
    assert_equal(again.read(again.tensor_names()), open_checkpoint(str(folder)).read(again.tensor_names()))


@pytest.mark.parametrize("spoil", [lambda path: os.truncate(path, 100), lambda path: path.unlink()])
def test_a_file_that_lost_its_end_is_fetched_anew(folder, use_hub, spoil):
    hub = use_hub(folder)
    open_checkpoint("org/tiny").fetch(block(1))
    spoil(parts_of(hub.files[SINGLE]).path)
    assert_equal(open_checkpoint("org/tiny").read(block(1)), open_checkpoint(str(folder)).read(block(1)))


def test_what_was_removed_meanwhile_is_fetched_anew(folder, use_hub):
    """While a server was paused, say."""
    use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    checkpoint.fetch(block(1))
    shutil.rmtree(cache_folder())
    assert checkpoint.missing(block(1)) > 0
    for _ in range(2):
        assert_equal(checkpoint.read(block(1)), open_checkpoint(str(folder)).read(block(1)))


def test_what_another_process_discarded_is_fetched_anew(folder, use_hub):
    """It found the file damaged, and began anew with parts of its own. What is not there reads as zeros."""
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    checkpoint.fetch(block(1))
    with parts_of(hub.files[SINGLE]).lock(1.0) as other:
        other.discard()
    open_checkpoint("org/tiny").fetch(block(2))
    assert_equal(checkpoint.read(block(1)), open_checkpoint(str(folder)).read(block(1)))


def test_a_full_disk(folder, use_hub, monkeypatch):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    write = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DownloadFailed, match=r"no room for the model's weights in .*: the disk is full; make room"):
        checkpoint.fetch(block(1))
    monkeypatch.setattr(os, "pwrite", write)
    before = len(hub.requests)
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadFailed, match=r"24\.6KB are needed, 1\.0KB are free; make room, or set PETSWARM_CACHE"):
        checkpoint.fetch(block(1))
    assert len(hub.requests) == before


def test_a_disk_that_fills_up_while_it_is_written_to(folder, use_hub, monkeypatch):
    use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(DownloadFailed, match="the disk is full; make room"):
        checkpoint.fetch(block(1))


def test_another_process_that_hangs(folder, use_hub, monkeypatch):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    checkpoint.fetch(block(1))
    monkeypatch.setattr(hub_parts, "_PATIENCE", 0.0)
    with (
        parts_of(hub.files[SINGLE]).lock(1.0),
        pytest.raises(DownloadFailed, match=r"another process has been downloading model\.safetensors"),
    ):
        checkpoint.fetch(block(2))
    checkpoint.fetch(block(2))


def test_no_file_is_held_while_others_are_fetched(sharded, use_hub):
    """Other processes that wait for it would see no progress, and give up in the end."""
    use_hub(sharded)
    held: list[int] = []

    class Told(Progress):
        def fetched(self, done: int, total: int) -> None:
            lists = (cache_folder() / "hub" / "org--tiny").glob("*.parts")
            held.append(sum(map(_is_locked, lists)))

    checkpoint = open_checkpoint("org/tiny")
    checkpoint.fetch(checkpoint.tensor_names(), Told())
    assert held and max(held) == 1


def _is_locked(path):
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_what_another_process_fetched_meanwhile_is_not_fetched_again(folder, use_hub):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    checkpoint.fetch(block(1))
    told: list[tuple[int, int]] = []
    other = parts_of(hub.files[SINGLE]).lock(1.0)

    class Told(Progress):
        def fetched(self, done: int, total: int) -> None:
            told.append((done, total))
            if len(told) == 1:
                for entry in (checkpoint._files.header(SINGLE)[name] for name in block(2)):
                    other.write(entry.start, hub.files[SINGLE][entry.start : entry.end])
                other.close()

    before = hub.sent()
    checkpoint.fetch(block(2), Told())
    assert hub.sent() == before
    assert told[0] == (0, 0)  # it waits
    assert told[-1] == (checkpoint.nbytes(block(2)),) * 2  # it has come all the same


def test_a_cache_that_cannot_be_written(folder, use_hub, monkeypatch):
    use_hub(folder)
    monkeypatch.setenv("PETSWARM_CACHE", "/proc/nothing-can-be-kept-here")
    assert "cannot keep parts of org/tiny in /proc/nothing-can-be-kept-here/hub/org--tiny: " in refusal("org/tiny")


def test_an_answer_that_names_no_commit(folder, use_hub, monkeypatch):
    use_hub(folder)
    monkeypatch.setattr("fake_hub.COMMIT", "../../../elsewhere")
    assert refusal("org/tiny") == "the hub does not say which commit of org/tiny it has"


def test_the_lists_that_are_kept_may_be_junk(folder, use_hub, monkeypatch):
    use_hub(folder)
    open_checkpoint("org/tiny").read(block(3))
    listing = cache_folder() / "hub" / "org--tiny" / f"{COMMIT}.json"
    ask(NOWHERE, monkeypatch)
    for junk in ("", "[]", '{"model.safetensors": 5}', '{"model.safetensors": [-1, "x"]}'):
        listing.write_text(junk)
        assert "has no *.safetensors files" in refusal("org/tiny")


def test_safetensors_can_read_a_file_with_holes(folder, use_hub):
    """What other programs see of it: the parts that are here at their place, and its true length."""
    hub = use_hub(folder)
    open_checkpoint("org/tiny").fetch(block(1))
    path = parts_of(hub.files[SINGLE]).path
    assert path.stat().st_size == len(hub.files[SINGLE])
    with safetensors.safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor(block(1)[0]), open_checkpoint(str(folder)).read(block(1))[block(1)[0]])


def test_an_adapter_of_a_hub(tmp_path, use_hub):
    """Which one it is, is known without its weights."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    hub = use_hub(folder)
    reference = find_adapter("org/tiny")
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    assert reference.digest == adapter_digest(files)
    assert hub.sent() == 0
    fetched = fetch_adapter("org/tiny", max_bytes=1000)
    assert [(fetched / file.name).read_bytes() for file in files] == [file.read_bytes() for file in files]
    assert hub.sent() == 256


def test_what_is_missing_is_known_before_it_is_fetched(folder, use_hub):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    assert checkpoint.missing(block(1)) == checkpoint.nbytes(block(1))
    assert hub.sent() == header_bytes(hub.files[SINGLE])
    checkpoint.fetch(block(1))
    assert checkpoint.missing(block(1)) == 0
    assert checkpoint.missing([*block(1), *block(2)]) == checkpoint.nbytes(block(2))
    assert open_checkpoint(str(folder)).missing(block(1)) == 0


def test_a_download_that_nobody_wants_any_more_ends(folder, use_hub):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    told = []

    class Told(Progress):
        def fetched(self, done: int, total: int) -> None:
            told.append(done)
            progress.stop()

    progress = StoppableProgress(Told())
    names = [name for name in checkpoint.tensor_names() if name.startswith("model.layers.")]
    hub.slow_after = hub.sent() + 1000
    with pytest.raises(Stopped):
        checkpoint.fetch(names, progress)
    assert told == [0]


async def test_a_server_fetches_before_it_moves(folder, use_hub):
    hub = use_hub(folder)
    reports = []
    server = Server(ServerConfig(model="org/tiny"), report=reports.append)
    checkpoint = open_checkpoint("org/tiny")
    server._setup = SimpleNamespace(checkpoint=checkpoint)
    span = BlockSpan(start=1, end=3)
    assert await server.prepare(span)
    assert reports == ["fetching blocks 1:3, where the swarm needs this server more"]
    before = hub.sent()
    assert not await server.prepare(span)
    checkpoint.fetch(span_tensors(architecture_of(checkpoint.config), checkpoint.tensor_names(), span))
    assert hub.sent() == before


async def test_a_server_that_is_told_otherwise_stops_fetching(folder, use_hub):
    hub = use_hub(folder)
    server = Server(ServerConfig(model="org/tiny"))
    checkpoint = open_checkpoint("org/tiny")
    server._setup = SimpleNamespace(checkpoint=checkpoint)
    hub.slow_after = hub.sent() + 1000
    preparing = asyncio.create_task(server.prepare(BlockSpan(start=1, end=3)))
    async with asyncio.timeout(60):
        while hub.sent() <= hub.slow_after:
            await asyncio.sleep(0.01)
        preparing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await preparing
        partial = parts_of(hub.files[SINGLE])
        (await asyncio.to_thread(partial.lock, 60.0)).close()  # which nobody holds any more
    assert checkpoint.missing(checkpoint.tensor_names()) > 0
