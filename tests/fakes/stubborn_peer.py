"""A process that is slow to end: `python stubborn_peer.py HOW`, with HOW one of

"loads": a thread of it still loads when it is told to stop, before it is ready. "stays": it does not leave the swarm.
"""

from __future__ import annotations

import asyncio
import sys
import time

from swarm.scripts import serving
from swarm.scripts.logs import set_up_logging


class StubbornPeer:
    def __init__(self, how: str):
        self._how = how

    async def start(self) -> str:
        print("starting", flush=True)
        if self._how == "loads":
            await asyncio.to_thread(time.sleep, 3600)
        return "/ip4/127.0.0.1/tcp/1"

    def stop(self) -> None:
        pass

    async def serve_until_stopped(self) -> None:
        await asyncio.Event().wait()


if __name__ == "__main__":
    serving.THREAD_GRACE = serving.LEAVE_GRACE = 0.2
    set_up_logging(False)
    serving.run_until_stopped(lambda: serving.serve(StubbornPeer(sys.argv[1])), None)
