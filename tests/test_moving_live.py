"""Servers that nobody gave blocks to: they spread over the model, and close a hole that kills tear into it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.scripts.local_swarm import LocalSwarm, ServerSpec

#: As far as it matters: sessions of a server that moves are told, and have this long; a dead server is known by 3 s.
FLAGS = ["--threads", "1", "--dtype", "float32", "--announce-period", "1", "--move-delay", "1", "--drain-time", "2"]
LONG = 120.0

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def swarm(tiny_llama_folder):
    """Four servers of half of the model's blocks each; three of them choose at about the same moment."""
    with LocalSwarm(tiny_llama_folder, [ServerSpec("", ("--num-blocks", "4"))] * 4, flags=FLAGS) as swarm:
        yield swarm


def holders(model):
    """Peer ids of the servers of each half, as announced."""
    model.connection.thread.run(model.connection.router.refresh(force=True))
    halves = {"0:4": [], "4:8": []}
    for record in model.connection.router.snapshot().servers:
        halves[str(record.info.span)].append(record.peer_id)
    return halves


def test_a_region_that_lost_all_its_servers_is_served_again_and_a_waiting_client_goes_on(
    swarm, connect, tiny_llama_folder
):
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    model = connect(max_retry_delay=1.0)
    ids = torch.randint(1, 256, (1, 10), generator=torch.Generator().manual_seed(0))
    expected = plain.generate(ids, max_new_tokens=60)
    before = holders(model)
    assert [len(half) for half in before.values()] == [2, 2]

    class KillsAtTheTwentieth:
        """A streamer; the prompt comes first."""

        seen = 0

        def put(self, value):
            self.seen += 1
            if self.seen == 21:
                for peer_id in before["4:8"]:
                    swarm.by_peer_id(peer_id).kill()

        def end(self):
            pass

    assert torch.equal(model.generate(ids, max_new_tokens=60, streamer=KillsAtTheTwentieth()), expected)
    after = holders(model)
    assert [len(half) for half in after.values()] == [1, 1]
    assert set(after["0:4"] + after["4:8"]) == set(before["0:4"])  # the same processes: one of them moved
    newcomer = connect()
    assert torch.equal(newcomer.generate(ids, max_new_tokens=60), expected)
