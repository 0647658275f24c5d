"""Every place where a failure can hit a session. Outputs are compared, exactly, with those of an undisturbed run."""

import time

import pytest

from swarm.codecs import Codec
from swarm.data_structures import ServerState
from swarm.errors import (
    BadSpan,
    CacheFull,
    EngineError,
    MissingBlocks,
    NetworkError,
    NotSupported,
    NumericsMismatch,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    QuotaExceeded,
    RoutingError,
    SessionLost,
    SessionTooLong,
)
from swarm.protocol import SessionOpened

FAULTS = [
    PeerUnreachable("gone"),
    PeerTimeout("too slow"),
    PeerRefused("no"),
    EngineError("out of memory"),
    ProtocolError("nonsense"),
]


@pytest.fixture
def swarm(fake_swarm, either_way):
    """A fast chain A, B, C, and slow spares with other boundaries for any of them."""
    for name, start, end in (("A", 0, 3), ("B", 3, 6), ("C", 6, 8)):
        fake_swarm.add(name, start, end, throughput=100.0)
    for name, start, end in (("D", 0, 2), ("E", 2, 4), ("F", 4, 7), ("G", 7, 8)):
        fake_swarm.add(name, start, end, throughput=1.0)
    return fake_swarm


USUAL = [("A", "0:3"), ("B", "3:6"), ("C", "6:8")]
WITHOUT = {
    "A": [("D", "0:2"), ("E", "2:3"), *USUAL[1:]],
    "B": [USUAL[0], ("E", "3:4"), ("F", "4:6"), USUAL[2]],
    "C": [*USUAL[:2], ("F", "6:7"), ("G", "7:8")],
}


# --- where it hits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", "ABC")
@pytest.mark.parametrize("good_steps", [0, 1, 3])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_step_fails(swarm, victim, good_steps, fault):
    client = swarm.connect()
    user = client.user(num_rows=2)
    swarm[victim].fail("step", fault, after=good_steps)
    for counts in ((5, 3), (1, 1), (0, 2), (1, 1), (1, 1)):
        user.step(*counts)
    assert user.route == WITHOUT[victim]
    assert client.banned == {victim}
    (replacement,) = user.session.replacements
    assert replacement.lost.peer_id == victim
    assert [(link.peer_id, str(link.span)) for link in replacement.found] == [
        hop for hop in WITHOUT[victim] if hop not in USUAL
    ]
    assert replacement.replayed_tokens == {0: 0, 1: 8, 3: 12}[good_steps]
    assert str(fault) in replacement.reason
    assert not swarm[victim].sessions, "the session on the lost server was not closed"


def test_the_servers_around_a_lost_one_keep_their_caches(swarm):
    user = swarm.connect().user()
    swarm["B"].fail("step", PeerUnreachable("gone"), after=1)
    user.step(9)
    user.step()
    for name in "AC":
        assert [rows[0].num_tokens for rows in swarm[name].steps] == [9, 1]
        assert swarm[name].opened == 1


def test_two_servers_fail_in_one_step(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(6)
    swarm["A"].die()
    swarm["C"].die()
    user.step(2)
    assert user.route == [("D", "0:2"), ("E", "2:3"), ("B", "3:6"), ("F", "6:7"), ("G", "7:8")]
    assert client.banned == {"A", "C"}


def test_a_server_fails_long_after_it_replaced_another(swarm):
    swarm.add("E2", 2, 4, throughput=0.5)
    client = swarm.connect()
    user = client.user()
    user.step(6)
    swarm["B"].die()
    user.step()
    user.step()
    swarm["E"].die()
    user.step()
    assert user.route == [("A", "0:3"), ("E2", "3:4"), ("F", "4:6"), ("C", "6:8")]
    assert client.banned == {"B", "E"}
    assert [replacement.replayed_tokens for replacement in user.session.replacements] == [6, 8]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_opening_the_first_chain_fails(swarm, fault):
    client = swarm.connect()
    swarm["B"].fail("open", fault)
    user = client.user()
    user.step(4)
    user.step()
    assert user.route == WITHOUT["B"]
    assert client.banned == {"B"}
    assert user.session.replacements == []
    assert len(swarm["A"].sessions) == 1, "the chain that did not come about was not closed"


@pytest.mark.parametrize("place", ["open", "first replay chunk", "later replay chunk", "the step after the replay"])
@pytest.mark.parametrize("second", ["E", "F"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_replacement_fails(swarm, small_messages, place, second, fault):
    swarm.add("E2", 2, 4, throughput=0.5)
    swarm.add("F2", 4, 7, throughput=0.5)
    client = swarm.connect()
    user = client.user(num_rows=2)
    user.step(6, 7)
    user.step(1, 1)
    swarm["B"].die()
    where, after = {
        "open": ("open", 0),
        "first replay chunk": ("step", 0),
        "later replay chunk": ("step", 2),
        "the step after the replay": ("step", 4),
    }[place]
    swarm[second].fail(where, fault, after=after)
    user.step(2, 1)
    user.step(1, 1)
    other = {"E": ["E2", "F"], "F": ["E", "F2"]}[second]
    assert [peer_id for peer_id, _ in user.route] == ["A", *other, "C"]
    assert client.banned == {"B", second}, "of the servers that replace, only the faulty one is to blame"
    assert len(swarm[other[0]].sessions) == len(swarm[other[1]].sessions) == 1, "an attempt left sessions open"
    assert not swarm[second].sessions


def test_a_replay_brings_every_row_to_its_own_length(swarm):
    user = swarm.connect().user(num_rows=3)
    user.step(4, 0, 2)
    user.step(1, 0, 3)
    swarm["B"].die()
    user.step(1, 2, 0)
    replayed = swarm["E"].steps[0]
    assert [(row.row, row.position, row.num_tokens) for row in replayed] == [(0, 0, 5), (2, 0, 5)]
    user.step(1, 1, 1)


def test_what_was_rewound_is_not_replayed(swarm):
    user = swarm.connect().user(num_rows=2)
    user.step(9, 9)
    user.rewind(4, 9)
    swarm["B"].die()
    user.step(1, 1)
    assert user.session.replacements[0].replayed_tokens == 13
    user.rewind(0, 0)
    user.step(3, 1)
    swarm["C"].die()
    user.step(1, 1)
    assert user.session.replacements[1].replayed_tokens == 4


def test_a_session_rewound_to_nothing_needs_no_replay(swarm):
    user = swarm.connect().user()
    user.step(9)
    user.rewind(0)
    swarm["B"].die()
    user.step(2)
    user.step()
    assert user.session.replacements[0].replayed_tokens == 0


# --- who is to blame -----------------------------------------------------------------------------------------------


def test_a_lost_session_is_reopened_on_the_same_server_without_a_ban(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(5)
    swarm["B"].lose_sessions()
    user.step()
    assert user.route == USUAL
    assert client.banned == set()
    (replacement,) = user.session.replacements
    assert replacement.replayed_tokens == 5
    assert [rows[0].num_tokens for rows in swarm["B"].steps] == [5, 5, 1]


def test_a_server_that_takes_sessions_but_fails_every_step_is_banned_longer_each_time(swarm):
    client = swarm.connect(ban_time=1.0)
    clock = time.monotonic()
    client.router._bans._clock = lambda: clock
    swarm["B"].fail("step", EngineError("always"), times=10**9)
    client.user().step()
    assert client.router.banned() == {"B": pytest.approx(1.0)}
    clock += 1.5
    client.user().step()
    assert client.router.banned() == {"B": pytest.approx(2.0)}


def test_a_server_that_works_again_has_its_failures_forgiven(swarm):
    client = swarm.connect(ban_time=1.0)
    clock = time.monotonic()
    client.router._bans._clock = lambda: clock
    for _ in range(2):
        swarm["B"].fail("step", EngineError("once"), after=1)
        user = client.user()
        user.step()
        user.step()
        assert client.router.banned() == {"B": pytest.approx(1.0)}
        clock += 1.5


@pytest.mark.parametrize(
    "fault", [BadSpan("I hold others now"), NotSupported("not here"), SessionTooLong("too long for me")], ids=repr
)
@pytest.mark.parametrize("where", ["open", "step"])
def test_what_a_server_says_of_our_request_is_not_taken_for_our_users_error(swarm, fault, where):
    """The client checked the request itself: a server that restarted with another span, or lies, is replaced."""
    client = swarm.connect()
    swarm["B"].fail(where, fault)
    user = client.user()
    user.step(3)
    user.step()
    assert user.route == WITHOUT["B"]
    assert client.banned == {"B"}


# --- cache room ----------------------------------------------------------------------------------------------------


def test_a_full_server_is_passed_over_and_not_banned(swarm):
    swarm["B"].cache_tokens = 10
    client = swarm.connect()
    user = client.user(max_length=64)
    user.step(3)
    assert user.route == WITHOUT["B"]
    assert client.banned == set()


def test_more_full_servers_than_retries_do_not_hide_one_with_room(fake_swarm):
    for index in range(6):
        fake_swarm.add(f"full{index}", 0, 8, throughput=100.0, cache_tokens=0)
    fake_swarm.add("free", 0, 8, throughput=1.0)
    user = fake_swarm.connect(max_retries=3).user()
    user.step(2)
    assert user.route == [("free", "0:8")]


NO_ROOM = (CacheFull("full for now", 3), QuotaExceeded("this peer has 9 sessions open"))


@pytest.mark.parametrize("no_room", NO_ROOM, ids=lambda error: type(error).__name__)
def test_when_all_are_full_a_session_waits_for_room(swarm, no_room):
    for name in "BE":
        swarm[name].fail("open", no_room, times=2)
    client = swarm.connect()
    user = client.user()
    user.step(3)
    assert swarm["B"].opened == 3
    assert client.banned == set()


@pytest.mark.parametrize("no_room", NO_ROOM, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("settings", [{"max_retries": 3}, {"retry_time": 0.3}], ids=repr)
def test_when_all_stay_full_a_session_gives_up_in_bound(swarm, settings, no_room):
    for name in "BE":
        swarm[name].fail("open", no_room, times=10**9)
    client = swarm.connect(**settings)
    started = time.monotonic()
    with pytest.raises((CacheFull, QuotaExceeded), match=rf"{no_room}.*gave up after"):
        client.user().step(3)
    assert time.monotonic() - started < 20
    if "max_retries" in settings:
        assert swarm["B"].opened <= 4
    assert client.banned == set()
    assert not swarm["A"].sessions


def test_the_announced_room_counts_too(swarm):
    for name in "BE":
        swarm[name].announced_cache_tokens = 10
    with pytest.raises(CacheFull, match="room for 10") as caught:
        swarm.connect(max_retries=2).user().step(3)
    assert caught.value.tokens_left == 10


def test_a_full_replacement_is_passed_over(swarm):
    swarm.add("E2", 2, 4, throughput=0.5)
    client = swarm.connect()
    user = client.user()
    user.step(4)
    swarm["B"].die()
    swarm["E"].cache_tokens = 0
    user.step()
    assert user.route == [("A", "0:3"), ("E2", "3:4"), ("F", "4:6"), ("C", "6:8")]
    assert client.banned == {"B"}


# --- overcommitted cache -------------------------------------------------------------------------------------------


def test_a_step_refused_for_want_of_cache_goes_on_elsewhere(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(4)
    swarm["B"].fail("step", CacheFull("no cache became free"))
    user.step()
    assert user.route == WITHOUT["B"]
    assert client.banned == set()
    assert not swarm["B"].sessions, "the session stayed open on the full server"
    (replacement,) = user.session.replacements
    assert "no cache became free" in replacement.reason


def test_where_there_is_nobody_else_a_refused_step_is_sent_again(swarm):
    """In the same session, which has a place in the server's line."""
    del swarm.servers["E"]
    client = swarm.connect()
    user = client.user()
    user.step(4)
    swarm["B"].fail("step", CacheFull("no cache became free"), times=3)
    user.step()
    assert user.route == USUAL
    assert client.banned == set()
    assert swarm["B"].opened == 1
    assert user.session.replacements == []


def test_a_refused_replay_waits_for_the_same_server(swarm):
    del swarm.servers["E"]
    client = swarm.connect()
    user = client.user()
    user.step(4)
    swarm["B"].lose_sessions()
    swarm["B"].fail("step", CacheFull("no cache became free"), times=2)
    user.step()
    assert user.route == USUAL
    assert client.banned == set()
    assert swarm["B"].opened == 2, "the new session lost its place in the line"


def test_a_refused_replay_goes_on_where_there_is_room(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(4)
    swarm["B"].lose_sessions()
    swarm["B"].fail("step", CacheFull("no cache became free"))
    user.step()
    assert user.route == WITHOUT["B"]
    assert client.banned == set()
    assert not swarm["B"].sessions


def test_a_step_that_stays_refused_gives_up_in_bound(swarm):
    client = swarm.connect(max_retries=3)
    user = client.user()
    user.step(4)
    for name in "BE":
        swarm[name].fail("step", CacheFull("never any cache"), times=10**9)
    with pytest.raises(CacheFull, match=r"gave up after .* 4 attempts"):
        user.step()
    assert client.banned == set()


def test_an_evicted_session_goes_back_whatever_the_server_announced_before(swarm):
    del swarm.servers["E"]
    client = swarm.connect(max_retries=1)
    user = client.user()
    user.step(5)
    swarm["B"].announced_cache_tokens = 0
    client.router._read_at = 0.0
    swarm["B"].lose_sessions()
    user.step()
    assert user.route == USUAL
    assert client.banned == set()


def test_a_session_evicted_while_it_replays_starts_again(swarm, small_messages):
    client = swarm.connect()
    user = client.user()
    user.step(7)
    swarm["B"].lose_sessions()
    swarm["B"].fail("step", SessionLost("evicted"), after=1)  # the second part of the replay
    user.step()
    assert user.route == USUAL
    assert client.banned == set()


# --- servers that leave ----------------------------------------------------------------------------------------------


def test_a_moving_server_is_left_without_loss_and_without_a_ban(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(5)
    swarm["B"].leave()
    swarm["B"].state = ServerState.DRAINING
    for _ in range(3):
        user.step()
    assert user.route == WITHOUT["B"]
    assert client.banned == set()
    (replacement,) = user.session.replacements
    assert (replacement.lost.peer_id, replacement.reason) == ("B", "the server is leaving")
    assert not swarm["B"].sessions, "the session stayed open on the server that leaves"


def test_a_moving_server_is_used_until_another_can_take_over(swarm, monkeypatch):
    monkeypatch.setattr("swarm.client.inference_session.MOVE_RETRY_PERIOD", 0.0)
    client = swarm.connect(update_period=1e-9)
    user = client.user()
    user.step(5)
    swarm["E"].listed = False
    swarm["B"].leave()
    for _ in range(3):
        user.step()
    assert user.route == USUAL
    assert client.banned == set()
    swarm["E"].listed = True
    user.step()
    assert user.route == WITHOUT["B"]
    user.step()
    assert client.banned == set()


def test_a_replacement_that_fails_while_moving_is_to_blame_alone(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(5)
    swarm["B"].leave()
    swarm["E"].die()
    user.step()
    assert user.route == USUAL
    assert client.banned == {"E"}
    assert not swarm["F"].sessions


# --- numerics ------------------------------------------------------------------------------------------------------


def test_a_replacement_with_equal_numerics_comes_first(swarm):
    swarm.add("fast", 3, 6, throughput=1000.0, numerics="nf4")
    user = swarm.connect(blocked_servers={"fast"}).user()
    user.step(3)
    client = swarm.connect()
    client.router.report_failure("fast")
    user = client.user()
    user.step(3)
    assert user.route == USUAL
    client.router.report_success("fast")
    swarm["B"].die()
    user.step()
    assert user.route == WITHOUT["B"]


def only_other_numerics(swarm):
    for name in "EF":
        swarm[name].numerics = "nf4"


def test_other_numerics_are_taken_where_no_others_are_left_with_one_warning(swarm, caplog):
    only_other_numerics(swarm)
    user = swarm.connect().user()
    user.step(3)
    swarm["B"].die()
    user.step()
    swarm["A"].die()
    user.step()
    assert [peer_id for peer_id, _ in user.route] == ["D", "E", "E", "F", "C"]
    warnings = [message for message in caplog.messages if "tokens may differ" in message]
    assert len(warnings) == 1
    assert "blocks 3:6 were computed as fp32, but only servers with nf4 are left" in warnings[0]


def test_strict_numerics_refuse_and_say_why(swarm):
    only_other_numerics(swarm)
    client = swarm.connect(strict_numerics=True, max_retries=3)
    user = client.user()
    user.step(3)
    swarm["B"].die()
    with pytest.raises(NumericsMismatch, match=r"3:6 were computed as fp32.* strict_numerics .*gave up after"):
        user.step()
    assert swarm["E"].opened == 0
    assert client.banned == {"B"}


# --- giving up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"max_retries": 3}, {"retry_time": 0.3}], ids=repr)
def test_when_nobody_holds_some_blocks_the_error_names_them_and_the_time(swarm, settings):
    client = swarm.connect(**settings)
    user, lucky = client.user(), client.user(start=0, end=3)
    user.step(3)
    lucky.step(3)
    swarm["B"].die()
    swarm["E"].listed = False
    client.thread.run(client.router.refresh(force=True))
    started = time.monotonic()
    with pytest.raises(MissingBlocks, match=r"holds blocks 3:4 .*gave up after \d+\.\d s and \d+ attempts") as caught:
        user.step()
    assert caught.value.blocks == (3,)
    assert time.monotonic() - started < 20
    lucky.step()
    # the swarm is complete again: so is the session
    swarm["E"].listed = True
    user.step()
    user.step()
    assert user.route == WITHOUT["B"]


def test_missing_blocks_at_the_start_are_an_error_at_once(swarm):
    swarm["B"].listed = swarm["E"].listed = False
    with pytest.raises(MissingBlocks, match="holds blocks 3:4"):
        swarm.connect(retry_delay=3600, max_retry_delay=3600, retry_time=86_400).user().step()


def test_a_request_that_every_server_fails_is_given_up(swarm):
    for server in swarm.servers.values():
        server.fail("step", EngineError("poison"), times=10**9)
    with pytest.raises(RoutingError, match=r"gave up after .* and 4 attempts"):
        swarm.connect(max_retries=3, ban_time=0.001).user().step()


def test_the_time_for_recovery_starts_with_the_failure(swarm):
    """A server that hangs for `request_timeout` is replaced, be `retry_time` as short as that."""
    client = swarm.connect(retry_time=1e-3)
    user = client.user()
    user.step(4)
    swarm["B"].fail("step", PeerTimeout("it hung"))
    server_step = swarm["B"].may_fail

    def slow(where):
        time.sleep(0.02)
        server_step(where)

    swarm["B"].may_fail = slow
    user.step()
    assert user.route == WITHOUT["B"]


def test_a_directory_that_fails_for_a_moment_is_asked_again(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(4)
    swarm["B"].die()
    for name in "EF":
        swarm[name].listed = False
    client.thread.run(client.router.refresh(force=True))
    swarm.directory_error = NetworkError("nobody answers")
    attempts = []
    refresh = client.router.refresh

    async def recovering(force=False):
        attempts.append(force)
        if len(attempts) > 3:
            swarm.directory_error = None
            for name in "EF":
                swarm[name].listed = True
        await refresh(force)

    client.router.refresh = recovering
    user.step()
    assert user.route == WITHOUT["B"]
    swarm.directory_error = NetworkError("nobody answers")
    swarm["A"].die()
    swarm["D"].die()
    client.router.refresh = refresh
    with pytest.raises((NetworkError, RoutingError), match=r"nobody answers .*gave up after"):
        user.step()


# --- answers that cannot be true --------------------------------------------------------------------------------------


def wrong_shape(result, data):
    meta = result.hidden.model_copy(update={"shape": (result.hidden.shape[0] + 1, *result.hidden.shape[1:])})
    return result.model_copy(update={"hidden": meta}), data


def wrong_codec(result, data):
    return result.model_copy(update={"hidden": result.hidden.model_copy(update={"codec": Codec.FLOAT16})}), data[::2]


def wrong_size(result, data):
    return result, data[:-4]


def wrong_step(result, data):
    return result.model_copy(update={"step": result.step + 1}), data


def not_a_number(result, data):
    return result, data[:-4] + b"\x00\x00\xc0\x7f"


def infinity(result, data):
    return result, data[:-4] + b"\x00\x00\x80\x7f"


def not_a_result(result, data):
    return SessionOpened(session_id="0" * 32, cache_tokens_left=1, clock=1), b""


@pytest.mark.parametrize(
    "tamper",
    [wrong_shape, wrong_codec, wrong_size, wrong_step, not_a_number, infinity, not_a_result],
    ids=lambda tamper: tamper.__name__,
)
def test_a_server_that_answers_nonsense_is_replaced(swarm, tamper):
    client = swarm.connect()
    user = client.user(num_rows=2)
    user.step(3, 2)
    assert user.route == USUAL
    swarm["B"].tamper = tamper
    user.step(1, 1)
    user.step(1, 1)
    assert user.route == WITHOUT["B"]
    assert client.banned == {"B"}


# --- connections that break while their servers live ------------------------------------------------------------------


def test_a_server_whose_connection_broke_is_not_banned_and_its_spare_is_used(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(3)
    swarm["B"].reconnects = True
    swarm["B"].fail("step", PeerUnreachable("the connection broke"))
    user.step()
    user.step()
    assert user.route == WITHOUT["B"]
    assert client.banned == set()


def test_a_server_whose_connection_broke_opens_the_session_anew_if_nobody_else_can(swarm):
    client = swarm.connect(ban_time=3600.0)
    user = client.user()
    user.step(3)
    for name in "EF":
        swarm[name].listed = False
    client.thread.run(client.router.refresh(force=True))
    swarm["B"].reconnects = True
    swarm["B"].announced_cache_tokens = 0
    for _ in range(3):
        swarm["B"].fail("step", PeerUnreachable("the connection broke"))
        user.step()
    assert user.route == USUAL
    assert client.banned == set()
    assert len(user.session.replacements) == 3
    assert swarm["B"].opened == 4
    assert len(swarm["B"].sessions) == 1


def test_a_connection_that_breaks_in_the_replay_is_no_reason_to_wait_for_the_only_server(swarm):
    """Banned, it would be back after an hour: the step fails long before."""
    client = swarm.connect(ban_time=3600.0, retry_time=5.0)
    user = client.user()
    user.step(3)
    for name in "EF":
        swarm[name].listed = False
    client.thread.run(client.router.refresh(force=True))
    swarm["B"].reconnects = True
    swarm["B"].fail("step", PeerUnreachable("the connection broke"), times=4)  # in the step, and in three replays
    user.step()
    assert user.route == USUAL
    assert client.banned == set()
    assert swarm["B"].opened == 5
    assert len(swarm["B"].sessions) == 1


def test_a_server_that_is_gone_in_the_replay_is_banned(swarm):
    client = swarm.connect()
    user = client.user()
    user.step(3)
    swarm["B"].reconnects = True
    swarm["B"].fail("step", PeerUnreachable("the connection broke"))
    swarm["E"].die()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(swarm["E"].faults, "open", [])  # it takes the session, and dies of the replay
        user.step()
    assert user.route == USUAL
    assert client.banned == {"E"}


def test_one_that_drops_every_replay_is_given_up(swarm):
    client = swarm.connect(max_retries=4)
    user = client.user()
    user.step(3)
    for name in "EF":
        swarm[name].listed = False
    client.thread.run(client.router.refresh(force=True))
    swarm["B"].reconnects = True
    swarm["B"].fail("step", PeerUnreachable("the connection broke"), times=10**9)
    with pytest.raises(RoutingError, match=r"the connection broke.*5 attempts"):
        user.step()
    assert swarm["B"].opened == 1 + 4
