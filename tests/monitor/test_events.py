"""Streams of events over a real web server: what they say, how many there may be, and that they end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import uvicorn
from made_monitor import MadeMonitor, usual_picture, write_page

from swarm.monitor.api import make_app
from swarm.monitor.web_settings import WebSettings


@contextlib.asynccontextmanager
async def served(monitor: MadeMonitor, folder: Path, settings: WebSettings) -> AsyncIterator[httpx.AsyncClient]:
    """A browser of the monitor's web side. At the end the monitor closes, which must end all streams."""
    app = make_app(monitor, settings, write_page(folder))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", proxy_headers=False))
    serving = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(60):
            while not server.started:
                await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as browser:
            yield browser
            monitor.close()
            server.should_exit = True
            async with asyncio.timeout(60):
                await serving
    finally:
        server.force_exit = server.should_exit = True
        await serving


async def next_line(lines: AsyncIterator[str], start: str) -> str:
    async with asyncio.timeout(60):
        async for line in lines:
            if line.startswith(start):
                return line
    raise AssertionError(f"the stream ended before {start}")


async def test_a_stream_tells_every_revision_and_ends_with_the_monitor(tmp_path: Path) -> None:
    monitor = MadeMonitor()
    async with served(monitor, tmp_path, WebSettings()) as browser, browser.stream("GET", "/api/v1/events") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-content-type-options"] == "nosniff"
        lines = response.aiter_lines()
        assert await next_line(lines, "event:") == "event: revision"
        assert await next_line(lines, "data:") == "data: 1"
        await monitor.watcher.show(usual_picture())
        assert await next_line(lines, "data:") == "data: 2"
        monitor.close()
        assert [line async for line in lines if line] == []


async def test_a_quiet_stream_shows_that_it_lives(tmp_path: Path) -> None:
    settings = WebSettings(heartbeat=0.01)
    async with (
        served(MadeMonitor(), tmp_path, settings) as browser,
        browser.stream("GET", "/api/v1/events") as response,
    ):
        assert await next_line(response.aiter_lines(), ":") == ": still here"


async def test_streams_are_bounded_and_one_that_ends_makes_room(tmp_path: Path) -> None:
    settings = WebSettings(max_streams=1)
    async with served(MadeMonitor(), tmp_path, settings) as browser:
        async with browser.stream("GET", "/api/v1/events") as response:
            await next_line(response.aiter_lines(), "data:")
            refused = await browser.get("/api/v1/events")
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert refused.json() == {"detail": "1 pages are open already: close one"}
            assert (await browser.get("/api/v1/state")).status_code == 200
        async with asyncio.timeout(60):
            while True:  # until the server has noticed that the first one is gone
                async with browser.stream("GET", "/api/v1/events") as response:
                    if response.status_code == 200:
                        break
