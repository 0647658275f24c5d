"""What a server says of a request that failed, as an error of ours."""

from __future__ import annotations

from swarm.errors import NotSupported, PeerRefused, SessionTooLong, SwarmError, UsageError, from_wire
from swarm.protocol import ErrorReply


def reported_error(peer_id: str, reply: ErrorReply) -> SwarmError:
    """The error that this server reported; one that would blame our user is the server's own."""
    error = from_wire(reply.error, f"server {peer_id}: {reply.message}", reply.tokens_left)
    if isinstance(error, UsageError | SessionTooLong | NotSupported):
        # We checked our request ourselves, so this is about the server: it may have restarted with other blocks.
        return PeerRefused(str(error))
    return error
