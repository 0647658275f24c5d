"""The messages of inference streams, and the short questions peers ask each other.

Two kinds of binary stream carry a session's work:

- An *inference stream* goes from the client to one server and carries one session; when it ends, so does the session.
  The client writes `OpenSession`, then `StepRequest`s, each followed by its tensor; the server answers each with a
  `StepResult` or an `ErrorReply`. `Relink` tells the server anew who stands before and after it in the chain.
- A *push stream* goes from one server to the next of a chain: `OpenPush` names the session over there, then come the
  same `StepRequest`s, with the first server's output as their tensor. The answers go to the client, not back.

A step works on *rows*: one row is one sequence of the session's batch. Rows are flattened, so a tensor is
[tokens, hidden_size] and `RowSlice` says which tokens belong to which row, and from which position on.
Steps are numbered by the client, upwards through the whole life of a session and over all its servers; a step that is
tried again gets a new number, so a server can tell a late duplicate from news.
Every row may have an adapter of its own, for as long as its session lives. Passes for training travel on streams of
their own: see `passes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import msgpack
from hivemind.p2p import P2PContext, ServicerBase
from hivemind.proto import runtime_pb2
from pydantic import BaseModel, Field, ValidationError, model_validator

from .codecs import Codec
from .data_structures import (
    MAX_BLOCKS,
    PROTOCOL_VERSION,
    BlockSpan,
    Fingerprint,
    Frozen,
    PeerName,
)
from .data_structures import AdapterRef as AdapterRef
from .errors import MessageTooLarge, ProtocolError, UsageError

INFERENCE_STREAM = f"petswarm/inference/{PROTOCOL_VERSION}"
PUSH_STREAM = f"petswarm/push/{PROTOCOL_VERSION}"

#: Largest tensor in one message. Longer prompts travel in several steps.
MAX_PAYLOAD_BYTES = 16 * 2**20
#: Largest message without its tensor: enough for 1,024 rows.
MAX_HEADER_BYTES = 64 * 2**10

#: Most bytes that a peer may send to measure the way here.
MAX_UPLOAD_BYTES = 2**20

#: Begins the question of somebody who is about to open a session; his key follows.
OPENING_QUESTION = "opening/"

#: Tokens at the start of every row that may have deep prompts.
MAX_PROMPT_TOKENS = 512

MAX_ROWS = 1024
#: Different adapters in one session or pass.
MAX_ADAPTERS = 256
MAX_POSITION = 2**24

SessionId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
#: A point in time on its sender's own clock, or a duration, in microseconds: a float of seconds would take more bytes.
Microseconds = Annotated[int, Field(ge=0, lt=2**63)]
StepNumber = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=0, le=2**31)]


class Compact(Frozen):
    """Travels as the list of its values, without the names of its fields."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if isinstance(data, list):
            if len(data) > len(cls.model_fields):
                raise ValueError(f"{len(data)} values for {len(cls.model_fields)} fields")
            return dict(zip(cls.model_fields, data, strict=False))
        return data


class TensorMeta(Compact):
    """How the bytes that follow a message become a tensor: [tokens, hidden_size]."""

    shape: tuple[Size, Size]
    codec: Codec


class RowSlice(NamedTuple):
    """`num_tokens` new tokens of row `row`, the first of them at `position`.

    A position below the row's cached length rewinds the row to it.
    """

    row: Annotated[int, Field(ge=0, lt=MAX_ROWS)]
    position: Annotated[int, Field(ge=0, le=MAX_POSITION)]
    num_tokens: Annotated[int, Field(ge=0, le=MAX_POSITION)]


class Reorder(NamedTuple):
    """Before the step, row i becomes a copy of what row `sources[i]` was, as beam search asks for.

    number: counts the reorderings of a session. A server that did this one already (in a step that is tried again)
    skips it.
    """

    number: Annotated[int, Field(ge=0, lt=2**63)]
    sources: Annotated[tuple[Annotated[int, Field(ge=0, lt=MAX_ROWS)], ...], Field(max_length=MAX_ROWS)]


class RowAdapters(NamedTuple):
    """Which row has which adapter. adapters: each once. rows: for every row an index into them, -1 for none."""

    adapters: Annotated[tuple[AdapterRef, ...], Field(max_length=MAX_ADAPTERS)] = ()
    rows: Annotated[tuple[Annotated[int, Field(ge=-1, lt=MAX_ADAPTERS)], ...], Field(max_length=MAX_ROWS)] = ()

    def of_row(self, row: int) -> AdapterRef | None:
        index = self.rows[row]
        return None if index < 0 else self.adapters[index]

    def of_rows(self) -> tuple[AdapterRef | None, ...]:
        """One for each row, in order."""
        return tuple(self.of_row(row) for row in range(len(self.rows)))


def row_adapters(refs: Sequence[AdapterRef | None]) -> RowAdapters | None:
    """Says which row has which adapter, `refs` in the rows' order; None if no row has one.

    Raises UsageError for more than MAX_ADAPTERS different ones.
    """
    adapters = tuple(dict.fromkeys(ref for ref in refs if ref is not None))
    if not adapters:
        return None
    if len(adapters) > MAX_ADAPTERS:
        raise UsageError(
            f"{len(adapters)} different adapters; at most {MAX_ADAPTERS} are possible: send fewer rows at once"
        )
    places = {ref: place for place, ref in enumerate(adapters)}
    return RowAdapters(adapters, tuple(-1 if ref is None else places[ref] for ref in refs))


def check_rows(adapters: RowAdapters | None, num_rows: int) -> None:
    """Raises ProtocolError unless these say of each of `num_rows` rows which adapter it has. None fits any number."""
    if adapters is None:
        return
    if len(adapters.rows) != num_rows:
        raise ProtocolError(f"adapters for {len(adapters.rows)} rows, but there are {num_rows}")
    if max(adapters.rows, default=-1) >= len(adapters.adapters):
        raise ProtocolError(f"a row has adapter {max(adapters.rows)}, but {len(adapters.adapters)} are named")
    if unused := set(range(len(adapters.adapters))).difference(adapters.rows):  # they would be loaded and kept in vain
        raise ProtocolError(f"no row has adapter {min(unused)}, of {len(adapters.adapters)} that are named")
    if len(set(adapters.adapters)) != len(adapters.adapters):
        raise ProtocolError("the same adapter is named twice")


class NextServer(NamedTuple):
    """Where a server pushes its output: a peer, and the session that the same client has there."""

    peer_id: PeerName
    session_id: SessionId


class Message(Compact):
    """What travels in a frame. Every kind of message that is defined can be unpacked."""

    kind: ClassVar[str]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        assert cls.kind not in _KINDS, f"two messages are called {cls.kind!r}"
        _KINDS[cls.kind] = cls


_KINDS: dict[str, type[Message]] = {}


class OpenSession(Message):
    """Client -> server: reserve cache for `num_rows` rows of up to `max_length` tokens through blocks `span`.

    output_codec: how the outputs shall travel, to the client and to the next server alike.
    previous, next: the servers before and after this one, see `Relink`.
    adapters: of the rows; None: no row has one.
    """

    kind: ClassVar[str] = "open"
    session_id: SessionId
    fingerprint: Fingerprint
    span: BlockSpan
    num_rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    max_length: Annotated[int, Field(ge=1, le=MAX_POSITION)]
    output_codec: Codec
    previous: PeerName | None = None
    next: NextServer | None = None
    adapters: RowAdapters | None = None


class SessionOpened(Message):
    """Server -> client. clock: the server's, when it wrote this."""

    kind: ClassVar[str] = "opened"
    session_id: SessionId
    cache_tokens_left: Annotated[int, Field(ge=0)]
    clock: Microseconds


class SessionPrompts(Message):
    """Client -> server, before the first step: deep prompts of the session, for as many blocks as fit into one message.

    first: of the blocks, counted in the session's span. num_tokens: how many tokens of each row have prompts.
    prompts: [blocks * num_tokens, hidden_size]; before a block its share is added to the hidden states at positions
    0 to num_tokens. Prompts of all blocks must come before a step does.
    """

    kind: ClassVar[str] = "prompts"
    first: Annotated[int, Field(ge=0, lt=MAX_BLOCKS)]
    num_tokens: Annotated[int, Field(ge=1, le=MAX_PROMPT_TOKENS)]
    prompts: TensorMeta


class PromptsTaken(Message):
    """Server -> client: the prompts are here."""

    kind: ClassVar[str] = "prompted"


class Relink(Message):
    """Client -> server: from now on, pushes come from `previous` alone, and outputs go to `next`.

    None: the client itself sends the steps, or takes the outputs.
    """

    kind: ClassVar[str] = "relink"
    previous: PeerName | None
    next: NextServer | None


class Relinked(Message):
    """Server -> client: done. Pushes from others are refused from now on."""

    kind: ClassVar[str] = "relinked"


class OpenPush(Message):
    """Server -> next server: the steps that follow on this stream are for this session."""

    kind: ClassVar[str] = "push"
    session_id: SessionId


class StepRequest(Message):
    """Client or previous server -> server: run these tokens through the session's span.

    push: through so many further servers of the chain the outputs shall be pushed; 0: only the client gets them.
    sent_at: by the sender's clock.
    time_left: within so many microseconds the client wants the answer; among steps that wait, those with less of it go
    first. It is a wish: late answers come all the same. None: no hurry.
    """

    kind: ClassVar[str] = "step"
    step: StepNumber
    rows: Annotated[tuple[RowSlice, ...], Field(min_length=1, max_length=MAX_ROWS)]
    hidden: TensorMeta
    push: Annotated[int, Field(ge=0, le=MAX_BLOCKS)] = 0
    sent_at: Microseconds = 0
    reorder: Reorder | None = None
    time_left: Microseconds | None = None


class StepResult(Message):
    """Server -> client: the span's output for the same tokens.

    pushed: the request came from the previous server. request_sent_at: as the request said, by its sender's clock.
    received_at, sent_at: when the request was here and when this left, by the server's clock.
    queue_time, compute_time, codec_time: how long the tokens waited for the device, how long it worked, and what
    decoding the input and encoding the output took.
    moving: this server is leaving; the session should go on elsewhere.
    """

    kind: ClassVar[str] = "result"
    step: StepNumber
    hidden: TensorMeta
    pushed: bool
    request_sent_at: Microseconds
    received_at: Microseconds
    queue_time: Microseconds
    compute_time: Microseconds
    codec_time: Microseconds
    sent_at: Microseconds
    moving: bool = False


class PushFailed(Message):
    """Server -> client: the output of this step did not reach the next server; the client has its copy."""

    kind: ClassVar[str] = "unpushed"
    step: StepNumber
    reason: Annotated[str, Field(max_length=2000)]


class CloseSession(Message):
    kind: ClassVar[str] = "close"


class Moving(Message):
    """Server -> client, unasked: this server is leaving; the session should go on elsewhere."""

    kind: ClassVar[str] = "moving"


class ErrorReply(Message):
    """The request failed. `error` is the name of a class in `swarm.errors`.

    step: which one, also if it came from the previous server; None if it was no step that failed.
    """

    kind: ClassVar[str] = "error"
    error: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=2000)]
    tokens_left: int | None = None
    step: StepNumber | None = None


def pack(message: Message) -> bytes:
    """A message as bytes, without its tensor. Raises MessageTooLarge if it is over MAX_HEADER_BYTES."""
    data: bytes = msgpack.packb([message.kind, *_values(message)], use_bin_type=True, default=_plain)
    if len(data) > MAX_HEADER_BYTES:
        raise MessageTooLarge(f"a {message.kind} message of {len(data)} bytes is over the limit of {MAX_HEADER_BYTES}")
    return data


def _values(value: Compact) -> list[Any]:
    return [getattr(value, name) for name in type(value).model_fields]


def _plain(value: Any) -> Any:
    """What msgpack cannot pack by itself."""
    if isinstance(value, Compact):
        return _values(value)
    if isinstance(value, BaseModel):
        return value.model_dump()
    raise TypeError(f"a {type(value).__name__} does not travel")


def unpack(data: bytes) -> Message:
    """The message in these bytes. Raises ProtocolError if they are not one."""
    try:
        kind, *values = msgpack.unpackb(data, raw=False, strict_map_key=True)
        message_type = _KINDS[kind]
    except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not a message of protocol version {PROTOCOL_VERSION}: {error!r:.200}") from error
    try:
        return message_type.model_validate(values)
    except ValidationError as error:
        raise ProtocolError(f"bad {message_type.__name__} message: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """The first complaint of a validation error, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


class BlockProtocol(ServicerBase):
    """The short questions that a server answers. Servers pass themselves as the wrapper; clients take a stub."""

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        """The server's present `ServerInfo` as JSON. Also serves as a ping.

        request.uid: OPENING_QUESTION and an `OpeningKey`, if the caller is about to open a session; then the answer is
        an `OpeningAnswer`. Anything else is ignored.
        """
        raise NotImplementedError

    async def rpc_upload(self, request: runtime_pb2.ExpertInfo, context: P2PContext) -> runtime_pb2.ExpertUID:
        """Takes bytes and answers how many they were, so that a server can measure its way to others of its swarm.

        request.serialized_info: at most MAX_UPLOAD_BYTES of anything. The answer is a few digits, whatever was sent.
        """
        raise NotImplementedError
