"""Finding a model on a hub: a real one in miniature, served over HTTP on loopback."""

from __future__ import annotations

import json

import pytest
from fake_hub import COMMIT, sha256
from hub_checks import INDEX, SINGLE, assert_equal, block, header_bytes, refusal, shard_of

from swarm.checkpoint import open_checkpoint
from swarm.errors import ModelNotFound
from swarm.hub import find_on_hub

pytestmark = pytest.mark.usefixtures("hub_places")


def test_hub_and_folder_agree(sharded, use_hub):
    hub = use_hub(sharded)
    remote, local = open_checkpoint("org/tiny"), open_checkpoint(str(sharded))
    assert (remote.name, remote.source, remote.revision) == ("org/tiny", "org/tiny", COMMIT)
    assert remote.config.to_dict() | {"_name_or_path": ""} == local.config.to_dict() | {"_name_or_path": ""}
    assert remote.tensor_names() == local.tensor_names()
    assert remote.fingerprint() == local.fingerprint()
    assert remote.nbytes(block(2)) == local.nbytes(block(2))
    shards = {shard_of(sharded, name) for name in block(2)}
    assert hub.sent() == sum(header_bytes(hub.files[shard]) for shard in shards)


def test_a_hub_model_of_one_file_is_listed_without_downloading_it(folder, use_hub):
    hub = use_hub(folder)
    remote, local = open_checkpoint("org/tiny", revision="main"), open_checkpoint(str(folder))
    assert remote.tensor_names() == local.tensor_names()
    assert remote.fingerprint() == local.fingerprint()
    assert hub.sent() == header_bytes(hub.files[SINGLE])
    assert_equal(remote.read(block(1)), local.read(block(1)))


def test_the_fingerprint_needs_no_weights_and_no_cache(sharded, use_hub, monkeypatch):
    """Also of a hub, or a mirror of it, that lists no hashes, and where nothing can be kept."""
    hub = use_hub(sharded)
    expected = open_checkpoint(str(sharded)).fingerprint()
    monkeypatch.setenv("PETSWARM_CACHE", "/proc/nothing-can-be-kept-here")
    for hub.hashes_known in (True, False):
        assert open_checkpoint("org/tiny").fingerprint() == expected
    assert hub.sent() == 0


def test_small_weight_files_of_which_the_hub_has_no_sha256_are_fetched_whole(folder, use_hub, monkeypatch):
    hub = use_hub(folder)
    monkeypatch.setattr("fake_hub._is_large", lambda file: False)
    remote = open_checkpoint("org/tiny")
    assert remote.fingerprint() == open_checkpoint(str(folder)).fingerprint()
    assert remote.read(block(1)).keys() == set(block(1))
    assert SINGLE in hub.whole_files()


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
    assert files.digest("adapter_model.safetensors") == sha256(bytes(9))
    assert hub.whole_files() == set()
    assert hub.sent() == 0


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


@pytest.mark.parametrize("lists_for_all", [True, False])
@pytest.mark.parametrize(
    ("status", "expected"),
    [(401, "the hub does not accept your token: log in anew"), (403, "give your token the right")],
)
def test_a_hub_that_refuses_the_first_question_says_what_to_do(folder, use_hub, status, expected, lists_for_all):
    hub = use_hub(folder)
    hub.token, hub.refusal, hub.lists_for_all = "hf_right", (status, ""), lists_for_all
    assert expected in refusal("org/tiny", token="hf_wrong")


def test_a_hub_model_without_safetensors(folder, use_hub):
    hub = use_hub(folder)
    hub.files["pytorch_model.bin"] = hub.files.pop(SINGLE)
    assert "pickles, which are never loaded" in refusal("org/tiny")
    del hub.files["config.json"]
    assert refusal("org/tiny") == "the hub model org/tiny has no config.json, so it is not a model"


def test_a_hub_model_with_a_damaged_header(folder, use_hub):
    hub = use_hub(folder)
    contents = hub.files[SINGLE]
    for damaged in (
        contents[:8] + b"?" + contents[9:],
        bytes([255]) * 8 + contents[8:],
        contents.replace(b'"data_offsets":[0,', b'"data_offsets":[99999999,', 1),
        contents.replace(b'"data_offsets":[0,', b'"data_offsets":[-,', 1),
        contents[:-1],
    ):
        assert damaged != contents
        hub.files[SINGLE] = damaged
        assert f"{SINGLE} of the hub model org/tiny " in refusal("org/tiny")
    hub.files[SINGLE] = contents
    assert open_checkpoint("org/tiny").read(block(1)).keys() == set(block(1))


def test_a_hub_model_whose_index_names_an_absent_shard(sharded, use_hub):
    hub = use_hub(sharded)
    shard = shard_of(sharded, block(2)[0])
    del hub.files[shard]
    checkpoint = open_checkpoint("org/tiny")
    for use in (checkpoint.fingerprint, lambda: checkpoint.read(block(2))):
        with pytest.raises(ModelNotFound, match=f"the hub model org/tiny has no file {shard}"):
            use()


def test_a_hub_model_whose_shard_lacks_a_tensor(sharded, use_hub):
    hub = use_hub(sharded)
    index = json.loads(hub.files[INDEX])
    shard = shard_of(sharded, block(2)[0])
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = shard
    hub.files[INDEX] = json.dumps(index).encode()
    checkpoint = open_checkpoint("org/tiny")
    with pytest.raises(ModelNotFound, match=rf"{shard} of the hub model org/tiny lacks the tensor model\.layers\.9\."):
        checkpoint.read(["model.layers.9.mlp.up_proj.weight"])


# Tokens


def test_a_gated_model(folder, use_hub):
    use_hub(folder).token = "hf_right"
    message = refusal("org/tiny", token="hf_wrong")
    assert message.startswith("the hub model org/tiny is gated: accept its licence on its page, then log in")
    assert "HF_TOKEN" in message
    assert open_checkpoint("org/tiny", token="hf_right").config.model_type == "llama"


def test_the_token_goes_with_every_request_and_not_to_other_hosts(folder, use_hub, monkeypatch):
    hub = use_hub(folder)
    hub.token = "hf_right"
    hub.hashes_known = False  # so that it is asked for the file's tag, too
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    open_checkpoint("org/tiny").read(block(1))
    for request in hub.requests:
        assert request.token == (None if request in hub.large_requests() else "hf_right")
    assert hub.large_requests()


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        ((401, "GatedRepo"), "is gated: accept its licence"),
        ((403, "GatedRepo"), "is gated: accept its licence"),
        ((401, "RepoNotFound"), "a private model needs a token"),
        ((403, ""), "the hub forbids it: give your token the right"),
    ],
)
def test_access_that_was_withdrawn(folder, use_hub, refused, expected):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    hub.token, hub.refusal = "hf_right", refused
    before = len(hub.requests)
    with pytest.raises(ModelNotFound, match=expected):
        checkpoint.fetch(block(1))
    assert len(hub.requests) == before + 1
    hub.token = None
    checkpoint.fetch(block(1))
