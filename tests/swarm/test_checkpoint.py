"""Checkpoints from folders."""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from swarm import checkpoint as checkpoint_module
from swarm.cache_folder import cache_folder
from swarm.checkpoint import open_checkpoint
from swarm.errors import ModelNotFound, NotSupported
from swarm.fingerprint import combine, file_sha256

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PETSWARM_CACHE", str(tmp_path / "cache"))


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
