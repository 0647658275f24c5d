"""Two server processes show their figures while a client generates: they are what the client did, exactly."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from scraped import metrics_at

from swarm.scripts.local_swarm import LocalSwarm, ServerProcess

pytestmark = pytest.mark.usefixtures("one_thread")

PATIENCE = 60.0  # seconds, for machines that are busy with other tests

said: Queue[tuple[int, str]] = Queue()


@pytest.fixture(scope="module")
def swarm(tiny_llama_folder: Path) -> Iterator[LocalSwarm]:
    flags = ["--threads", "1", "--dtype", "float32", "--metrics-port", "0"]
    with LocalSwarm(
        tiny_llama_folder, ["0:4", "4:8"], flags=flags, on_progress=lambda index, text: said.put((index, text))
    ) as swarm:
        yield swarm


def urls(swarm: LocalSwarm) -> list[str]:
    """Of the servers, in order, as they said."""
    found: dict[int, str] = {}
    while len(found) < len(swarm.servers):
        index, text = said.get(timeout=PATIENCE)
        if text.startswith("metrics at "):
            found[index] = text.removeprefix("metrics at ")
    return [url for _, url in sorted(found.items())]


def test_the_figures_are_what_a_client_did(swarm: LocalSwarm, connect: Callable[..., Any]) -> None:
    first, last = urls(swarm)
    model = connect()
    before = [metrics_at(url) for url in (first, last)]
    assert all(figures["state online"] == 1 and figures["steps_total"] == 0 for figures in before)
    ids = torch.randint(1, 256, (1, 9), generator=torch.Generator().manual_seed(0))
    with model.inference_session(max_length=64) as session:
        model.generate(ids, max_new_tokens=12, do_sample=False)
        assert len(session.chain) == 2
        after = [metrics_at(url) for url in (first, last)]
    for figures in after:
        assert (figures["tokens_total prefill"], figures["tokens_total decode"]) == (9, 11)
        assert (figures["steps_total"], figures["queue_seconds_count"], figures["compute_seconds_count"]) == (12,) * 3
        assert figures["time_to_first_token_seconds_count"] == 1
        assert figures["time_per_output_token_seconds_count"] == 11
        assert (figures["batch_rows_count"], figures["batch_rows_bucket 1.0"]) == (12, 12)
        assert (figures["sessions"], figures["session_rows"], figures["cache_used_tokens"]) == (1, 1, 64)
        assert sum(value for name, value in figures.items() if name.startswith("refused_total")) == 0
    assert [figures["pushes_total"] for figures in after] == [12, 0]
    assert [(figures["first_block"], figures["last_block"]) for figures in after] == [(0, 3), (4, 7)]

    server: ServerProcess = swarm.servers[1]
    assert server.terminate(PATIENCE) == 0
    host, _, port = last.removeprefix("http://").removesuffix("/metrics").partition(":")
    socket.create_server((host, int(port))).close()
