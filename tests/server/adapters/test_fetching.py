"""Adapters of the hub: of what is too large, nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.adapter_files import MAX_CONFIG_BYTES
from swarm.errors import AdapterError, ModelNotFound
from swarm.server.adapters.fetching import fetch_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class HubFiles:
    """What the hub has: sizes of files, and which were fetched."""

    def __init__(self, folder: Path, sizes: dict[str, int]):
        self.folder, self.sizes, self.fetched = folder, sizes, list[str]()

    def size(self, file: str) -> int:
        return self.sizes[file]

    def path(self, file: str) -> Path:
        self.fetched.append(file)
        return self.folder / file


def on_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, **sizes: int) -> HubFiles:
    files = HubFiles(folder, {name.replace("__", "."): size for name, size in sizes.items()})
    monkeypatch.setattr("swarm.adapter_hub.find_on_hub", lambda *_: (files, set(files.sizes)))
    return files


def test_both_files_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = on_hub(monkeypatch, tmp_path, adapter_config__json=10, adapter_model__safetensors=90, README__md=10**9)
    assert fetch_adapter("org/a", 100) == tmp_path
    assert sorted(files.fetched) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(
    ("config", "weights", "limit", "says"),
    [
        (10, 91, 100, "org/a has 101 bytes, more than this server's limit of 100"),
        (MAX_CONFIG_BYTES + 1, 1, 2**30, "adapter_config.json of org/a has 8000001 bytes: that is no configuration"),
    ],
)
def test_what_is_too_large_is_not_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: int, weights: int, limit: int, says: str
) -> None:
    files = on_hub(monkeypatch, tmp_path, adapter_config__json=config, adapter_model__safetensors=weights)
    with pytest.raises(AdapterError) as caught:
        fetch_adapter("org/a", limit)
    assert str(caught.value) == says
    assert not files.fetched


def test_a_pickle_is_no_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_hub(monkeypatch, tmp_path, adapter_config__json=10, adapter_model__bin=90)
    with pytest.raises(AdapterError, match="org/a on the hub is no adapter: it lacks"):
        fetch_adapter("org/a", 100)


def test_what_the_hub_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*_: object) -> None:
        raise ModelNotFound("it is gated")

    monkeypatch.setattr("swarm.adapter_hub.find_on_hub", find)
    with pytest.raises(AdapterError, match="cannot fetch the adapter org/a: it is gated"):
        fetch_adapter("org/a", 100)
