"""A swarm and a generation in a network of their own, in which every packet is seen.

`unshare --user --map-root-user --net python -m watched_network FOLDER` prints as JSON to whom packets went
that left the machine, or tried to; `control` are those that this program sent itself, to see whether it would see any.
"""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

BIN = Path(sys.executable).parent
LIMIT = 120.0  # seconds
#: This machine's address beside loopback: a peer that has one may look for others around it.
OWN = "10.77.0.1"
#: Reserved for documentation: nobody has them.
CONTROL_UDP, CONTROL_TCP = "192.0.2.1", "192.0.2.2"
_SIOCADDRT, _SIOCSIFADDR, _SIOCSIFFLAGS = 0x890B, 0x8916, 0x8914
_UP, _RTF_UP = 1, 1
_ALL_PROTOCOLS = 3


def set_up() -> None:
    """Loopback works, and whatever is sent elsewhere leaves through it, too. There is no IPv6 but to ourselves."""
    with socket.socket() as ipv4:
        fcntl.ioctl(ipv4, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _UP))
        fcntl.ioctl(ipv4, _SIOCSIFADDR, struct.pack("16s16s8x", b"lo:1", _address(OWN)))
        anywhere, device = _address("0.0.0.0"), ctypes.create_string_buffer(b"lo")
        fields = (0, anywhere, anywhere, anywhere, _RTF_UP, 0, 0, 0, 0, ctypes.addressof(device), 0, 0, 0)
        fcntl.ioctl(ipv4, _SIOCADDRT, struct.pack("@L16s16s16sHhLPhPLLH", *fields))  # a struct rtentry


def _address(ip: str) -> bytes:
    """A struct sockaddr_in."""
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(ip))


class Watch:
    """Sees every packet. strangers: "address protocol port" of those that are not for this machine."""

    def __init__(self) -> None:
        self.strangers: set[str] = set()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**26)
        self._socket.bind(("lo", 0))
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            packet = self._socket.recv(256)
            kind = packet[12:14]
            if kind == b"\x08\x00":
                target, protocol, ports = packet[30:34], packet[23], packet[14 + 4 * (packet[14] & 15) :]
            elif kind == b"\x86\xdd":
                target, protocol, ports = packet[38:54], packet[20], packet[54:]
            else:
                self.strangers.add(f"a packet of kind {kind.hex()}")
                continue
            address, port = ipaddress.ip_address(target), int.from_bytes(ports[2:4], "big")
            if not (address.is_loopback or str(address) == OWN) or port == socket.getservbyname("domain"):
                self.strangers.add(f"{address} protocol {protocol} port {port}")

    def sees_control(self) -> list[str]:
        """Send packets away, and wait until they are seen."""
        sent = {CONTROL_UDP, CONTROL_TCP}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as tcp:
            udp.sendto(b"hello", (CONTROL_UDP, 443))
            tcp.setblocking(False)
            tcp.connect_ex((CONTROL_TCP, 443))
            deadline = time.monotonic() + LIMIT
            while True:
                missing = sent - {stranger.split()[0] for stranger in self.strangers}
                if not missing or time.monotonic() > deadline:
                    return sorted(sent - missing)
                time.sleep(0.01)


def serve_and_generate(folder: str) -> str:
    """The text that a server of a new swarm, as people start one, and a client made."""
    command = [BIN / "run-server", folder, "--new-swarm", "--threads", "1", "--quantization", "int8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            _, address = server.stdout.readline().split()
            assert OWN in address
            command = [BIN / "swarm", "generate", folder, "--initial-peers", address, "--prompt", "w5 w6 w7"]
            client = subprocess.run(
                [*command, "--max-new-tokens", "8"], stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT
            )
        finally:
            server.terminate()
            server.wait(LIMIT)
    return client.stdout


if __name__ == "__main__":
    set_up()
    watch = Watch()
    text = serve_and_generate(sys.argv[1])
    strangers = sorted(watch.strangers)
    print(json.dumps({"text": text, "strangers": strangers, "control": watch.sees_control()}))
