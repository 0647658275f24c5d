"""A process that is slow to end: `python stubborn_peer.py HOW`, with HOW one of

"waits": a thread of asyncio's pool still waits when it is told to stop, before it is ready. "computes": a daemon thread
still computes then. "stays": it does not leave the swarm.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from typing import Any

from swarm.scripts import serving
from swarm.scripts.leaving import end_with
from swarm.scripts.logs import set_up_logging


def compute(matrix: Any) -> None:
    while True:
        matrix @ matrix  # native code, without the interpreter's lock


class StubbornPeer:
    def __init__(self, how: str):
        self._how = how

    async def start(self) -> str:
        if self._how == "computes":
            import torch

            torch.set_num_threads(1)
            threading.Thread(target=compute, args=(torch.ones(256, 256),), daemon=True).start()
        print("starting", flush=True)
        if self._how == "waits":
            await asyncio.to_thread(time.sleep, 3600)
        if self._how == "computes":
            await asyncio.Event().wait()
        return "/ip4/127.0.0.1/tcp/1"

    def stop(self) -> None:
        pass

    async def serve_until_stopped(self) -> None:
        await asyncio.Event().wait()


if __name__ == "__main__":
    serving.THREAD_GRACE = serving.LEAVE_GRACE = 0.2
    set_up_logging(False)

    def run() -> None:
        serving.run_until_stopped(lambda: serving.serve(StubbornPeer(sys.argv[1])), None)
        sys.exit(0)

    end_with(run)
