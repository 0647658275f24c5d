"""How soon a browser shows the monitor's page: Debian's Chromium, without a window, driven by Selenium."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from types import TracebackType
from typing import NamedTuple

from swarm.errors import SwarmError, UsageError

from .local_monitor import CHROMEDRIVER, CHROMIUM, headless_browser

#: Seconds until a page is drawn, at most.
TIMEOUT = 60.0
#: Of the window, in pixels.
SIZE = 1280, 1400

#: Runs before the page's own code. The map says in words what it shows once it is drawn: two frames later, it is seen.
_WATCH = """
new MutationObserver(() => {
  const label = document.querySelector("#map canvas")?.getAttribute("aria-label");
  if (!label || window.swarmMapDrawn) return;
  window.swarmMapDrawn = { label, at: 0 };
  requestAnimationFrame(() => requestAnimationFrame((now) => (window.swarmMapDrawn.at = now)));
}).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ["aria-label"] });
"""
_TIMES = """
const paint = performance.getEntriesByName("first-contentful-paint")[0];
const map = window.swarmMapDrawn;
return map?.at && paint ? [paint.startTime, map.at, map.label] : null;
"""


class PageTiming(NamedTuple):
    """Milliseconds since the page was asked for: until it shows anything, and until the block map is drawn."""

    first_paint: float
    map_drawn: float


class Browser:
    """A context manager that leaves nothing behind. Raises UsageError if there is none."""

    def __enter__(self) -> Browser:
        if not (CHROMIUM.exists() and CHROMEDRIVER.exists()):
            raise UsageError("the page needs Chromium: apt install chromium chromium-driver, or say --no-page")
        if importlib.util.find_spec("selenium") is None:
            raise UsageError("the page needs Selenium: pip install selenium, or say --no-page")
        with contextlib.ExitStack() as stack:
            self._chrome = stack.enter_context(headless_browser(*SIZE))
            self._chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def open(self, url: str, num_servers: int) -> PageTiming:
        """Load the page as if for the first time. Raises SwarmError if its map shows another number of servers."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        self._chrome.execute_cdp_cmd("Network.clearBrowserCache", {})
        self._chrome.get("about:blank")
        self._chrome.get(url)
        try:
            paint, drawn, label = WebDriverWait(self._chrome, TIMEOUT, poll_frequency=0.1).until(
                lambda chrome: chrome.execute_script(_TIMES)
            )
        except TimeoutException:
            raise SwarmError(f"the page's block map was not drawn within {TIMEOUT:g} s") from None
        shown = re.sub(r"(?<=\d)\D(?=\d{3}\b)", "", label)  # thousands stand apart
        if f"{num_servers} server" not in shown:
            raise SwarmError(f"the block map shows {label!r} instead of {num_servers} servers")
        return PageTiming(paint, drawn)
