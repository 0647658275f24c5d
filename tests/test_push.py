"""Real server processes that push to each other: pushes happen, beams are right, and links that break are mended."""

import signal
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor

from swarm.client.block_client import RemoteSpan
from swarm.codecs import Codec
from swarm.scripts.local_swarm import LocalSwarm

#: The only chain, until a test adds servers.
CHAIN = ["0:3", "3:6", "6:8"]
FLAGS = ["--threads", "1", "--dtype", "float32", "--announce-period", "4"]
LONG = 120.0  # seconds: for what takes a few, but the machine may be busy


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(tiny_llama_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.fixture(scope="module")
def whole_swarm(tiny_llama_folder):
    with LocalSwarm(tiny_llama_folder, CHAIN, flags=FLAGS) as swarm:
        yield swarm


@pytest.fixture
def swarm(whole_swarm):
    """One live server for each part of the chain."""
    missing = set(CHAIN).difference(server.spec.blocks for server in alive(whole_swarm))
    for server in [whole_swarm.add(blocks, wait=False) for blocks in missing]:
        server.wait_until_ready(LONG)
    return whole_swarm


def alive(swarm):
    return [server for server in swarm.servers if server.process.poll() is None]


def tokens(*shape):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0))


def server_at(swarm, session, index):
    return swarm.by_peer_id(session.chain[index].peer_id)


def padded_batch():
    """Two prompts of 9 and 6 tokens, the shorter one padded on the left."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    ids[1, :3] = mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


class AtStep(LogitsProcessor):
    """Acts once, when a generation chooses its `number`th token, beams or not; changes nothing."""

    def __init__(self, number, action):
        self.left, self._action = number, action

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left == 0:
            self._action()
        return scores


@pytest.fixture
def answers(monkeypatch):
    """What servers report of each step, as it comes: copies may come after the step is done."""
    reports = []
    take = RemoteSpan._take_result

    def noting(span, report, payload):
        reports.append(report)
        take(span, report, payload)

    monkeypatch.setattr(RemoteSpan, "_take_result", noting)
    return reports


def wait_for(answers, number):
    deadline = time.monotonic() + LONG
    while len(answers) < number:
        assert time.monotonic() < deadline, f"only {len(answers)} of {number} answers came"
        time.sleep(0.01)


@pytest.mark.parametrize("direct_push", [True, False])
def test_every_token_is_pushed_from_server_to_server(connect, plain, direct_push, answers):
    model, ids = connect(direct_push=direct_push), tokens(1, 10)
    with model.inference_session(max_length=60) as session:
        ours = model.generate(ids, max_new_tokens=24)
        wait_for(answers, 3 * 24)
        report = session.report()
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=24))
    assert sum(answer.pushed for answer in answers) == (2 * 24 if direct_push else 0)
    assert [hop.pushed for hop in report.hops] == [False, direct_push, direct_push]
    assert report.steps > 0  # those of which all copies came before the next began
    assert report.pushes == (2 * report.steps if direct_push else 0)
    assert not session.replacements


def test_a_batch_with_left_padding_is_pushed(connect, plain, answers):
    model, batch = connect(), padded_batch()
    with model.inference_session(max_length=40, num_rows=2):
        ours = model.generate(**batch, max_new_tokens=16)
        wait_for(answers, 3 * 16)
    assert sum(answer.pushed for answer in answers) == 2 * 16
    assert torch.equal(ours, plain.generate(**batch, max_new_tokens=16))


@pytest.mark.parametrize("direct_push", [True, False])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_beams": 3}], ids=["beam search", "beam sampling"])
def test_beams(connect, plain, direct_push, options):
    model, batch = connect(direct_push=direct_push), padded_batch()
    options = {"num_beams": 4, "max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True} | options
    torch.manual_seed(0)
    ours = model.generate(**batch, **options)
    torch.manual_seed(0)
    theirs = plain.generate(**batch, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4, atol=1e-4)
    # rows did change places, or the test says nothing
    orders = theirs.beam_indices[:, :-1]
    assert any(len(set(row.tolist())) > 1 for row in orders)


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize(
    "direct_push", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["pushed", "carried by the client"]
)
def test_a_server_is_killed_during_beam_search(swarm, connect, plain, victim, direct_push):
    swarm.add(CHAIN[victim])
    model, batch = connect(direct_push=direct_push), padded_batch()
    options = {"num_beams": 4, "max_new_tokens": 20}
    with model.inference_session(max_length=40, num_rows=8) as session:
        kill = AtStep(8, lambda: server_at(swarm, session, victim).kill())
        ours = model.generate(**batch, **options, logits_processor=[kill])
        (replacement,) = session.replacements
        assert replacement.lost.peer_id not in {server.peer_id for server in alive(swarm)}
        assert replacement.replayed_tokens == 4 * (9 + 6) + 8 * 7
    assert torch.equal(ours, plain.generate(**batch, **options))


def assert_pushed_again(answers):
    """The latest steps went straight through all three servers."""
    last = max(answer.step for answer in answers)
    deadline = time.monotonic() + LONG
    for step in range(last - 9, last + 1):
        while len(got := [answer.pushed for answer in answers if answer.step == step]) < 3:
            assert time.monotonic() < deadline, f"only {len(got)} of 3 answers to step {step} came"
            time.sleep(0.01)
        assert sorted(got) == [False, True, True]


@pytest.mark.parametrize(
    "victim",
    [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)],
    ids=["first", "middle", "last"],
)
def test_servers_push_again_after_one_was_replaced(swarm, connect, plain, victim, answers):
    swarm.add(CHAIN[victim])
    model, ids = connect(), tokens(1, 10)
    with model.inference_session(max_length=60) as session:
        kill = AtStep(6, lambda: server_at(swarm, session, victim).kill())
        ours = model.generate(ids, max_new_tokens=20, logits_processor=[kill])
        assert len(session.replacements) == 1
        assert_pushed_again(answers)
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=20))


def test_a_server_that_hangs_holds_up_neither_its_predecessor_nor_the_copies(swarm, connect, plain, answers):
    """The middle one is stopped, not dead: what is pushed to it vanishes in buffers."""
    swarm.add(CHAIN[1])
    model, ids = connect(request_timeout=8.0, connect_timeout=8.0), tokens(1, 10)
    with model.inference_session(max_length=60) as session:
        hung = []

        def hang():
            hung.append(server_at(swarm, session, 1))
            hung[0].process.send_signal(signal.SIGSTOP)

        try:
            ours = model.generate(ids, max_new_tokens=20, logits_processor=[AtStep(6, hang)])
        finally:
            hung[0].kill()
        (replacement,) = session.replacements
        assert replacement.lost.peer_id == hung[0].peer_id
        assert_pushed_again(answers)
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=20))


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1], ids=["first", "middle"])
def test_compressed_rows_are_pushed_and_a_replay_sends_the_same_again(swarm, connect, victim, answers):
    """In blockwise8 tokens need not be the plain model's. But they are those of the same chain, whoever was killed."""
    swarm.add(CHAIN[victim])
    model, ids = connect(compression="blockwise8"), tokens(1, 10)
    with model.inference_session(max_length=60):
        undisturbed = model.generate(ids, max_new_tokens=24)
    answers.clear()
    with model.inference_session(max_length=60) as session:
        kill = AtStep(8, lambda: server_at(swarm, session, victim).kill())
        disturbed = model.generate(ids, max_new_tokens=24, logits_processor=[kill])
        assert len(session.replacements) == 1
        assert_pushed_again(answers)
        assert {hop.history.codec for hop in session._hops} == {Codec.BLOCKWISE8}  # client -> 1 -> 2 -> 3
    assert {answer.hidden.codec for answer in answers} == {Codec.BLOCKWISE8}
    assert torch.equal(disturbed, undisturbed)


def test_between_processes_of_one_machine_nothing_is_compressed(swarm, connect, plain, answers):
    """compression="auto", the default, once everybody's line was measured."""
    model, ids = connect(update_period=0.5), tokens(1, 10)
    wait_for_line_rates(model, swarm)
    with model.inference_session(max_length=40):
        ours = model.generate(ids, max_new_tokens=8)
    assert {answer.hidden.codec for answer in answers} == {Codec.FLOAT32}
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=8))


def wait_for_line_rates(model, swarm):
    """Until the client knows how fast its own line is, and that of each server."""
    connection, deadline = model.connection, time.monotonic() + LONG
    while True:
        connection.thread.run(connection.router.refresh())
        infos = [connection.router.info(server.peer_id) for server in alive(swarm)]
        if connection.links.own_rate.value is not None and all(info and info.network_rate for info in infos):
            return
        assert time.monotonic() < deadline, "not all lines were measured"
        time.sleep(0.1)
