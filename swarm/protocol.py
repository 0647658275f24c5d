"""The messages of one inference stream, and the short questions peers ask each other.

An inference stream carries one session. The client writes `OpenSession`, then any number of `StepRequest`, each
followed by its tensor; the server answers each with one message. When the stream ends, so does the session.

A step works on *rows*: one row is one sequence of the session's batch. Rows are flattened, so a tensor is
[tokens, hidden_size] and `RowSlice` says which tokens belong to which row, and from which position on.
Adapters are named per row and the kind of work per step from the first protocol version on, so that servers which
learn more can be told from those that refuse.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar, NamedTuple

import msgpack
from hivemind.p2p import P2PContext, ServicerBase
from hivemind.proto import runtime_pb2
from pydantic import Field, ValidationError

from .data_structures import PROTOCOL_VERSION, BlockSpan, Fingerprint, Frozen
from .errors import MessageTooLarge, ProtocolError

INFERENCE_STREAM = f"petswarm/inference/{PROTOCOL_VERSION}"

#: Largest tensor in one message. Longer prompts travel in several steps.
MAX_PAYLOAD_BYTES = 16 * 2**20
#: Largest message without its tensor: enough for 1,024 rows.
MAX_HEADER_BYTES = 64 * 2**10

#: Most bytes that a peer may send to measure the way here.
MAX_UPLOAD_BYTES = 2**20

#: Begins the question of somebody who is about to open a session; his key follows.
OPENING_QUESTION = "opening/"

MAX_ROWS = 1024
MAX_POSITION = 2**24

SessionId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class WorkKind(StrEnum):
    INFERENCE = "inference"
    FORWARD = "forward"
    BACKWARD = "backward"


class TensorMeta(Frozen):
    """How the bytes that follow a message become a tensor."""

    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=2**31)], ...], Field(max_length=4)]
    dtype: Annotated[str, Field(pattern=r"^(float32|float16|bfloat16)$")]


class RowSlice(NamedTuple):
    """`num_tokens` new tokens of row `row`, the first of them at `position`.

    A position below the row's cached length rewinds the row to it.
    """

    row: Annotated[int, Field(ge=0, lt=MAX_ROWS)]
    position: Annotated[int, Field(ge=0, le=MAX_POSITION)]
    num_tokens: Annotated[int, Field(ge=0, le=MAX_POSITION)]


class Message(Frozen):
    kind: ClassVar[str]


class OpenSession(Message):
    """Client -> server: reserve cache for `num_rows` rows of up to `max_length` tokens through blocks `span`."""

    kind: ClassVar[str] = "open"
    session_id: SessionId
    fingerprint: Fingerprint
    span: BlockSpan
    num_rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    max_length: Annotated[int, Field(ge=1, le=MAX_POSITION)]
    adapters: Annotated[tuple[str | None, ...], Field(max_length=MAX_ROWS)] = ()


class SessionOpened(Message):
    kind: ClassVar[str] = "opened"
    session_id: SessionId
    cache_tokens_left: Annotated[int, Field(ge=0)]


class StepRequest(Message):
    """Client -> server: run these tokens through the session's span. The tensor is [tokens, hidden_size]."""

    kind: ClassVar[str] = "step"
    session_id: SessionId
    step: Annotated[int, Field(ge=0)]
    work: WorkKind = WorkKind.INFERENCE
    rows: Annotated[tuple[RowSlice, ...], Field(min_length=1, max_length=MAX_ROWS)]
    hidden: TensorMeta


class StepResult(Message):
    """Server -> client: the span's output for the same tokens.

    queue_time, compute_time: seconds that the tokens waited for the device, and that the device worked.
    moving: this server is leaving; the session should go on elsewhere.
    """

    kind: ClassVar[str] = "result"
    step: Annotated[int, Field(ge=0)]
    hidden: TensorMeta
    queue_time: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    compute_time: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    moving: bool = False


class CloseSession(Message):
    kind: ClassVar[str] = "close"
    session_id: SessionId


class Moving(Message):
    """Server -> client, unasked: this server is leaving; the session should go on elsewhere."""

    kind: ClassVar[str] = "moving"


class ErrorReply(Message):
    """Server -> client: the request failed. `error` is the name of a class in `swarm.errors`."""

    kind: ClassVar[str] = "error"
    error: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=2000)]
    tokens_left: int | None = None


_KINDS: dict[str, type[Message]] = {
    cls.kind: cls for cls in (OpenSession, SessionOpened, StepRequest, StepResult, CloseSession, Moving, ErrorReply)
}


def pack(message: Message) -> bytes:
    """A message as bytes, without its tensor. Raises MessageTooLarge if it is over MAX_HEADER_BYTES."""
    data: bytes = msgpack.packb([message.kind, message.model_dump()], use_bin_type=True)
    if len(data) > MAX_HEADER_BYTES:
        raise MessageTooLarge(f"a {message.kind} message of {len(data)} bytes is over the limit of {MAX_HEADER_BYTES}")
    return data


def unpack(data: bytes) -> Message:
    """The message in these bytes. Raises ProtocolError if they are not one."""
    try:
        kind, fields = msgpack.unpackb(data, raw=False, strict_map_key=True)
        message_type = _KINDS[kind]
    except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not a message of protocol version {PROTOCOL_VERSION}: {error!r:.200}") from error
    try:
        return message_type.model_validate(fields)
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
