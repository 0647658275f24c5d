"""What a failure may cost at most: how often servers are asked, how long a step is tried, who is left alone."""

import re
import time

import pytest

from swarm.errors import CacheFull, EngineError, MissingBlocks, PeerUnreachable, RoutingError

pytestmark = pytest.mark.timeout(60)

#: Seconds that a busy machine may add; what is tested would take an hour without its bound.
SLACK = 20.0
HOUR = 3600.0


@pytest.fixture
def swarm(fake_swarm, either_way):
    """A fast chain A, B, C, and slower spares for B."""
    for name, start, end, throughput in (("A", 0, 3, 9.0), ("B", 3, 6, 9.0), ("C", 6, 8, 9.0), ("E", 3, 6, 1.0)):
        fake_swarm.add(name, start, end, throughput=throughput)
    return fake_swarm


def hang(swarm, name):
    swarm[name].hung = True


def die(swarm, name):
    swarm[name].die()


def refuse(swarm, name):
    swarm[name].fail("step", EngineError("always"), times=10**9)


def be_full(swarm, name):
    swarm[name].fail("step", CacheFull("always"), times=10**9)
    swarm[name].fail("open", CacheFull("always"), times=10**9)


def vanish(swarm, name):
    swarm[name].die()
    swarm[name].listed = False


@pytest.mark.parametrize("trouble", [hang, die, refuse, be_full, vanish], ids=lambda trouble: trouble.__name__)
@pytest.mark.parametrize("bound", ["retry_time", "max_retries"])
def test_a_step_that_cannot_be_recovered_is_given_up_in_time(swarm, trouble, bound):
    quick = {"connect_timeout": 0.05, "request_timeout": 0.2, "hang_timeout": 0.02, "max_patience": 0.02}
    bounds = {"retry_time": 0.3, "max_retries": 1000} if bound == "retry_time" else {"max_retries": 3}
    client = swarm.connect(**{**quick, "retry_time": HOUR, "ban_time": 1e-3, "max_ban_time": 1e-3, **bounds})
    user, other = client.user(), client.user(end=3)
    user.step(3)
    other.step(3)
    for name in "BE":
        trouble(swarm, name)
    started = time.monotonic()
    with pytest.raises((RoutingError, CacheFull), match="gave up after") as caught:
        user.step()
    assert time.monotonic() - started < SLACK
    seconds, attempts = re.search(r"gave up after ([\d.]+) s and (\d+) attempts", str(caught.value)).groups()
    assert float(seconds) < SLACK
    if bound == "max_retries":
        assert int(attempts) == 4
        assert swarm["B"].opened + swarm["E"].opened <= 2 * 4, "retries that nobody counts"
    other.step()


def test_the_error_names_the_blocks_that_nobody_holds(swarm):
    client = swarm.connect(max_retries=2)
    user = client.user()
    user.step(3)
    for name in "BE":
        vanish(swarm, name)
    with pytest.raises(MissingBlocks, match=r"holds blocks 3:6 .*gave up after \d+\.\d s") as caught:
        user.step()
    assert caught.value.blocks == (3, 4, 5)


def test_a_dead_server_is_not_dialled_again_within_its_ban(swarm):
    client = swarm.connect(ban_time=10.0)
    now = time.monotonic()
    swarm.clock = lambda: now
    user = client.user()
    user.step(3)
    swarm["B"].die()
    for _ in range(3):
        user.step()
    for _ in range(3):
        client.user().step()
    swarm["E"].fail("step", EngineError("once"))
    with pytest.raises(MissingBlocks):
        client.user().step()
    assert swarm["B"].opened == 1
    now += 9.0
    with pytest.raises(MissingBlocks):
        client.user().step()
    assert swarm["B"].opened == 1
    now += 1.5
    client.user().step()
    assert swarm["B"].opened == 2
    assert client.banned == {"B"}, "it is still dead, and E's ban is over as well"


def test_a_step_that_is_tried_again_does_not_prolong_the_ban(swarm):
    """The client closed its session on B itself when it gave up: that is no news of B."""
    client = swarm.connect(ban_time=10.0, max_retries=1)
    now = time.monotonic()
    swarm.clock = lambda: now
    user = client.user()
    user.step(3)
    for name in "BE":
        swarm[name].fail("step", EngineError("once"))
    for _ in range(3):
        with pytest.raises(RoutingError, match="gave up"):
            user.step()
        now += 3.0
    now += 2.0
    user.step()
    assert client.banned == set()


@pytest.mark.parametrize("victim", "ABC")
@pytest.mark.parametrize("times", [1, 2])
def test_no_healthy_server_is_banned_for_its_neighbour(fake_swarm, either_way, victim, times):
    """Whatever happens to one server of the chain, and to its first replacement: bans hit those alone."""
    chain = {"A": (0, 3), "B": (3, 6), "C": (6, 8)}
    for name, (start, end) in chain.items():
        fake_swarm.add(name, start, end, throughput=100.0)
        for spare in range(2):
            fake_swarm.add(f"{name}{spare}", start, end, throughput=10.0 - spare)
    guilty = [victim, f"{victim}0"][:times]
    client = fake_swarm.connect(min_patience=0.02, max_patience=0.02, hang_timeout=0.02)
    user = client.user(num_rows=2)
    user.step(3, 2)
    user.step()
    fake_swarm[victim].hung = True
    for name in guilty[1:]:
        fake_swarm[name].fail("step", PeerUnreachable("gone in the replay"))
    for _ in range(3):
        user.step()
    assert client.banned == set(guilty)
