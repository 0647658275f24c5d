"""The real proxy process between plain sockets. Times have lower bounds only: a busy machine may add to them."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import psutil
import pytest

from swarm.errors import SwarmError
from swarm.scripts.links import Link, LinkBytes, LinkProxy, direct_connections

#: Seconds. Nothing here takes that long.
LONG = 60.0

#: A socket closed with this option sends a reset.
RESET = struct.pack("ii", 1, 0)


@pytest.fixture(scope="module")
def proxy():
    proxy = LinkProxy()
    yield proxy
    proxy.stop()


class Pair:
    """A client's socket, the server's, and the link between them."""

    def __init__(self, proxy, link):
        self.ports = proxy.add(link)
        self._connect()

    def _connect(self):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self.ports.server))
            listener.listen()
            listener.settimeout(LONG)
            self.client = socket.create_connection(("127.0.0.1", self.ports.proxy), timeout=LONG)
            self.server, _ = listener.accept()
            self.server.settimeout(LONG)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.client.close()
        self.server.close()


class Other(Pair):
    """One more connection through the same link."""

    def __init__(self, pair):
        self.ports = pair.ports
        self._connect()


def receive(sock, size):
    data = bytearray()
    while len(data) < size:
        part = sock.recv(2**20)
        assert part, f"the stream ended after {len(data)} of {size} bytes"
        data += part
    return bytes(data)


def test_bytes_pass_unchanged_each_way_and_are_counted(proxy):
    number = len(proxy.counters())
    with Pair(proxy, Link(rate_bits_per_s=1e9, one_way_delay_s=0.002)) as pair:
        there, back = os.urandom(5_000_000), os.urandom(3_000_000)
        senders = [
            threading.Thread(target=sock.sendall, args=(data,))
            for sock, data in ((pair.client, there), (pair.server, back))
        ]
        for sender in senders:
            sender.start()
        received = {}
        reader = threading.Thread(target=lambda: received.update(back=receive(pair.client, len(back))))
        reader.start()
        assert receive(pair.server, len(there)) == there
        for thread in (*senders, reader):
            thread.join(LONG)
        assert received["back"] == back
    assert proxy.counters()[number] == LinkBytes(to_server=5_000_000, from_server=3_000_000)
    assert LinkBytes(3, 4) - LinkBytes(1, 1) == LinkBytes(2, 3)


def test_the_delay_counts_each_way_and_for_connecting(proxy):
    started = time.perf_counter()
    with Pair(proxy, Link(one_way_delay_s=0.05)) as pair:
        assert time.perf_counter() - started >= 0.1
        started = time.perf_counter()
        for _ in range(2):
            pair.client.sendall(b"there")
            receive(pair.server, 5)
            pair.server.sendall(b"back")
            receive(pair.client, 4)
        assert time.perf_counter() - started >= 0.2


@pytest.mark.parametrize("sender", ["client", "server"])
def test_the_rate_holds_each_way(proxy, sender):
    with Pair(proxy, Link(rate_bits_per_s=40e6)) as pair:
        ends = [pair.client, pair.server] if sender == "client" else [pair.server, pair.client]
        data = bytes(1_000_000)
        started = time.perf_counter()
        thread = threading.Thread(target=ends[0].sendall, args=(data,))
        thread.start()
        receive(ends[1], len(data))
        assert time.perf_counter() - started >= 0.2
        thread.join(LONG)


def test_two_connections_share_the_rate(proxy):
    with Pair(proxy, Link(rate_bits_per_s=40e6)) as pair, Other(pair) as other:
        started = time.perf_counter()
        senders = [threading.Thread(target=two.client.sendall, args=(bytes(500_000),)) for two in (pair, other)]
        for sender in senders:
            sender.start()
        receive(pair.server, 500_000)
        receive(other.server, 500_000)
        assert time.perf_counter() - started >= 0.2
        for sender in senders:
            sender.join(LONG)


def test_a_half_closed_connection_still_answers(proxy):
    with Pair(proxy, Link(one_way_delay_s=0.01)) as pair:
        pair.client.sendall(b"question")
        pair.client.shutdown(socket.SHUT_WR)
        assert receive(pair.server, 8) == b"question"
        assert pair.server.recv(1) == b""
        pair.server.sendall(b"answer")
        pair.server.close()
        assert receive(pair.client, 6) == b"answer"
        assert pair.client.recv(1) == b""


@pytest.mark.parametrize("breaker", ["client", "server"])
def test_a_reset_is_passed_on_as_a_reset(proxy, breaker):
    with Pair(proxy, Link(one_way_delay_s=0.01)) as pair:
        other = {"client": pair.server, "server": pair.client}[breaker]
        broken = getattr(pair, breaker)
        broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        broken.close()
        with pytest.raises(ConnectionResetError):
            other.recv(1)


def test_a_connection_that_breaks_after_its_end_disturbs_no_other(proxy):
    """The last end cannot be told to a socket that was reset meanwhile."""
    with Pair(proxy, Link(rate_bits_per_s=40e6)) as pair, Other(pair) as other:
        pair.server.close()
        assert pair.client.recv(1) == b""
        pair.client.sendall(b"to nobody: answered by a reset")
        other.client.sendall(b"behind it")
        assert receive(other.server, 9) == b"behind it"
        sender = threading.Thread(target=other.client.sendall, args=(bytes(1_000_000),))
        sender.start()
        receive(other.server, 1)
        pair.client.shutdown(socket.SHUT_WR)  # in the midst of the other's data
        receive(other.server, 900_000)
        sender.join(LONG)


def test_a_server_that_is_not_there_resets(proxy):
    ports = proxy.add(Link(one_way_delay_s=0.01))
    with (
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", ports.proxy), timeout=LONG) as client,
    ):
        client.recv(1)


def test_a_reader_that_does_not_read_stops_the_sender_and_takes_little_memory(proxy):
    before = psutil.Process(proxy.pid).memory_info().rss
    with Pair(proxy, Link(rate_bits_per_s=1e9)) as pair:
        pair.client.settimeout(1.0)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 2**28:
                sent += pair.client.send(bytes(2**20))
        assert psutil.Process(proxy.pid).memory_info().rss - before < 16 * 2**20
        pair.client.close()
        assert len(receive(pair.server, sent)) == sent  # and nothing is lost


def test_a_connection_that_by_passes_the_link_is_found(proxy):
    with Pair(proxy, Link()) as pair, socket.socket() as listener:
        assert direct_connections([pair.ports.server], proxy.pid) == []
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", pair.ports.server))
        listener.listen()
        with socket.create_connection(("127.0.0.1", pair.ports.server), timeout=LONG) as client:
            both_ends = direct_connections([pair.ports.server], proxy.pid)
            assert len(both_ends) == 2
            assert all(f":{client.getsockname()[1]}" in end for end in both_ends)


def test_a_port_is_kept_for_its_server(proxy):
    ports = proxy.add(Link())
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", ports.server))


def test_a_proxy_that_is_gone_is_an_error():
    proxy = LinkProxy()
    os.kill(proxy.pid, signal.SIGKILL)
    with pytest.raises(SwarmError, match="link proxy's process ended"):
        proxy.add(Link())
    proxy.stop()
    proxy.stop()


def test_the_proxy_ends_with_the_program_that_started_it():
    code = "from swarm.scripts.links import LinkProxy; print(LinkProxy().pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        process.wait(LONG)
