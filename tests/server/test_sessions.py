"""Who owns a session, and which steps it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.codecs import Codec
from swarm.data_structures import BlockSpan
from swarm.errors import CacheFull, PeerRefused, ProtocolError, SessionLost, SessionTooLong, SwarmError
from swarm.protocol import NextServer, OpenSession, Reorder, RowSlice, StepRequest, TensorMeta
from swarm.server.kv_cache import KVCache
from swarm.server.sessions import Session, SessionTable

OWNER, STRANGER = "QmOwner", "QmStranger"
HIDDEN_SIZE = 64


class Changes:
    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> None:
        self.number += 1


@pytest.fixture
def changes() -> Changes:
    return Changes()


@pytest.fixture
def cache() -> KVCache:
    return KVCache(1, 128, 4, torch.device("cpu"), torch.float32)


@pytest.fixture
def table(cache: KVCache, changes: Changes) -> SessionTable:
    return SessionTable(cache, on_change=changes)


def request(session_id: str = "ab" * 16, num_rows: int = 2, max_length: int = 20, **fields: Any) -> OpenSession:
    return OpenSession(
        session_id=session_id,
        fingerprint="cd" * 32,
        span=BlockSpan(start=0, end=1),
        num_rows=num_rows,
        max_length=max_length,
        output_codec=Codec.BFLOAT16,
        **fields,
    )


def step(*rows: tuple[int, int, int], shape: tuple[int, int] | None = None, **fields: Any) -> StepRequest:
    shape = shape or (sum(num_tokens for _, _, num_tokens in rows), HIDDEN_SIZE)
    return StepRequest(
        step=1,
        rows=tuple(RowSlice(*row) for row in rows),
        hidden=TensorMeta(shape=shape, codec=Codec.FLOAT32),
        **fields,
    )


def test_a_session_holds_cache_from_opening_to_closing(table: SessionTable, cache: KVCache, changes: Changes) -> None:
    session = table.open(request(), OWNER)
    assert (len(table), cache.tokens_left, changes.number) == (1, 128 - 2 * 20, 1)
    table.close(session)
    assert (len(table), cache.tokens_left, changes.number) == (0, 128, 2)


def test_a_session_is_what_its_owner_asked_for(table: SessionTable) -> None:
    following = NextServer("QmNext", "ef" * 16)
    session = table.open(request(previous="QmBefore", next=following), OWNER)
    assert (session.owner, session.previous, session.next) == (OWNER, "QmBefore", following)
    assert (session.output_codec, session.max_length, len(session.rows)) == (Codec.BFLOAT16, 20, 2)
    assert session.last_step < 0  # any number is news


def test_closing_twice_does_not_close_its_successor(table: SessionTable, cache: KVCache, changes: Changes) -> None:
    first = table.open(request(), OWNER)
    table.close(first)
    second = table.open(request(), OWNER)
    table.close(first)
    assert (len(table), cache.tokens_left, changes.number) == (1, 128 - 2 * 20, 3)
    assert not any(row.released for row in second.rows)


def test_a_session_that_was_evicted_knows_it(table: SessionTable, cache: KVCache) -> None:
    session = table.open(request(), OWNER)
    session.check_alive()
    cache.evict(session.rows[0].session)
    assert session.evicted
    with pytest.raises(SessionLost, match="was evicted: others needed its cache; it can be replayed"):
        session.check_alive()


@pytest.mark.parametrize("peer", [OWNER, STRANGER])
def test_an_id_in_use_is_refused_and_takes_no_cache(table: SessionTable, cache: KVCache, peer: str) -> None:
    session = table.open(request(), OWNER)
    left = cache.tokens_left
    with pytest.raises(PeerRefused, match="is open already"):
        table.open(request(), peer)
    assert cache.tokens_left == left
    assert len(table) == 1 and not any(row.released for row in session.rows)


def test_a_session_that_finds_no_room_is_not_opened(table: SessionTable, changes: Changes) -> None:
    with pytest.raises(CacheFull) as caught:
        table.open(request(max_length=65), OWNER)
    assert caught.value.tokens_left == 128
    assert (len(table), changes.number) == (0, 0)


@pytest.fixture
def session(table: SessionTable) -> Session:
    """Two rows of at most 20 tokens, with 5 and 0 tokens cached."""
    session = table.open(request(), OWNER)
    session.rows[0].length = 5
    return session


@pytest.mark.parametrize(
    "rows",
    [[(0, 5, 1)], [(0, 0, 20)], [(0, 5, 15), (1, 0, 3)], [(1, 0, 1), (0, 2, 1)]],
    ids=["goes on", "starts again", "two rows", "rewinds, in any order of rows"],
)
def test_steps_that_fit(session: Session, rows: list[tuple[int, int, int]]) -> None:
    work = session.check_step(step(*rows), HIDDEN_SIZE)
    assert [(item.cache, item.position, item.num_tokens) for item in work] == [
        (session.rows[row], position, num_tokens) for row, position, num_tokens in rows
    ]


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (step((0, 5, 1), shape=(1, 32)), ProtocolError, r"shape \[1, 32\]; this model takes \[tokens, 64\]"),
        (step((0, 5, 1), shape=(2, 64)), ProtocolError, "hidden states for 2 tokens, but the rows list 1"),
        (step((0, 5, 1), (0, 6, 1)), ProtocolError, "lists a row twice"),
        (step((2, 0, 1)), ProtocolError, "row 2 of a session with 2 rows"),
        (step((0, 5, 1), (1, 0, 0)), ProtocolError, "row 1 has no tokens"),
        (step((0, 6, 1)), ProtocolError, "goes on at position 6, but only 5 tokens"),
        (step((1, 1, 1)), ProtocolError, "goes on at position 1, but only 0 tokens"),
        (step((0, 5, 16)), SessionTooLong, r"5 \+ 16 tokens are more than the session's max_length of 20"),
        (
            step((0, 5, 1), (1, 0, 1), reorder=Reorder(1, (0,))),
            ProtocolError,
            r"of 2 rows cannot be reordered as \[0\]",
        ),
        (step((0, 5, 1), (1, 0, 1), reorder=Reorder(1, ())), ProtocolError, r"cannot be reordered as \[\]"),
        (step((0, 5, 1), (1, 0, 1), reorder=Reorder(1, (0, 2))), ProtocolError, r"cannot be reordered as \[0, 2\]"),
        (step((0, 5, 1), reorder=Reorder(1, (0, 0))), ProtocolError, "reorders 2 rows has tokens for 1 only"),
        # the lengths that count are those after the reordering
        (step((0, 5, 1), (1, 0, 1), reorder=Reorder(1, (1, 0))), ProtocolError, "position 5, but only 0 tokens"),
    ],
)
def test_steps_that_do_not_fit(session: Session, bad: StepRequest, error: type[SwarmError], text: str) -> None:
    with pytest.raises(error, match=text):
        session.check_step(bad, HIDDEN_SIZE)


@pytest.mark.parametrize(
    ("number", "lengths"), [(3, [0, 5]), (2, [5, 0]), (1, [5, 0])], ids=["new", "done just now", "done long ago"]
)
def test_a_reordering_counts_once(session: Session, number: int, lengths: list[int]) -> None:
    session.rows[0].session.reorder_number = 2
    rows = [(row, length, 1) for row, length in enumerate(lengths)]
    work = session.check_step(step(*rows, reorder=Reorder(number, (1, 0))), HIDDEN_SIZE)
    assert [item.position for item in work] == lengths
    beyond = [(row, length + 1, 1) for row, length in enumerate(lengths)]
    with pytest.raises(ProtocolError, match="tokens are cached here"):
        session.check_step(step(*beyond, reorder=Reorder(number, (1, 0))), HIDDEN_SIZE)


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=3),
    reorder=st.none() | st.tuples(st.integers(0, 3), st.lists(st.integers(0, 3), max_size=3)),
)
def test_what_is_accepted_can_be_run(rows: list[tuple[int, int, int]], reorder: tuple[int, list[int]] | None) -> None:
    """Whatever a stranger sends: it is refused, or no row goes on behind its end, beyond its room, or twice."""
    cache = KVCache(1, 128, 4, torch.device("cpu"), torch.float32)
    session = SessionTable(cache).open(request(), OWNER)
    session.rows[0].length, session.rows[1].length = 5, 2
    session.rows[0].session.reorder_number = 1
    lengths = [5, 2]
    if reorder is not None and reorder[0] > 1 and len(reorder[1]) == 2 and max(reorder[1]) < 2:
        lengths = [lengths[source] for source in reorder[1]]
    asked = None if reorder is None else Reorder(reorder[0], tuple(reorder[1]))
    try:
        work = session.check_step(step(*rows, reorder=asked), HIDDEN_SIZE)
    except (ProtocolError, SessionTooLong):
        return
    assert len({item.cache for item in work}) == len(work)
    for item in work:
        assert item.position <= lengths[session.rows.index(item.cache)]
        assert item.num_tokens > 0 and item.position + item.num_tokens <= 20
