"""Messages survive packing, and no bytes of a stranger do more than raise ProtocolError."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from swarm.codecs import Codec
from swarm.data_structures import BlockSpan
from swarm.errors import MessageTooLarge, ProtocolError, UsageError
from swarm.passes import PassRequest, PassResult, TensorPart
from swarm.protocol import (
    MAX_ADAPTERS,
    MAX_HEADER_BYTES,
    MAX_ROWS,
    AdapterRef,
    CloseSession,
    ErrorReply,
    Message,
    Moving,
    NextServer,
    OpenPush,
    OpenSession,
    PromptsTaken,
    PushFailed,
    Relink,
    Relinked,
    Reorder,
    RowAdapters,
    RowSlice,
    SessionOpened,
    SessionPrompts,
    StepRequest,
    StepResult,
    TensorMeta,
    check_rows,
    pack,
    row_adapters,
    unpack,
)

SESSION = "0123456789abcdef" * 2
FINGERPRINT = "ab" * 32
HIDDEN = TensorMeta(shape=(3, 64), codec=Codec.FLOAT32)
FRENCH, GERMAN = AdapterRef("french", "0123456789abcdef"), AdapterRef("org/german", "fedcba9876543210")
PEER, NEXT = "QmBefore", NextServer("QmBehind", "fedcba9876543210" * 2)
OPEN = OpenSession(
    session_id=SESSION,
    fingerprint=FINGERPRINT,
    span=BlockSpan(start=0, end=8),
    num_rows=2,
    max_length=100,
    output_codec=Codec.BLOCKWISE8,
    previous=PEER,
    next=NEXT,
    adapters=row_adapters([None, FRENCH]),
)
STEP = StepRequest(
    step=7,
    rows=(RowSlice(0, 5, 1), RowSlice(1, 0, 2)),
    hidden=HIDDEN,
    push=2,
    sent_at=2**62,
    reorder=Reorder(3, (1, 1)),
)
RESULT = StepResult(
    step=7,
    hidden=HIDDEN,
    pushed=True,
    request_sent_at=1,
    received_at=2,
    queue_time=3,
    compute_time=4,
    codec_time=5,
    sent_at=6,
    moving=True,
)
RELINK = Relink(previous=PEER, next=NEXT)
PASS = PassRequest(
    fingerprint=FINGERPRINT, span=BlockSpan(start=2, end=4), lengths=(1, 2), output_codec=Codec.FLOAT32, hidden=HIDDEN
)
ALL = [
    OPEN,
    OpenSession(
        session_id=SESSION,
        fingerprint=FINGERPRINT,
        span=BlockSpan(start=0, end=8),
        num_rows=1,
        max_length=1,
        output_codec=Codec.FLOAT16,
    ),
    SessionOpened(session_id=SESSION, cache_tokens_left=2**40, clock=2**60),
    RELINK,
    Relink(previous=None, next=None),
    Relinked(),
    OpenPush(session_id=SESSION),
    STEP,
    STEP.model_copy(update={"time_left": 10**6}),
    StepRequest(step=0, rows=(RowSlice(0, 0, 3),), hidden=HIDDEN),
    RESULT,
    PushFailed(step=7, reason="nobody is there"),
    CloseSession(),
    Moving(),
    SessionPrompts(first=1, num_tokens=2, prompts=TensorMeta(shape=(6, 8), codec=Codec.FLOAT32)),
    PromptsTaken(),
    PASS,
    PASS.model_copy(update={"prompts": HIDDEN, "gradient": HIDDEN, "adapters": row_adapters([GERMAN, None])}),
    TensorPart(),
    PassResult(hidden=HIDDEN, queue_time=0, compute_time=10**6),
    PassResult(hidden=HIDDEN, prompts=HIDDEN, queue_time=2**60, compute_time=0),
    ErrorReply(error="CacheFull", message="völlig voll", tokens_left=0),
    ErrorReply(error="EngineError", message="", step=2**62),
]


@pytest.mark.parametrize("message", ALL, ids=lambda message: message.kind)
def test_a_message_survives_packing(message: Message) -> None:
    arrived = unpack(pack(message))
    assert type(arrived) is type(message)
    assert arrived == message


def test_every_kind_of_message_is_tested() -> None:
    assert {type(message) for message in ALL} == set(Message.__subclasses__())


def test_a_token_travels_in_few_bytes_besides_its_tensor() -> None:
    """A decode step of one row, deep in a session on machines that have been up for years; 8 bytes of lengths not
    counted."""
    years = 10 * 365 * 86400 * 10**6
    hidden = TensorMeta(shape=(1, 576), codec=Codec.BLOCKWISE8)
    step = StepRequest(step=100_000, rows=(RowSlice(0, 100_000, 1),), hidden=hidden, push=2, sent_at=years)
    assert len(pack(step)) <= 60
    times = {"queue_time": 10**6, "compute_time": 10**6, "codec_time": 10**6}
    clocks = {"request_sent_at": years, "received_at": years, "sent_at": years}
    assert len(pack(StepResult(step=100_000, hidden=hidden, pushed=True, **times, **clocks))) <= 90


def fields_of(message: Message, **changes: Any) -> bytes:
    """The message with other values in some fields."""
    fields = {name: getattr(message, name) for name in type(message).model_fields} | changes
    return bytes(msgpack.packb([message.kind, *fields.values()], default=_plain))


def _plain(value: Any) -> Any:
    plain = value.model_dump()
    return list(plain.values()) if isinstance(value, TensorMeta) else plain


def positions_of(message: Message, *more: Any, drop: int = 0) -> bytes:
    """The message with more values at its end, or fewer."""
    values = msgpack.unpackb(pack(message))
    return bytes(msgpack.packb([*values[: len(values) - drop], *more]))


def test_a_message_without_its_last_fields_has_their_defaults() -> None:
    bare = STEP.model_copy(update={"reorder": None, "sent_at": 0, "push": 0})
    assert unpack(positions_of(STEP, drop=4)) == bare


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
        (fields_of(OPEN, output_codec="gzip"), "output_codec:"),
        (fields_of(OPEN, previous="../x"), "previous:"),
        (fields_of(OPEN, previous=""), "previous:"),
        (fields_of(OPEN, next=["QmBehind"]), "next"),
        (fields_of(OPEN, next=["QmBehind", "../x"]), "next.1:"),
        (fields_of(OPEN, next=["Qm Behind", SESSION]), "next.0:"),
        (positions_of(OPEN, 1), "bad OpenSession message: Value error, 10 values for 9 fields"),
        (positions_of(RELINK, drop=1), "bad Relink message: next: Field required"),
        (fields_of(RELINK, next=["QmBehind", SESSION, 1]), "next"),
        (positions_of(OpenPush(session_id=SESSION), drop=1), "session_id: Field required"),
        (fields_of(OpenPush(session_id=SESSION), session_id=None), "session_id:"),
        (fields_of(STEP, rows=[]), "rows:"),
        (fields_of(PASS, lengths=[]), "lengths:"),
        (fields_of(PASS, lengths=[0]), "lengths.0:"),
        (fields_of(PASS, lengths=[1] * (MAX_ROWS + 1)), "lengths:"),
        (fields_of(PASS, hidden=None), "hidden:"),
        (fields_of(PASS, gradient=[[1, 1], "int64"]), "gradient.codec:"),
        (fields_of(STEP, rows=[(0, 0, 1)] * (MAX_ROWS + 1)), "rows:"),
        (fields_of(STEP, rows=[(0, -1, 1)]), "rows.0.1:"),
        (fields_of(STEP, rows=[(MAX_ROWS, 0, 1)]), "rows.0.0:"),
        (fields_of(STEP, rows=[(0, 0)]), "rows.0"),
        (fields_of(STEP, hidden=[[1, 1], "int64"]), "hidden.codec:"),
        (fields_of(STEP, hidden=[[-1, 1], "float32"]), "hidden.shape.0:"),
        (fields_of(STEP, hidden=[[1] * 3, "float32"]), "hidden.shape:"),
        (fields_of(STEP, hidden=[[1, 1], "float32", 1]), "hidden: Value error, 3 values for 2 fields"),
        (fields_of(STEP, step=-1), "step:"),
        (fields_of(STEP, step=2**63), "step:"),
        (fields_of(STEP, push=-1), "push:"),
        (fields_of(STEP, push=2**20), "push:"),
        (fields_of(STEP, sent_at=-1), "sent_at:"),
        (fields_of(STEP, reorder=[1]), "reorder"),
        (fields_of(STEP, reorder=[-1, [0, 1]]), "reorder.0:"),
        (fields_of(STEP, reorder=[1, [0, -1]]), "reorder.1.1:"),
        (fields_of(STEP, reorder=[1, [0] * (MAX_ROWS + 1)]), "reorder.1:"),
        (fields_of(RESULT, queue_time=float("nan")), "queue_time:"),
        (fields_of(RESULT, queue_time=-1), "queue_time:"),
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
        msgpack.packb([]),
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
@example(pack(STEP)[:-3])
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(data)


@given(
    st.sampled_from(ALL),
    st.dictionaries(st.integers(0, 12), JSON_LIKE, min_size=1),
)
def test_no_fields_do_more_than_be_refused(message: Message, changes: dict[int, Any]) -> None:
    values = msgpack.unpackb(pack(message))
    for index, value in changes.items():  # in place of a field, or behind the last
        values[index + 1 : index + 2] = [value]
    try:
        arrived = unpack(msgpack.packb(values))
    except ProtocolError:
        return
    assert unpack(pack(arrived)) == arrived


def test_a_header_over_the_limit_is_not_packed() -> None:
    with pytest.raises(MessageTooLarge, match=rf"is over the limit of {MAX_HEADER_BYTES}"):
        pack(OPEN.model_copy(update={"previous": "x" * MAX_HEADER_BYTES}))


def test_the_largest_step_is_within_the_limit() -> None:
    rows = tuple(RowSlice(MAX_ROWS - 1, 2**24, 2**24) for _ in range(MAX_ROWS))
    largest = STEP.model_copy(update={"rows": rows})
    assert unpack(pack(largest)) == largest


# --- adapters of rows -------------------------------------------------------------------------------------------------


def test_each_adapter_of_the_rows_is_named_once() -> None:
    refs = (GERMAN, None, FRENCH, GERMAN)
    adapters = row_adapters(refs)
    assert adapters == RowAdapters((GERMAN, FRENCH), (0, -1, 1, 0))
    assert adapters.of_rows() == refs
    assert adapters.of_row(2) == FRENCH
    check_rows(adapters, 4)


def test_rows_without_adapters_need_no_words() -> None:
    assert row_adapters([None, None]) is None
    check_rows(None, 2)


@pytest.mark.parametrize(
    ("adapters", "complaint"),
    [
        (RowAdapters((FRENCH,), (0,)), "adapters for 1 rows, but there are 2"),
        (RowAdapters((FRENCH,), (0, 0, 0)), "adapters for 3 rows, but there are 2"),
        (RowAdapters((FRENCH,), (0, 1)), "a row has adapter 1, but 1 are named"),
        (RowAdapters((), (0, -1)), "a row has adapter 0, but 0 are named"),
        (RowAdapters((FRENCH, FRENCH), (0, 1)), "named twice"),
        (RowAdapters((FRENCH, GERMAN), (0, -1)), "no row has adapter 1, of 2 that are named"),
    ],
)
def test_adapters_that_do_not_fit_the_rows_are_refused(adapters: RowAdapters, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        check_rows(adapters, 2)


def test_too_many_adapters_at_a_time_are_the_users_error() -> None:
    refs = [AdapterRef(f"adapter{number}", f"{number:016x}") for number in range(MAX_ADAPTERS + 1)]
    assert row_adapters(refs[1:]) is not None
    with pytest.raises(UsageError, match="257 different adapters; at most 256"):
        row_adapters(refs)


def test_the_largest_session_with_adapters_is_within_the_limit() -> None:
    refs = [AdapterRef(f"{number:064}", f"{number:016x}") for number in range(MAX_ADAPTERS)]
    adapters = row_adapters([refs[row % MAX_ADAPTERS] for row in range(MAX_ROWS)])
    largest = OPEN.model_copy(update={"num_rows": MAX_ROWS, "adapters": adapters})
    assert unpack(pack(largest)) == largest
