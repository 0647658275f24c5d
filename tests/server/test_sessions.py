"""Who owns a session, and which steps it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swarm.codecs import Codec
from swarm.data_structures import BlockSpan
from swarm.errors import CacheFull, NotSupported, PeerRefused, ProtocolError, SessionLost, SessionTooLong, SwarmError
from swarm.protocol import OpenSession, RowSlice, StepRequest, TensorMeta, WorkKind
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


def request(session_id: str = "ab" * 16, num_rows: int = 2, max_length: int = 20) -> OpenSession:
    return OpenSession(
        session_id=session_id,
        fingerprint="cd" * 32,
        span=BlockSpan(start=0, end=1),
        num_rows=num_rows,
        max_length=max_length,
    )


def step(*rows: tuple[int, int, int], shape: tuple[int, int] | None = None, **fields: Any) -> StepRequest:
    shape = shape or (sum(num_tokens for _, _, num_tokens in rows), HIDDEN_SIZE)
    return StepRequest(
        session_id="ab" * 16,
        step=1,
        rows=tuple(RowSlice(*row) for row in rows),
        hidden=TensorMeta(shape=shape, codec=Codec.FLOAT32),
        **fields,
    )


def test_a_session_holds_cache_from_opening_to_closing(table: SessionTable, cache: KVCache, changes: Changes) -> None:
    session = table.open(request(), OWNER)
    assert (len(table), cache.tokens_left, changes.number) == (1, 128 - 2 * 20, 1)
    assert table.get(session.session_id, OWNER) is session
    table.close(session)
    assert (len(table), cache.tokens_left, changes.number) == (0, 128, 2)
    with pytest.raises(SessionLost, match="it was closed, or never opened"):
        table.get(session.session_id, OWNER)


def test_closing_twice_does_not_close_its_successor(table: SessionTable, cache: KVCache, changes: Changes) -> None:
    first = table.open(request(), OWNER)
    table.close(first)
    second = table.open(request(), OWNER)
    table.close(first)
    assert table.get(second.session_id, OWNER) is second
    assert cache.tokens_left == 128 - 2 * 20
    assert changes.number == 3


def test_a_session_belongs_to_the_peer_that_opened_it(table: SessionTable) -> None:
    session = table.open(request(), OWNER)
    with pytest.raises(PeerRefused, match="belongs to another peer"):
        table.get(session.session_id, STRANGER)


@pytest.mark.parametrize("peer", [OWNER, STRANGER])
def test_an_id_in_use_is_refused_and_takes_no_cache(table: SessionTable, cache: KVCache, peer: str) -> None:
    session = table.open(request(), OWNER)
    left = cache.tokens_left
    with pytest.raises(PeerRefused, match="is open already"):
        table.open(request(), peer)
    assert cache.tokens_left == left
    assert table.get(session.session_id, OWNER) is session


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
        (step((0, 5, 1), work=WorkKind.FORWARD), NotSupported, "not forward passes"),
        (step((0, 5, 1), work=WorkKind.BACKWARD), NotSupported, "not backward passes"),
    ],
)
def test_steps_that_do_not_fit(session: Session, bad: StepRequest, error: type[SwarmError], text: str) -> None:
    with pytest.raises(error, match=text):
        session.check_step(bad, HIDDEN_SIZE)
