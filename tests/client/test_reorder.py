"""Rows that change places between steps, as in beam search, with failures around it."""

import pytest

from swarm.errors import EngineError, NotSupported, RoutingError, UsageError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def swarm(fake_swarm, either_way):
    """A fast chain A, B, C, and a slower spare for each of them."""
    for names, start, end in (("AD", 0, 3), ("BE", 3, 6), ("CF", 6, 8)):
        for name, throughput in zip(names, (100.0, 1.0), strict=True):
            fake_swarm.add(name, start, end, throughput=throughput)
    return fake_swarm


def reorders(swarm, names):
    return [swarm[name].reorders for name in names]


def test_rows_become_copies_of_others(swarm):
    user = swarm.connect().user(num_rows=3)
    user.step(4, 5, 6)
    user.reorder(2, 2, 0)
    assert user.session.lengths == [6, 6, 4]
    user.step()
    user.step(2, 1, 3)
    user.reorder(1, 0, 1)
    user.step()
    assert reorders(swarm, "ABC") == [[1, 2]] * 3


def test_several_orders_before_a_step_are_one(swarm):
    user = swarm.connect().user(num_rows=3)
    user.step(1, 2, 3)
    user.reorder(1, 2, 0)
    user.reorder(2, 2, 1)
    user.step()
    assert reorders(swarm, "ABC") == [[1]] * 3


def test_rows_that_are_reordered_and_rewound_before_the_same_step(swarm):
    user = swarm.connect().user(num_rows=2)
    user.step(5, 7)
    user.rewind(3, 7)
    user.reorder(1, 0)
    user.rewind(6, 2)
    user.step()
    swarm["B"].die()
    user.step()
    user.step()


@pytest.mark.parametrize("victim", "ABC")
@pytest.mark.parametrize("steps_after", [0, 1, 2])
def test_a_replay_brings_rows_to_the_order_that_they_were_in(swarm, victim, steps_after):
    client = swarm.connect()
    user = client.user(num_rows=3)
    user.step(4, 5, 6)
    user.reorder(2, 2, 0)
    for _ in range(steps_after):
        user.step()
    swarm[victim].die()
    user.step()
    user.reorder(1, 0, 1)
    user.step()
    user.step()
    assert client.banned == {victim}


@pytest.mark.parametrize("victim", "ABC")
def test_a_step_that_is_tried_again_reorders_once_everywhere(swarm, victim):
    user = swarm.connect().user(num_rows=3)
    user.step(4, 5, 6)
    user.reorder(1, 1, 0)
    swarm[victim].fail("step", EngineError("no"))
    user.step()
    spare = {"A": "D", "B": "E", "C": "F"}[victim]
    for name in {"A", "B", "C", spare} - {victim}:
        assert swarm[name].reorders == [1]
    user.step()


@pytest.mark.parametrize("first_dies", [False, True])
def test_a_step_that_was_given_up_and_is_sent_again_reorders_once_everywhere(swarm, first_dies):
    client = swarm.connect(max_retries=2)
    user = client.user(num_rows=3)
    user.step(4, 5, 6)
    user.reorder(1, 1, 0)
    for name in "BE":
        swarm[name].fail("step", EngineError("no"))
    with pytest.raises(RoutingError, match="gave up"):
        user.step()
    with pytest.raises(UsageError, match="send it again first"):
        user.session.reorder([0, 1, 2])
    client.router.report_success("B")
    if first_dies:  # after it reordered
        swarm["A"].die()
    user.step()
    user.step()
    assert reorders(swarm, "ADBC") == [[1], [1] if first_dies else [], [1], [1]]


def test_an_interruption_just_after_the_step_does_not_reorder_twice(swarm):
    client = swarm.connect()
    user = client.user(num_rows=3)
    user.step(4, 5, 6)
    run = client.thread.run

    def run_and_interrupt(coroutine):
        run(coroutine)
        raise KeyboardInterrupt

    user.reorder(1, 2, 0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(client.thread, "run", run_and_interrupt)
        user.step()
    user.step()
    swarm["B"].fail("step", EngineError("no"))
    user.step()
    user.step()
    assert reorders(swarm, "AC") == [[1], [1]]


def test_a_session_leaves_a_server_with_its_rows_in_order(swarm):
    client = swarm.connect()
    user = client.user(num_rows=2)
    user.step(3, 5)
    user.reorder(1, 1)
    swarm["B"].leave()
    user.step()
    user.step()
    assert [peer_id for peer_id, _ in user.route] == ["A", "E", "C"]
    assert client.banned == set()


def test_a_step_after_a_reordering_without_tokens_for_every_row_is_our_users_error(swarm):
    client = swarm.connect()
    user = client.user(num_rows=3)
    user.step(4, 5, 6)
    user.reorder(1, 1, 0)
    with pytest.raises(UsageError, match="tokens for each of the 3 rows"):
        user.step(1, 0, 1)
    user.step()
    assert client.banned == set()


def test_a_step_after_a_reordering_that_does_not_fit_into_one_message_is_our_users_error(swarm, small_messages):
    client = swarm.connect()
    user = client.user(num_rows=3)
    user.step(4, 5, 6)
    user.reorder(1, 1, 0)
    with pytest.raises(NotSupported, match="one message, which takes 4"):
        user.step(2, 2, 1)
    user.step()
    user.step(2, 2, 2)
    assert client.banned == set()


@pytest.mark.parametrize("sources", [[0], [0, 3, 1], [-1, 0, 0], [0, 1, 2, 0]])
def test_orders_that_cannot_be(swarm, sources):
    user = swarm.connect().user(num_rows=3)
    user.step(1, 2, 3)
    with pytest.raises(UsageError, match="cannot reorder 3 rows"):
        user.session.reorder(sources)
    user.step()
