"""A session's own rules: its bounds, its state after an interrupted or failed step, one thread at a time."""

import asyncio
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_swarm import HIDDEN_SIZE
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from swarm.data_structures import BlockSpan
from swarm.errors import EngineError, MissingBlocks, PeerTimeout, PeerUnreachable, SessionTooLong, UsageError
from swarm.protocol import RowSlice


@pytest.fixture
def swarm(fake_swarm, either_way):
    """A chain A, B, C and a slower spare for each."""
    for names, start, end in (("AD", 0, 3), ("BE", 3, 6), ("CF", 6, 8)):
        for name, throughput in zip(names, (100.0, 1.0), strict=True):
            fake_swarm.add(name, start, end, throughput=throughput)
    return fake_swarm


TROUBLES = ["fail", "lose", "move", "lost push", "no copies", "die late", "kill"]


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mixture_of_steps_rewinds_and_failures_equals_an_undisturbed_run(fake_swarm, either_way, data):
    fake_swarm.servers.clear()
    for name, start, end in (("A", 0, 3), ("B", 3, 6), ("C", 6, 8), ("D", 0, 2), ("E", 2, 5), ("F", 5, 8), ("G", 0, 8)):
        fake_swarm.add(name, start, end, throughput=0.2 if name == "G" else 10.0)
    num_rows = data.draw(st.integers(1, 3))
    # a server whose copies got lost is waited for until the request times out
    hasty = {"request_timeout": 0.1, "min_patience": 0.02, "max_patience": 0.02}
    client = fake_swarm.connect(ban_time=1e-3, max_retries=50, **hasty)
    user = client.user(num_rows=num_rows, max_length=40)
    for _ in range(data.draw(st.integers(1, 12))):
        lengths = user.session.lengths
        action = data.draw(st.sampled_from(["step"] * 4 + ["rewind", "reorder", *TROUBLES]))
        names = [peer_id for peer_id, _ in user.route] + list(fake_swarm.servers)
        server = fake_swarm[names[data.draw(st.integers(0, 20), label="server") % len(names)]]
        after, copies_first, dies_before = data.draw(
            st.tuples(st.integers(0, 2), st.booleans(), st.sampled_from(["push", "copy"]))
        )
        if action == "step":
            # a step after a reordering has tokens for every row, where there is room
            counts = [data.draw(st.integers(min(1, 40 - length), 40 - length)) for length in lengths]
            if user.session._pending is None or all(counts):
                user.step(*counts) if any(counts) else None
        elif action == "rewind":
            user.rewind(*[data.draw(st.integers(0, length)) for length in lengths])
        elif action == "reorder":
            user.reorder(*[data.draw(st.integers(0, num_rows - 1)) for _ in range(num_rows)])
        elif action == "fail":
            server.fail("step", EngineError("chance"), after=after)
        elif action == "lose":
            server.lose_sessions()
        elif action == "move":
            server.leave()
        elif action == "lost push":
            server.fail("push", PeerUnreachable("no way"), after=after)
        elif action == "no copies":
            server.loses_copies = 1
        elif action == "die late" and server.name != "G":  # of which somebody is left for every block
            server.dies_before, server.copies_first = dies_before, copies_first
        elif action == "kill" and server.name != "G":
            server.kill()
    user.rewind(*[min(length, 39) for length in user.session.lengths])
    user.step()
    event(f"{len(user.session.replacements)} replacements")
    user.session.close()


# --- interrupted and failed steps -------------------------------------------------------------------------------------


def interrupt_when(event):
    """Ctrl-C, once `event` is set."""

    def press():
        event.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


@pytest.mark.parametrize("victim", "ABC")
def test_an_interrupted_step_leaves_the_session_usable(swarm, victim):
    client = swarm.connect()
    user = client.user(num_rows=2)
    user.step(5, 3)
    swarm[victim].gate = asyncio.Event()
    pressing = interrupt_when(swarm[victim].reached)
    with pytest.raises(KeyboardInterrupt):
        user.step(1, 1)
    pressing.join()
    swarm[victim].gate = None
    assert user.session.lengths == [5, 3]
    user.step(2, 1)
    user.step()
    assert user.route == [("A", "0:3"), ("B", "3:6"), ("C", "6:8")]
    assert client.banned == set(), "an interrupted step is no server's fault"


def test_an_interrupted_first_step_leaves_the_session_usable(swarm):
    user = swarm.connect().user()
    swarm["B"].gate = asyncio.Event()
    pressing = interrupt_when(swarm["B"].reached)
    with pytest.raises(KeyboardInterrupt):
        user.step(4)
    pressing.join()
    swarm["B"].gate = None
    user.step(4)
    user.step()


def test_an_interrupted_replay_leaves_the_session_usable(swarm):
    user = swarm.connect().user()
    user.step(4)
    swarm["B"].die()
    swarm["E"].gate = asyncio.Event()
    pressing = interrupt_when(swarm["E"].reached)
    with pytest.raises(KeyboardInterrupt):
        user.step()
    pressing.join()
    swarm["E"].gate = None
    user.step()
    assert len(swarm["E"].sessions) == 1, "the replacement that was never taken was not closed"
    assert user.route == [("A", "0:3"), ("E", "3:6"), ("C", "6:8")]


def test_neighbours_that_answer_after_an_interrupted_replay_are_not_lost(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(4)
    gate = swarm["A"].relink_gate = swarm["C"].relink_gate = asyncio.Event()
    swarm["B"].die()
    swarm["E"].gate = asyncio.Event()
    pressing = interrupt_when(swarm["E"].reached)
    with pytest.raises(KeyboardInterrupt):
        user.step()
    pressing.join()
    swarm["E"].gate = None
    client.thread.loop.call_soon_threadsafe(gate.set)
    user.step()
    user.step()
    assert user.route == [("A", "0:3"), ("E", "3:6"), ("C", "6:8")]
    assert client.banned == {"B"}
    assert swarm["A"].opened == swarm["C"].opened == 1


def test_a_long_step_that_was_interrupted_half_way_counts_for_nothing(swarm, small_messages):
    """The first part had gone through all servers; the user's next step begins where the interrupted one began."""
    user = swarm.connect().user(num_rows=2)
    user.step(3, 1)
    swarm["B"].fail("step", PeerUnreachable("gone"), after=1)
    swarm["E"].gate = asyncio.Event()
    pressing = interrupt_when(swarm["E"].reached)
    with pytest.raises(KeyboardInterrupt):
        user.step(9, 2)
    pressing.join()
    swarm["E"].gate = None
    assert user.session.lengths == [3, 1]
    user.step(1, 2)
    user.step(9, 2)


def test_a_long_step_that_failed_half_way_counts_for_nothing(swarm, small_messages):
    client = swarm.connect(max_retries=1)
    user = client.user()
    user.step(3)
    for name in "BE":
        swarm[name].fail("step", EngineError("no"), after=1, times=2)
    with pytest.raises(Exception, match="gave up"):
        user.step(12)
    assert user.session.lengths == [3]
    for name in "BE":
        client.router.report_success(name)
        swarm[name].faults["step"].clear()
    user.step(2)
    user.step(9)


def test_a_rewind_holds_even_if_the_step_after_it_fails(swarm):
    client = swarm.connect(max_retries=1)
    user = client.user()
    user.step(9)
    user.rewind(4)
    for name in "BE":
        swarm[name].fail("step", EngineError("no"))
    with pytest.raises(Exception, match="gave up"):
        user.step(2)
    assert user.session.lengths == [4]
    client.router.report_success("B")
    user.step(3)


def test_a_session_whose_chain_could_not_be_opened_can_be_tried_again(swarm):
    swarm["B"].listed = swarm["E"].listed = False
    user = swarm.connect().user()
    with pytest.raises(MissingBlocks):
        user.step(3)
    swarm["B"].listed = True
    user.step(3)
    user.step()


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_a_session_too_long_is_refused_before_anything_is_sent(swarm):
    client = swarm.connect()
    user = client.user(num_rows=2, max_length=10)
    user.step(8, 2)
    sent = len(swarm["A"].steps)
    with pytest.raises(SessionTooLong, match=r"8 cached \+ 3 new tokens are more than the session's max_length of 10"):
        user.step(3, 1)
    assert len(swarm["A"].steps) == sent
    assert client.banned == set()
    user.step(2, 8)


def test_a_history_that_could_outgrow_its_bound_is_refused(swarm):
    client = swarm.connect(max_history_bytes=2 * 10 * 16)
    client.user(num_rows=2, max_length=10)
    with pytest.raises(UsageError, match=r"2 x 11 tokens may keep 352 bytes .* more than max_history_bytes=320"):
        client.user(num_rows=2, max_length=11)
    assert swarm["A"].opened == 0


@pytest.mark.parametrize(
    ("hidden", "rows", "complaint"),
    [
        (torch.full((1, 4), float("nan")), [RowSlice(0, 2, 1)], "NaN"),
        (torch.full((1, 4), float("inf")), [RowSlice(0, 2, 1)], "infinity"),
        (torch.zeros(1, 4, dtype=torch.float64), [RowSlice(0, 2, 1)], "float64"),
        (torch.zeros(2, 4), [RowSlice(0, 2, 1)], "shape"),
        (torch.zeros(1, 1, 4), [RowSlice(0, 2, 1)], "shape"),
        (torch.zeros(1, 4), [RowSlice(1, 0, 1)], "row 1"),
        (torch.zeros(1, 4), [RowSlice(0, 3, 1)], "cannot go on at 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_of_ours_is_our_error_and_no_servers(swarm, hidden, rows, complaint):
    client = swarm.connect()
    user = client.user()
    user.step(2)
    sent = len(swarm["A"].steps)
    with pytest.raises(UsageError, match=complaint):
        user.session.step(hidden, rows)
    assert len(swarm["A"].steps) == sent
    assert client.banned == set()
    user.step()


# --- threads and ends ------------------------------------------------------------------------------------------------


def test_two_threads_at_once_are_refused(swarm):
    user = swarm.connect().user()
    user.step(2)
    gate = swarm["B"].gate = asyncio.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(user.step)
        swarm["B"].reached.wait(20)
        with pytest.raises(UsageError, match="in use by another thread"):
            user.session.step(torch.zeros(1, 4), [RowSlice(0, 2, 1)])
        user.session._thread.loop.call_soon_threadsafe(gate.set)
        running.result(20)
    user.step()


def test_many_sessions_in_many_threads(swarm):
    client = swarm.connect()

    def work(number):
        user = client.user(max_length=40)
        for count in (number + 1, 1, 1, 2, 1):
            user.step(count)
            if number == 5:
                swarm["B"].fail("step", EngineError("chance"))
        user.session.close()

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(work, range(10)))


def test_closing_gives_every_server_its_cache_back(swarm):
    user = swarm.connect().user()
    user.step(2)
    with user.session as session:
        assert session is user.session
    session.close()
    session._thread.run(asyncio.sleep(0))
    assert not any(server.sessions for server in swarm.servers.values())
    assert session.chain == ()
    with pytest.raises(UsageError, match="closed"):
        user.step()


def test_closing_while_a_step_runs_ends_the_step_with_an_error(swarm):
    user = swarm.connect().user()
    user.step(2)
    swarm["B"].gate = asyncio.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(user.step)
        swarm["B"].reached.wait(20)
        user.session.close()
        with pytest.raises(UsageError, match="closed while it ran a step"):
            running.result(20)
    user.session._thread.run(asyncio.sleep(0))
    assert not any(server.sessions for server in swarm.servers.values())


def test_rewinding_to_what_was_never_there_is_refused(swarm):
    user = swarm.connect().user(num_rows=2)
    user.step(3, 4)
    for lengths in ([3], [3, 5], [-1, 0], [0, 0, 0]):
        with pytest.raises(UsageError, match="the session holds"):
            user.session.rewind(lengths)
    assert user.session.lengths == [3, 4]


def test_the_route_is_shown_when_it_is_taken_and_when_it_changes(swarm, capsys):
    user = swarm.connect(show_route=True).user()
    user.step(2)
    user.step()
    assert capsys.readouterr().err == "route: 0:3 via ...A, 3:6 via ...B, 6:8 via ...C\n"
    swarm["B"].die()
    user.step()
    assert capsys.readouterr().err == "route: 0:3 via ...A, 3:6 via ...E, 6:8 via ...C\n"


# --- one server's stream -------------------------------------------------------------------------------------------


def test_a_server_that_stops_reading_runs_into_the_request_timeout(swarm, monkeypatch):
    """A large step does not even leave our machine when the server hangs, though it may answer pings."""
    client = swarm.connect(request_timeout=0.05)
    user = client.user()
    user.step(2)
    hop = user.session._hops[0]

    async def never(*args):
        await asyncio.Event().wait()

    monkeypatch.setattr(hop.span._stream, "send", never)
    user.step(2)
    assert user.route[0] == ("D", "0:3")
    (replacement,) = user.session.replacements
    assert "did not read a step within 0.05 s" in replacement.reason
    assert client.banned == {"A"}


def test_a_server_that_hangs_on_opening_runs_into_the_connect_timeout(swarm, monkeypatch):
    client = swarm.connect(connect_timeout=0.05)
    take = type(swarm).__dict__["_open_stream"]

    async def open_stream(p2p, peer_id, timeout):
        stream = await take(swarm, p2p, peer_id, timeout)
        if peer_id == "B":
            stream.receive = asyncio.Event().wait
        return stream

    monkeypatch.setattr("swarm.client.block_client.open_stream", open_stream)
    user = client.user()
    user.step(2)
    assert user.route[1] == ("E", "3:6")
    assert client.banned == {"B"}
    assert not swarm["B"].sessions


@pytest.mark.parametrize("victim", "AC")
def test_the_answer_to_an_interrupted_step_is_not_taken_for_that_to_the_next(swarm, either_way, victim):
    client = swarm.connect()
    user = client.user()
    user.step(2)
    gate = swarm[victim].copy_gate = asyncio.Event()
    if victim == "A" and either_way:  # nobody waits for its answer
        swarm["C"].copy_gate = gate
    pressing = interrupt_when(swarm[victim].reached)
    with pytest.raises(KeyboardInterrupt):
        user.step()
    pressing.join()
    client.thread.loop.call_soon_threadsafe(gate.set)
    user.step(2)
    user.step()
    assert all(swarm[name].opened == 1 for name in "ABC")
    assert client.banned == set()


def test_an_error_over_the_stream_keeps_its_meaning(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(2)
    swarm["B"].lose_sessions()
    user.step()
    assert user.route[1] == ("B", "3:6")
    assert client.banned == set()
    swarm["A"].fail("step", PeerTimeout("my own engine hangs"))
    user.step()
    assert client.banned == {"A"}


@pytest.mark.parametrize(
    ("prompts", "text"),
    [(torch.full((8, 1, HIDDEN_SIZE), 1e5), "NaN or infinity"), (torch.zeros(8, 1, HIDDEN_SIZE + 1), "of shape")],
    ids=["too large for float16", "of another width"],
)
def test_prompts_that_no_server_could_take_are_the_users_error(swarm, prompts, text):
    client = swarm.connect()
    span = BlockSpan(start=0, end=8)
    with client.open_session(span, 1, 8, 2 * HIDDEN_SIZE, prompts) as session, pytest.raises(UsageError, match=text):
        session.step(torch.zeros(1, HIDDEN_SIZE, dtype=torch.float16), [RowSlice(0, 0, 1)])
    assert client.banned == set()
