"""Fail-over of real server processes that push to each other, scene by scene; tests/test_kill.py has the plain ones.

Float32 everywhere, so whatever happens, tokens must be those of plain transformers.
"""

import asyncio
import contextlib
import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor

from swarm import AutoSwarmModelForCausalLM, BlockSpan
from swarm.errors import MissingBlocks
from swarm.scripts.bench_server import bench_program
from swarm.scripts.local_swarm import LocalSwarm, ServerSpec

#: The chain that everybody takes while it lives.
CHAIN = ["0:3", "3:6", "6:8"]
FIRST, MIDDLE, LAST = 0, 1, 2
#: Two that announce to be slower, with other boundaries: between them they replace whichever of the chain is lost.
SPARES = ["0:4", "4:8"]
#: The slowest, which is taken when those are lost too. Its cache of 4 pages of 64 tokens is overcommitted.
LAST_RESORT = "0:8"
#: Another first server. Its pushes come again when they are long done with, and it ends a session after so many idle
#: seconds.
REPEATING, IDLE_LIMIT = "0:3", 4
SPECS = [
    *map(ServerSpec, CHAIN),
    *(ServerSpec(blocks, program=bench_program(least_time=0.03)) for blocks in SPARES),
    ServerSpec(
        LAST_RESORT, ("--cache-tokens", "256", "--cache-overcommit", "4"), program=bench_program(least_time=0.05)
    ),
    ServerSpec(REPEATING, ("--session-idle-limit", str(IDLE_LIMIT)), program=("repeating_server", "--")),
]
FLAGS = ["--threads", "1", "--dtype", "float32", "--announce-period", "4", "--verbose"]
LONG = 120.0  # seconds: for what takes a few, but the machine may be busy


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(tiny_llama_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


class Scene:
    """A swarm whose servers have names: what they were started as. A killed one is started again for the next test."""

    def __init__(self, swarm):
        self._swarm = swarm
        self._of_spec = dict(enumerate(swarm.servers))

    def revive(self):
        started = []
        for index, server in self._of_spec.items():
            if server.process.poll() is not None:
                self._of_spec[index] = self._swarm.add(SPECS[index], wait=False)
                started.append(self._of_spec[index])
        for server in started:
            server.wait_until_ready(LONG)

    @property
    def initial_peers(self):
        return self._swarm.initial_peers

    @property
    def chain(self):
        return [self._of_spec[index] for index in range(3)]

    @property
    def spares(self):
        return [self._of_spec[3], self._of_spec[4]]

    @property
    def last_resort(self):
        return self._of_spec[5]

    @property
    def repeating(self):
        return self._of_spec[6]

    def add(self, spec):
        return self._swarm.add(spec)

    def by_peer_id(self, peer_id):
        return self._swarm.by_peer_id(peer_id)

    def log(self, peer_id):
        return self.by_peer_id(peer_id)._log.read_text()


@pytest.fixture(scope="module")
def whole_scene(tiny_llama_folder):
    with pytest.MonkeyPatch.context() as patch:
        path = [str(Path(__file__).parent / "fakes"), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        with LocalSwarm(tiny_llama_folder, SPECS, flags=FLAGS) as swarm:
            yield Scene(swarm)


@pytest.fixture
def scene(whole_scene):
    whole_scene.revive()
    return whole_scene


@pytest.fixture
def connect(scene, tiny_llama_folder):
    """A client, which does not use the repeating server unless it says which servers it uses."""
    with contextlib.ExitStack() as stack:

        def connect(servers=None, **settings):
            if servers is None:
                settings["blocked_servers"] = [scene.repeating.peer_id]
            else:
                settings["allowed_servers"] = [server.peer_id for server in servers]
            model = AutoSwarmModelForCausalLM.from_pretrained(
                tiny_llama_folder, initial_peers=scene.initial_peers, **settings
            )
            stack.callback(model.close)
            return model

        yield connect


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def padded_batch():
    """Two prompts of 9 and 6 tokens, the shorter one padded on the left."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    ids[1, :3] = mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def losses(session):
    return [replacement.lost.peer_id for replacement in session.replacements]


def peers(servers):
    return [server.peer_id for server in servers]


class AtStep(LogitsProcessor):
    """Acts when a generation chooses a token: {number of the token: action}. Changes nothing."""

    def __init__(self, actions):
        self.actions, self.count = dict(actions), 0

    def __call__(self, input_ids, scores):
        self.count += 1
        self.actions.pop(self.count, lambda: None)()
        return scores


class Watched:
    """A `BlockClient` that calls `before(link, request)` before it sends a step to a server."""

    def __init__(self, client, before):
        self._client, self._before = client, before

    async def open(self, link, spec):
        span = await self._client.open(link, spec)
        send = span.send

        async def watched(request, payload):
            self._before(link, request)
            await send(request, payload)

        span.send = watched
        return span


def kill_in_flight(server):
    """Now it takes nothing in any more, and in a moment it is dead: it cannot have answered what is sent now."""
    server.process.send_signal(signal.SIGSTOP)
    asyncio.get_running_loop().call_later(0.2, server.process.kill)


slow = pytest.mark.slow


def test_an_evicted_session_in_a_chain_is_replayed(scene, connect, plain):
    """Two sessions, each of which needs three of the four pages that the last server has."""
    servers = [scene.chain[FIRST], scene.last_resort]
    model, ids = connect(servers), tokens(2, 135)
    with model.inference_session(max_length=190) as first:
        text = model.generate(ids[:1], max_new_tokens=6)
        assert [link.peer_id for link in first.chain] == peers(servers)
        other = {}

        def take_turns():  # a session belongs to the thread that opened it
            with model.inference_session(max_length=190) as session:
                other["text"] = model.generate(ids[1:], max_new_tokens=6)
                other["losses"] = losses(session)

        thread = threading.Thread(target=take_turns)
        thread.start()
        thread.join(LONG)
        assert not first.replacements  # it does not know yet
        text = model.generate(text, max_new_tokens=6)
        (replacement,) = first.replacements
        assert "evicted" in replacement.reason
        assert replacement.lost.peer_id == replacement.found[0].peer_id == scene.last_resort.peer_id
        assert replacement.replayed_tokens == 140
    assert other["losses"] == []
    assert torch.equal(other["text"], plain.generate(ids[1:], max_new_tokens=6))
    assert torch.equal(text, plain.generate(ids[:1], max_new_tokens=12))
    assert not set(model.connection.router.banned()).intersection(peers(servers))


def test_a_session_beyond_its_servers_idle_limit_goes_on(scene, connect, plain):
    servers = [scene.repeating, *scene.chain[1:]]
    model, ids = connect(servers), tokens(1, 10)
    with model.inference_session(max_length=60) as session:
        text = model.generate(ids, max_new_tokens=6)
        hop = session._hops[FIRST]
        deadline = time.monotonic() + LONG
        while hop.span.broken is None:
            assert time.monotonic() < deadline, "the server never ended the session"
            time.sleep(0.05)
        text = model.generate(text, max_new_tokens=6)
        (replacement,) = session.replacements
        assert f"no step for {IDLE_LIMIT} s" in replacement.reason
        assert replacement.found[0].peer_id == scene.repeating.peer_id
        assert replacement.replayed_tokens == 15
    assert torch.equal(text, plain.generate(ids, max_new_tokens=12))
    assert not set(model.connection.router.banned()).intersection(peers(servers))


def test_a_push_that_comes_again_after_a_replay_changes_nothing(scene, connect, plain):
    lost = scene.chain[MIDDLE]
    model, ids = connect([scene.repeating, *scene.chain[1:], *scene.spares]), tokens(1, 10)
    with model.inference_session(max_length=60) as session:
        ours = model.generate(ids, max_new_tokens=20, logits_processor=[AtStep({6: lost.kill})])
        assert session.chain[0].peer_id == scene.repeating.peer_id
        heir = session.replacements[losses(session).index(lost.peer_id)].found[0]
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=20))
    deadline = time.monotonic() + LONG / 4
    while "a late duplicate" not in scene.log(heir.peer_id):
        assert time.monotonic() < deadline, "the late push never came"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "victim",
    [pytest.param(FIRST, marks=slow), MIDDLE, pytest.param(LAST, marks=slow)],
    ids=["first", "middle", "last"],
)
def test_a_server_dies_during_the_replay(scene, connect, plain, victim):
    """The spare that takes the lost server's place dies with the replay under way; the last resort takes over."""
    model, ids = connect(), tokens(1, 40)
    lost, heirs, replays = scene.chain[victim], [], []

    def before(link, request):
        if lost.process.poll() is not None and link.peer_id not in peers(scene.chain) and not heirs:
            heirs.append(scene.by_peer_id(link.peer_id))
            replays.append(sum(row.num_tokens for row in request.rows))
            kill_in_flight(heirs[0])

    model.connection.client = Watched(model.connection.client, before)
    with model.inference_session(max_length=80) as session:
        ours = model.generate(ids, max_new_tokens=16, logits_processor=[AtStep({6: lost.kill})])
        assert losses(session) == [lost.peer_id]
        assert heirs[0].peer_id not in [link.peer_id for link in session.replacements[0].found]
    assert replays == [45]
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=16))
    banned = model.connection.router.banned()
    assert {lost.peer_id, heirs[0].peer_id} <= set(banned)
    assert not set(banned).intersection(peers(s for s in scene.chain if s is not lost))


@slow
@pytest.mark.parametrize("victims", [(FIRST, MIDDLE), (MIDDLE, LAST)], ids=str)
def test_two_neighbours_die_at_once(scene, connect, plain, victims):
    """With the first of them die the copies of what the second was sent."""
    model, ids = connect(), tokens(1, 10)
    lost = [scene.chain[victim] for victim in victims]

    def kill():
        for server in lost:
            server.process.kill()

    with model.inference_session(max_length=60) as session:
        ours = model.generate(ids, max_new_tokens=16, logits_processor=[AtStep({6: kill})])
        assert sorted(losses(session)) == sorted(peers(lost))
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=16))


@slow
@pytest.mark.parametrize("victim", [FIRST, LAST], ids=["first", "last"])
def test_a_server_dies_during_a_prefill(scene, connect, plain, victim):
    """The first prompt of a session and a later one; the middle server is left to tests/test_kill.py."""
    model, ids = connect(), tokens(1, 600)
    lost = scene.chain[victim]
    hit = []

    def before(link, request):
        if request.rows[0].num_tokens > 100 and not hit:
            hit.append(link)
            kill_in_flight(lost)

    model.connection.client = Watched(model.connection.client, before)
    with model.inference_session(max_length=640) as session:
        text = model.generate(ids[:, :20], max_new_tokens=4)
        text = torch.cat([text, ids[:, 20:]], dim=1)
        ours = model.generate(text, max_new_tokens=8)
        assert losses(session) == [lost.peer_id]
    assert hit
    assert torch.equal(ours, plain.generate(text, max_new_tokens=8))


@slow
@pytest.mark.parametrize("victim", [FIRST, MIDDLE, LAST], ids=["first", "middle", "last"])
def test_a_server_dies_while_a_step_reorders_beams(scene, connect, plain, victim):
    """Others have copied their rows already, it has not; those that replace it have other boundaries."""
    model, batch = connect(), padded_batch()
    lost, options = scene.chain[victim], {"num_beams": 4, "max_new_tokens": 20}
    orders = []

    def before(link, request):
        if request.reorder is not None:
            orders.append(request.reorder.sources)
            if len(orders) == 6:
                kill_in_flight(lost)

    model.connection.client = Watched(model.connection.client, before)
    with model.inference_session(max_length=40, num_rows=8) as session:
        ours = model.generate(**batch, **options)
        assert losses(session) == [lost.peer_id]
    assert orders[5] != tuple(range(3)), "that step changed no order, so this test says nothing"
    assert torch.equal(ours, plain.generate(**batch, **options))


@slow
def test_a_session_is_rewound_before_and_after_a_kill(scene, connect, plain):
    model, ids, other = connect(), tokens(1, 12), tokens(1, 3, seed=9)
    with model.inference_session(max_length=64) as session:
        text = model.generate(ids, max_new_tokens=8)
        session.position = 15
        scene.chain[MIDDLE].kill()
        text = torch.cat([text[:, :15], other], dim=1)
        expected = torch.cat([plain.generate(ids, max_new_tokens=8)[:, :15], other], dim=1)
        text = model.generate(text, max_new_tokens=6)
        expected = plain.generate(expected, max_new_tokens=6)
        assert torch.equal(text, expected)
        (replacement,) = session.replacements
        assert replacement.lost.peer_id == scene.chain[MIDDLE].peer_id
        assert replacement.replayed_tokens == 15  # not those that were forgotten
        # to a place that the lost server had computed, then on over another kill
        session.position = 9
        text, expected = (torch.cat([text[:, :9], other], dim=1) for text in (text, expected))
        killed = AtStep({4: scene.chain[FIRST].kill})
        text = model.generate(text, max_new_tokens=8, logits_processor=[killed])
        assert torch.equal(text, plain.generate(expected, max_new_tokens=8))
        assert losses(session) == peers([scene.chain[MIDDLE], scene.chain[FIRST]])


@slow
@pytest.mark.parametrize("kind", ["prompt lookup", "assistant"])
def test_assisted_generation_survives_a_kill(scene, connect, plain, kind):
    """Candidates that were refused are rewound, with every step."""
    model, ids = connect(), tokens(1, 8).repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 3} if kind == "prompt lookup" else {"assistant_model": plain}
    with model.inference_session(max_length=100) as session:
        killed = AtStep({6: scene.chain[MIDDLE].kill})
        ours = model.generate(ids, max_new_tokens=24, logits_processor=[killed], **options)
        assert not killed.actions
        assert losses(session) == [scene.chain[MIDDLE].peer_id]
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=24))


@slow
def test_a_server_that_floods_the_next_one_with_steps_may_push_no_more(scene, connect, plain):
    """No healthy server is banned for it, and the session goes on over the very same servers."""
    forging = scene.add(ServerSpec("0:3", program=("forging_server", "--")))
    try:
        servers = [forging, *scene.chain[1:]]
        model, ids = connect(servers), tokens(1, 10)
        with model.inference_session(max_length=60) as session:
            ours = model.generate(ids, max_new_tokens=12)
            assert {lost for lost in losses(session)} <= set(peers(servers[1:]))
            assert 1 <= len(session.replacements) <= 2  # the last one is misled through the middle one
            assert "nobody asked for" in session.replacements[0].reason
            assert [link.peer_id for link in session.chain] == peers(servers)
        assert torch.equal(ours, plain.generate(ids, max_new_tokens=12))
        assert not set(model.connection.router.banned()).intersection(peers(servers))
    finally:
        forging.kill()


def test_who_gives_up_does_so_in_time_and_others_go_on_meanwhile(scene, connect, plain):
    """The only server left of some blocks dies. A session of other blocks, over the same server, notices nothing."""
    retry_time = 3.0
    model, ids = connect(scene.chain, retry_time=retry_time), tokens(1, 10)
    hidden = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    part, steps, stop = model.model.layers[0:3], [], threading.Event()

    def go_on():
        with model.connection.open_session(BlockSpan(start=0, end=3), 1, 900, 256) as other, torch.no_grad():
            while not stop.is_set() and len(steps) < 900:
                output = part(hidden, past_key_values=other.cache)
                steps.append((time.monotonic(), output))
                stop.wait(0.01)
            steps.append(other.replacements)

    with model.inference_session(max_length=60) as session:
        text = model.generate(ids, max_new_tokens=5)
        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            scene.chain[LAST].kill()
            started = time.monotonic()
            with pytest.raises(
                MissingBlocks, match=r"no usable server holds blocks 6:8 .*gave up after \d+\.\d s"
            ) as caught:
                model.generate(text, max_new_tokens=5)
            ended = time.monotonic()
        finally:
            stop.set()
            thread.join(LONG)
        assert caught.value.blocks == (6, 7)
        assert ended - started < retry_time + 10  # nothing here waits longer for anybody, but the machine may be busy
        assert losses(session) == []
    *steps, replacements = steps
    assert replacements == []
    meanwhile = [at for at, _ in steps if started < at < ended]
    assert len(meanwhile) > 10
    assert max(later - earlier for earlier, later in pairwise(meanwhile)) < retry_time
    with torch.no_grad():
        whole = part(hidden.repeat(1, len(steps), 1))
    torch.testing.assert_close(torch.cat([output for _, output in steps], dim=1), whole, rtol=0, atol=1e-4)
