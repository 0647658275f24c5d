"""What an owner's command and a server on the same machine say to each other: one JSON line each way."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from swarm.errors import ProtocolError

#: Bytes of a line, its end included.
MAX_LINE = 8192

_Text = Annotated[str, Field(max_length=1000)]


class _Message(BaseModel):
    # Unknown fields are ignored: the server may run since before an update.
    model_config = ConfigDict(frozen=True, extra="ignore")


_Kind = TypeVar("_Kind", bound=_Message)


class Action(StrEnum):
    STATUS = "status"
    PAUSE = "pause"
    RESUME = "resume"


class OwnerRequest(_Message):
    """The server answers once it is done, which takes minutes if it drains or loads."""

    action: Action


class ServerStatus(_Message):
    """A server as its owner sees it. peer_id, model, span: "" where the server does not know yet. metrics_url: where
    it shows its figures to Prometheus; "" if nowhere."""

    pid: Annotated[int, Field(ge=1)]
    public_name: _Text = ""
    peer_id: _Text = ""
    model: _Text = ""
    span: _Text = ""
    state: _Text
    metrics_url: _Text = ""


class OwnerAnswer(_Message):
    """error: why it was not done, in a sentence; "" if it was. server: as it is afterwards."""

    server: ServerStatus
    error: Annotated[str, Field(max_length=2000)] = ""


def to_line(message: OwnerRequest | OwnerAnswer) -> bytes:
    return message.model_dump_json().encode() + b"\n"


def request_from_line(line: bytes) -> OwnerRequest:
    """Raises ProtocolError."""
    return _parse(OwnerRequest, line)


def answer_from_line(line: bytes) -> OwnerAnswer:
    """Raises ProtocolError."""
    return _parse(OwnerAnswer, line)


def _parse(kind: type[_Kind], line: bytes) -> _Kind:
    if not line.endswith(b"\n"):
        raise ProtocolError(f"an {kind.__name__} of {len(line)} bytes does not end with a line")
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise ProtocolError(f"not an {kind.__name__}: {error.errors()[0]['msg']}") from error
