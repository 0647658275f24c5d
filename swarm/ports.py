"""Whether this machine can listen where somebody wants it to."""

from __future__ import annotations

import errno
import socket

from hivemind.utils.multiaddr import Multiaddr

from .errors import BadAddress, PortInUse


def check_ports_are_free(host_maddrs: tuple[str, ...]) -> None:
    """Raises PortInUse or BadAddress. p2pd itself is content if one of several addresses is free.

    host_maddrs: checked addresses, each an ip and a port.
    """
    for address in host_maddrs:
        maddr = Multiaddr(address)
        (_, host), (transport, port) = list(maddr.items())[:2]
        family = socket.AF_INET6 if "ip6" in maddr else socket.AF_INET
        kind = socket.SOCK_STREAM if transport.name == "tcp" else socket.SOCK_DGRAM
        with socket.socket(family, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not count
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((host, int(port)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise PortInUse(f"cannot listen on {address}: another program listens there already") from error
                raise BadAddress(f"cannot listen on {address}: {error.strerror}") from error
