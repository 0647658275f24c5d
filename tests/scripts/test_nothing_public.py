"""Without initial peers nothing public is contacted: every packet of a server and its client is looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import watched_network

from swarm.node import Node, NodeConfig

IN_A_NETWORK_OF_ITS_OWN = ("unshare", "--user", "--map-root-user", "--net")
LIMIT = 300.0  # seconds for what takes twenty


def can_have_networks() -> bool:
    """Containers often forbid them."""
    try:
        return subprocess.run([*IN_A_NETWORK_OF_ITS_OWN, "true"], capture_output=True, timeout=LIMIT).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_have_networks(), reason="this machine forbids network namespaces")
def test_a_new_swarm_sends_no_packet_to_anybody_else(tiny_chat_folder: Path) -> None:
    program = [sys.executable, "-m", "watched_network", str(tiny_chat_folder)]
    paths = os.pathsep.join([str(Path(watched_network.__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])])
    result = subprocess.run(
        [*IN_A_NETWORK_OF_ITS_OWN, *program],
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert result.returncode == 0
    seen = json.loads(result.stdout)
    assert seen["control"] == [watched_network.CONTROL_UDP, watched_network.CONTROL_TCP]
    assert seen["strangers"] == []
    assert len(seen["text"].split()) == 8


@pytest.mark.parametrize("listen", [True, False])
async def test_p2pd_is_told_to_look_for_nobody(listen: bool) -> None:
    """By default it would connect to the public peers of IPFS, use their relays and open ports in the router."""
    node = await Node.start(NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",), listen=listen))
    try:
        arguments = set(psutil.Process(node.daemon_pid).cmdline()[1:])
    finally:
        await node.stop()
    off = ("b", "natPortMap", "autonat", "autoRelay", "relayDiscovery")
    assert arguments.issuperset(f"-{name}=0" for name in off)
    assert not any(argument.startswith(("-bootstrapPeers", "-trustedRelays", "-pubsub")) for argument in arguments)
