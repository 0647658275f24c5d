"""What tests of hub models say again and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import sha256

from swarm.cache_folder import cache_folder
from swarm.checkpoint import open_checkpoint
from swarm.errors import ModelNotFound
from swarm.partial_file import PartialFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NOWHERE = "http://127.0.0.1:9"


def block(number: int) -> list[str]:
    return [f"model.layers.{number}.mlp.{part}_proj.weight" for part in ("up", "gate", "down")]


def shard_of(folder: Path, name: str) -> str:
    shard: str = json.loads((folder / INDEX).read_text())["weight_map"][name]
    return shard


def header_bytes(contents: bytes) -> int:
    return 8 + int.from_bytes(contents[:8], "little")


def refusal(model: str, **options: Any) -> str:
    with pytest.raises(ModelNotFound) as caught:
        open_checkpoint(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_equal(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def parts_of(contents: bytes) -> PartialFile:
    (path,) = (cache_folder() / "hub" / "org--tiny").glob("*.safetensors")
    assert path.name == f"{sha256(contents)}-{SINGLE}"
    return PartialFile(path, len(contents))
