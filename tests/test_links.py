"""Servers behind slow links, each with a proxy of its own: nobody by-passes them, and tokens do not change."""

import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm import AutoSwarmModelForCausalLM
from swarm.scripts.links import Link
from swarm.scripts.local_swarm import LocalSwarm, assert_no_direct_connections

pytestmark = pytest.mark.slow

#: Seconds, one way.
DELAY = 0.05


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of torch wait for each other by spinning: beside server processes on few cores, two take tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def swarm(tiny_llama_folder):
    flags = ["--threads", "1", "--dtype", "float32", "--announce-period", "4"]
    servers = ["0:3", "3:5", "5:8"]
    with LocalSwarm(tiny_llama_folder, servers, flags=flags, link=Link(one_way_delay_s=DELAY)) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm, tiny_llama_folder):
    model = AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=swarm.initial_peers)
    yield model
    model.close()


def test_tokens_through_slow_links_are_those_of_the_plain_model(swarm, model, tiny_llama_folder):
    ids = torch.randint(1, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    with model.inference_session(max_length=40) as session:
        text = model.generate(ids, max_new_tokens=4)
        before, started = swarm.proxy.counters(), time.perf_counter()
        text = model.generate(text, max_new_tokens=8)
        elapsed, after = time.perf_counter() - started, swarm.proxy.counters()
        assert_no_direct_connections(swarm)
        assert [str(link.span) for link in session.chain] == ["0:3", "3:5", "5:8"]
    assert torch.equal(text, plain.generate(ids, max_new_tokens=12))
    # At the least, each of 8 steps goes client -> 1 -> 2 -> 3 -> client, and no link can be passed in less time.
    assert elapsed >= 8 * 4 * DELAY
    row = 64 * 4  # bytes of hidden states
    for earlier, later in zip(before, after, strict=True):
        assert (later - earlier).both >= 8 * row
