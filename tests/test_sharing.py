"""Eight clients and two equal replicas, all of them real: whoever comes when, neither replica gets more than five.

Eight draws by chance give that in 71% of all cases.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swarm.checkpoint import open_checkpoint
from swarm.client.config import ClientConfig
from swarm.client.connection import SwarmConnection
from swarm.client.inference_session import InferenceSession
from swarm.data_structures import BlockSpan, ServerInfo
from swarm.protocol import RowSlice
from swarm.rpc import server_info
from swarm.scripts.local_swarm import LocalSwarm

pytestmark = pytest.mark.slow  # servers start for longer than the tests take

NUM_CLIENTS = 8
HIDDEN_SIZE = 64
LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
FLAGS = ("--threads", "1", "--dtype", "float32", "--cache-tokens", "16384")


class Replicas:
    """Two servers of all blocks that announce the same speed, and clients with a node each."""

    def __init__(self, swarm: LocalSwarm, folder: Path):
        self._swarm = swarm
        self._checkpoint = open_checkpoint(str(folder))
        self._observer = self.connect()
        # Speeds are measured at start. Where other programs disturb that, two servers are not equal replicas.
        for _ in range(5):
            if len({info.decode_times for info in self.infos()}) == 1:
                break
            swarm.servers.pop().terminate()
            swarm.add("0:8")
        else:
            pytest.skip("this machine is too busy to measure the same speed twice")
        self.clients = [self.connect() for _ in range(NUM_CLIENTS)]

    def connect(self) -> SwarmConnection:
        return SwarmConnection(self._checkpoint, ClientConfig(initial_peers=tuple(self._swarm.initial_peers)))

    def infos(self) -> list[ServerInfo]:
        """What the servers say about themselves right now."""
        thread = self._observer.thread
        return [thread.run(server_info(thread.node.p2p, server.peer_id, LIMIT)) for server in self._swarm.servers]

    def split(self) -> list[int]:
        """Rows of the sessions that each server holds, the fewest first."""
        return sorted(info.session_rows for info in self.infos())

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + LIMIT
        while self.split() != [0, 0]:
            assert time.monotonic() < deadline, "sessions were closed, but servers still hold them"

    def close(self) -> None:
        for connection in [self._observer, *self.clients]:
            connection.thread.stop()


@pytest.fixture(scope="module")
def replicas(tiny_llama_folder: Path) -> Iterator[Replicas]:
    with LocalSwarm(tiny_llama_folder, ["0:8", "0:8"], flags=FLAGS) as swarm:
        replicas = Replicas(swarm, tiny_llama_folder)
        yield replicas
        replicas.close()


@contextlib.contextmanager
def sessions(connections: list[SwarmConnection]) -> Iterator[list[InferenceSession]]:
    opened = [connection.open_session(BlockSpan(start=0, end=8), 1, 64, 4 * HIDDEN_SIZE) for connection in connections]
    try:
        yield opened
    finally:
        for session in opened:
            session.close()


def step(session: InferenceSession) -> None:
    """The first step chooses the chain."""
    session.step(torch.zeros(1, HIDDEN_SIZE), [RowSlice(0, 0, 1)])


def step_together(opened: list[InferenceSession]) -> None:
    barrier = threading.Barrier(len(opened))

    def run(session: InferenceSession) -> None:
        barrier.wait()
        step(session)

    threads = [threading.Thread(target=run, args=(session,)) for session in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_one_after_another(replicas: Replicas) -> None:
    for _ in range(3):
        with sessions(replicas.clients) as opened:
            for session in opened:
                step(session)
            assert replicas.split() in ([3, 5], [4, 4])
        replicas.wait_until_idle()


def test_all_at_once_on_stale_announcements(replicas: Replicas) -> None:
    splits: Counter[tuple[int, ...]] = Counter()
    for _ in range(10):
        with sessions(replicas.clients) as opened:
            step_together(opened)
            splits[tuple(replicas.split())] += 1
        replicas.wait_until_idle()
    # Round trips that differ by ten milliseconds, as they may on a busy machine, are no equal replicas for a client.
    assert splits[3, 5] + splits[4, 4] >= 9, splits
    assert splits[4, 4] >= 5, splits  # by chance it would be 2.7


def test_all_sessions_of_one_client(replicas: Replicas) -> None:
    for _ in range(3):
        with sessions([replicas.clients[0]] * NUM_CLIENTS) as opened:
            step_together(opened)
            assert replicas.split() in ([3, 5], [4, 4])
        replicas.wait_until_idle()
