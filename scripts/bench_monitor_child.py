"""The monitor's web side over a swarm that is drawn, not watched: a process of its own, for `swarm bench monitor`.

It prints RESULT with its `url`. For each line of standard input it takes the same swarm with news from a tenth of the
servers, as after a look, and prints RESULT with the seconds that making the picture took. It ends when its input does.
"""

from __future__ import annotations

import asyncio
import random
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from .bench_processes import print_result

if TYPE_CHECKING:
    from swarm.monitor.picture import Picture
    from swarm.monitor.report import ReachabilityReport

#: Of the servers, so many say something new each time.
NEWS = 0.1


class DrawnWatcher:
    """Stands in for `swarm.monitor.watcher.Watcher`."""

    def __init__(self, picture: Picture, rng: random.Random):
        self.picture = picture
        self._random = rng
        self._changed = asyncio.Event()

    async def changed(self, after: int, timeout: float) -> int:
        try:
            async with asyncio.timeout(timeout):
                while self.picture.revision <= after:
                    await self._changed.wait()
        except TimeoutError:
            pass
        return self.picture.revision

    async def run(self) -> None:
        await asyncio.Event().wait()

    def change(self) -> float:
        """News; the seconds that the new picture took. What the last one was asked does not help with it."""
        from swarm.monitor.picture import ModelPicture, Picture

        started = time.process_time()
        (model,) = self.picture.models
        servers = model.snapshot.servers
        infos = {
            server.peer_id: server.info.model_copy(update={"busy_rows": self._random.uniform(0.0, 4.0)})
            for server in self._random.sample(servers, round(NEWS * len(servers)))
        }
        later = ModelPicture(model.model, model.snapshot.updated(infos))
        now = time.time()
        self.picture = Picture((later,), self.picture.revision + 1, made_at=now, read_at=now)
        self._changed.set()
        self._changed = asyncio.Event()
        return time.process_time() - started


class NoTraces:
    """Nobody to ask."""

    async def trace(self, model: object, request: object) -> NoReturn:
        raise NotImplementedError("a drawn swarm answers nothing")


async def _nobody(peer_id: str) -> ReachabilityReport:
    raise NotImplementedError("a drawn swarm answers nothing")


def run_monitor(num_servers: str, num_blocks: str, seed: str) -> None:
    import uvloop

    uvloop.run(_serve(int(num_servers), int(num_blocks), random.Random(int(seed))))


async def _serve(num_servers: int, num_blocks: int, rng: random.Random) -> None:
    import uvicorn

    from swarm.monitor.api import make_app
    from swarm.monitor.monitor import Monitor
    from swarm.monitor.web_settings import WebSettings

    from .drawn_picture import draw_picture

    watcher = DrawnWatcher(draw_picture(rng, num_servers, num_blocks), rng)
    watcher.change()  # a first one costs more than those that follow
    monitor = Monitor(watcher, NoTraces(), _nobody)
    server = uvicorn.Server(uvicorn.Config(make_app(monitor, WebSettings()), log_level="warning", lifespan="off"))
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for _ in sys.stdin:
            loop.call_soon_threadsafe(lambda: print_result(seconds=watcher.change()))
        loop.call_soon_threadsafe(monitor.close)
        server.should_exit = True

    with socket.create_server(("127.0.0.1", 0)) as listener:
        print_result(url=f"http://127.0.0.1:{listener.getsockname()[1]}/")
        threading.Thread(target=listen, name="stdin", daemon=True).start()
        await server.serve(sockets=[listener])
