"""Sessions whose rows have adapters, over fake servers: whom they ask, what they tell, and what a fail-over keeps."""

import time

import pytest
import torch
from fake_server import HIDDEN_SIZE

from swarm.data_structures import AdapterRef
from swarm.errors import AdapterNotHere, AdapterNotServed, CacheFull, PeerUnreachable, RoutingError, UsageError
from swarm.protocol import RowSlice, row_adapters

FR, DE = AdapterRef("fr", f"{17:016x}"), AdapterRef("de", f"{5:016x}")
ROWS = (FR, None, DE)


@pytest.fixture
def swarm(fake_swarm, either_way):
    """A fast server without adapters, and slower ones with both."""
    fake_swarm.add("fast", 0, 8, throughput=1000.0)
    for name, start, end, throughput in (("A", 0, 5, 100.0), ("B", 5, 8, 100.0), ("C", 0, 8, 1.0), ("D", 0, 8, 0.5)):
        fake_swarm.add(name, start, end, throughput=throughput, adapters=(FR, DE))
    return fake_swarm


USUAL = [("A", "0:5"), ("B", "5:8")]


def told(server):
    """What the sessions on a server have."""
    return [session.request.adapters for session in server.sessions.values()]


def test_servers_are_told_the_adapters_of_the_rows(swarm):
    user = swarm.connect().user(num_rows=3, adapters=ROWS)
    user.step(3, 1, 2)
    user.step()
    assert user.route == USUAL
    assert told(swarm["A"]) == told(swarm["B"]) == [row_adapters(ROWS)]
    assert swarm["fast"].opened == 0


def test_without_adapters_any_server_will_do(swarm):
    user = swarm.connect().user(num_rows=2)
    user.step()
    assert user.route == [("fast", "0:8")]
    assert told(swarm["fast"]) == [None]


@pytest.mark.parametrize("victim", ["A", "B"])
def test_a_fail_over_keeps_the_adapters(swarm, victim):
    connection = swarm.connect()
    user = connection.user(num_rows=3, adapters=ROWS)
    user.step(3, 1, 2)
    swarm[victim].kill()
    user.step()
    assert {peer for peer, _ in user.route} <= {"A", "B", "C", "D"} - {victim}
    assert connection.banned == {victim}
    for peer, _ in user.route:
        assert told(swarm[peer]) == [row_adapters(ROWS)]


def test_a_server_that_leaves_is_left_for_one_with_the_adapters(swarm):
    user = swarm.connect().user(adapters=[FR])
    user.step(2)
    swarm["A"].leave()
    user.step()
    assert user.route == [("C", "0:5"), ("B", "5:8")]
    assert told(swarm["C"]) == [row_adapters([FR])]


def test_a_server_that_lost_the_adapter_is_passed_over_and_not_banned(swarm):
    swarm["A"].fail("open", AdapterNotHere("no adapter 'fr' here"))
    connection = swarm.connect()
    user = connection.user(adapters=[FR])
    user.step(2)
    user.step()
    assert user.route[0][0] == "C"
    assert connection.banned == set()
    assert connection.user(adapters=[FR]).session.chain == ()
    other = connection.user(adapters=[DE])
    other.step()
    assert other.route == USUAL  # the next session asks it again


def test_one_that_loses_it_in_the_middle_is_replaced_and_not_banned(swarm):
    connection = swarm.connect()
    user = connection.user(adapters=[FR])
    user.step(2)
    swarm["B"].fail("step", AdapterNotHere("no adapter 'fr' here any more"))
    user.step()
    assert user.route == [("A", "0:5"), ("C", "5:8")]
    assert connection.banned == set()


def test_more_servers_without_the_adapter_than_retries(fake_swarm):
    """Each is asked once: that is no failure to be counted."""
    for number in range(20):
        server = fake_swarm.add(f"no{number}", 0, 8, adapters=(FR,))
        server.fail("open", AdapterNotHere("no adapter 'fr' here"), times=10**9)
    fake_swarm.add("yes", 0, 8, throughput=0.1, adapters=(FR,))
    user = fake_swarm.connect(max_retries=3).user(adapters=[FR])
    user.step()
    assert user.route == [("yes", "0:8")]


def test_nobody_has_it_though_all_announce_it(fake_swarm):
    for name in ("A", "B"):
        fake_swarm.add(name, 0, 8, adapters=(FR,)).fail("open", AdapterNotHere("no adapter 'fr'"), times=10**9)
    connection = fake_swarm.connect()
    with pytest.raises(
        AdapterNotServed,
        match=r"no server of blocks 0:8 has the session's adapters \(server A: no adapter 'fr'; server B",
    ):
        connection.user(adapters=[FR]).step()
    assert connection.banned == set()
    assert (fake_swarm["A"].opened, fake_swarm["B"].opened) == (1, 1)


def test_a_full_server_with_the_adapter_is_waited_for(fake_swarm):
    fake_swarm.add("no", 0, 8, adapters=(FR,)).fail("open", AdapterNotHere("no adapter 'fr'"), times=10**9)
    fake_swarm.add("full", 0, 8, adapters=(FR,)).fail("open", CacheFull("full", 0), times=2)
    user = fake_swarm.connect().user(adapters=[FR])
    user.step()
    assert user.route == [("full", "0:8")]


def test_the_last_server_with_the_adapter_dies(fake_swarm):
    fake_swarm.add("plain", 0, 8)
    fake_swarm.add("A", 0, 8, adapters=(FR,))
    user = fake_swarm.connect(max_retries=2).user(adapters=[FR])
    user.step()
    fake_swarm["A"].fail("step", PeerUnreachable("gone"))
    fake_swarm["A"].die()
    with pytest.raises(RoutingError, match=r"gave up after") as caught:
        user.step()
    assert "plain" not in {peer for peer, _ in user.route}
    assert fake_swarm["plain"].opened == 0
    assert "blocks 0:8" in str(caught.value)


def test_a_name_becomes_what_the_servers_have(swarm):
    connection = swarm.connect()
    assert connection.find_adapter("fr", connection.user().span) == FR
    with pytest.raises(AdapterNotServed, match="named 'it'; adapters that are there: 'de', 'fr'"):
        connection.find_adapter("it", connection.user().span)


def test_rows_are_not_copied_to_rows_with_another_adapter(swarm):
    user = swarm.connect().user(num_rows=3, adapters=(FR, FR, DE))
    user.step(2, 2, 2)
    user.reorder(1, 0, 2)
    user.step()
    with pytest.raises(UsageError, match="row 2 cannot become a copy of row 1, which has another adapter"):
        user.reorder(0, 1, 1)
    user.step()


def test_steps_say_how_much_time_is_left(swarm):
    user = swarm.connect().user(adapters=[FR])
    user.step(2)
    user.session.deadline = time.monotonic() + 1000.0
    user.step()
    user.session.deadline = time.monotonic() - 1.0
    user.step()
    user.session.deadline = None
    user.step()
    left = [request.time_left for request in swarm["A"].requests]
    assert left[0] is left[3] is None
    assert 900e6 < left[1] <= 1000e6
    assert left[2] == 0
    with pytest.raises(UsageError, match="a deadline of inf"):
        user.session.deadline = float("inf")


def test_an_adapter_changes_what_fake_servers_compute(swarm):
    """The fake servers' outputs depend on it, or the tests here would prove little."""
    user = swarm.connect().user(num_rows=2, adapters=(FR, None))
    inputs = torch.ones(2, HIDDEN_SIZE)
    output = user.session.step(inputs, [RowSlice(0, 0, 1), RowSlice(1, 0, 1)])
    assert not torch.equal(output[0], output[1])
