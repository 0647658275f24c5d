"""The door of a private swarm: nothing comes in from a stranger, and nothing goes out to one.

It stands where all that a node says and hears passes through: DHT, questions, sessions, pushes, passes, and whatever
is added one day. p2pd has no pre-shared keys, so what p2pd says by itself is open: see SECURITY.md.

Whoever opens a stream or asks a question begins with a *greeting*: GREETING, then his tag (see `membership`). The other
side reads that before anything else. To a peer that is not known to be a member nothing is said but the greeting: it
must answer with its own tag first (`meet`), once; a peer that has the key cannot lose it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence

from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import StreamHandler, TUnaryHandler
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from .circuit import CIRCUIT_STREAMS
from .control import MEETING_TIMEOUT, MEMBER_QUESTION, SturdyControl, make_sturdy
from .errors import PeerRefused, to_wire
from .membership import TAG_BYTES, SwarmKey
from .protocol import ErrorReply
from .rpc import FrameStream

logger = logging.getLogger(__name__)

#: Neither a question nor a frame begins with its first byte, so that peers without a key can be told what they lack.
GREETING = b"petswarm/member1"
_GREETING_BYTES = len(GREETING) + TAG_BYTES

_PATIENCE = 10.0  # seconds for whoever opens a stream to greet, and to read why he was refused
_LINGER = 1.0  # seconds that somebody who was refused has to read why, and to stop sending
#: Members that are remembered; whoever is forgotten is met again.
_MAX_MEMBERS = 10_000
#: Streams of strangers at a time that are heard, or told why not; further ones are closed at once. Members that were
#: met are let through whatever strangers do.
_MAX_STRANGERS = 64
_MAX_STRANGERS_PER_PEER = 4


class PrivateControl(SturdyControl):
    """hivemind's connection to p2pd for a node with a swarm key."""

    _key: SwarmKey
    _greeting: bytes

    async def use(self, key: SwarmKey, own_id: PeerID) -> None:
        """For `make_private` only."""
        self._key = key
        self._greeting = GREETING + key.tag(own_id.to_bytes())
        self._members: OrderedDict[PeerID, None] = OrderedDict()
        self._strangers: Counter[PeerID] = Counter()
        await self.add_unary_handler(MEMBER_QUESTION, self._answer_greeting)

    async def meet(self, peer_id: PeerID) -> None:
        """Make sure that a peer is a member, and let it know that we are.

        Raises PeerRefused if it is not or does not think so, TimeoutError, or what hivemind raises if it cannot be
        reached.
        """
        if peer_id in self._members:
            self._members.move_to_end(peer_id)
            return
        try:
            async with asyncio.timeout(MEETING_TIMEOUT):
                tag = await super().call_unary_handler(peer_id, MEMBER_QUESTION, self._greeting)
        except P2PHandlerError as error:
            raise PeerRefused(
                f"peer {peer_id} answers, but its swarm is private and has another key than the one that we were given"
            ) from error
        except P2PDaemonError as error:
            if "protocols not supported" in str(error):
                raise PeerRefused(
                    f"peer {peer_id} answers, but it has no swarm key, so it is not in our private swarm"
                ) from error
            raise
        if not self._key.is_tag(tag or b"", peer_id.to_bytes()):
            raise PeerRefused(f"peer {peer_id} answers, but it does not have our swarm key, whatever it says")
        self._remember(peer_id)

    def may_be_served(self, peer_id: PeerID) -> bool:
        return peer_id in self._members

    async def call_unary_handler(self, peer_id: PeerID, proto: str, data: bytes) -> bytes:
        await self.meet(peer_id)
        return await super().call_unary_handler(peer_id, proto, self._greeting + data)

    async def add_unary_handler(self, proto: str, handler: TUnaryHandler, balanced: bool = False) -> None:
        async def guarded(data: bytes, peer_id: PeerID) -> bytes:
            self._check(data[:_GREETING_BYTES], peer_id)
            return await handler(data[_GREETING_BYTES:], peer_id)

        await super().add_unary_handler(proto, guarded, balanced)

    async def stream_open(
        self, peer_id: PeerID, protocols: Sequence[str]
    ) -> tuple[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter]:
        await self.meet(peer_id)
        info, reader, writer = await super().stream_open(peer_id, protocols)
        if not CIRCUIT_STREAMS.issuperset(protocols):
            writer.write(self._greeting)
        return info, reader, writer

    async def stream_handler(self, proto: str, handler_cb: StreamHandler, balanced: bool = False) -> None:
        if proto in CIRCUIT_STREAMS:  # p2pd cannot greet; see `RelayService` for what members alone may ask there
            await super().stream_handler(proto, handler_cb, balanced)
            return

        async def guarded(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if await self._let_in(info.peer_id, reader, writer):
                await handler_cb(info, reader, writer)

        await super().stream_handler(proto, guarded, balanced)

    async def _answer_greeting(self, data: bytes, peer_id: PeerID) -> bytes:
        """Nothing is left of the question but its greeting, which was right."""
        return self._greeting[len(GREETING) :]

    def _check(self, greeting: bytes, peer_id: PeerID) -> None:
        """Raises PeerRefused, in words for that peer, unless it is a member."""
        greets = greeting.startswith(GREETING)
        if greets and self._key.is_tag(greeting[len(GREETING) :], peer_id.to_bytes()):
            self._remember(peer_id)
            return
        logger.info("refused %s, who is not in our private swarm", peer_id)
        if greets:
            raise PeerRefused("this swarm is private, and your swarm key is not its key")
        raise PeerRefused("this swarm is private: join it with its key, --swarm-key FILE (in Python swarm_key=...)")

    def _remember(self, peer_id: PeerID) -> None:
        self._members[peer_id] = None
        self._members.move_to_end(peer_id)
        if len(self._members) > _MAX_MEMBERS:
            self._members.popitem(last=False)

    async def _let_in(self, peer_id: PeerID, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether a stream comes from a member. If not, it is closed, its owner told why."""
        if peer_id in self._members:
            return await self._hear(peer_id, reader, writer)
        if self._strangers.total() >= _MAX_STRANGERS or self._strangers[peer_id] >= _MAX_STRANGERS_PER_PEER:
            writer.transport.abort()
            return False
        self._strangers[peer_id] += 1
        try:
            return await self._hear(peer_id, reader, writer)
        finally:
            self._strangers[peer_id] -= 1
            self._strangers += Counter()  # drops those who have none left

    async def _hear(self, peer_id: PeerID, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            async with asyncio.timeout(_PATIENCE):
                greeting = await reader.readexactly(1)
                if GREETING.startswith(greeting):  # others may wait for an answer after fewer bytes than a greeting has
                    greeting += await reader.readexactly(_GREETING_BYTES - 1)
            self._check(greeting, peer_id)
            return True
        except PeerRefused as error:
            await _turn_away(FrameStream(reader, writer), error)
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            pass
        writer.close()
        return False


async def _turn_away(stream: FrameStream, refusal: PeerRefused) -> None:
    """Say why, and read on for a moment: a stream that is closed with unread data may lose what was said."""
    name, message = to_wire(refusal)
    with contextlib.suppress(Exception):  # a stranger who does not listen
        async with asyncio.timeout(_PATIENCE):
            await stream.send(ErrorReply(error=name, message=message))
            await stream.linger(_LINGER)


async def make_private(p2p: P2P, key: SwarmKey) -> None:
    """Let a P2P that has not registered any handlers yet deal with members alone."""
    control = await make_sturdy(p2p, PrivateControl)
    await control.use(key, p2p.peer_id)
