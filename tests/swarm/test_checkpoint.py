"""Checkpoints from folders and from a hub: a real one in miniature, served over HTTP on loopback."""

import hashlib
import http.server
import json
import os
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm import checkpoint as checkpoint_module
from swarm import fingerprint as fingerprint_module
from swarm.cache_folder import cache_folder
from swarm.checkpoint import open_checkpoint
from swarm.errors import ModelNotFound, NotSupported
from swarm.fingerprint import combine, file_sha256
from swarm.hub import find_on_hub

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PETSWARM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def folder(llama, tmp_path):
    """One weight file."""
    llama.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def sharded(llama, tmp_path):
    """Several weight files and an index."""
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


@pytest.fixture
def hashed(monkeypatch):
    """The files whose contents were hashed."""
    seen = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: seen.append(Path(file.name)) or digest(file, name))
    return seen


def block(number):
    return [f"model.layers.{number}.mlp.{part}_proj.weight" for part in ("up", "gate", "down")]


def shard_of(folder, name):
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


def test_a_folder_with_one_file(folder, llama):
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.name, checkpoint.source, checkpoint.revision) == ("tiny", str(folder), None)
    assert checkpoint.config.model_type == "llama"
    assert checkpoint.config.num_hidden_layers == 6
    assert checkpoint.dtype is torch.float32
    expected = dict(llama.named_parameters())
    assert checkpoint.tensor_names() == set(expected)
    for name, tensor in checkpoint.read(checkpoint.tensor_names()).items():
        assert torch.equal(tensor, expected[name])
    assert checkpoint.nbytes(checkpoint.tensor_names()) == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.nbytes(block(3)) == 3 * 32 * 64 * 4


def test_a_folder_with_shards_equals_one_with_one_file(folder, sharded):
    one, many = open_checkpoint(str(folder)), open_checkpoint(str(sharded))
    assert one.tensor_names() == many.tensor_names()
    assert one.nbytes(block(2)) == many.nbytes(block(2))
    expected = one.read(one.tensor_names())
    for name, tensor in many.read(many.tensor_names()).items():
        assert torch.equal(tensor, expected[name])


def test_a_folder_relative_to_here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert open_checkpoint(".").name == "tiny"
    monkeypatch.chdir(folder.parent)
    assert open_checkpoint("tiny").source == str(folder)


def test_only_the_shards_asked_for_are_opened(sharded, monkeypatch):
    opened = []
    real = checkpoint_module.safe_open

    def recording(path, framework):
        opened.append(Path(path).name)
        return real(path, framework=framework)

    monkeypatch.setattr(checkpoint_module, "safe_open", recording)
    checkpoint = open_checkpoint(str(sharded))
    assert opened == []
    checkpoint.read(block(3))
    assert sorted(opened) == sorted({shard_of(sharded, name) for name in block(3)})


def test_tensors_are_views_into_the_mapped_file(folder):
    tensors = open_checkpoint(str(folder)).read(block(1) + block(4))
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(folder / SINGLE)):
            mappings.append([int(address, 16) for address in line.split()[0].split("-")])
    for tensor in tensors.values():
        assert any(start <= tensor.data_ptr() < end for start, end in mappings)


def test_writing_to_a_tensor_leaves_the_file_alone(folder):
    before = (folder / SINGLE).read_bytes()
    open_checkpoint(str(folder)).read(block(1))[block(1)[0]].zero_()
    assert (folder / SINGLE).read_bytes() == before


def test_an_unknown_tensor(folder):
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(ModelNotFound, match=r"tiny has no tensor model\.layers\.6"):
        checkpoint.read(block(6))
    with pytest.raises(ModelNotFound, match=r"tiny has no tensor model\.layers\.6"):
        checkpoint.nbytes(block(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weights_when_the_configuration_is_silent(folder, llama, dtype):
    safetensors.torch.save_file(
        {name: tensor.detach().to(dtype) for name, tensor in llama.named_parameters()}, folder / SINGLE
    )
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(str(folder)).dtype is dtype
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert open_checkpoint(str(folder)).dtype is torch.bfloat16


# Fingerprints


def test_the_fingerprint_is_that_of_the_weights_alone(sharded, tmp_path):
    expected = open_checkpoint(str(sharded)).fingerprint()
    assert len(expected) == 64
    digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in sharded.glob("*.safetensors"))
    assert expected == hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()

    renamed = tmp_path / "renamed"
    shutil.copytree(sharded, renamed)
    weight_map = json.loads((renamed / INDEX).read_text())["weight_map"]
    for file in set(weight_map.values()):
        (renamed / file).rename(renamed / f"other-{file}")
    (renamed / INDEX).write_text(json.dumps({"weight_map": {k: f"other-{v}" for k, v in weight_map.items()}}))
    (renamed / "unused.safetensors").write_bytes(b"not of this model")
    assert open_checkpoint(str(renamed)).fingerprint() == expected


def test_one_changed_value_changes_the_fingerprint(folder):
    before = open_checkpoint(str(folder)).fingerprint()
    contents = bytearray((folder / SINGLE).read_bytes())
    contents[-1] ^= 1
    (folder / SINGLE).write_bytes(contents)
    assert open_checkpoint(str(folder)).fingerprint() != before


def test_a_file_is_hashed_once_and_again_when_touched(folder, hashed):
    first = open_checkpoint(str(folder)).fingerprint()
    assert open_checkpoint(str(folder)).fingerprint() == first
    assert hashed == [folder / SINGLE]
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert open_checkpoint(str(link)).fingerprint() == first
    assert len(hashed) == 1
    os.utime(folder / SINGLE, ns=(0, 10**18))
    assert open_checkpoint(str(folder)).fingerprint() == first
    assert len(hashed) == 2


def test_the_cached_digest_is_what_counts(folder):
    open_checkpoint(str(folder)).fingerprint()
    path = cache_folder() / "fingerprints.json"
    entries = json.loads(path.read_text())
    entries[str(folder / SINGLE)]["sha256"] = "a" * 64
    path.write_text(json.dumps(entries))
    assert open_checkpoint(str(folder)).fingerprint() == combine(["a" * 64])


@pytest.mark.parametrize("junk", ["", "{", "[]", '{"%s": 3}', '{"%s": {"stamp": 1}}', "\x00\xff"])
def test_a_corrupt_cache_is_rewritten(folder, hashed, junk):
    expected = open_checkpoint(str(folder)).fingerprint()
    path = cache_folder() / "fingerprints.json"
    path.write_text(junk.replace("%s", str(folder / SINGLE)))
    assert open_checkpoint(str(folder)).fingerprint() == expected
    assert str(folder / SINGLE) in json.loads(path.read_text())
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_written_is_no_error(folder, monkeypatch):
    in_the_way = folder.parent / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("PETSWARM_CACHE", str(in_the_way / "cache"))
    assert len(open_checkpoint(str(folder)).fingerprint()) == 64


def test_concurrent_writers_leave_a_whole_cache(tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(20)]
    for file in files:
        file.write_text(file.name)
    threads = [threading.Thread(target=file_sha256, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((cache_folder() / "fingerprints.json").read_text())
    assert [path.name for path in cache_folder().iterdir()] == ["fingerprints.json"]
    for file in files:
        assert file_sha256(file) == hashlib.sha256(file.name.encode()).hexdigest()


def test_a_digest_of_a_file_that_changes_meanwhile_is_not_kept(folder, monkeypatch):
    digest = hashlib.file_digest

    def slow(file, name):
        os.utime(file.name, ns=(0, 10**18))
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", slow)
    file_sha256(folder / SINGLE)
    assert not (cache_folder() / "fingerprints.json").exists()


# What users get wrong


def refusal(model, **options):
    with pytest.raises(ModelNotFound) as caught:
        open_checkpoint(str(model), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "../model", "~/no/model", "models/of/mine", ""])
def test_a_path_that_does_not_exist(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert refusal(path) == f"there is no folder {path!r}"


def test_a_file_in_place_of_a_folder(folder):
    assert "is a file; give the folder" in refusal(folder / SINGLE)
    (folder / "model.gguf").write_text("")
    assert refusal(folder / "model.gguf").endswith(f"swarm convert {folder / 'model.gguf'}")


def test_a_folder_without_what_a_model_needs(folder):
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder} has no config.json, so it is not a model"


def test_a_folder_without_safetensors(folder):
    (folder / SINGLE).rename(folder / "consolidated.safetensors")
    assert refusal(folder) == f"{folder} has *.safetensors files, but neither {SINGLE} nor {INDEX}"
    (folder / "consolidated.safetensors").unlink()
    assert refusal(folder) == f"{folder} has no *.safetensors files"
    (folder / "pytorch_model.bin").write_text("")
    assert "pickles, which are never loaded" in refusal(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.gguf")
    assert "swarm convert" in refusal(folder)
    (folder / "config.json").unlink()
    assert "swarm convert" in refusal(folder)


@pytest.mark.parametrize("contents", ["", "{", "[]", "\x00", "{}", '{"model_type": 7}'])
def test_a_damaged_configuration(folder, contents):
    (folder / "config.json").write_text(contents)
    assert str(folder / "config.json") in refusal(folder)


def test_a_configuration_with_impossible_values(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": "many"}')
    assert str(folder / "config.json") in refusal(folder)


def test_code_of_the_model_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(folder / 'was_run')!r}, 'w')")
    with pytest.raises(NotSupported, match="no models of type 'own'"):
        open_checkpoint(str(folder))
    assert not (folder / "was_run").exists()


def shorten(contents):
    return contents[:-1]


def header_only(contents):
    return contents[:100]


def lengthen(contents):
    return contents + b"\0"


def scramble_header(contents):
    return contents[:8] + b"}" + contents[9:]


def huge_header(contents):
    return b"\xff" * 8 + contents[8:]


def no_offsets(contents):
    header = b'{"a": {"dtype": "F32"}}'
    return len(header).to_bytes(8, "little") + header


def empty(contents):
    return b""


@pytest.mark.parametrize("damage", [shorten, header_only, lengthen, scramble_header, huge_header, no_offsets, empty])
def test_a_damaged_weight_file(folder, sharded, damage):
    path = folder / SINGLE
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in refusal(folder)
    path = min(sharded.glob("*.safetensors"))
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in refusal(sharded)


def test_a_weight_file_damaged_after_opening(folder):
    checkpoint = open_checkpoint(str(folder))
    (folder / SINGLE).write_bytes(b"")
    with pytest.raises(ModelNotFound, match=str(folder / SINGLE)):
        checkpoint.read(block(0))
    (folder / SINGLE).unlink()
    with pytest.raises(ModelNotFound, match=str(folder / SINGLE)):
        checkpoint.read(block(0))
    with pytest.raises(ModelNotFound, match=str(folder / SINGLE)):
        checkpoint.fingerprint()


def test_an_index_that_names_what_is_absent(sharded):
    shard = shard_of(sharded, block(2)[0])
    (sharded / shard).rename(sharded / "elsewhere")
    assert refusal(sharded) == f"{sharded / INDEX} names {shard}, which is not there"
    (sharded / "elsewhere").rename(sharded / shard)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.layers.6.mlp.up_proj.weight"] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"{sharded / shard} lacks the tensor model.layers.6.mlp.up_proj.weight" in refusal(sharded)


@pytest.mark.parametrize(
    "contents",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../../secret.safetensors"}}',
        '{"weight_map": {"a": "pytorch_model.bin"}}',
    ],
)
def test_a_damaged_index(sharded, contents):
    (sharded / INDEX).write_text(contents)
    assert f"{sharded / INDEX} is damaged" in refusal(sharded)


# The hub


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub's HTTP interface as its library uses here, for one model made of a folder's files."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.gated = False
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def downloads(self):
        return {path.rpartition("/")[2] for method, path, ranged in self.requests if method == "GET" and not ranged}


class HubHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, contents, headers, *, status=200):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(contents)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(contents)

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path, "range" in self.headers))
        parts = path.strip("/").split("/")
        if parts[:4] == ["api", "models", "org", "tiny"]:
            if parts[4:] in ([], ["revision", "main"], ["revision", COMMIT]):
                return self.answer(json.dumps(self.listing()).encode(), {"Content-Type": "application/json"})
            return self.refuse(404, "RevisionNotFound")
        if parts[:3] == ["org", "tiny", "resolve"]:
            return self.file(parts[4])
        return self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def listing(self):
        siblings = []
        for name, contents in self.server.files.items():
            siblings.append({"rfilename": name, "size": len(contents)})
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(contents).hexdigest()
                siblings[-1]["lfs"] = {"sha256": sha256, "size": len(contents), "pointerSize": 130}
        return {"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}

    def file(self, name):
        if self.server.gated and self.headers.get("Authorization") != "Bearer hf_right":
            return self.refuse(401, "GatedRepo")
        if name not in self.server.files:
            return self.refuse(404, "EntryNotFound")
        contents = self.server.files[name]
        algorithm = hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{algorithm(contents).hexdigest()}"'}
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            return self.answer(contents[int(start) : int(end or len(contents)) + 1], headers, status=206)
        return self.answer(contents, headers)


def point_to(monkeypatch, url):
    """Make the hub's library ask this URL; it reads HF_ENDPOINT only once, when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def use_hub(tmp_path, monkeypatch):
    """A function that starts a hub with the files of a folder and makes it the one that is asked."""
    hubs = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))

    def start(folder):
        hub = Hub(folder)
        hubs.append(hub)
        point_to(monkeypatch, hub.url)
        return hub

    yield start
    for hub in hubs:
        hub.shutdown()
        hub.server_close()


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    point_to(monkeypatch, "http://127.0.0.1:9")


def test_hub_and_folder_agree(sharded, use_hub):
    hub = use_hub(sharded)
    remote, local = open_checkpoint("org/tiny"), open_checkpoint(str(sharded))
    assert (remote.name, remote.source, remote.revision) == ("org/tiny", "org/tiny", COMMIT)
    assert remote.config.to_dict() | {"_name_or_path": ""} == local.config.to_dict() | {"_name_or_path": ""}
    assert remote.tensor_names() == local.tensor_names()
    assert remote.fingerprint() == local.fingerprint()
    assert remote.nbytes(block(2)) == local.nbytes(block(2))
    assert not any(file.endswith(".safetensors") for file in hub.downloads())


def test_only_the_shards_needed_are_downloaded(sharded, use_hub):
    hub = use_hub(sharded)
    tensors = open_checkpoint("org/tiny").read(block(3))
    expected = open_checkpoint(str(sharded)).read(block(3))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    downloaded = {file for file in hub.downloads() if file.endswith(".safetensors")}
    assert downloaded == {shard_of(sharded, name) for name in block(3)}


def test_a_hub_model_of_one_file_is_listed_without_downloading_it(folder, use_hub):
    hub = use_hub(folder)
    remote, local = open_checkpoint("org/tiny", revision="main"), open_checkpoint(str(folder))
    assert remote.tensor_names() == local.tensor_names()
    assert remote.fingerprint() == local.fingerprint()
    assert SINGLE not in hub.downloads()
    assert remote.read(block(1)).keys() == set(block(1))


def test_a_snapshot_folder_needs_no_hashing(sharded, use_hub, hashed, tmp_path):
    use_hub(sharded)
    remote = open_checkpoint("org/tiny")
    remote.read(remote.tensor_names())
    (snapshot,) = (tmp_path / "hub_cache").glob("models--org--tiny/snapshots/*")
    shutil.rmtree(cache_folder())
    assert open_checkpoint(str(snapshot)).fingerprint() == remote.fingerprint()
    assert hashed == []


def test_weights_that_the_hub_keeps_no_hash_of_are_hashed_here(folder, use_hub, monkeypatch):
    use_hub(folder)
    listing = HubHandler.listing

    def without_hashes(self):
        answer = listing(self)
        for sibling in answer["siblings"]:
            sibling.pop("lfs", None)
        return answer

    monkeypatch.setattr(HubHandler, "listing", without_hashes)
    assert open_checkpoint("org/tiny").fingerprint() == open_checkpoint(str(folder)).fingerprint()


def test_sizes_are_known_before_anything_is_fetched(tmp_path, use_hub):
    """Whoever names something on the hub may have put anything there."""
    (tmp_path / "adapter").mkdir()
    for name, size in (("config.json", 8_000_001), ("adapter_config.json", 7), ("adapter_model.safetensors", 9)):
        (tmp_path / "adapter" / name).write_bytes(bytes(size))
    hub = use_hub(tmp_path / "adapter")
    files, present = find_on_hub("org/tiny", None, None)
    assert {name: files.size(name) for name in present} == {
        "config.json": 8_000_001,
        "adapter_config.json": 7,
        "adapter_model.safetensors": 9,
    }
    assert hub.downloads() == {"tiny"}  # the list


def test_a_model_used_before_works_while_the_hub_is_away(sharded, use_hub, monkeypatch, caplog):
    use_hub(sharded)
    before = open_checkpoint("org/tiny")
    expected = before.read(block(3))
    point_to(monkeypatch, "http://127.0.0.1:9")
    offline = open_checkpoint("org/tiny")
    assert "using what was downloaded" in caplog.text
    assert offline.fingerprint() == before.fingerprint()
    assert offline.revision == COMMIT
    tensors = offline.read(block(3))
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_an_unknown_hub_id(folder, use_hub):
    use_hub(folder)
    expected = "org/other is neither a folder here nor a model on the hub (a private model needs a token)"
    assert refusal("org/other") == expected


def test_an_unknown_revision(folder, use_hub):
    use_hub(folder)
    assert refusal("org/tiny", revision="v7") == "the hub model org/tiny has no revision v7"


def test_no_hub_id(no_hub):
    assert refusal("what is this?") == "'what is this?' is neither a folder here nor a valid hub id"


def test_a_hub_that_cannot_be_reached(no_hub):
    assert refusal("org/tiny").startswith("org/tiny is no folder here, and the hub cannot be reached")


def test_a_gated_model(folder, use_hub):
    use_hub(folder).gated = True
    assert "the hub model org/tiny is gated" in refusal("org/tiny", token="hf_wrong")
    assert open_checkpoint("org/tiny", token="hf_right").config.model_type == "llama"


def test_a_hub_model_without_safetensors(folder, use_hub):
    hub = use_hub(folder)
    hub.files["pytorch_model.bin"] = hub.files.pop(SINGLE)
    assert "pickles, which are never loaded" in refusal("org/tiny")
    del hub.files["config.json"]
    assert refusal("org/tiny") == "the hub model org/tiny has no config.json, so it is not a model"


def test_a_hub_model_with_a_damaged_header(folder, use_hub):
    hub = use_hub(folder)
    hub.files[SINGLE] = scramble_header(hub.files[SINGLE])
    assert refusal("org/tiny") == f"{SINGLE} of the hub model org/tiny has a damaged header"


def test_a_hub_model_whose_index_names_an_absent_shard(sharded, use_hub):
    hub = use_hub(sharded)
    shard = shard_of(sharded, block(2)[0])
    del hub.files[shard]
    checkpoint = open_checkpoint("org/tiny")
    for use in (checkpoint.fingerprint, lambda: checkpoint.read(block(2))):
        with pytest.raises(ModelNotFound, match=f"the hub model org/tiny has no file {shard}"):
            use()


def test_the_cache_is_not_rewritten_when_nothing_is_new(sharded, use_hub, monkeypatch):
    use_hub(sharded)
    open_checkpoint("org/tiny")
    monkeypatch.setattr(fingerprint_module, "replace_file", lambda *args: pytest.fail("written again"))
    open_checkpoint("org/tiny")
