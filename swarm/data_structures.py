"""What peers say about themselves: small frozen values, validated on entry.

These are the contents of DHT records, so everything here may come from a stranger: every field has bounds.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .errors import BadSpan

#: Peers whose records carry another number do not mix with ours.
PROTOCOL_VERSION = 5

MAX_BLOCKS = 4096


class Frozen(BaseModel):
    """A value that never changes; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BlockSpan(Frozen):
    """Blocks [start, end) of a model, start < end."""

    start: Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
    end: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]

    @model_validator(mode="after")
    def _not_empty(self) -> BlockSpan:
        if self.start >= self.end:
            raise ValueError(f"blocks {self.start}:{self.end} are empty: the end must be greater than the start")
        return self

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def blocks(self) -> range:
        return range(self.start, self.end)

    def covers(self, other: BlockSpan) -> bool:
        return self.start <= other.start and other.end <= self.end

    @classmethod
    def parse(cls, text: str) -> BlockSpan:
        """Read "A:B". Raises BadSpan with the reason."""
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if match is None:
            raise BadSpan(f"cannot read blocks {text!r}: write START:END, for example 0:10 (END is not included)")
        start, end = int(match[1]), int(match[2])
        if start >= end:
            raise BadSpan(f"blocks {text.strip()} are empty: END must be greater than START")
        if end > MAX_BLOCKS:
            raise BadSpan(f"blocks {text.strip()} lie outside every model: at most {MAX_BLOCKS} blocks are possible")
        return cls(start=start, end=end)


class ServerState(StrEnum):
    JOINING = "joining"  # loads its weights; announced so that others choose different spans
    ONLINE = "online"
    DRAINING = "draining"  # serves its sessions to their end, or to its drain limit, and takes no new ones
    OFFLINE = "offline"


#: How a server computes: equal tags give equal tokens after a fail-over (in float32). Its parts, with slashes between:
#: dtype, quantisation and kind of device, then versions.
NumericsTag = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[\x21-\x7e]+$")]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
#: Rows of the decode steps whose times servers announce.
DECODE_ROWS = (1, 4, 16)
#: Unix time in seconds, by the clock of whoever says it.
UnixTime = Annotated[int, Field(ge=0, lt=2**40)]
DecodeTimes = Annotated[
    tuple[Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)], ...], Field(max_length=len(DECODE_ROWS))
]
Rate = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
PeerName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9]+$")]
MAX_ADAPTER_NAME = 64
_ADAPTER_NAME = rf"^[\x21-\x7e]{{1,{MAX_ADAPTER_NAME}}}$"
AdapterName = Annotated[str, Field(pattern=_ADAPTER_NAME)]
#: First hex digits of the sha256 over an adapter's files: equal ones are the same adapter, whatever it is called.
AdapterDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
#: Most adapters that a server announces, so that a record stays small.
MAX_ANNOUNCED_ADAPTERS = 128
#: Most entries of `ServerInfo.next_pings`, so that a record stays small.
MAX_NEXT_PINGS = 64
#: Whether a peer has others reach it through relays; "auto": if peers say that they cannot call it back.
RelayMode = Literal["auto", "always", "never"]
#: Most entries of `ServerInfo.relays`.
MAX_RELAYS = 4
#: What somebody who is about to open a session calls himself while he chooses a server: random, and new each time.
OpeningKey = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
#: Most of them that a server remembers at a time.
MAX_OPENINGS = 256


class AdapterInfo(NamedTuple):
    """An adapter that a server has. kind: what its files say, such as "lora", for people."""

    name: AdapterName
    kind: Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[a-z0-9_+-]+$")]
    digest: AdapterDigest


class AdapterRef(NamedTuple):
    """An adapter that a client wants: that of this name with these contents."""

    name: AdapterName
    digest: AdapterDigest


def is_adapter_name(name: str) -> bool:
    """Whether an `AdapterName` may be this."""
    return re.fullmatch(_ADAPTER_NAME, name) is not None


def _printable(text: str) -> str:
    """Drop control characters: these strings reach terminals and web pages."""
    return "".join(char for char in text if char.isprintable())


class ServerInfo(Frozen):
    """What one server announces about itself under the prefix of its model.

    throughput: tokens/s of single-row decoding through the whole span, measured at start.
    decode_times: seconds of a decode step through the whole span with 1, 4 and 16 rows (`DECODE_ROWS`); shorter where
        not all were measured.
    forward_rate: tokens/s of a prompt through the whole span. network_rate: bytes/s from this server to others of the
        swarm. None: not measured.
    running_rows, waiting_rows: rows that the device works on now, and rows whose next tokens wait for it.
    busy_rows: both together, on average over the last seconds; None: not measured.
    session_rows: rows of the sessions that it holds, at work or not.
    cache_tokens, cache_tokens_left: how many tokens of sessions it admits while it has none, and how many of new ones
        now.
    next_pings: seconds of round trip to servers that hold the block after this span, by peer id.
    fixed: its owner chose its blocks, so it never moves to others.
    relayed: it can be reached through relays only, which are slow and may drop a connection.
    relays: the peer ids of those, the first that works is taken; empty while it looks for others.
    adapters: those that it has; of more than MAX_ANNOUNCED_ADAPTERS, those that were used last.
    fetches_adapters: it loads adapters of the hub when somebody asks for them; their names hold a "/".
    started_at, announced_at: when its process started, and when it said this.
    """

    protocol_version: Annotated[int, Field(ge=0)] = PROTOCOL_VERSION
    state: ServerState
    span: BlockSpan
    throughput: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
    numerics: NumericsTag
    decode_times: DecodeTimes = ()
    forward_rate: Rate | None = None
    network_rate: Rate | None = None
    running_rows: Annotated[int, Field(ge=0, le=2**31)] = 0
    waiting_rows: Annotated[int, Field(ge=0, le=2**31)] = 0
    busy_rows: Annotated[float, Field(ge=0, le=2**31, allow_inf_nan=False)] | None = None
    session_rows: Annotated[int, Field(ge=0, le=2**31)] = 0
    cache_tokens: Annotated[int, Field(ge=0, le=2**40)] | None = None
    cache_tokens_left: Annotated[int, Field(ge=0, le=2**40)]
    public_name: Annotated[str, Field(max_length=64)] = ""
    software: Annotated[str, Field(max_length=32)] = ""
    next_pings: Annotated[
        dict[PeerName, Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]], Field(max_length=MAX_NEXT_PINGS)
    ] = {}
    fixed: bool = False
    relayed: bool = False
    relays: Annotated[tuple[PeerName, ...], Field(max_length=MAX_RELAYS)] = ()
    adapters: Annotated[tuple[AdapterInfo, ...], Field(max_length=MAX_ANNOUNCED_ADAPTERS)] = ()
    fetches_adapters: bool = False
    started_at: UnixTime | None = None
    announced_at: UnixTime | None = None

    @field_validator("public_name", "software")
    @classmethod
    def _clean(cls, text: str) -> str:
        return _printable(text)

    @model_validator(mode="before")
    @classmethod
    def _version_first(cls, data: Any) -> Any:
        """Another protocol version may have other fields: say that, rather than which field is odd."""
        if isinstance(data, dict) and data.get("protocol_version", PROTOCOL_VERSION) != PROTOCOL_VERSION:
            raise ValueError(
                f"protocol version {str(data.get('protocol_version'))[:20]} does not mix with ours ({PROTOCOL_VERSION})"
            )
        return data


class OpeningAnswer(Frozen):
    """What a server answers to somebody who is about to open a session, see `swarm.rpc.timed_info`.

    before: what others called themselves who asked before him and have not opened a session here since, first come
    first. opened: the same of those who asked lately and have. A client takes `before` from one server and `opened`
    from all that he asked: so he knows who still chooses.
    """

    info: ServerInfo
    before: Annotated[tuple[OpeningKey, ...], Field(max_length=MAX_OPENINGS)] = ()
    opened: Annotated[tuple[OpeningKey, ...], Field(max_length=MAX_OPENINGS)] = ()


class ModelInfo(Frozen):
    """What one server announces about the model it serves, so that others can list the models of a swarm.

    hidden_size: of the hidden states that travel between its blocks.
    """

    protocol_version: Annotated[int, Field(ge=0)] = PROTOCOL_VERSION
    name: Annotated[str, Field(min_length=1, max_length=128)]
    fingerprint: Fingerprint
    num_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    hidden_size: Annotated[int, Field(ge=1, le=2**20)]

    @field_validator("name")
    @classmethod
    def _clean(cls, text: str) -> str:
        return _printable(text)
