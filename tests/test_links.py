"""Servers behind slow links, each with a proxy of its own: nobody by-passes them, and tokens do not change."""

import statistics
import time
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm import AutoSwarmModelForCausalLM
from swarm.codecs import Codec
from swarm.scripts.bench_generation import Stopwatch
from swarm.scripts.links import Link
from swarm.scripts.local_swarm import LocalSwarm, assert_no_direct_connections

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

#: Seconds, one way.
DELAY = 0.05


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


@pytest.mark.parametrize(("direct_push", "links_passed"), [(True, 4), (False, 6)], ids=["pushed", "through the client"])
def test_a_token_takes_the_links_on_its_way_and_little_more(swarm, tiny_llama_folder, direct_push, links_passed):
    """Delays of 50 ms are large beside what a busy machine adds; compute is what the peers measured themselves."""
    model = AutoSwarmModelForCausalLM.from_pretrained(
        tiny_llama_folder, initial_peers=swarm.initial_peers, direct_push=direct_push
    )
    try:
        with model.inference_session(max_length=40) as session:
            watch = Stopwatch(session, lambda: None)
            model.generate(torch.arange(1, 9)[None], max_new_tokens=16, streamer=watch)
            assert_no_direct_connections(swarm)
            report = session.report()
    finally:
        model.close()
    assert [hop.pushed for hop in report.hops] == [False, direct_push, direct_push]
    steps = [later - earlier for earlier, later in pairwise(watch.stamps[1:])]
    compute = report.client + report.codec + sum(hop.computed for hop in report.hops)
    assert links_passed * DELAY <= statistics.median(steps) <= 1.15 * (links_passed * DELAY + compute)


def test_what_passes_a_slow_line_is_compressed_once_all_know_that_it_is_slow(tiny_llama_folder):
    """compression="auto", the default. A line counts as slow after three measurements."""
    flags = ["--threads", "1", "--dtype", "float32", "--announce-period", "2"]
    with LocalSwarm(tiny_llama_folder, ["0:4", "4:8"], flags=flags, link=Link(25e6, 0.002)) as swarm:
        model = AutoSwarmModelForCausalLM.from_pretrained(
            tiny_llama_folder, initial_peers=swarm.initial_peers, update_period=0.5
        )
        try:
            connection, deadline = model.connection, time.monotonic() + 120
            rates = [None]
            while None in rates:
                assert time.monotonic() < deadline, "not all lines were measured"
                time.sleep(0.2)
                connection.thread.run(connection.router.refresh())
                infos = [connection.router.info(server.peer_id) for server in swarm.servers]
                rates = [connection.links.own_rate.value, *(info and info.network_rate for info in infos)]
            assert max(rates) < 25e6 / 8
            ids = torch.arange(1, 9)[None]
            with model.inference_session(max_length=40) as session:
                model.generate(ids, max_new_tokens=8)
                assert [hop.output_codec for hop in session._hops] == [Codec.BLOCKWISE8] * 2
                assert [hop.history.codec for hop in session._hops] == [Codec.BLOCKWISE8] * 2
                assert sum(hop.pushed for hop in session.report().hops) == 1
        finally:
            model.close()
