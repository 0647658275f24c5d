"""A server whose engine dies leaves the swarm, instead of being announced and refusing every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.errors import EngineError
from swarm.server.config import ServerConfig
from swarm.server.server import Server
from swarm.server.tasks import RowWork, StepTask


async def test_a_server_ends_with_its_engine(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(
        ServerConfig(model=str(tiny_llama_folder), host_maddrs=("/ip4/127.0.0.1/tcp/0",), cache_tokens=64, threads=1)
    )
    await server.start()
    engine = server._engine
    assert engine is not None

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
