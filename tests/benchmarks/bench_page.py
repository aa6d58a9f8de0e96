"""How soon the observer's page paints a run of 500 rounds and 50 spaces, in a real Chromium on loopback."""

import shutil
import statistics

from playwright.sync_api import Page, sync_playwright

from tests.benchmarks.figures import Figure, Goal, Say
from tests.server.reports import many_spaces, run_of
from tests.server.test_page import observer, told

_VIEWS = 5
_PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
_ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]


def measure(say: Say) -> Figure:
    """First contentful paint of the first view of a run, and of those that follow."""
    say("page: 500 rounds of 50 spaces, 4 clients")
    with observer() as addresses, sync_playwright() as playwright:
        told(addresses, run_of("long", rounds=500, clients=4, spaces=many_spaces(50)))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=_ARGUMENTS)
        tab = browser.new_page()
        paints = [_paint(tab, addresses.page) for _ in range(_VIEWS)]
        browser.close()
    warm = statistics.median(paints[1:])
    return Figure(
        "First paint of the observer's page",
        "A run of 500 rounds, 50 spaces and 4 clients; the time from the start of the navigation to the first "
        f"contentful paint, in headless Chromium on loopback. The median of {_VIEWS - 1} views after the first.",
        ("", "first view, ms", "views after it, ms"),
        [("500 rounds x 50 spaces", f"{paints[0]:.0f}", f"{warm:.0f}")],
        [
            Goal("the first view paints within 1 s", f"{paints[0]:.0f} ms", paints[0] < 1000),
            Goal("views after it paint within 1 s", f"{warm:.0f} ms", warm < 1000),
        ],
    )


def _paint(tab: Page, address: str) -> float:
    tab.goto(address)
    tab.locator("svg.heat").first.wait_for()
    return float(tab.evaluate(_PAINT))
