"""The picture of the monitor's page in the README: `python -m swarm.scripts.examples.monitor_screenshot`.

It starts servers of SmolLM2 on this machine, a monitor beside them, sends a test request by a click, and has Debian's
Chromium take the picture. Needs the packages chromium and chromium-driver, and `pip install 'petswarm[test]'`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from swarm.errors import UsageError
from swarm.scripts import main as front_door
from swarm.scripts.local_monitor import CHROMEDRIVER, CHROMIUM, LocalMonitor, headless_browser, show_as
from swarm.scripts.local_swarm import LocalSwarm, ServerSpec
from swarm.scripts.logs import say
from swarm.scripts.models import demo_model_folder

PICTURE = Path(__file__).resolve().parent.parent.parent / "docs" / "monitor.png"

#: Blocks, name and further flags of each server.
SERVERS = (
    ("0:10", "alice", ()),
    ("10:20", "basement-rack", ()),
    ("20:30", "kiel-2", ()),
    ("0:15", "laptop of Bo", ("--quantization", "int8")),
    ("12:24", "workstation", ("--dtype", "float32")),
)
WIDTH = 1280
SECONDS = 60  # for anything to show


def screenshot(
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = PICTURE,
    dark: Annotated[bool, typer.Option(help="In the dark theme.")] = False,
) -> None:
    """Take the picture."""
    for program in (CHROMIUM, CHROMEDRIVER):
        if not program.exists():
            raise UsageError(f"there is no {program}: install Debian's packages chromium and chromium-driver")
    from selenium.webdriver.support.ui import WebDriverWait

    specs = [ServerSpec(blocks, ("--public-name", name, *flags)) for blocks, name, flags in SERVERS]
    say(f"starting {len(specs)} servers")
    with (
        LocalSwarm(demo_model_folder(), specs, flags=["--threads", "1"]) as swarm,
        LocalMonitor(swarm.initial_peers, "--probe-period", "0") as monitor,
        headless_browser() as browser,
    ):
        say("taking the picture")
        show_as(browser, WIDTH, 900)
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        browser.get(monitor.url)
        wait = WebDriverWait(browser, SECONDS)
        rows = f"return document.getElementById('figures').innerText.includes('{len(specs)} online')"
        wait.until(lambda _: browser.execute_script(rows))
        browser.execute_script("document.getElementById('trace-start').click()")
        wait.until(lambda _: browser.execute_script("return document.querySelector('.waterfall')"))
        height = browser.execute_script(
            "for (const part of ['links', 'reach']) document.getElementById(part).hidden = true;"
            "return document.documentElement.scrollHeight"
        )
        show_as(browser, WIDTH, height)  # all of it is in sight, so all of it is drawn
        wait.until(lambda _: browser.execute_script("return document.querySelector('#servers-table tbody tr')"))
        wait.until(lambda _: browser.execute_script("return document.querySelector('#map-legend li')"))
        output.write_bytes(browser.get_screenshot_as_png())
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB")


def main() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(screenshot)
    command = typer.main.get_command(app)
    sys.exit(front_door.report(lambda: command.main(args=sys.argv[1:], prog_name="monitor_screenshot")))


if __name__ == "__main__":
    main()
