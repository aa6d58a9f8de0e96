"""The observer's page: over HTTP, and in a real browser where there is one.

Set FEDBASIN_AXE to the file axe.min.js of axe-core to check the page's accessibility too.
"""

import asyncio
import json
import os
import ssl
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from fedbasin.server.observe.access import Guard
from fedbasin.server.observe.arrival import digest
from fedbasin.server.observe.history import History
from fedbasin.server.page import stream
from tests.needing import needed
from tests.observing import observer, push
from tests.server.reports import run_of
from tests.server.test_access import Authority
from tests.waiting import LONG

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AXE = os.environ.get("FEDBASIN_AXE")
HOSTILE = "<img src=x onerror=alert(1)>"


def told(addresses, reports):
    for report in reports:
        assert push(addresses.observer, report)


@pytest.fixture(scope="module")
def site():
    """An observer with a finished run, a running one, and one with hostile words."""
    with observer() as addresses:
        told(addresses, run_of("plain", rounds=8, recipe="fedavg", seed=1))
        told(addresses, run_of(HOSTILE, rounds=1, recipe=HOSTILE))
        told(addresses, run_of("aligned", rounds=6, of=30))
        yield addresses


@pytest.fixture(scope="module")
def client(site):
    with httpx.Client(base_url=site.page, trust_env=False, timeout=LONG) as made:
        yield made


def events_of(client, path, count, headers=None):
    """The first events of a stream as (id, data)."""
    found = []
    with client.stream("GET", path, headers=headers, timeout=LONG) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        event = {}
        for line in answer.iter_lines():
            if line:
                key, _, value = line.partition(": ")
                event[key] = value
            elif event:
                found.append(event)
                event = {}
                if sum("data" in one for one in found) == count:
                    break
    return [one for one in found if "data" in one]


def test_the_page_shows_the_newest_run_and_offers_all(client):
    page = client.get("/").text
    assert "6 of 30" in page
    for run in ("plain", "aligned"):
        assert f'<option value="{run}"' in page


def test_the_address_chooses_run_comparison_and_round(client):
    page = client.get("/", params={"run": "plain", "with": "aligned", "round": "3"}).text
    assert "plain, round 3: loss" in page
    assert "aligned, as trained" in page
    assert "Clients of round 3" in page


def test_a_round_that_the_run_does_not_have_shows_the_newest(client):
    assert "Round 6: loss" in client.get("/", params={"round": "99999"}).text


@pytest.mark.parametrize("text", ["x", "-1", "²", "٣", "9" * 5000, " 1", "1e3"])
@pytest.mark.parametrize(("path", "name"), [("/", "round"), ("/api/runs/plain/rounds", "from"),
                                            ("/api/runs/plain/events", "from"), ("/api/events", "from")])  # fmt: skip
def test_a_round_that_is_no_number_is_refused_by_name(client, path, name, text):
    answer = client.get(path, params={name: text})
    assert answer.status_code == 400
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.startswith(f"{name} is '{text[:20]}")
    assert len(answer.text) < 200


@pytest.mark.parametrize("path", ["/?run=nonsense", "/spaces?run=nonsense", "/api/runs/nonsense/rounds",
                                  "/api/runs/nonsense/events"])  # fmt: skip
def test_an_unknown_run_is_not_found_and_is_not_repeated_as_html(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/plain")


def test_hostile_words_stay_words(client):
    for path in ("/", "/spaces"):
        page = client.get(path, params={"run": HOSTILE}).text
        assert HOSTILE not in page
        assert "onerror=" not in page.replace("onerror=alert(1)&gt;", "")


def test_no_answer_lets_a_browser_run_or_fetch_anything_foreign(client):
    for path in ("/", "/api/runs", "/metrics", "/static/page.js", "/nowhere"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    page = client.get("/").text
    assert " style=" not in page
    assert "<style" not in page


def test_the_runs_and_their_rounds_are_json(client):
    runs = client.get("/api/runs").json()
    assert [(run["run_id"], run["finished"]) for run in runs][::2] == [("plain", True), ("aligned", False)]
    rounds = client.get("/api/runs/plain/rounds", params={"from": 7}).json()
    assert [one["round"] for one in rounds] == [7, 8]
    assert rounds[-1]["state"] == "finished"
    assert client.get("/api/runs/plain/rounds", params={"from": "x"}).status_code == 400


def test_a_run_with_a_slash_in_its_name_has_its_rounds():
    with observer() as addresses:
        told(addresses, run_of("team/run", rounds=1))
        answer = httpx.get(f"{addresses.page}api/runs/team%2Frun/rounds", trust_env=False, timeout=LONG)
        assert [one["run"] for one in answer.json()] == ["team/run"]


def test_events_give_history_from_a_round_and_say_when_it_is_over(client):
    events = events_of(client, "/api/runs/plain/events?from=7", 3)
    assert [(one["event"], one.get("id")) for one in events] == [("round", "7"), ("round", "8"), ("end", None)]
    assert json.loads(events[0]["data"])["round"] == 7


def test_events_go_on_after_the_last_that_was_seen(client):
    events = events_of(client, "/api/runs/plain/events?from=1", 1, {"Last-Event-ID": "7"})
    assert events[0]["id"] == "8"


def test_events_arrive_as_rounds_end():
    first, second = run_of(rounds=2)
    with observer() as addresses, httpx.Client(base_url=addresses.page, trust_env=False, timeout=LONG) as client:
        told(addresses, [first])
        with client.stream("GET", f"/api/runs/{first.run_id}/events", timeout=LONG) as answer:
            lines = answer.iter_lines()
            assert next(line for line in lines if line.startswith("id:")) == "id: 1"
            told(addresses, [second])
            assert next(line for line in lines if line.startswith("id:")) == "id: 2"


def test_a_silent_stream_says_what_state_the_run_is_in(monkeypatch):
    monkeypatch.setattr(stream, "SILENCE_SECONDS", 0.01)

    async def story():
        history = History()
        (told,) = run_of(rounds=1, of=2)
        history.add(digest(told, told.to_bytes()), b"")
        coming = stream.stream_events(history, "", 0)
        heard = [await anext(coming) for _ in range(4)]
        await coming.aclose()
        return heard

    heard = asyncio.run(story())
    assert heard[1].startswith("id: 1")
    assert heard[2] == heard[3] == "event: state\ndata: running\n\n"


def test_readers_of_events_do_not_hold_up_the_end():
    with observer() as addresses, httpx.Client(base_url=addresses.page, trust_env=False, timeout=LONG) as client:
        told(addresses, run_of(rounds=1, of=2))
        request = client.build_request("GET", "/api/events", timeout=LONG)
        client.send(request, stream=True)
    # An observer that does not end raises where it is closed.


def test_scrapers_may_ask_for_openmetrics(client):
    assert "# EOF" in client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}).text
    assert client.get("/metrics").headers["content-type"].startswith("text/plain; version=")


@pytest.mark.parametrize("version", ["\xff", "one", "1", "1.0.0.0.0", "", "9"])
def test_whatever_a_scraper_accepts_is_answered_or_refused_by_name(client, version):
    answer = client.get("/metrics", headers={b"accept": f"application/openmetrics-text; version={version}".encode()})
    assert answer.status_code == 200 or (answer.status_code, "Accept" in answer.text) == (400, True)


@pytest.mark.parametrize("host", ["evil.example", "localhost:1@evil", "[::1]evil", "[::1", ":1", ""])
def test_another_spaces_name_for_this_machine_is_refused(client, host):
    assert client.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:", "[::1]:1", "[::1]"])
def test_names_of_this_machine_are_answered(client, host):
    assert client.get("/", headers={"host": host}).status_code == 200


def test_a_token_guards_the_page_but_not_the_metrics(tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123\n")
    guard = Guard(token_file=token)
    with observer(guard=guard) as addresses, httpx.Client(trust_env=False, timeout=LONG) as client:
        assert client.get(addresses.page).status_code == 401
        assert client.get(f"{addresses.page}api/runs").status_code == 401
        assert client.get(addresses.page, auth=("any", "wrong")).status_code == 401
        assert client.get(addresses.page, auth=("any", "0123456789abcdef0123")).status_code == 200
        bearer = {"authorization": "Bearer 0123456789abcdef0123"}
        assert client.get(addresses.page, headers=bearer).status_code == 200
        assert client.get(addresses.metrics).status_code == 200


def test_with_a_certificate_the_page_speaks_https(tmp_path):
    authority = Authority(tmp_path, "ours")
    cert, key = authority.issue("observer")
    trusting = ssl.create_default_context(cafile=authority.ca)
    with observer(guard=Guard(cert=cert, key=key)) as addresses:
        assert addresses.page.startswith("https://")
        for address in (addresses.page, addresses.metrics):
            assert httpx.get(address, verify=trusting, trust_env=False, timeout=LONG).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(addresses.page.replace("https", "http"), trust_env=False)


def test_with_an_authority_the_page_asks_for_a_certificate_too(tmp_path):
    authority = Authority(tmp_path, "ours")
    cert, key = authority.issue("observer")
    without, own = (ssl.create_default_context(cafile=authority.ca) for _ in range(2))
    own.load_cert_chain(*authority.issue("reader"))
    with observer(guard=Guard(cert=cert, key=key, client_ca=authority.ca)) as addresses:
        assert httpx.get(addresses.page, verify=own, trust_env=False, timeout=LONG).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(addresses.page, verify=without, trust_env=False)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs a driver of the browser (pip install playwright)")
    chromium = needed("chromium", "chromium-browser")
    with (
        api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS, timeout=1000 * LONG) as started,
    ):
        yield started


@contextmanager
def opened(browser, **how):
    """A page of the browser, closed however its test ends."""
    page = browser.new_page(**how)
    page.set_default_timeout(1000 * LONG)
    try:
        yield page
    finally:
        page.close()


@pytest.fixture
def tab(browser):
    """A page that fails the test where its console has an error."""
    problems = []
    with opened(browser, viewport={"width": 1280, "height": 900}) as page:
        page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        yield page
    assert problems == []


def color(tab):
    return tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")


def test_a_browser_draws_all_charts(site, tab):
    tab.goto(site.page)
    tab.locator("svg.heat").first.wait_for()
    assert tab.locator("figure").count() >= 9
    for box in tab.locator("svg.canvas").all():
        assert box.bounding_box()["height"] > 100


def test_a_round_that_ends_appears_without_a_reload(tab):
    *before, last = run_of(rounds=3)
    with observer() as addresses:
        tab.goto(addresses.page)  # nobody has reported yet
        told(addresses, before)
        tab.locator("dd b", has_text="2 of 3").wait_for()
        tab.locator("#state[data-state=live]").wait_for()
        tab.locator("summary").first.click()
        tab.evaluate("window.same = true")
        told(addresses, [last])
        tab.locator("dd b", has_text="3 of 3").wait_for()
        tab.locator("#state", has_text="the run has ended").wait_for()
        assert tab.evaluate("window.same")
        assert tab.locator("details").first.get_attribute("open") is not None


def test_a_choice_shows_at_once_and_stays_in_the_address(site, tab):
    tab.goto(site.page)
    tab.select_option("#choose-with", "plain")
    tab.locator("h2.runname", has_text="plain").wait_for()
    tab.select_option("#choose-round", "2")
    tab.locator("h3", has_text="plain, round 2: loss").wait_for()
    assert "with=plain" in tab.url
    tab.reload()
    assert tab.locator("h3", has_text="plain, round 2: loss").count() == 1


def test_the_keyboard_reaches_everything_and_opens_tables(site, tab):
    tab.goto(site.page)
    tab.locator("svg.heat").first.wait_for()
    reached = []
    for _ in range(60):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.tagName.toLowerCase()"))
        if reached[-1] == "summary":
            break
    assert reached[0] == "a"  # to skip what comes before the numbers
    assert {"input", "select", "summary"} <= set(reached)
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.parentElement.open")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_system_and_the_readers_choice_survives_a_reload(site, browser, scheme):
    with opened(browser, color_scheme=scheme) as page:
        page.goto(site.page)
        system = color(page)
        other = "dark" if scheme == "light" else "light"
        page.locator("label", has_text=other.capitalize()).click()
        chosen = color(page)
        assert chosen != system
        page.reload()
        assert color(page) == chosen


@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_is_wider_than_the_window(site, tab, width):
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto(f"{site.page}?with=plain")
    tab.locator("svg.heat").first.wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_it_works_without_scripts(site, browser):
    with opened(browser, java_script_enabled=False) as page:
        page.goto(site.page)
        page.select_option("#choose-run", "plain")
        page.locator("button").click()
        # The page is another one after a click, once it has come.
        page.locator("dd b", has_text="8 of 8").wait_for()
        page.locator("a", has_text="heat maps").click()
        page.locator("svg.heat").first.wait_for()
        assert page.locator("svg.heat").count() == 3


@pytest.mark.skipif(AXE is None, reason="needs axe-core (npm pack axe-core; FEDBASIN_AXE=the axe.min.js in it)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("query", ["", "?with=plain"])
def test_axe_finds_nothing(site, browser, scheme, query):
    with opened(browser, color_scheme=scheme, bypass_csp=True) as page:
        page.goto(f"{site.page}{query}")
        page.locator("svg.heat").first.wait_for()
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        page.add_script_tag(content=Path(AXE).read_text())
        found = page.evaluate("axe.run().then((result) => result.violations)")
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found] == []
