"""Servers that push to each other, in every order in which pushes, copies and failures can arrive.

Where a step must go on at once, patience is set to minutes: a client that waited for a probe would run into the
test's time-out.
"""

import asyncio

import pytest
import torch

from swarm.errors import EngineError, PeerRefused, PeerUnreachable, SessionLost

#: A client that asks nobody for a sign of life.
PATIENT = {"min_patience": 600.0, "max_patience": 600.0}
#: One that asks soon.
HASTY = {"min_patience": 0.02, "max_patience": 0.05, "hang_timeout": 0.05}

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def swarm(fake_swarm):
    """A fast chain A, B, C, and a slower spare for each of them."""
    for names, start, end in (("AD", 0, 3), ("BE", 3, 6), ("CF", 6, 8)):
        for name, throughput in zip(names, (100.0, 1.0), strict=True):
            fake_swarm.add(name, start, end, throughput=throughput)
    return fake_swarm


def servers(user):
    return [peer_id for peer_id, _ in user.route]


def soon(client, event):
    """Set an event of the clients' loop while this thread waits for a step."""
    client.thread.loop.call_soon_threadsafe(client.thread.loop.call_later, 0.05, event.set)


def pushes(swarm, names="ABC"):
    return [swarm[name].pushed_steps for name in names]


# --- undisturbed ---------------------------------------------------------------------------------------------------


def test_every_output_goes_straight_to_the_next_server(swarm):
    user = swarm.connect().user()
    for _ in range(3):
        user.step(2)
    assert pushes(swarm) == [3, 3, 0]
    assert [[request.push for request in swarm[name].requests] for name in "ABC"] == [[2] * 3, [1] * 3, [0] * 3]


def test_without_direct_push_everything_goes_through_the_client(swarm):
    user = swarm.connect(direct_push=False).user()
    for _ in range(3):
        user.step(2)
    swarm["B"].die()
    user.step()
    assert pushes(swarm) == [0, 0, 0]
    assert not any(session.previous or session.next for name in "AEC" for session in swarm[name].sessions.values())


def test_a_step_in_parts_is_pushed_part_by_part(swarm, small_messages):
    user = swarm.connect().user(num_rows=2)
    user.step(6, 3)
    assert pushes(swarm) == [3, 3, 0]


def test_neighbours_know_each_other_also_after_a_replacement(swarm):
    user = swarm.connect().user()
    user.step(3)
    swarm["B"].die()
    user.step()
    user.step()
    assert servers(user) == ["A", "E", "C"]
    a, e, c = (next(iter(swarm[name].sessions.values())) for name in "AEC")
    assert [a.previous, e.previous, c.previous] == [None, "A", "E"]
    assert [a.next, e.next, c.next] == [
        ("E", e.request.session_id),
        ("C", c.request.session_id),
        None,
    ]
    assert pushes(swarm, "AEC") == [3, 2, 0], "the step that failed goes on through E by a push to C"


# --- copies ----------------------------------------------------------------------------------------------------------


def test_nobody_waits_for_copies(swarm):
    client = swarm.connect(**PATIENT)
    user = client.user()
    gate = swarm["A"].copy_gate = swarm["B"].copy_gate = asyncio.Event()
    for _ in range(4):
        user.step()
    soon(client, gate)
    swarm["C"].die()
    user.step()
    assert servers(user) == ["A", "B", "F"]
    assert client.banned == {"C"}
    assert user.session.replacements[0].replayed_tokens == 4


def test_a_replay_waits_for_copies_that_are_late(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(5)
    gate = swarm["A"].copy_gate = asyncio.Event()
    user.step()
    swarm["B"].kill()
    soon(client, gate)
    user.step()
    assert servers(user) == ["A", "E", "C"]
    assert client.banned == {"B"}
    assert swarm["A"].opened == 1


def test_copies_that_died_with_their_server_are_computed_anew_when_the_next_one_dies_too(swarm):
    client = swarm.connect()
    user = client.user(num_rows=2)
    user.step(5, 2)
    swarm["A"].copy_gate = asyncio.Event()
    user.step(1, 1)
    swarm["A"].kill()
    swarm["B"].kill()
    user.step(1, 1)
    user.step(1, 1)
    assert servers(user) == ["D", "E", "C"]
    assert client.banned == {"A", "B"}
    assert [replacement.replayed_tokens for replacement in user.session.replacements] == [9, 9]


def test_the_replay_of_a_lost_server_fills_the_gaps_in_the_history_of_the_next(swarm):
    client = swarm.connect()
    user = client.user(num_rows=2)
    user.step(5, 2)
    swarm["A"].copy_gate = asyncio.Event()
    user.step(1, 1)
    swarm["A"].kill()
    user.step(1, 1)
    swarm["B"].die()
    user.step(1, 1)
    assert servers(user) == ["D", "E", "C"]
    assert client.banned == {"A", "B"}
    assert swarm["D"].opened == 1, "it had to be left again, though its own copies were all there"


def test_a_server_whose_copies_got_lost_is_replaced_with_the_next_one(swarm):
    """The history of B cannot be replayed: whoever computed it must compute it again."""
    client = swarm.connect(request_timeout=0.2)
    user = client.user()
    user.step(5)
    swarm["A"].loses_copies = 1
    user.step()
    swarm["B"].fail("step", EngineError("no"))
    user.step()
    user.step()
    assert servers(user) == ["D", "E", "C"]
    assert [replacement.lost.peer_id for replacement in user.session.replacements] == ["A", "B"]


def test_a_server_whose_copies_hang_does_not_hold_up_a_recovery_for_ever(swarm):
    client = swarm.connect(request_timeout=0.2, **HASTY)
    user = client.user()
    user.step(5)
    gate = swarm["A"].copy_gate = asyncio.Event()
    user.step()
    swarm["B"].kill()
    user.step()
    assert servers(user) == ["D", "E", "C"]
    swarm.thread.loop.call_soon_threadsafe(gate.set)
    user.step()


# --- pushes that get lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies_first", [False, True])
def test_a_push_that_fails_is_carried_by_the_client_at_once(swarm, copies_first):
    client = swarm.connect(**PATIENT)
    user = client.user()
    user.step(3)
    swarm["A"].copies_first = copies_first
    swarm["A"].fail("push", PeerUnreachable("no way there"))
    user.step()
    assert user.session.replacements == [] and client.banned == set()
    for _ in range(2):
        user.step()
    assert pushes(swarm) == [2, 4, 0], "it was asked again to push where it cannot, or others no more"
    assert [request.push for request in swarm["A"].requests] == [2, 2, 0, 0]


def test_after_its_neighbour_was_replaced_a_server_pushes_again(swarm):
    client = swarm.connect(**PATIENT)
    user = client.user()
    swarm["A"].fail("push", PeerUnreachable("no way there"))
    user.step(3)
    user.step()
    assert pushes(swarm) == [1, 2, 0]
    swarm["B"].die()
    for _ in range(3):
        user.step()
    assert servers(user) == ["A", "E", "C"]
    assert pushes(swarm, "AEC") == [3, 3, 0]


def test_a_push_that_is_lost_unnoticed_is_carried_by_the_client(swarm):
    """The next server lives, and must not be taken for the one that failed."""
    client = swarm.connect(request_timeout=1.0, **HASTY)
    user = client.user()
    user.step(3)
    swarm["A"].loses_pushes = True
    user.step()
    assert user.session.replacements == [] and client.banned == set()


@pytest.mark.parametrize("victim", "AB")
def test_a_server_dies_after_its_copy_and_before_its_push(swarm, victim):
    client = swarm.connect(**PATIENT)
    user = client.user()
    user.step(3)
    swarm[victim].copies_first = True
    swarm[victim].dies_before = "push"
    user.step()
    assert user.session.replacements == [], "its output was here: nothing had to be computed again"
    user.step()
    user.step()
    assert client.banned == {victim}
    assert len(user.session.replacements) == 1


@pytest.mark.parametrize("victim", "ABC")
def test_a_server_dies_after_its_push_and_before_its_copy(swarm, victim):
    client = swarm.connect(**PATIENT)
    user = client.user()
    user.step(3)
    swarm[victim].dies_before = "copy"
    for _ in range(3):
        user.step()
    assert client.banned == {victim}
    assert len(user.session.replacements) == 1
    assert {"A": "D", "B": "E", "C": "F"}[victim] in servers(user)


# --- late duplicates and strangers -----------------------------------------------------------------------------------


async def push(swarm, pusher, target, request, payload):
    swarm.take_push(pusher, target, request, payload)


def test_late_duplicates_after_a_replay_change_nothing(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(3)
    user.step()
    late = list(swarm["A"].pushes)
    swarm["B"].lose_sessions()
    user.step()
    user.step()
    new_session = swarm["A"].pushes[-1][0]
    for target, request, payload in late:
        with pytest.raises(SessionLost):
            swarm.run(push(swarm, "A", target, request, payload))
        swarm.run(push(swarm, "A", new_session, request, payload))
    assert swarm["B"].dropped == len(late), "a replay must have higher numbers than what was before it"
    user.step()
    assert client.banned == set()


def test_a_lost_server_that_comes_back_cannot_push_any_more(swarm):
    user = swarm.connect().user()
    user.step(3)
    user.step()
    target, request, payload = swarm["B"].pushes[-1]
    swarm["B"].die()
    user.step()
    with pytest.raises(PeerRefused, match="E was named"):
        swarm.run(push(swarm, "B", target, request.model_copy(update={"step": 10**9}), payload))
    user.step()


def test_a_step_that_the_client_sends_again_runs_once(swarm):
    """The push did arrive, and only the news of it got lost."""
    client = swarm.connect(request_timeout=1.0, **HASTY)
    user = client.user()
    user.step(3)
    gate = swarm["B"].gate = asyncio.Event()
    client.thread.loop.call_soon_threadsafe(client.thread.loop.call_later, 0.7, gate.set)
    user.step()
    assert swarm["B"].dropped == 1
    assert len(swarm["B"].requests) == 2
    assert client.banned == set()


@pytest.mark.parametrize("forger", "AB")
@pytest.mark.parametrize("forged", ["before", "after"])
@pytest.mark.parametrize("refused", [False, True])
def test_a_server_that_pushes_steps_of_its_own_may_push_no_more(swarm, forger, forged, refused):
    """The next one takes its word for the newest step, and drops ours from then on. It opens the session anew."""
    client = swarm.connect(**PATIENT)
    user = client.user()
    user.step(3)
    swarm[forger].forges = forged
    following = swarm[chr(ord(forger) + 1)]
    if refused:  # after it was taken for the newest
        following.fail("step", EngineError("no memory"))
    user.step()
    user.step()
    found, pushed = len(user.session.replacements), len(swarm[forger].pushes)
    for _ in range(3):
        user.step()
    assert len(user.session.replacements) == found
    assert len(swarm[forger].pushes) == pushed
    assert client.banned == set()  # we cannot know which of the two it is
    assert servers(user) == ["A", "B", "C"]


def test_a_server_that_keeps_the_next_one_from_our_steps_can_do_so_once(swarm):
    """The next one answers pings alone, and then so would whoever replaces it."""
    client = swarm.connect(request_timeout=1.0, **HASTY)
    user = client.user()
    user.step(3)
    swarm["B"].forges = "before"
    swarm["C"].gate = asyncio.Event()
    user.step()
    pushed = len(swarm["B"].pushes)
    for _ in range(3):
        user.step()
    assert client.banned == {"C"}  # as every server that does not answer
    assert len(swarm["B"].pushes) == pushed
    assert servers(user) == ["A", "B", "F"]


def test_a_server_that_speaks_of_steps_that_nobody_can_have_pushed_is_replaced(swarm):
    client = swarm.connect(**PATIENT)
    user = client.user()
    user.step(3)
    swarm["C"].tamper = lambda result, data: (result.model_copy(update={"step": 2**63 - 1}), data)
    for _ in range(3):
        user.step()
    assert client.banned == {"C"}
    assert servers(user) == ["A", "B", "F"]


# --- servers that hang -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", "ABC")
def test_a_server_that_hangs_is_found_out_by_a_ping(swarm, either_way, victim):
    client = swarm.connect(**HASTY)
    user = client.user()
    user.step(3)
    swarm[victim].hung = True
    user.step()
    user.step()
    assert client.banned == {victim}
    (replacement,) = user.session.replacements
    assert replacement.lost.peer_id == victim
    assert "answered neither a step nor a ping" in replacement.reason
    assert replacement.detected > 0


def test_a_server_that_hangs_while_it_reads_is_found_out_by_a_ping(swarm, monkeypatch):
    """A large step does not leave our machine before the server reads it."""
    client = swarm.connect(**HASTY)
    user = client.user()
    user.step(3)
    swarm["A"].hung = True

    async def never(*args):
        await asyncio.Event().wait()

    monkeypatch.setattr(user.session._hops[0].span._stream, "send", never)
    user.step()
    assert servers(user) == ["D", "B", "C"]
    assert "nor a ping" in user.session.replacements[0].reason


@pytest.mark.parametrize("victim", "ABC")
def test_a_busy_server_that_answers_pings_is_kept(swarm, either_way, victim):
    client = swarm.connect(**HASTY)
    user = client.user()
    user.step(3)
    gate = swarm[victim].gate = asyncio.Event()
    client.thread.loop.call_soon_threadsafe(client.thread.loop.call_later, 0.3, gate.set)
    user.step()
    assert swarm[victim].pings >= 2
    assert client.banned == set() and user.session.replacements == []


def test_a_server_that_answers_pings_and_never_the_step_runs_into_the_request_timeout(swarm, either_way):
    client = swarm.connect(request_timeout=0.3, **HASTY)
    user = client.user()
    user.step(3)
    swarm["B"].gate = asyncio.Event()
    user.step()
    assert servers(user) == ["A", "E", "C"]
    assert "did not answer a step within 0.3 s" in user.session.replacements[0].reason


def test_a_replacement_that_hangs_in_the_replay_is_replaced(swarm, either_way):
    swarm.add("E2", 3, 6, throughput=0.5)
    client = swarm.connect(**HASTY)
    user = client.user()
    user.step(3)
    swarm["B"].kill()
    swarm["E"].gate = asyncio.Event()

    def hang():
        swarm["E"].reached.wait()
        swarm["E"].hung = True

    waiting = client.thread.loop.run_in_executor(None, hang)
    user.step()
    assert waiting.done()
    assert servers(user) == ["A", "E2", "C"]
    assert client.banned == {"B", "E"}


# --- who is to blame -------------------------------------------------------------------------------------------------


def not_a_number(span, inputs):
    return torch.full_like(inputs, float("nan"))


@pytest.mark.parametrize("victim", "ABC")
def test_nonsense_is_blamed_on_who_computed_it(swarm, either_way, victim):
    client = swarm.connect()
    user = client.user()
    user.step(3)
    swarm[victim].compute = not_a_number
    user.step()
    user.step()
    assert client.banned == {victim}
    assert "answered with NaN or infinity" in user.session.replacements[0].reason


def test_nonsense_is_blamed_on_who_computed_it_even_if_the_next_server_is_lost(swarm, either_way):
    client = swarm.connect()
    user = client.user()
    user.step(3)
    swarm["B"].compute = not_a_number
    swarm["C"].fail("step", PeerUnreachable("gone"))
    user.step()
    assert "F" not in client.banned
    assert "B" in client.banned and "E" in servers(user)


def test_nonsense_in_a_replay_is_blamed_on_who_computed_it(fake_swarm, either_way):
    for name, start, end, throughput in (("A", 0, 8, 100.0), ("D", 0, 4, 1.0), ("E", 4, 8, 1.0), ("D2", 0, 4, 0.5)):
        fake_swarm.add(name, start, end, throughput=throughput)
    client = fake_swarm.connect()
    user = client.user()
    user.step(3)
    fake_swarm["A"].die()
    fake_swarm["D"].compute = not_a_number
    user.step()
    assert servers(user) == ["D2", "E"]
    assert client.banned == {"A", "D"}


def test_the_replacement_of_a_server_that_left_in_time_is_not_blamed_for_copies_that_were_late(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(3)
    gate = swarm["A"].copy_gate = asyncio.Event()
    user.step()
    swarm["A"].leave()
    soon(client, gate)
    user.step()
    assert servers(user) == ["D", "B", "C"]
    swarm["B"].die()
    user.step()
    assert servers(user) == ["D", "E", "C"]
    assert client.banned == {"B"}


# --- links to neighbours ---------------------------------------------------------------------------------------------


def test_where_nobody_can_take_over_from_a_leaving_server_its_neighbours_still_push(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(3)
    swarm["B"].leave()
    swarm["E"].fail("step", EngineError("not now"), times=10**9)
    for _ in range(3):
        user.step()
    assert servers(user) == ["A", "B", "C"]
    assert client.banned == {"E"}
    assert pushes(swarm) == [4, 4, 0]
    assert [request.push for request in swarm["A"].requests] == [2] * 4


def test_a_neighbour_that_is_slow_to_relink_while_replacements_fail_is_not_lost(swarm):
    swarm.add("E2", 3, 6, throughput=0.5)
    client = swarm.connect()
    user = client.user()
    user.step(3)
    gate = swarm["A"].relink_gate = asyncio.Event()
    swarm["B"].die()
    swarm["E"].fail("step", EngineError("in the replay"))
    soon(client, gate)
    user.step()
    user.step()
    assert servers(user) == ["A", "E2", "C"]
    assert client.banned == {"B", "E"}
    assert swarm["A"].opened == 1
    assert pushes(swarm, ["A", "E2"]) == [3, 2]


def test_a_neighbour_that_never_relinks_costs_only_its_push(swarm):
    client = swarm.connect(connect_timeout=0.1)
    user = client.user()
    user.step(3)
    swarm["C"].relink_gate = asyncio.Event()
    swarm["B"].die()
    user.step()
    user.step()
    assert servers(user) == ["A", "E", "C"]
    assert client.banned == {"B"}
