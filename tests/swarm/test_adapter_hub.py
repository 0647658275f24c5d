from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from swarm.adapter_files import MAX_CONFIG_BYTES, adapter_digest, choose_files
from swarm.adapter_hub import find_adapter, is_hub_name
from swarm.errors import AdapterError, ModelNotFound
from swarm.protocol import AdapterRef


class HubFiles:
    """One adapter on the hub, which knows the sha256 of its weights."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, file: str) -> Path:
        assert file.endswith(".json"), "weights need not be fetched"
        return self.folder / file

    def size(self, file: str) -> int:
        return (self.folder / file).stat().st_size

    def digest(self, file: str) -> str:
        return hashlib.sha256((self.folder / file).read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the hub has, as a folder."""

    def find(name: str, revision: str | None, token: str | None) -> tuple[HubFiles, set[str]]:
        if name != "org/french":
            raise ModelNotFound(f"{name} is not there")
        return HubFiles(tmp_path), {path.name for path in tmp_path.iterdir()}

    monkeypatch.setattr("swarm.adapter_hub.find_on_hub", find)
    return tmp_path


def test_the_digest_is_that_of_the_files(hub: Path) -> None:
    files = [hub / "adapter_config.json", hub / "adapter_model.safetensors"]
    for number, path in enumerate(files):
        path.write_bytes(bytes(range(number, 200)))
    (hub / "README.md").touch()
    assert find_adapter("org/french") == AdapterRef("org/french", adapter_digest(files))


def test_a_pickle_is_no_adapter(hub: Path) -> None:
    (hub / "adapter_config.json").touch()
    (hub / "adapter_model.bin").touch()
    with pytest.raises(
        AdapterError, match=r"org/french on the hub is no adapter: it has no petswarm_adapter.json with "
    ):
        find_adapter("org/french")


def test_a_huge_configuration_is_not_fetched(hub: Path) -> None:
    with (hub / "adapter_config.json").open("wb") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    (hub / "adapter_model.safetensors").touch()
    with pytest.raises(AdapterError, match=r"adapter_config\.json of org/french has 8000001 bytes"):
        find_adapter("org/french")


def test_what_the_hub_does_not_have_is_said_so(hub: Path) -> None:
    with pytest.raises(AdapterError, match="cannot find adapter 'org/german' on the hub: org/german is not there"):
        find_adapter("org/german")


def test_files_of_the_first_format_count() -> None:
    peft = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}
    assert choose_files(peft) == ("adapter_config.json", "adapter_model.safetensors")
    assert choose_files({*peft, "petswarm_adapter.json", "adapter.safetensors"}) == (
        "petswarm_adapter.json",
        "adapter.safetensors",
    )
    assert choose_files({"adapter_config.json"}) is None


def test_names_of_the_hub() -> None:
    assert is_hub_name("org/french")
    assert not is_hub_name("french")
