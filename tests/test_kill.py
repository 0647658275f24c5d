"""Real server processes that die: SIGKILL and SIGSTOP in the middle of a generation. Tokens must not change."""

import asyncio
import signal
import time
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm import BlockSpan
from swarm.errors import MissingBlocks
from swarm.scripts.local_swarm import LocalSwarm

#: Two holders of every block, and no two with the same blocks: whoever dies is replaced by others with other
#: boundaries. How fast each of them seemed at its start decides the first chain; it has three servers at least.
LAYOUT = ["0:3", "3:5", "5:8", "0:2", "2:4", "4:6", "6:8"]
FIRST, MIDDLE, LAST = 0, 1, -1

#: Seconds. Everything here takes a few, but the machine may be busy.
LONG = 120.0


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(tiny_llama_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.fixture(scope="module")
def whole_swarm(tiny_llama_folder):
    with LocalSwarm(
        tiny_llama_folder, LAYOUT, flags=["--threads", "1", "--dtype", "float32", "--announce-period", "4"]
    ) as swarm:
        yield swarm


@pytest.fixture
def swarm(whole_swarm):
    """All servers of the layout: those that the test before killed were started anew."""
    missing = list(LAYOUT)
    for server in whole_swarm.servers:
        if server.process.poll() is None:
            missing.remove(server.spec.blocks)
    for server in [whole_swarm.add(blocks, wait=False) for blocks in missing]:
        server.wait_until_ready(LONG)
    return whole_swarm


def tokens(*shape):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0))


def server_at(swarm, session, index):
    """The server that now stands at this place of the session's chain."""
    return swarm.by_peer_id(session.chain[index].peer_id)


def kill_holder(swarm, blocks):
    next(server for server in swarm.servers if server.spec.blocks == blocks and server.process.poll() is None).kill()


def assert_replaced(swarm, session, lost):
    """Exactly these servers were lost, and each was replaced by others for just its part of the chain."""
    assert [replacement.lost.peer_id for replacement in session.replacements] == [server.peer_id for server in lost]
    for replacement, server in zip(session.replacements, lost, strict=True):
        assert replacement.found[0].span.start == replacement.lost.span.start
        assert replacement.found[-1].span.end == replacement.lost.span.end
        assert server.spec.blocks not in [swarm.by_peer_id(link.peer_id).spec.blocks for link in replacement.found]
        assert 0 < replacement.time < LONG
    links = session.chain
    assert (links[0].span.start, links[-1].span.end) == (0, 8)
    assert all(link.span.end == following.span.start for link, following in pairwise(links))
    assert not {link.peer_id for link in links}.intersection(server.peer_id for server in lost)


def assert_banned(swarm, model, lost):
    """These servers, and no live one. Records of servers that earlier tests killed may have led to bans as well."""
    banned = set(model.connection.router.banned())
    assert banned.issuperset(server.peer_id for server in lost)
    alive = {server.peer_id for server in swarm.servers if server.process.poll() is None}
    assert not banned.intersection(alive), "a healthy server was banned"


class AtToken:
    """A streamer that acts when so many tokens have come: {number of tokens: action}."""

    def __init__(self, actions):
        self._actions, self._count = dict(actions), 0

    def put(self, value):
        if value.dim() == 1:  # else it is the prompt
            self._count += 1
            self._actions.pop(self._count, lambda: None)()

    def end(self):
        assert not self._actions, "the text ended before all was done"


class Watched:
    """A `BlockClient` that awaits `before(link, rows)` before it sends a step to a server."""

    def __init__(self, client, before):
        self._client, self._before = client, before

    async def open(self, link, spec):
        span = await self._client.open(link, spec)
        send = span.send

        async def watched(request, payload):
            await self._before(link, request.rows)
            await send(request, payload)

        span.send = watched
        return span


@pytest.mark.parametrize("victims", [[MIDDLE], [FIRST, LAST]], ids=["middle", "first, then last"])
def test_servers_are_killed_during_decoding(swarm, connect, plain, victims):
    model, ids, killed = connect(), tokens(1, 10), []

    def kill(index):
        killed.append(server_at(swarm, session, index))
        killed[-1].kill()

    with model.inference_session(max_length=60) as session:
        actions = {5 + 6 * number: lambda index=index: kill(index) for number, index in enumerate(victims)}
        ours = model.generate(ids, max_new_tokens=24, streamer=AtToken(actions))
        assert_replaced(swarm, session, killed)
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=24))
    assert [replacement.replayed_tokens for replacement in session.replacements] == [14, 20][: len(victims)]
    assert_banned(swarm, model, killed)


def test_a_replacement_is_killed_too(swarm, connect, plain):
    """The only other holder of some block dies after it took over; a server that joined meanwhile takes its place.

    It may have stood in the chain before already: then two places of the chain are lost at once.
    """
    model, ids, killed = connect(), tokens(1, 10), []

    def kill(server):
        killed.extend(server for link in session.chain if link.peer_id == server.peer_id)
        server.kill()

    with model.inference_session(max_length=60) as session:
        actions = {
            4: lambda: kill(server_at(swarm, session, MIDDLE)),
            8: lambda: swarm.add(killed[0].spec.blocks),
            12: lambda: kill(swarm.by_peer_id(session.replacements[0].found[0].peer_id)),
        }
        ours = model.generate(ids, max_new_tokens=20, streamer=AtToken(actions))
        assert_replaced(swarm, session, killed)
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=20))


def test_a_batch_with_left_padding_survives(swarm, connect, plain):
    model = connect()
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    for row, padding in ((0, 5), (2, 1)):
        ids[row, :padding] = mask[row, :padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": 14}
    with model.inference_session(max_length=40, num_rows=3) as session:
        actions = {5: lambda: server_at(swarm, session, MIDDLE).kill()}
        ours = model.generate(ids, streamer=AtToken(actions), **options)
        assert session.replacements[0].replayed_tokens == 21 + 3 * 4
    assert torch.equal(ours, plain.generate(ids, **options))


def test_a_server_is_killed_during_the_prefill_of_a_long_prompt(swarm, connect, plain):
    model, ids = connect(), tokens(1, 700)
    stopped = []

    async def kill_in_flight(link, rows):
        if rows[0].num_tokens > 100 and not stopped:
            server = server_at(swarm, session, MIDDLE)
            stopped.append(server)
            server.process.send_signal(signal.SIGSTOP)  # lest it answers before it dies
            asyncio.get_running_loop().call_later(0.2, server.process.kill)

    model.connection.client = Watched(model.connection.client, kill_in_flight)
    with model.inference_session(max_length=720) as session:
        text = model.generate(ids[:, :20], max_new_tokens=4)
        text = torch.cat([text, ids[:, 20:]], dim=1)
        ours = model.generate(text, max_new_tokens=8)
        assert_replaced(swarm, session, stopped)
        assert [replacement.replayed_tokens for replacement in session.replacements] == [23]
    assert torch.equal(ours, plain.generate(text, max_new_tokens=8))


@pytest.mark.parametrize(
    ("prompt", "patience"),
    # The long prompt takes the replacement a second or two, on a busy machine a multiple of that.
    [
        pytest.param((1, 10), 8.0, id="in a decoding step"),
        # Fails now and then after the tests before it, for a reason that is not understood yet.
        pytest.param((16, 900), 20.0, id="in a prompt it does not even read", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_hangs_is_replaced(swarm, connect, plain, prompt, patience):
    model = connect(request_timeout=patience, connect_timeout=patience)
    ids = tokens(*prompt)
    with model.inference_session(max_length=930, num_rows=len(ids)) as session:
        text = model.generate(ids[:, :5], max_new_tokens=4)
        hung = server_at(swarm, session, MIDDLE)
        hung.process.send_signal(signal.SIGSTOP)
        try:
            text = torch.cat([text, ids[:, 5:]], dim=1)
            ours = model.generate(text, max_new_tokens=4)
        finally:
            hung.kill()
        assert_replaced(swarm, session, [hung])
        assert "answered neither a step nor a ping" in session.replacements[0].reason
        assert session.replacements[0].detected < LONG
        assert_banned(swarm, model, [hung])
    assert torch.equal(ours, plain.generate(text, max_new_tokens=4))


def test_a_server_that_is_told_to_stop_is_left_before_it_ends(swarm, connect, plain):
    model, text = connect(), tokens(1, 10)
    with model.inference_session(max_length=1000) as session:
        text = model.generate(text, max_new_tokens=4)
        leaving = server_at(swarm, session, MIDDLE)
        leaving.process.send_signal(signal.SIGTERM)
        while not session.replacements:
            text = model.generate(text, max_new_tokens=4)
        text = model.generate(text, max_new_tokens=4)
        assert leaving.process.wait(LONG) == 0
        text = model.generate(text, max_new_tokens=4)
        assert_replaced(swarm, session, [leaving])
        assert session.replacements[0].reason == "the server is leaving"
    assert_banned(swarm, model, [])
    assert leaving.peer_id not in model.connection.router.banned()
    assert torch.equal(text, plain.generate(tokens(1, 10), max_new_tokens=text.shape[1] - 10))


def test_when_nobody_is_left_the_error_names_the_blocks_and_the_session_waits_for_a_server(swarm, connect, plain):
    model, ids = connect(retry_time=5.0), tokens(1, 10)
    hidden = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    part = model.model.layers[0:5]
    other = model.connection.open_session(BlockSpan(start=0, end=5), 1, 16, 256)
    with model.inference_session(max_length=60), other, torch.no_grad():
        text = model.generate(ids, max_new_tokens=5)
        start = part(hidden[:, :3], past_key_values=other.cache)
        for blocks in ("5:8", "6:8"):
            kill_holder(swarm, blocks)
        started = time.monotonic()
        with pytest.raises(
            MissingBlocks, match=r"no usable server holds blocks 6:8 .*gave up after \d+\.\d s"
        ) as caught:
            model.generate(text, max_new_tokens=5)
        assert caught.value.blocks == (6, 7)
        assert time.monotonic() - started < LONG
        # a session that needs none of the missing blocks is not concerned
        end = part(hidden[:, 3:], past_key_values=other.cache)
        torch.testing.assert_close(torch.cat([start, end], dim=1), part(hidden), rtol=0, atol=1e-4)
        swarm.add("5:8")
        assert torch.equal(model.generate(text, max_new_tokens=5), plain.generate(text, max_new_tokens=5))
