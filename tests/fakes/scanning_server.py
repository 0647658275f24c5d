"""A server that looks through its folders of adapters several times a second: `python -m scanning_server -- MODEL
FLAGS...` with the flags of `run-server`."""

from __future__ import annotations

import sys

from swarm.scripts import main as front_door
from swarm.server import server as server_module
from swarm.server.adapters.sources import keep_looking

PERIOD = 0.2  # seconds

if __name__ == "__main__":
    server_module.keep_looking = lambda registry, sources, period: keep_looking(registry, sources, PERIOD)  # type: ignore[attr-defined]
    front_door.main(["run-server", *sys.argv[2:]])
