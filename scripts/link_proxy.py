"""Links for swarms on one machine: a TCP proxy before each server, with a delay and a rate limit in each direction.

`python -m swarm.scripts.link_proxy`, started by `LinkProxy` in links.py: all links of a swarm in one process, so that
they disturb no client's event loop. Each line of standard input is a request in JSON and answered by one line:

{"target": PORT, "rate_bits_per_s": R or null, "one_way_delay_s": D}: a new link to a port of 127.0.0.1; answers the
    port that stands for it.
"counters": answers for every link, in the order of their making, the bytes delivered [to the server, from it].

It ends when standard input closes. A server that announces only its link's port is reached through the link by clients
that do not listen and by other servers alike. What the proxy carries is TCP's payload: headers are not counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import selectors
import socket
import struct
import sys
from collections import deque
from dataclasses import asdict
from typing import NamedTuple

from .link_line import Line, Link

LOCALHOST = "127.0.0.1"

#: Data is carried in pieces of at most this many bytes, lest one read holds up those of other connections, or the
#: answers to its own beginning.
PIECE_BYTES = 16 * 2**10
#: Seconds between two deliveries at least: a fast line would wake us for every piece.
TICK = 0.0002
#: A socket closed with this option sends a reset.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Piece(NamedTuple):
    """Data for `end`, due at a time of the event loop. No data: the stream ends there. None: it breaks off."""

    due: float
    end: End
    data: bytes | memoryview | None


class Lane:
    """One direction of one link, shared by all its connections, in the order in which data came."""

    def __init__(self, link: Link, loop: asyncio.AbstractEventLoop):
        self.link = link
        self.delivered = 0  # bytes
        self._loop = loop
        self._line = Line(link)
        self._pieces: deque[Piece] = deque()
        self._last_delivery = 0.0

    def send(self, end: End, data: bytes | memoryview | None) -> None:
        """Deliver `data` (or an end of the stream, see `Piece`) to `end` when it comes out of the line."""
        due = self._line.arrival(self._loop.time(), len(data) if data else 0)
        self._pieces.append(Piece(due, end, data))
        if len(self._pieces) == 1:
            self._wake_for(due)

    def _wake_for(self, due: float) -> None:
        self._loop.call_at(max(due, self._last_delivery + TICK), self._deliver)

    def _deliver(self) -> None:
        self._last_delivery = now = self._loop.time()
        while self._pieces and self._pieces[0].due <= now:
            _, end, data = self._pieces.popleft()
            if data:
                self.delivered += len(data)
            end.deliver(data)
        if self._pieces:
            self._wake_for(self._pieces[0].due)


class End(asyncio.Protocol):
    """One of the two sockets of a proxied connection. What it reads comes out of `other` after its way down `lane`."""

    other: End
    _transport: asyncio.Transport

    def __init__(self, lane: Lane):
        self._lane = lane
        self._on_the_way = 0  # bytes that we read and the other end has not written yet
        self._clogged = False  # the other end's reader is slow
        self._open = False
        self._read_all = False
        self._wrote_all = False
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.pause_reading()

    def start(self) -> None:
        """Both ends are connected."""
        self._open = True
        self._read_or_wait()

    def data_received(self, data: bytes) -> None:
        self._on_the_way += len(data)
        view = memoryview(data)
        for first in range(0, len(data), PIECE_BYTES):
            self._lane.send(self.other, view[first : first + PIECE_BYTES])
        self._read_or_wait()

    def eof_received(self) -> bool:
        self._read_all = True
        self._lane.send(self.other, b"")
        self._close_if_done()
        return True  # the other direction goes on

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        if error is not None:
            self._lane.send(self.other, None)

    def deliver(self, data: bytes | memoryview | None) -> None:
        """What the other end read comes out here."""
        if data:
            self.other._on_the_way -= len(data)
        if self._lost:
            return
        if data is None:
            self.reset()
        elif data:
            self._transport.write(data)
        else:
            self._wrote_all = True
            with contextlib.suppress(OSError):  # the peer broke off; where that is of interest, its reset is read
                self._transport.write_eof()
            self._close_if_done()
        self.other._read_or_wait()

    def reset(self) -> None:
        """Break the connection off, as the other side did."""
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._transport.abort()

    def pause_writing(self) -> None:
        self.other._clogged = True
        self.other._read_or_wait()

    def resume_writing(self) -> None:
        self.other._clogged = False
        self.other._read_or_wait()

    def _read_or_wait(self) -> None:
        """Back-pressure: what is on the way is bounded by the link's window, and by how fast the other side reads."""
        if not self._open or self._lost or self._read_all or self._transport.is_closing():
            return
        if self._clogged or self._on_the_way > self._lane.link.window:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _close_if_done(self) -> None:
        if self._read_all and self._wrote_all:
            self._transport.close()  # after all was written


class ProxiedLink:
    """A port that stands for a server's: each connection to it goes on to the server through the link."""

    def __init__(self, link: Link, target: int):
        loop = asyncio.get_running_loop()
        self.to_server, self.from_server = Lane(link, loop), Lane(link, loop)
        self._link = link
        self._target = target
        self._server: asyncio.Server
        self._connecting: set[asyncio.Task[None]] = set()

    async def listen(self) -> int:
        self._server = await asyncio.get_running_loop().create_server(self._accept, LOCALHOST, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def _accept(self) -> End:
        near = End(self.to_server)
        task = asyncio.create_task(self._connect(near))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return near

    async def _connect(self, near: End) -> None:
        await asyncio.sleep(2 * self._link.one_way_delay_s)  # TCP shakes hands before any data travels
        far = End(self.from_server)
        near.other, far.other = far, near
        try:
            await asyncio.get_running_loop().create_connection(lambda: far, LOCALHOST, self._target)
        except OSError:  # nobody listens there
            near.reset()
            return
        near.start()
        far.start()


async def main() -> None:
    loop = asyncio.get_running_loop()
    requests = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    links: list[ProxiedLink] = []
    while line := await requests.readline():
        request = json.loads(line)
        if request == "counters":
            answer: object = [(link.to_server.delivered, link.from_server.delivered) for link in links]
        else:
            target = request.pop("target")
            links.append(ProxiedLink(Link(**request), target))
            answer = await links[-1].listen()
        print(json.dumps(answer), flush=True)


def request_for(link: Link, target: int) -> dict[str, float | None]:
    """What asks for a link to a port of 127.0.0.1."""
    return {"target": target, **asdict(link)}


def precise_loop() -> asyncio.AbstractEventLoop:
    """select() waits to the microsecond; epoll, asyncio's default, and uvloop's timers know only whole milliseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(main())
