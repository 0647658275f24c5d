"""A server on a machine whose clock is wrong: `python -m skewed_server SECONDS MODEL FLAGS...` with the flags of
`run-server`."""

from __future__ import annotations

import sys
import time

_right_time = time.time

if __name__ == "__main__":
    time.time = lambda: _right_time() + float(sys.argv[1])  # before hivemind takes it for its own

    from swarm.scripts import main as front_door

    front_door.main(["run-server", *sys.argv[2:]])
