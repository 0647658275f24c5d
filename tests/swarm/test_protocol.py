"""Messages survive packing, and no bytes of a stranger do more than raise ProtocolError."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from swarm.codecs import Codec
from swarm.data_structures import BlockSpan
from swarm.errors import MessageTooLarge, ProtocolError
from swarm.protocol import (
    MAX_HEADER_BYTES,
    MAX_ROWS,
    CloseSession,
    ErrorReply,
    Message,
    Moving,
    OpenSession,
    RowSlice,
    SessionOpened,
    StepRequest,
    StepResult,
    TensorMeta,
    WorkKind,
    pack,
    unpack,
)

SESSION = "0123456789abcdef" * 2
FINGERPRINT = "ab" * 32
HIDDEN = TensorMeta(shape=(3, 64), codec=Codec.FLOAT32)
OPEN = OpenSession(
    session_id=SESSION,
    fingerprint=FINGERPRINT,
    span=BlockSpan(start=0, end=8),
    num_rows=2,
    max_length=100,
    adapters=(None, "french"),
)
STEP = StepRequest(session_id=SESSION, step=7, rows=(RowSlice(0, 5, 1), RowSlice(1, 0, 2)), hidden=HIDDEN)


@pytest.mark.parametrize(
    "message",
    [
        OPEN,
        SessionOpened(session_id=SESSION, cache_tokens_left=2**40),
        STEP,
        StepRequest(session_id=SESSION, step=0, work=WorkKind.BACKWARD, rows=(RowSlice(0, 0, 3),), hidden=HIDDEN),
        StepResult(step=7, hidden=HIDDEN, queue_time=0.25, compute_time=1e-3, moving=True),
        CloseSession(session_id=SESSION),
        Moving(),
        ErrorReply(error="CacheFull", message="völlig voll", tokens_left=0),
    ],
    ids=lambda message: message.kind,
)
def test_a_message_survives_packing(message: Message) -> None:
    arrived = unpack(pack(message))
    assert type(arrived) is type(message)
    assert arrived == message


def fields_of(message: Message, **changes: Any) -> bytes:
    fields: dict[str, Any] = message.model_dump() | changes
    return bytes(msgpack.packb([message.kind, fields]))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (fields_of(OPEN, session_id="../../etc/passwd"), "bad OpenSession message: session_id:"),
        (fields_of(OPEN, fingerprint="ab"), "fingerprint:"),
        (fields_of(OPEN, span={"start": 3, "end": 3}), "blocks 3:3 are empty"),
        (fields_of(OPEN, num_rows=0), "num_rows:"),
        (fields_of(OPEN, num_rows=MAX_ROWS + 1), "num_rows:"),
        (fields_of(OPEN, max_length=0), "max_length:"),
        (fields_of(OPEN, max_length=2**60), "max_length:"),
        (fields_of(OPEN, surprise=1), "surprise: Extra inputs"),
        (fields_of(STEP, work="sabotage"), "work:"),
        (fields_of(STEP, rows=[]), "rows:"),
        (fields_of(STEP, rows=[(0, 0, 1)] * (MAX_ROWS + 1)), "rows:"),
        (fields_of(STEP, rows=[(0, -1, 1)]), "rows.0.1:"),
        (fields_of(STEP, rows=[(MAX_ROWS, 0, 1)]), "rows.0.0:"),
        (fields_of(STEP, rows=[(0, 0)]), "rows.0"),
        (fields_of(STEP, hidden={"shape": [1, 1], "codec": "int64"}), "hidden.codec:"),
        (fields_of(STEP, hidden={"shape": [-1, 1], "codec": "float32"}), "hidden.shape.0:"),
        (fields_of(STEP, hidden={"shape": [1] * 3, "codec": "float32"}), "hidden.shape:"),
        (fields_of(StepResult(step=0, hidden=HIDDEN, queue_time=0, compute_time=0), queue_time=float("nan")), "queue"),
    ],
)
def test_a_bad_field_is_named(changed: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        unpack(changed)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # the one byte that msgpack never uses
        msgpack.packb("open"),
        msgpack.packb(["open"]),
        msgpack.packb(["open", {}, {}]),
        msgpack.packb(["steal", {}]),
        msgpack.packb([["open"], {}]),
        msgpack.packb([{"open": 1}, {}]),
        msgpack.packb(["open", {1: 2}]),
        msgpack.packb(["open", None]),
        msgpack.packb(["open", {"session_id": b"\xff"}]),
        msgpack.packb(["moving", {}]) + b"more",
        msgpack.packb(msgpack.ExtType(5, b"code")),
        msgpack.packb(msgpack.Timestamp(2**33, 0)),
        b"\x91" * 60_000,  # lists in lists
        b"\xdd\xff\xff\xff\xff",  # a list of 2**32 entries
        b"\xc6\xff\xff\xff\xff",  # a string of 4 GB
    ],
)
def test_junk_is_no_message(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(data)


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=8,
)


@given(st.binary(max_size=200))
@example(msgpack.packb(["step", STEP.model_dump()])[:-3])
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(data)


@given(
    st.sampled_from([OPEN, STEP, CloseSession(session_id=SESSION)]),
    st.dictionaries(
        st.sampled_from(["session_id", "span", "num_rows", "max_length", "adapters", "rows", "hidden", "work", "step"]),
        JSON_LIKE,
        min_size=1,
    ),
)
def test_no_fields_do_more_than_be_refused(message: Message, changes: dict[str, Any]) -> None:
    try:
        arrived = unpack(fields_of(message, **changes))
    except ProtocolError:
        return
    assert unpack(pack(arrived)) == arrived


def test_a_header_over_the_limit_is_not_packed() -> None:
    with pytest.raises(MessageTooLarge, match=rf"is over the limit of {MAX_HEADER_BYTES}"):
        pack(OPEN.model_copy(update={"adapters": ("x" * MAX_HEADER_BYTES,)}))


def test_the_largest_step_is_within_the_limit() -> None:
    rows = tuple(RowSlice(MAX_ROWS - 1, 2**24, 2**24) for _ in range(MAX_ROWS))
    largest = STEP.model_copy(update={"rows": rows})
    assert unpack(pack(largest)) == largest
