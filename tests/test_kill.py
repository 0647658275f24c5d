"""Real server processes that die: SIGKILL and SIGSTOP in the middle of a generation. Tokens must not change."""

import asyncio
import contextlib
import signal
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm import AutoSwarmModelForCausalLM, BlockSpan
from swarm.errors import MissingBlocks
from swarm.scripts.local_swarm import LocalSwarm

#: A chain of three, and spares with other boundaries for each of them; the shortest chain is the first three.
LAYOUT = ["0:3", "3:5", "5:8", "0:2", "2:4", "4:6", "6:8"]
FIRST, MIDDLE, LAST = "0:3", "3:5", "5:8"
REPLACED_BY = {FIRST: ["0:2", "2:3"], MIDDLE: ["3:4", "4:5"], LAST: ["5:6", "6:8"]}

#: Seconds. Everything here takes a few, but the machine may be busy.
LONG = 120.0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of torch wait for each other by spinning: beside server processes on few cores, two take tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain(tiny_llama_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.fixture(scope="module")
def whole_swarm(tiny_llama_folder):
    with LocalSwarm(tiny_llama_folder, LAYOUT, flags=["--threads", "1", "--announce-period", "2"]) as swarm:
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


@pytest.fixture
def connect(swarm, tiny_llama_folder):
    with contextlib.ExitStack() as stack:

        def connect(**settings):
            model = AutoSwarmModelForCausalLM.from_pretrained(
                tiny_llama_folder, initial_peers=swarm.initial_peers, **settings
            )
            stack.callback(model.close)
            return model

        yield connect


def tokens(*shape):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0))


def route(session):
    return [str(link.span) for link in session.chain]


def server_of(swarm, session, blocks):
    (peer_id,) = [link.peer_id for link in session.chain if str(link.span) == blocks]
    return swarm.by_peer_id(peer_id)


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
    """A `BlockClient` that awaits `during_step(link, rows, task)` while `task` runs a step."""

    def __init__(self, client, during_step):
        self._client, self._during_step = client, during_step

    async def open(self, link, **sizes):
        span = await self._client.open(link, **sizes)
        step = span.step

        async def watched(rows, hidden):
            task = asyncio.ensure_future(step(rows, hidden))
            await self._during_step(link, rows, task)
            return await task

        span.step = watched
        return span


@pytest.mark.parametrize("victims", [[FIRST], [MIDDLE], [LAST], [FIRST, MIDDLE], [LAST, FIRST]], ids=" then ".join)
def test_servers_are_killed_during_decoding(swarm, connect, plain, victims):
    model, ids = connect(), tokens(1, 10)
    with model.inference_session(max_length=60) as session:
        killed = []

        def kill(blocks):
            server = server_of(swarm, session, blocks)
            killed.append(server.peer_id)
            server.kill()

        actions = {5 + 6 * number: lambda blocks=blocks: kill(blocks) for number, blocks in enumerate(victims)}
        ours = model.generate(ids, max_new_tokens=24, streamer=AtToken(actions))
        expected_route = [
            part
            for blocks in (FIRST, MIDDLE, LAST)
            for part in (REPLACED_BY[blocks] if blocks in victims else [blocks])
        ]
        assert route(session) == expected_route
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=24))
    assert [replacement.lost.peer_id for replacement in session.replacements] == killed
    for number, (replacement, blocks) in enumerate(zip(session.replacements, victims, strict=True)):
        assert [str(link.span) for link in replacement.found] == REPLACED_BY[blocks]
        assert replacement.replayed_tokens == 10 + 4 + 6 * number
        assert 0 < replacement.time < LONG
    assert set(model.connection.router.banned()) == set(killed)


def test_a_replacement_is_killed_too(swarm, connect, plain):
    """The last spare of block 3 dies after it took over; the server that was started meanwhile takes its place."""
    model, ids = connect(), tokens(1, 10)
    with model.inference_session(max_length=60) as session:
        actions = {
            4: lambda: server_of(swarm, session, MIDDLE).kill(),
            8: lambda: swarm.add(MIDDLE).wait_until_ready(LONG),
            12: lambda: server_of(swarm, session, "3:4").kill(),
        }
        ours = model.generate(ids, max_new_tokens=20, streamer=AtToken(actions))
        assert [str(replacement.lost.span) for replacement in session.replacements] == [MIDDLE, "3:4"]
        assert route(session) == [FIRST, "3:4", "4:5", LAST]
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=20))


def test_a_batch_with_left_padding_survives(swarm, connect, plain):
    model = connect()
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    for row, padding in ((0, 5), (2, 1)):
        ids[row, :padding] = mask[row, :padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": 14}
    with model.inference_session(max_length=40, num_rows=3) as session:
        actions = {5: lambda: server_of(swarm, session, MIDDLE).kill()}
        ours = model.generate(ids, streamer=AtToken(actions), **options)
        assert session.replacements[0].replayed_tokens == 21 + 3 * 4
    assert torch.equal(ours, plain.generate(ids, **options))


def test_a_server_is_killed_during_the_prefill_of_a_long_prompt(swarm, connect, plain):
    model, ids = connect(), tokens(1, 700)
    stopped = []

    async def kill_in_flight(link, rows, task):
        if str(link.span) == MIDDLE and rows[0].num_tokens > 100 and not stopped:
            server = swarm.by_peer_id(link.peer_id)
            stopped.append(server)
            server.process.send_signal(signal.SIGSTOP)  # lest it answers before it dies
            done, _ = await asyncio.wait({task}, timeout=0.5)
            assert not done
            server.kill()

    model.connection.client = Watched(model.connection.client, kill_in_flight)
    with model.inference_session(max_length=720) as session:
        text = model.generate(ids[:, :20], max_new_tokens=4)
        text = torch.cat([text, ids[:, 20:]], dim=1)
        ours = model.generate(text, max_new_tokens=8)
        assert len(stopped) == 1
        assert [replacement.replayed_tokens for replacement in session.replacements] == [23]
    assert torch.equal(ours, plain.generate(text, max_new_tokens=8))


@pytest.mark.parametrize(
    "prompt", [(1, 10), (16, 900)], ids=["in a decoding step", "in a prompt it does not even read"]
)
def test_a_server_that_hangs_is_replaced(swarm, connect, plain, prompt):
    model = connect(request_timeout=8.0, connect_timeout=8.0)
    ids = tokens(*prompt)
    with model.inference_session(max_length=930, num_rows=len(ids)) as session:
        text = model.generate(ids[:, :5], max_new_tokens=4)
        hung = server_of(swarm, session, MIDDLE)
        hung.process.send_signal(signal.SIGSTOP)
        try:
            text = torch.cat([text, ids[:, 5:]], dim=1)
            ours = model.generate(text, max_new_tokens=4)
        finally:
            hung.kill()
        (replacement,) = session.replacements
        assert replacement.lost.peer_id == hung.peer_id
        assert "did not answer a step within 8 s" in replacement.reason
        assert set(model.connection.router.banned()) == {hung.peer_id}
    assert torch.equal(ours, plain.generate(text, max_new_tokens=4))


def test_when_nobody_is_left_the_error_names_the_blocks_and_the_session_waits_for_a_server(swarm, connect, plain):
    model, ids = connect(retry_time=5.0), tokens(1, 10)
    hidden = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    part = model.model.layers[0:5]
    other = model.connection.open_session(BlockSpan(start=0, end=5), 1, 16, 256)
    with model.inference_session(max_length=60) as session, other, torch.no_grad():
        text = model.generate(ids, max_new_tokens=5)
        start = part(hidden[:, :3], past_key_values=other.cache)
        server_of(swarm, session, LAST).kill()
        next(server for server in swarm.servers if server.spec.blocks == "6:8" and server.process.poll() is None).kill()
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
        swarm.add(LAST).wait_until_ready(LONG)
        assert torch.equal(model.generate(text, max_new_tokens=5), plain.generate(text, max_new_tokens=5))
