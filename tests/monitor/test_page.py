"""The monitor's page in a real browser: a live swarm of four server processes and a `swarm health` process."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from swarm.scripts.local_monitor import CHROMEDRIVER, CHROMIUM, LocalMonitor, headless_browser, show_as
from swarm.scripts.local_swarm import LocalSwarm, ServerSpec

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

HAS_BROWSER = CHROMIUM.exists() and CHROMEDRIVER.exists()
pytestmark = pytest.mark.skipif(
    not HAS_BROWSER and os.environ.get("CI") != "true",
    reason=f"needs {CHROMIUM} and {CHROMEDRIVER}: Debian's packages chromium and chromium-driver",
)

EVIL = "<script>alert(1)</script>"
#: Only the third holds the last blocks; the fourth stands in for the first two.
SERVERS = (("0:3", EVIL), ("3:6", "beta"), ("6:8", "gamma"), ("0:6", "delta"))
DEADLINE = 40  # seconds for anything to show; it takes one or two

# Pixels of the block map in just this colour of the style sheet.
COUNT_PIXELS = """
const probe = document.body.appendChild(document.createElement("span"));
probe.style.color = `var(--${arguments[0]})`;
const wanted = getComputedStyle(probe).color.match(/\\d+/g).slice(0, 3).map(Number);
probe.remove();
const canvas = document.querySelector("#map-frame canvas");
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let count = 0;
for (let at = 0; at < data.length; at += 4) {
  if (data[at + 3] === 255 && wanted.every((value, part) => Math.abs(value - data[at + part]) < 3)) count++;
}
return count;
"""


@dataclass
class Page:
    """The page in a browser. errors, hosts: what it wrote to its console, and whom it asked."""

    browser: Chrome
    url: str
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def open(self, fragment: str = "") -> None:
        self.browser.get("about:blank")  # else another fragment alone would not load it anew
        self.browser.get(self.url + fragment)
        self.wait(lambda: not self.run("return document.getElementById('swarm').hidden"), "the swarm is shown")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def wait(self, is_so: Callable[[], object], what: str) -> None:
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            WebDriverWait(self.browser, DEADLINE, poll_frequency=0.1).until(lambda _: is_so())
        except TimeoutException:
            raise AssertionError(f"not within {DEADLINE} s: {what}; the page says: {self.text('body')}") from None

    def text(self, selector: str) -> str:
        """What people see there; an element that is out of sight counts."""
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def texts(self, selector: str) -> list[str]:
        """The same of every element that fits."""
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)", selector))

    def click(self, selector: str) -> None:
        from selenium.webdriver.common.by import By

        element = self.browser.find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", element)
        element.click()

    def send_trace(self) -> None:
        """By a click, once that is possible."""
        self.wait(lambda: not self.run("return document.getElementById('trace-start').disabled"), "a chain is ready")
        self.click("#trace-start")

    def press(self, selector: str, *keys: str) -> None:
        from selenium.webdriver.common.by import By

        self.browser.find_element(By.CSS_SELECTOR, selector).send_keys(*keys)

    def see(self, section: str) -> None:
        """Scroll there: what is out of sight is not drawn."""
        self.run("document.getElementById(arguments[0]).scrollIntoView({ behavior: 'instant' })", section)

    def count_pixels(self, colour: str) -> int:
        return int(self.run(COUNT_PIXELS, colour))

    def rows(self) -> dict[str, str]:
        """The table of servers: name to the rest of the row."""
        self.see("servers")
        rows = self.texts("#servers-table tbody tr")
        return {row.split("\t")[0].rpartition(" ")[0] or row: " ".join(row.split("\t")[1:]) for row in rows}

    def collect_logs(self) -> None:
        for entry in self.browser.get_log("browser"):
            if entry["level"] == "SEVERE":
                self.errors.append(entry["message"])
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = urlsplit(message["params"]["request"]["url"])
                self.hosts.add(url.netloc or url.geturl())


@pytest.fixture(scope="module")
def swarm(tiny_llama_folder: Path) -> Iterator[LocalSwarm]:
    assert HAS_BROWSER, f"CI must have {CHROMIUM} and {CHROMEDRIVER}: .ci/run installs them"
    specs = [ServerSpec(blocks, ("--public-name", name)) for blocks, name in SERVERS]
    with LocalSwarm(tiny_llama_folder, specs[:1], flags=["--threads", "1", "--dtype", "float32"]) as swarm:
        for spec in specs[1:]:
            swarm.add(spec, wait=False)
        yield swarm


@pytest.fixture(scope="module")
def monitor(swarm: LocalSwarm) -> Iterator[LocalMonitor]:
    first = swarm.servers[0].address  # the others start beside the monitor
    with LocalMonitor([first], "--update-period", "1", "--probe-period", "0") as monitor:
        for server in swarm.servers:
            server.wait_until_ready(120.0)
        yield monitor


@pytest.fixture(scope="module")
def browser(monitor: LocalMonitor) -> Iterator[Chrome]:
    with headless_browser(logged=True) as browser:
        browser.get("about:blank")
        browser.get_log("performance")  # the browser's own page at its start is not ours
        yield browser


@pytest.fixture
def page(browser: Chrome, monitor: LocalMonitor) -> Iterator[Page]:
    """Freshly loaded. Afterwards: no errors in its console, and nobody asked but the monitor."""
    page = Page(browser, monitor.url)
    show_as(browser, 1280, 900)
    page.open()
    page.wait(lambda: len(page.rows()) == len(SERVERS), "all servers are listed")
    page.run("scrollTo(0, 0)")
    yield page
    page.collect_logs()
    assert page.errors == []
    assert page.hosts - {"about:blank"} == {urlsplit(monitor.url).netloc}


def test_the_swarm_is_shown(page: Page) -> None:
    figures = ("✓ yes", "all 8 blocks are served", "1 to 2", "blocks 6:8 have fewest", "4 online")
    page.wait(lambda: all(text in page.text("#figures") for text in figures), "the figures of a swarm in order")
    page.wait(lambda: page.text("#status") == "live", "the page is up to date")
    page.wait(lambda: re.search(r"[\d.]+ tokens/s", page.text("#figures")), "a speed is predicted")
    page.wait(lambda: page.text("#chain li:last-child").split()[1:3] == ["gamma", "6:8"], "the chain ends with gamma")

    page.see("map")
    label = page.run("return document.querySelector('#map-frame canvas').getAttribute('aria-label')")
    assert label == "Block map: 8 blocks by 4 servers, complete"
    page.wait(lambda: page.count_pixels("ink") > 500, "the fastest chain has its outline in the block map")
    page.wait(lambda: page.count_pixels("warn") > 10, "the weakest blocks are marked")
    page.wait(lambda: page.count_pixels("unreachable") == 0, "nobody is unreachable")

    assert set(page.rows()) == {name for _, name in SERVERS}
    gamma = r"● online 6:8 [\d.,]+ 0 \+ 0 100% [\d.]+ m?s ▲ loses 6:8 directly check float32 no 0 "
    page.wait(lambda: re.match(gamma, page.rows()["gamma"]), "gamma's row")
    page.wait(lambda: re.search("no change|a token", page.rows()["beta"]), "beta can be done without")
    page.see("links")
    page.wait(lambda: "no server has measured" in page.text("#links").lower() or " ms" in page.text("#links"), "links")


def test_shades_tell_how_fast_blocks_are(page: Page) -> None:
    def strengths(*servers: tuple[float, int]) -> list[float]:
        """Of servers with so many tokens/s through so many blocks."""
        shown = [{"serving": True, "throughput": rate, "span": [0, blocks]} for rate, blocks in servers]
        script = (
            "return import(arguments[0] + 'map_layout.js')"
            ".then(({ rateScale }) => arguments[1].map(rateScale(arguments[1]).strength));"
        )
        return list(page.run(script, page.url, shown))

    assert strengths((12.6, 4), (14.0, 4), (12.6, 4)) == pytest.approx([0.5, 0.538, 0.5], abs=1e-3)  # nearly the same
    assert strengths((10, 4), (20, 2), (5, 8)) == pytest.approx([0.5] * 3)  # each block takes as long
    assert strengths((10, 1), (20, 1), (5, 1)) == pytest.approx([0.5, 0.75, 0.25])
    assert strengths((1e30, 1), (10, 1), (11, 1), (9, 1), (0, 1))[1] == pytest.approx(0.465, abs=1e-3)  # one boasts
    assert strengths((0, 1)) == [0.5]
    page.see("map")
    scale = r"([\d.,]+) or less to ([\d.,]+) or more tokens/s through one block"
    page.wait(lambda: re.search(scale, page.text("#map-legend")), "the legend tells the scale")
    ends = re.search(scale, page.text("#map-legend"))
    assert ends is not None
    slowest, fastest = (float(end.replace(",", "")) for end in ends.groups())
    assert fastest / slowest == pytest.approx(16, rel=0.02)  # three digits are shown


def test_what_is_said_of_a_leaving_server(page: Page) -> None:
    script = (
        "const [url, servers, step] = arguments;"
        "return import(url + 'status.js').then((m) => servers.map((one) => m.departureOf(one, step).text));"
    )
    servers = [
        {"serving": False, "departure": None},
        {"serving": True, "departure": None},  # of too large a model
        {"serving": True, "departure": {"lost_blocks": [1, 2], "step_time": None}},
        {"serving": True, "departure": {"lost_blocks": [], "step_time": None}},
        {"serving": True, "departure": {"lost_blocks": [], "step_time": 0.2}},
    ]
    said = ["serves nobody", "not worked out", "loses 1:3", "no chain is left", "200 ms a token"]
    assert page.run(script, page.url, servers, 0.1) == said
    assert page.run(script, page.url, servers[3:4], None) == ["no chain even now"]  # it is not what takes it


def test_why_there_is_no_chain(page: Page) -> None:
    script = (
        "return import(arguments[0] + 'overview.js').then((m) => [true, false].map((c) => m.whyNone({complete: c})));"
    )
    full, missing = page.run(script, page.url)
    assert "caches are full" in full and "covers all blocks" in missing


def test_a_chain_may_come_back_to_a_server(page: Page) -> None:
    hops = [{"peer_id": peer, "blocks": blocks} for peer, blocks in (("a", [0, 2]), ("b", [2, 4]), ("a", [4, 8]))]
    script = "return import(arguments[0]).then(({ hopsByPeer }) => Object.fromEntries(hopsByPeer(arguments[1])));"
    found = page.run(script, f"{page.url}map_layout.js", {"best_chain": {"hops": hops}})
    assert {peer: [(hop["number"], hop["blocks"]) for hop in of_it] for peer, of_it in found.items()} == {
        "a": [(1, [0, 2]), (3, [4, 8])],
        "b": [(2, [2, 4])],
    }


def test_what_strangers_wrote_is_text(page: Page) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    assert EVIL in page.rows()
    page.see("map")
    scripts = page.run("return [...document.scripts].map((script) => script.src + script.textContent)")
    assert sorted(scripts) == [f"{page.url}app.js", f"{page.url}theme.js"]
    with pytest.raises(NoAlertPresentException):
        _ = page.browser.switch_to.alert.text


def test_keyboard_and_address_lead_to_a_server(page: Page, swarm: LocalSwarm) -> None:
    page.see("map")
    page.press(".map-scroll", "\ue015")  # arrow down
    page.wait(lambda: page.text("#map-readout"), "the row is read out")
    assert ": blocks 0:" in page.text("#map-readout") and "if it leaves: " in page.text("#map-readout")
    page.press(".map-scroll", "\ue007")  # enter
    page.wait(lambda: page.run("return document.getElementById('server').open"), "the server is shown in full")
    chosen = swarm.by_peer_id(page.run("return new URLSearchParams(location.hash.slice(1)).get('server')"))
    assert chosen.peer_id in page.text("#server")

    page.open(f"#server={swarm.servers[2].peer_id}")
    page.wait(lambda: page.text("#server-name") == "gamma", "the address opens a server")
    page.wait(lambda: "nobody else holds 6:8" in page.text("#server"), "what happens if it leaves")
    selected = "const [code] = document.querySelectorAll('#server dd code'); getSelection().selectAllChildren(code);"
    page.run(f"{selected} dispatchEvent(new HashChangeEvent('hashchange'))")  # the page is drawn anew
    assert page.run("return String(getSelection())") == swarm.servers[2].peer_id  # and can still be copied
    page.run("getSelection().removeAllRanges()")
    page.click("#server-body button.primary")
    page.wait(lambda: "can be reached directly" in page.text("#server-body"), "the server is reached")
    page.press("#server", "\ue00c")  # escape
    page.wait(lambda: "server=" not in page.browser.current_url, "it is closed")


def test_a_link_to_a_model_that_is_gone_does_not_pass_for_another(page: Page) -> None:
    assert not page.texts("#notice:not([hidden])")
    page.open("#model=feedfacefeed")
    assert "No server serves feedfacefeed" in page.text("#notice:not([hidden])")


def test_a_peer_that_nobody_knows_is_not_reached(page: Page) -> None:
    page.press("#reach-peer", "Qm" + "a" * 44)
    page.click("#reach-form button")
    page.wait(lambda: re.search("[✕▲] ", page.text("#reach-result")), "the check has failed")
    assert "unknown" not in page.text("#reach-result") and len(page.text("#reach-result")) > 20


def test_a_test_request_shows_where_the_time_goes(page: Page) -> None:
    page.send_trace()
    page.wait(lambda: len(page.texts(".waterfall")) == 2, "two waterfalls")
    assert page.text("#trace-message") == ""
    prompt, token = (page.texts(f"figure.waterfall:nth-of-type({number}) .lane-name") for number in (1, 2))
    assert prompt == token and prompt[0].strip() == "this monitor"
    # which chain is the fastest may change at any moment, but each ends with the only holder of the last blocks
    assert prompt[1].split()[-1].startswith("0:") and prompt[-1].strip() == "gamma 6:8"
    widths = "return [...document.querySelectorAll('.lane .computed')].map((part) => parseFloat(part.style.width))"
    assert len(page.run(widths)) == 2 * (len(prompt) - 1) and all(width > 0 for width in page.run(widths))
    assert all(" ms" in time or " s" in time for time in page.texts(".lane-time"))

    page.click("#trace-form input[value=chosen]")
    assert page.run("return document.getElementById('trace-start').disabled")  # nobody is chosen yet
    for name in (EVIL, "beta", "gamma"):
        select = "document.querySelector('#trace-chooser select')"
        page.wait(lambda: name in page.text("#trace-chooser select"), f"{name} can be chosen")  # noqa: B023
        page.run(
            f"const option = [...{select}.options].find((one) => one.text.startsWith(arguments[0]));"
            f"{select}.value = option.value; {select}.dispatchEvent(new Event('change', {{ bubbles: true }}));",
            name,
        )
    page.send_trace()
    page.wait(lambda: len(page.texts(".waterfall .lane")) == 8, "three servers and the monitor, twice")
    names = [lane.rpartition(" ")[0] for lane in page.texts(".waterfall:first-of-type .lane-name")]
    assert names[1:4] == [EVIL, "beta", "gamma"]


def test_both_themes(page: Page) -> None:
    look = "return getComputedStyle(document.body).backgroundColor"

    def emulate(scheme: str) -> None:
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)

    emulate("light")
    light = page.run(look)
    emulate("dark")
    dark = page.run(look)
    assert light != dark
    page.click("#theme")
    assert page.text("#theme") == "Theme: light" and page.run(look) == light
    page.see("map")
    page.wait(lambda: page.count_pixels("ink") > 500, "the map has the theme's colours")
    page.click("#theme")
    assert page.text("#theme") == "Theme: dark" and page.run(look) == dark
    page.see("map")
    page.wait(lambda: page.count_pixels("ink") > 500, "the map has the theme's colours")
    emulate("light")
    page.open()
    assert page.text("#theme") == "Theme: dark" and page.run(look) == dark  # kept
    assert page.run("return Object.keys(localStorage)") == ["petswarm-theme"]
    page.click("#theme")
    assert page.text("#theme") == "Theme: system" and page.run(look) == light


def test_a_phone(page: Page) -> None:
    show_as(page.browser, 360, 740, phone=True)
    page.send_trace()
    page.wait(lambda: page.texts(".waterfall"), "a waterfall")
    page.run("for (const figures of document.querySelectorAll('.waterfall details')) figures.open = true")
    for section in ("overview", "map", "servers", "links", "trace", "reach"):
        page.see(section)
        assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360], section
    page.see("servers")
    page.click("#servers-table tbody button.link")
    page.wait(lambda: page.run("return document.getElementById('server').open"), "the server is shown in full")
    left, right = page.run(
        "const box = document.getElementById('server').getBoundingClientRect(); return [box.left, box.right]"
    )
    assert 0 <= left < right <= 360


def test_a_killed_server_shows_without_a_reload(page: Page, swarm: LocalSwarm) -> None:
    page.run("window.loadedOnce = true")
    swarm.servers[2].kill()
    page.wait(lambda: "nobody serves 6:8 of 8" in page.text("#figures"), "the model is incomplete")
    assert "✕ no" in page.text("#figures")
    page.wait(lambda: "is incomplete: no server that answers holds blocks 6:8" in page.text("#banners"), "a banner")
    assert page.browser.title.startswith("▲")
    assert "No chain of servers covers all blocks" in page.text("#chain")
    assert page.run("return document.getElementById('trace-start').disabled")
    assert page.rows().get("gamma", "✕ no answer").startswith("✕ no answer")  # or its record is gone already
    page.wait(lambda: "no chain even now" in page.rows()["beta"], "that there is no chain is not for others to answer")
    page.see("map")
    page.wait(lambda: page.count_pixels("bad") > 50, "the map marks what is missing")
    assert page.run("return window.loadedOnce")


def test_the_page_says_that_the_monitor_is_gone(browser: Chrome, monitor: LocalMonitor) -> None:
    page = Page(browser, monitor.url)
    page.open()
    assert monitor.process.stdin is not None
    monitor.process.stdin.close()  # as if we were gone
    assert monitor.process.wait(DEADLINE) == 0
    page.wait(lambda: page.text("#status") == "monitor gone", "the monitor is gone")
    assert "is `swarm health` still running?" in page.text("#banners")
    assert "What is shown is of " in page.text("#banners")
