"""A peer that cannot be reached keeps relays, which carry connections to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.utils.multiaddr import Multiaddr

from .addresses import check_peer_address, peer_id_of, without_peer_id
from .circuit import HOP_STREAM, CircuitMessage, Hop, Status, receive_hop, send_hop
from .errors import BadAddress, JoinFailed, ProtocolError
from .ways import WayfindingP2P

logger = logging.getLogger(__name__)

#: Relays that are kept at once: when one goes, connections through the other live on.
NUM_RELAYS = 2
#: Seconds between renewals; a third of what a reservation lives.
_RENEWAL = 20.0
#: Seconds for a relay to answer.
_PATIENCE = 8.0
#: Seconds until peers are looked through again while relays are missing, and until one that refused is asked again:
#: doubled each time.
_CHECK, _FIRST_PAUSE, _LAST_PAUSE = 2.0, 1.0, 60.0
_MAX_SHOWN = 3

_REASONS: dict[int | None, str] = {
    Status.PERMISSION_DENIED: "it does not relay",
    Status.RESERVATION_REFUSED: "it relays to as many peers as it can",
}


@dataclass(frozen=True)
class Candidate:
    """A peer that may relay. addresses: where it is, as far as we were told."""

    peer_id: str
    addresses: tuple[str, ...] = ()


class Reservations:
    """Keeps up to NUM_RELAYS relays for this node, and finds others when they go.

    candidates: peers that may relay, the best first. on_change: called when the relays are others than before.
    """

    def __init__(
        self, p2p: WayfindingP2P, candidates: Callable[[], Sequence[Candidate]], on_change: Callable[[], None]
    ):
        self._p2p = p2p
        self._candidates = candidates
        self._on_change = on_change
        self._relays: dict[str, str] = {}
        self._held: dict[str, asyncio.Task[None]] = {}
        self._pauses: dict[str, tuple[float, float]] = {}  # until when a peer is left alone, and for how long
        self._reasons: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._found = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._lost = False

    @property
    def relays(self) -> dict[str, str]:
        """The address of each relay by its peer id, the oldest first."""
        return dict(self._relays)

    async def start(self, timeout: float) -> None:
        """Find a relay, then keep on in the background. Raises JoinFailed after `timeout` seconds without one."""
        self._keeping = asyncio.create_task(self._keep())
        try:
            async with asyncio.timeout(timeout):
                await self._found.wait()
        except TimeoutError as error:
            self.stop()
            raise JoinFailed(self._explain(timeout)) from error

    def start_soon(self) -> None:
        """Like `start`, without waiting for the first relay."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep())

    def stop(self) -> None:
        """Give the relays up."""
        for task in (self._keeping, *self._held.values()):
            if task is not None:
                task.cancel()
        self._keeping = None
        self._relays.clear()

    async def _keep(self) -> None:
        while True:
            self._wake.clear()
            candidates = self._candidates()
            known = {candidate.peer_id for candidate in candidates}
            self._pauses = {peer_id: pause for peer_id, pause in self._pauses.items() if peer_id in known}
            self._reasons = {peer_id: reason for peer_id, reason in self._reasons.items() if peer_id in known}
            for candidate in candidates:
                if len(self._held) >= NUM_RELAYS:
                    break
                until, _ = self._pauses.get(candidate.peer_id, (0.0, 0.0))
                if candidate.peer_id not in self._held and time.monotonic() >= until:
                    await self._try(candidate)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CHECK if len(self._held) < NUM_RELAYS else None):
                    await self._wake.wait()

    async def _try(self, candidate: Candidate) -> None:
        peer_id = candidate.peer_id
        try:
            async with asyncio.timeout(_PATIENCE):
                address, reader, writer = await self._reserve(candidate)
        except (ProtocolError, BadAddress) as error:
            self._leave_alone(peer_id, str(error))
        except (P2PDaemonError, EOFError, OSError, RuntimeError) as error:  # time-outs and closed streams included
            logger.info("peer %s is no relay for us: %r", peer_id, error)
            self._leave_alone(peer_id, "it does not answer")
        else:
            self._take(peer_id, address, reader, writer)

    def _leave_alone(self, peer_id: str, reason: str) -> None:
        """For a while, which doubles each time."""
        self._reasons[peer_id] = reason
        _, pause = self._pauses.get(peer_id, (0.0, _FIRST_PAUSE / 2))
        pause = min(2 * pause, _LAST_PAUSE)
        self._pauses[peer_id] = time.monotonic() + pause, pause

    def _take(self, peer_id: str, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._pauses.pop(peer_id, None)
        self._relays[peer_id] = address
        self._held[peer_id] = asyncio.create_task(self._hold(peer_id, reader, writer))
        self._found.set()
        if self._lost:
            logger.warning("others can reach this peer again, through the relay %s", address)
            self._lost = False
        self._on_change()

    async def _reserve(self, candidate: Candidate) -> tuple[str, asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises ProtocolError if it refuses, BadAddress if it does not tell where it is."""
        peer = PeerID.from_base58(candidate.peer_id)
        await self._p2p._client.connect(peer, [without_peer_id(address) for address in candidate.addresses])
        reader, writer = await self._p2p.open_direct_stream(peer, HOP_STREAM)
        try:
            granted = await _ask(reader, writer)
            if candidate.addresses:
                return candidate.addresses[0], reader, writer
            if not granted.addresses:
                raise ProtocolError("it does not say where it is")
            return _relay_address(granted.addresses[0], candidate.peer_id), reader, writer
        except BaseException:
            writer.close()
            raise

    async def _hold(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Renew a reservation until its relay goes, or says no."""
        try:
            while not await _something_came(reader, _RENEWAL):
                async with asyncio.timeout(_PATIENCE):
                    await _ask(reader, writer)
        except (ProtocolError, EOFError, OSError, RuntimeError) as error:  # time-outs and closed streams included
            logger.info("the relay %s is gone: %r", peer_id, error)
        finally:
            writer.close()
            if self._held.get(peer_id) is asyncio.current_task():
                del self._held[peer_id]
                self._forget(peer_id)

    def _forget(self, peer_id: str) -> None:
        address = self._relays.pop(peer_id, None)
        if address is None or self._keeping is None:
            return
        if not self._relays:
            self._lost = True
            logger.warning("the relay %s is gone, so others cannot reach this peer; looking for another", address)
        self._wake.set()
        self._on_change()

    def _explain(self, timeout: float) -> str:
        tried = [f"{peer_id} ({reason})" for peer_id, reason in list(self._reasons.items())[:_MAX_SHOWN]]
        asked = f"asked were {', '.join(tried)}" if tried else "no peer of the swarm could be asked"
        return (
            f"could not join at the step relay: others cannot reach this peer, and none was found within {timeout:g} s "
            f"that relays to it; {asked}; run `swarm run-bootstrap` where others can reach it and join through that, "
            f"or open this peer's port and give --port"
        )


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> CircuitMessage:
    """Make or renew a reservation. Raises ProtocolError if it is refused."""
    await send_hop(writer, CircuitMessage(Hop.RESERVE))
    answer = await receive_hop(reader)
    if answer.kind != Hop.STATUS or answer.status != Status.OK:
        raise ProtocolError(_REASONS.get(answer.status, f"it refuses with status {answer.status}"))
    return answer


async def _something_came(reader: asyncio.StreamReader, seconds: float) -> bool:
    """Whether the relay said something unasked, as it never should. Raises EOFError at the end of the stream."""
    try:
        async with asyncio.timeout(seconds):
            await reader.readexactly(1)
    except TimeoutError:
        return False
    return True


def _relay_address(data: bytes, peer_id: str) -> str:
    """Raises BadAddress unless these bytes are a full address of this peer."""
    try:
        address = str(Multiaddr(data))
    except Exception as error:  # whatever the parser raises for a stranger's bytes
        raise BadAddress("it says something unreadable about where it is") from error
    check_peer_address(address)
    if peer_id_of(address) != peer_id:
        raise BadAddress("it gives the address of another peer for its own")
    return address
