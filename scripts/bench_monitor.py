"""`swarm bench monitor`: what the monitor's web side makes of large swarms, and how soon its page shows them.

The swarms are drawn (see drawn_picture.py), not started. Each is shown by a process of its own; between two requests a
tenth of its servers has news, so that nothing is left of what was worked out before. Time is until the last byte has
come, over loopback; the page is measured where Debian's Chromium is installed (see page_timing.py).
"""

from __future__ import annotations

import gzip
import http.client
import time
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

import psutil
import typer

from .bench_processes import ChildProcess, peak_memory
from .bench_report import MEGABYTE, MILLISECONDS, JsonFile, Report, Runs, check_writable

#: What the monitor should keep to with 1,000 servers, in milliseconds.
STATE_GOAL = 300.0
PAINT_GOAL = 2000.0
#: Seconds for an answer.
TIMEOUT = 60.0
STATE = "/api/v1/state"


def monitor(
    servers: Annotated[
        list[int], typer.Option("--servers", min=1, max=20_000, help="Of a swarm; give it several times.")
    ] = [100, 1000, 3000],  # noqa: B006 (typer reads it, nobody writes it)
    blocks: Annotated[int, typer.Option(min=1, max=1000, help="Of the model.")] = 80,
    page: Annotated[bool, typer.Option(help="Also measure the page, in Chromium.")] = True,
    runs: Runs = 5,
    seed: Annotated[int, typer.Option(help="Of the swarms.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """The monitor's answer about swarms of very many servers, and its page in a browser."""
    from rich.console import Console

    check_writable(json_file)
    with Console(stderr=True).status("starting") as status:
        report = measure(servers, blocks, page, runs, seed, progress=lambda text: status.update(text))
    report.publish(json_file)


def measure(
    sizes: Sequence[int], num_blocks: int, page: bool, runs: int, seed: int, progress: Callable[[str], None]
) -> Report:
    """Run the benchmark. Raises UsageError if the page is to be measured without a browser."""

    report = Report(
        "monitor", {"servers": ", ".join(map(str, sizes)), "blocks": num_blocks, "runs": runs, "seed": seed}
    )
    for size in sizes:
        with ChildProcess("monitor", str(size), str(num_blocks), str(seed)) as child:
            progress(f"{size} servers: drawing the swarm")
            url = child.answer()["url"]
            _measure_answers(report, child, url, size, runs, progress)
            report.add(f"{size} servers: memory", "MB", [peak_memory(child.pid) / MEGABYTE])
            if page:
                progress(f"{size} servers: the page")
                _measure_page(report, child, url, size, runs)
    for name, goal in (("1000 servers: state", STATE_GOAL), ("1000 servers: first paint", PAINT_GOAL)):
        if name in report.medians:
            report.ratios[f"{name} / {goal:g} ms"] = report.medians[name] / goal
    return report


def _measure_answers(
    report: Report, child: ChildProcess, url: str, size: int, runs: int, progress: Callable[[str], None]
) -> None:
    pictures, first, again, unchanged = list[float](), list[float](), list[float](), list[float]()
    worked = list[float]()
    address, process = urlsplit(url).netloc, psutil.Process(child.pid)
    for number in range(runs + 1):
        progress(f"{size} servers: " + (f"run {number} of {runs}" if number else "warming up"))
        child.ask("change")
        pictures.append(MILLISECONDS * child.answer()["seconds"])
        before = process.cpu_times()
        answers = [ask(address)]
        after = process.cpu_times()
        worked.append(MILLISECONDS * (after.user + after.system - before.user - before.system))
        answers += [ask(address), ask(address, answers[0].tag)]
        assert [answer.status for answer in answers] == [200, 200, 304], "the state did not change just once"
        for times, answer in zip((first, again, unchanged), answers, strict=True):
            times.append(MILLISECONDS * answer.seconds)
    report.add(f"{size} servers: picture", "ms", pictures[1:])
    report.add(f"{size} servers: state", "ms", first[1:])
    report.add(f"{size} servers: state, processor time", "ms", worked[1:])
    report.add(f"{size} servers: state, once more", "ms", again[1:])
    report.add(f"{size} servers: state, not changed", "ms", unchanged[1:])
    body = answers[0].body
    report.add(f"{size} servers: state, compressed", "MB", [len(body) / MEGABYTE])
    report.add(f"{size} servers: state, in full", "MB", [len(gzip.decompress(body)) / MEGABYTE])


def _measure_page(report: Report, child: ChildProcess, url: str, size: int, runs: int) -> None:
    from .page_timing import Browser

    timings = []
    with Browser() as browser:
        for _ in range(runs + 1):
            child.ask("change")
            child.answer()
            timings.append(browser.open(url, size))
    del timings[0]  # the browser warms up
    report.add(f"{size} servers: first paint", "ms", [one.first_paint for one in timings])
    report.add(f"{size} servers: block map drawn", "ms", [one.map_drawn for one in timings])


class Answer(NamedTuple):
    """tag: names what the body says. seconds: until all of it came."""

    status: int
    tag: str
    body: bytes
    seconds: float


def ask(address: str, tag: str | None = None) -> Answer:
    """The state, compressed. tag: of an answer that we have."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        connection.connect()
        started = time.perf_counter()
        headers = {"Accept-Encoding": "gzip"} | ({} if tag is None else {"If-None-Match": tag})
        connection.request("GET", STATE, headers=headers)
        response = connection.getresponse()
        body = response.read()
        return Answer(response.status, response.headers["ETag"], body, time.perf_counter() - started)
    finally:
        connection.close()
