"""The line of those who are about to open a session."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from hivemind.proto import runtime_pb2
from no_adapters import empty_registry

from swarm.codecs import Codec
from swarm.data_structures import MAX_OPENINGS, BlockSpan, OpeningAnswer, ServerInfo, ServerState
from swarm.errors import PeerRefused
from swarm.protocol import OPENING_QUESTION, OpenSession
from swarm.server.adapters.registry import Lease
from swarm.server.handler import Handler
from swarm.server.openings import MAX_PER_PEER, PATIENCE, Openings
from swarm.server.quotas import PeerQuotas, QuotaLimits

INFO = ServerInfo(
    state=ServerState.ONLINE, span=BlockSpan(start=0, end=8), throughput=1.0, numerics="x", cache_tokens_left=5
)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def line(clock):
    return Openings(clock)


def key(number):
    return f"{number:016x}"


def ask(line, peer, number):
    answer = line.answer(OPENING_QUESTION + key(number), peer, INFO)
    assert answer.info == INFO
    return [int(one, 16) for one in answer.before], [int(one, 16) for one in answer.opened]


def test_everybody_learns_who_came_before_him(line):
    assert ask(line, "A", 1) == ([], [])
    assert ask(line, "B", 2) == ([1], [])
    assert ask(line, "C", 3) == ([1, 2], [])


def test_who_opened_a_session_is_told_apart(line):
    ask(line, "A", 1)
    ask(line, "B", 2)
    line.opened("A")
    line.opened("stranger")
    assert ask(line, "C", 3) == ([2], [1])


def test_the_session_is_the_one_that_was_asked_for_last(line):
    ask(line, "A", 1)
    ask(line, "A", 2)
    line.opened("A")
    assert ask(line, "B", 3) == ([1], [2])
    line.opened("A")
    line.opened("A")
    assert ask(line, "B", 4) == ([], [1, 2])


def test_nobody_stands_before_himself(line):
    ask(line, "A", 1)
    assert ask(line, "A", 2) == ([], [])


def test_asking_again_with_the_same_key_moves_to_the_end(line):
    ask(line, "A", 1)
    ask(line, "B", 2)
    ask(line, "A", 1)
    assert ask(line, "C", 3) == ([2, 1], [])


def test_patience_ends(line, clock):
    ask(line, "A", 1)
    line.opened("A")
    ask(line, "B", 2)
    clock.now += PATIENCE / 2
    ask(line, "C", 3)
    clock.now += PATIENCE / 2
    assert ask(line, "D", 4) == ([3], [])


def test_one_peer_cannot_fill_the_line(line):
    for number in range(3 * MAX_PER_PEER):
        ask(line, "A", number)
    before, _ = ask(line, "B", 999)
    assert before == list(range(2 * MAX_PER_PEER, 3 * MAX_PER_PEER))


def test_the_line_is_bounded(line):
    for number in range(2 * MAX_OPENINGS):
        ask(line, f"P{number}", number)
    assert len(ask(line, "B", 9999)[0]) == MAX_OPENINGS


@pytest.mark.parametrize(
    "question", ["", "hello", OPENING_QUESTION, OPENING_QUESTION + "x" * 16, OPENING_QUESTION + "a" * 17, "a" * 16]
)
def test_any_other_question_is_answered_with_the_info_alone(line, question):
    assert line.answer(question, "A", INFO) is INFO
    assert ask(line, "B", 1) == ([], [])


async def test_the_handler_keeps_the_line():
    fingerprint = "a" * 64
    handler = Handler(
        fingerprint=fingerprint,
        info=lambda: INFO,
        quotas=PeerQuotas(QuotaLimits()),
        idle_limit=1.0,
        step_timeout=1.0,
        pass_timeout=1.0,
        max_pass_tokens=64,
    )
    handler.open(
        SimpleNamespace(
            engine=SimpleNamespace(span=SimpleNamespace(blocks=INFO.span)),
            sessions=SimpleNamespace(open=lambda request, peer_id: SimpleNamespace(rows=[])),
            adapters=empty_registry(),
        )
    )

    async def ask(peer, number):
        question = runtime_pb2.ExpertUID(uid=OPENING_QUESTION + key(number))
        response = await handler.rpc_info(question, SimpleNamespace(remote_id=peer))
        return OpeningAnswer.model_validate_json(response.serialized_info)

    def open_session(peer, weights):
        request = OpenSession(
            session_id="0" * 32,
            fingerprint=weights,
            span=INFO.span,
            num_rows=1,
            max_length=8,
            output_codec=Codec.FLOAT32,
        )
        return handler.open_session(request, peer, Lease([], ExitStack()))

    await ask("A", 1)
    await ask("B", 2)
    with pytest.raises(PeerRefused):
        open_session("B", "b" * 64)
    assert open_session("A", fingerprint).rows == []
    assert await ask("C", 3) == OpeningAnswer(info=INFO, before=(key(2),), opened=(key(1),))
    plain = await handler.rpc_info(runtime_pb2.ExpertUID(), SimpleNamespace(remote_id="C"))
    assert ServerInfo.model_validate_json(plain.serialized_info) == INFO
