"""`swarm health` as a process beside a local swarm, and a browser without a window that looks at its page."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from swarm.errors import SwarmError

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

#: Where Debian's packages chromium and chromium-driver put them.
CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")

_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it is for root, too, and sees our own page alone
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


class MonitorFailed(SwarmError):
    """The monitor's process ended, or was not ready in time; the message quotes its last words."""


class LocalMonitor:
    """A `swarm health` process that serves its page on loopback. A context manager that leaves nothing behind."""

    def __init__(self, initial_peers: Sequence[str], *flags: str, start_timeout: float = 60.0):
        self.url = ""
        self._command = [
            sys.executable,
            "-m",
            "swarm.scripts.main",
            "health",
            "--port",
            "0",
            "--stop-with-stdin",
            *flags,
        ]
        self._command += ["--initial-peers", ",".join(initial_peers)]
        self._start_timeout = start_timeout
        self._ready = threading.Event()

    def __enter__(self) -> LocalMonitor:
        self._log = tempfile.TemporaryFile("w+", prefix="petswarm-monitor-")
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,  # closes with us, however we end
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read_stdout, daemon=True).start()
        ready = self._ready.wait(self._start_timeout)
        if not ready or not self.url:
            self.stop()
            self._log.seek(0)
            words = " | ".join(self._log.read().strip().splitlines()[-3:]) or "it said nothing"
            happened = f"was not ready after {self._start_timeout:g} s" if not ready else "ended"
            raise MonitorFailed(f"the monitor {happened}: {words}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self._log.close()

    def stop(self, timeout: float = 20.0) -> int:
        """End it in order, by force after `timeout` seconds. Its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.fullmatch(r"READY (http://\S+)\s*", line):
                self.url = match[1]
                self._ready.set()
        self._ready.set()  # it ended


@contextlib.contextmanager
def headless_browser(width: int = 1280, height: int = 900, *, logged: bool = False) -> Iterator[Chrome]:
    """Debian's Chromium with a fresh profile. logged: it keeps logs of its console and requests."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(prefix="petswarm-browser-", ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*_FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        if logged:
            options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        browser = Chrome(options=options, service=Service(str(CHROMEDRIVER)))
        try:
            browser.set_page_load_timeout(30)
            browser.set_script_timeout(30)
            yield browser
        finally:
            browser.quit()


def show_as(browser: Chrome, width: int, height: int, *, phone: bool = False, scale: float = 1.0) -> None:
    """Give the page a window of this size, in its own pixels. scale: pixels of a picture for each of those."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
