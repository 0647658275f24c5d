"""A server that cannot serve says so at its start; one whose engine dies leaves the swarm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.errors import EngineError, UsageError
from swarm.server.config import ServerConfig
from swarm.server.server import Server
from swarm.server.tasks import RowWork, StepTask


async def test_a_server_ends_with_its_engine(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(
        ServerConfig(model=str(tiny_llama_folder), host_maddrs=("/ip4/127.0.0.1/tcp/0",), cache_tokens=64, threads=1)
    )
    await server.start()
    assert server._hosting is not None
    engine = server._hosting.engine

    def bug(*args: Any) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(engine, "_schedule", bug)
    (row,) = engine.cache.admit(1, 4)
    future = engine.submit(StepTask(torch.zeros(1, 64), [RowWork(row, 0, 1)], 0, 8))
    with pytest.raises(EngineError, match="the engine died, so this server ends"):
        await server.serve_until_stopped()
    with pytest.raises(EngineError):
        future.result(timeout=10)
    assert server.node._stopped is not None


async def test_a_folder_of_adapters_that_is_not_there_is_known_before_anything_is_loaded(tmp_path: Path) -> None:
    """Neither is the model, which is found out later."""
    server = Server(ServerConfig(model=str(tmp_path / "model"), adapters=(str(tmp_path / "adapters"),)))
    with pytest.raises(UsageError, match=r"--adapters .*: there is no folder"):
        await server.start()


async def test_memory_that_adapters_do_not_leave(tiny_llama_folder: Path) -> None:
    config = ServerConfig(
        model=str(tiny_llama_folder),
        host_maddrs=("/ip4/127.0.0.1/tcp/0",),
        max_memory="500MB",  # type: ignore[arg-type]
        adapters_from_hub=True,
    )
    with pytest.raises(UsageError, match=r"beside 1\.1GB for adapters \(--adapter-memory\),.* but 0B of memory"):
        await Server(config).start()
