"""Every error that Petswarm raises for its users, as one tree.

SwarmError
├── UsageError              what the user asked for cannot be done as asked; says what to change
│   ├── BadAddress          a multiaddress that does not parse, or lacks its /p2p/ part
│   ├── BadSpan             a span of blocks that is empty or lies outside the model
│   ├── ModelNotFound       no such model, or a folder without what a model needs
│   │   └── DownloadFailed  the hub, the way to it or the disk did not let us fetch all of it
│   └── AdapterError        an adapter that cannot be used: damaged, of another base or kind, too large
├── NetworkError            this peer cannot take part in the swarm
│   ├── JoinFailed          no initial peer answered
│   └── PortInUse           another program listens on the wanted port
├── RoutingError            no chain of servers for what was asked
│   ├── MissingBlocks       some blocks are held by no live server
│   ├── ModelNotServed      nobody in the swarm serves these weights
│   ├── NumericsMismatch    only servers with other numerics are left, and strict_numerics forbids them
│   └── AdapterNotServed    nobody in the swarm has this adapter, or no chain of servers has the same one
├── PeerError               one server failed us; a session recovers by replaying elsewhere
│   ├── PeerTimeout         it did not answer in time
│   ├── PeerUnreachable     it is gone, or its connection broke
│   ├── PeerRefused         it would not serve this request
│   ├── AdapterNotHere      it does not have this adapter (any more); others may
│   └── SessionLost         it no longer holds this session
├── CacheFull               the server's cache has no room for the session
├── QuotaExceeded           this peer holds as much of the server as one peer may; others may do
├── SessionTooLong          a session would grow beyond its max_length
├── ProtocolError           a message that breaks the protocol: shape, dtype, position, owner, size
│   └── MessageTooLarge     a message over the limit
├── EngineError             the forward pass of a batch failed on the server
└── NotSupported            a feature that does not work over the swarm, with the reason

Errors cross the network as (class name, message): see `to_wire` and `from_wire`.
"""

from __future__ import annotations


class SwarmError(Exception):
    """Base of every error raised by Petswarm."""


class UsageError(SwarmError):
    """What the user asked for cannot be done as asked."""


class BadAddress(UsageError):
    """A multiaddress does not parse, or lacks the part that names the peer."""


class BadSpan(UsageError):
    """A span of blocks is empty or lies outside the model."""


class ModelNotFound(UsageError):
    """No such model, or a folder without the files that a model needs."""


class DownloadFailed(ModelNotFound):
    """The hub, the way to it or the disk did not let us fetch what is needed of a model."""


class AdapterError(UsageError):
    """An adapter cannot be used: damaged, made for another base, of an unknown kind, too large."""


class NetworkError(SwarmError):
    """This peer cannot take part in the swarm."""


class JoinFailed(NetworkError):
    """No initial peer answered."""


class PortInUse(NetworkError):
    """Another program listens on the wanted port."""


class RoutingError(SwarmError):
    """No chain of servers exists for what was asked."""


class MissingBlocks(RoutingError):
    """Some blocks are held by no live server. `blocks` lists them."""

    def __init__(self, message: str, blocks: tuple[int, ...] = ()):
        super().__init__(message)
        self.blocks = blocks


class ModelNotServed(RoutingError):
    """Nobody in the swarm serves these weights."""


class NumericsMismatch(RoutingError):
    """Only servers with another numerics tag are left, and strict_numerics forbids them."""


class AdapterNotServed(RoutingError):
    """Nobody in the swarm has this adapter, or no chain of servers has the same one."""


class PeerError(SwarmError):
    """One server failed us. A session recovers by replaying its history elsewhere."""


class PeerTimeout(PeerError):
    """The server did not answer in time."""


class PeerUnreachable(PeerError):
    """The server is gone, or the connection to it broke."""


class PeerRefused(PeerError):
    """The server would not serve this request."""


class AdapterNotHere(PeerError):
    """The server does not have this adapter (any more); others may."""


class SessionLost(PeerError):
    """The server no longer holds this session."""


class CacheFull(SwarmError):
    """The server's cache has no room for the session. `tokens_left` is what it could still admit."""

    def __init__(self, message: str, tokens_left: int = 0):
        super().__init__(message)
        self.tokens_left = tokens_left


class QuotaExceeded(SwarmError):
    """This peer holds as many sessions or streams of the server as one peer may. No fault of the server: go elsewhere,
    or come back with less."""


class SessionTooLong(SwarmError):
    """A session would grow beyond its max_length."""


class ProtocolError(SwarmError):
    """A message breaks the protocol: its shape, dtype, position, owner or size is wrong."""


class MessageTooLarge(ProtocolError):
    """A message is over the limit."""


class EngineError(SwarmError):
    """The forward pass of a batch failed on the server."""


class NotSupported(SwarmError):
    """A feature that does not work over the swarm; the message gives the reason."""


# What a server may say about a request over the wire. Anything else becomes PeerRefused.
_WIRE_ERRORS: dict[str, type[SwarmError]] = {
    cls.__name__: cls
    for cls in (
        BadSpan,
        PeerRefused,
        AdapterNotHere,
        SessionLost,
        CacheFull,
        QuotaExceeded,
        SessionTooLong,
        ProtocolError,
        MessageTooLarge,
        EngineError,
        NotSupported,
    )
}


#: Names of what a server may say about a request.
WIRE_ERRORS = tuple(_WIRE_ERRORS)


def to_wire(error: SwarmError) -> tuple[str, str]:
    """The (name, message) under which an error travels to the peer that caused it."""
    name = type(error).__name__
    return (name if name in _WIRE_ERRORS else PeerRefused.__name__), str(error)


def from_wire(name: str, message: str, tokens_left: int | None = None) -> SwarmError:
    """The error that a peer reported; an unknown name becomes PeerRefused."""
    if name == CacheFull.__name__:
        return CacheFull(message, tokens_left or 0)
    return _WIRE_ERRORS.get(name, PeerRefused)(message)
