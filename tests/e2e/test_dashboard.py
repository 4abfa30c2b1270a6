"""The dashboard and the playground in a real browser, on a gateway that serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from selfroute.protocol import HELP_CALL
from selfroute.serve import history, keys
from selfroute.serve.account import Limits
from selfroute.serve.app import Gateway, make_app
from selfroute.serve.budget import Budget
from selfroute.serve.config import GatewayConfig
from selfroute.serve.handoff import Pair
from selfroute.serve.history import RequestRecord
from selfroute.serve.keys import Keyring
from selfroute.serve.sessions import Sessions
from selfroute.serve.store import Store
from tests.browser import Page, chromium
from tests.serving import ScriptedCloud, ScriptedDevice, said, serving

pytestmark = pytest.mark.slow

HOSTILE = "</pre><script>window.owned = 1</script><img src=/evil onerror='window.owned = 2'>"
ASKS = said("thinking ", f"{HOSTILE} ", "hard\n", HELP_CALL, score=2.25)
ANSWERS = said("2+3=5", f"<answer>5 {HOSTILE}</answer>", score=-3.5)


class KeepingRecorder:
    """Writes each record at once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.records: list[RequestRecord] = []

    def record(self, record: RequestRecord) -> None:
        self.records.append(record)
        with self.store.begin() as connection:
            history.add(connection, [record])


class World:
    """A gateway with a store of its own, and a browser before it."""

    def __init__(self, path: Path, *, limits: Limits | None = None, keyed: bool = False) -> None:
        self.store = Store(str(path / "gateway.sqlite"))
        self.device, self.cloud = ScriptedDevice(ASKS, pause_s=0.02), ScriptedCloud("fi", f"ve {HOSTILE}")
        self.recorder = KeepingRecorder(self.store)
        self.limits, self.keyed = limits or Limits(share=0.5, usd_per_day=1.0), keyed

    @contextmanager
    def serving(self) -> Iterator[str]:
        budget = Budget(self.store, self.limits)
        pair = Pair(self.device, self.cloud, budget, self.recorder, idle_s=20)
        ring = Keyring(self.store) if self.keyed else None
        config = GatewayConfig(budget=self.limits, keys=self.keyed)
        gateway = Gateway(config, pair, budget, ring, Sessions(self.store, ring) if ring else None, self.store)
        try:
            with serving(make_app(gateway)) as url:
                yield url
        finally:
            self.store.close()

    @contextmanager
    def visited(self, page: Page) -> Iterator[str]:
        """The page is left before the gateway is."""
        with self.serving() as url:
            yield url
            page.call("Page.navigate", url="about:blank")

    def write(self, *records: RequestRecord) -> None:
        with self.store.begin() as connection:
            history.add(connection, records)


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """A tab on which nothing may go wrong."""
    browser.asked.clear()
    browser.complaints.clear()
    browser.size(1280, 900)
    yield browser
    assert not browser.complaints
    assert browser.js("window.owned") is None
    browser.scripts(on=True)
    browser.open("about:blank")
    assert all(url.startswith("http://127.0.0.1:") for url in browser.asked if url.startswith(("http", "ws")))


def record(number: int, **changes: Any) -> RequestRecord:
    made = RequestRecord(
        id=f"r{number}", at=time.time() - number, model=HOSTILE, decision="answer", route="device", score=-1.0,
        first_ms=10.0, device_ms=80.0, total_ms=82.0,
    )  # fmt: skip
    return replace(made, **changes)


def text(page: Page, selector: str) -> str:
    return str(page.js(f"document.querySelector({selector!r})?.innerText ?? ''"))


def until(happened: Callable[[], Any]) -> None:
    by = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < by
        time.sleep(0.01)


def test_the_dashboard_renders_and_keeps_itself_up_to_date(tmp_path: Path, page: Page) -> None:
    world = World(tmp_path)
    world.write(
        *(record(n) for n in range(1, 30)), record(40, route="cloud", decision="help", cost_usd=0.25, cloud_ms=900.0)
    )
    with world.visited(page) as url:
        page.open(f"{url}/dashboard")
        assert "device 29" in text(page, "#routes").replace("\n", " ")
        blue = page.js("getComputedStyle(document.querySelector('#routes rect.device')).fill")
        assert blue == "rgb(11, 110, 153)"
        # In one minute or in two, as it happens.
        tall = page.js(
            "[...document.querySelectorAll('#routes rect.device')].map((e) => e.getBoundingClientRect().height)"
        )
        assert sum(tall) > 20
        # What somebody does meanwhile stays: an opened table, the focus, the very elements, the place on the page.
        page.js("document.querySelector('#numbers').open = true")
        page.js("document.querySelector('#r-r20 a').focus(); window.row = document.activeElement; scrollTo(0, 300)")
        scrolled = page.js("scrollY")
        world.write(record(0, denied="share", decision="help"))
        page.until("document.querySelector('#r-r0')")
        page.until("document.querySelector('#denials').innerText.includes('share of requests')")
        assert page.js("document.activeElement === window.row && window.row.isConnected")
        assert page.js("document.querySelector('#numbers').open")
        assert page.js("scrollY") == scrolled
        assert text(page, "#state").startswith("live")
        # Paused, nothing changes any more.
        page.js("document.querySelector('#pause').click()")
        assert text(page, "#state") == "paused"
        asked = len(page.asked)
        page.js("new Promise((done) => setTimeout(done, 2500))")
        assert len(page.asked) == asked
    assert all(f"{url}/" in asked for asked in page.asked)


def test_a_gateway_that_is_gone_is_said_and_heals(tmp_path: Path, page: Page) -> None:
    with World(tmp_path).serving() as url:
        page.open(f"{url}/dashboard")
    page.until("document.querySelector('#state').classList.contains('lost')")
    # The browser itself complains of the connection.
    assert all("ERR_CONNECTION_REFUSED" in complaint for complaint in page.complaints)
    page.complaints.clear()


def test_without_scripts_the_page_is_whole_and_loads_itself_again(tmp_path: Path, page: Page) -> None:
    world = World(tmp_path)
    world.write(record(1))
    page.scripts(on=False)
    with world.visited(page) as url:
        page.call("Page.navigate", url=f"{url}/dashboard")
        until(lambda: any("page.css" in asked for asked in page.asked))
        until(lambda: sum(asked.endswith("/dashboard") for asked in page.asked) >= 2)
        assert not any("/live" in asked for asked in page.asked)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/playground", "/dashboard/requests/r40"])
def test_on_a_phone_nothing_is_wider_than_the_screen(tmp_path: Path, page: Page, path: str, dark: bool) -> None:
    world = World(tmp_path)
    long = "x" * 200
    world.write(
        *(record(n) for n in range(1, 20)),
        record(21, status=499, error="client_gone"),
        record(22, denied="usd_per_day", decision="help"),
        record(23, route="cloud", decision="help", cost_usd=0.00234, cloud_ms=1234.0),
        record(24, route="cloud", decision="undecided", score=-12.345, cost_usd=0.000000123),
        record(40, model=long, error=long, status=500, request=long, response=long),
    )
    page.size(360, 740, dark=dark)
    with world.visited(page) as url:
        page.open(f"{url}{path}")
        assert page.js("document.documentElement.scrollWidth") == 360
        assert page.js("[...document.querySelectorAll('.wrap')].every((e) => e.scrollWidth <= e.clientWidth)")
        small = page.js(
            "[...document.querySelectorAll('main :is(p, td, th, dd, dt, span, label, a)')].filter((e) => e.innerText &&"
            " e.checkVisibility() && parseFloat(getComputedStyle(e).fontSize) < 11).map((e) => e.outerHTML)"
        )
        assert not small
        assert page.js(CONTRAST) == []


# Text and what lies behind it, by WCAG's formula: 4.5 for all, as none here counts as large.
CONTRAST = """
(() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const weights = [0.2126, 0.7152, 0.0722];
  const light = (c) => weights.reduce((sum, weight, i) => sum + weight * linear(parse(c)[i] / 255), 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    const p = parse(c);
    if (c.startsWith("rgb") && (p.length < 4 || p[3] === 1)) return c; } return "rgb(255,255,255)"; };
  const said = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  return [...document.querySelectorAll("body *")]
    .filter((e) => !e.closest("svg") && e.checkVisibility() && !e.disabled && said(e))
    .map((e) => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 120)]; })
    .filter(([ratio]) => ratio < 4.5);
})()
"""


def tabbed(page: Page, most: int = 60) -> list[str]:
    """What the Tab key leads to, in order."""
    found = []
    for _ in range(most):
        page.press("Tab")
        where = page.js(
            "document.activeElement === document.body ? '' : document.activeElement.id || "
            "document.activeElement.innerText || document.activeElement.getAttribute('aria-label')"
        )
        if not where:
            break
        found.append(where)
        visible = page.js(
            "(() => { const s = getComputedStyle(document.activeElement); "
            "return s.outlineStyle !== 'none' || document.activeElement.classList.contains('skip'); })()"
        )
        assert visible, where
    return found


def test_everything_can_be_reached_by_keyboard(tmp_path: Path, page: Page) -> None:
    world = World(tmp_path)
    world.write(*(record(n) for n in range(1, 4)))
    with world.visited(page) as url:
        page.open(f"{url}/dashboard")
        page.js("document.querySelector('#pause').click()")
        reached = tabbed(page)
        assert reached[:2] == ["Skip to the content", "selfroute"]
        for name in ("Dashboard", "Playground", "Hour", "30 days", "pause", "As a table"):
            assert name in reached
        assert sum(":" in name for name in reached) == 3
        page.open(f"{url}/dashboard/playground")
        reached = tabbed(page)
        assert reached[-6:] == ["example", "prompt", "model", "policy", "bias", "go"]
        page.js("document.querySelector('#prompt').focus()")
        page.type("2+3?")
        page.press("Enter", ctrl=True)
        page.until("!document.querySelector('#facts').hidden")


def ask(page: Page, prompt: str = "2+3?") -> None:
    page.js(f"document.querySelector('#prompt').value = {prompt!r}; document.querySelector('#go').click()")


def test_the_playground_shows_the_hand_off_as_it_happens(tmp_path: Path, page: Page) -> None:
    world = World(tmp_path)
    world.device.scripts = [[*ASKS[:1], None]]
    with world.visited(page) as url:
        page.open(f"{url}/dashboard/playground")
        ask(page)
        # The reasoning is there while the device still writes.
        page.until("document.querySelector('.turn.device.writing .reasoning')?.textContent === 'thinking'")
        assert page.js("document.querySelector('#go').disabled")
        page.js("document.querySelector('#stop').click()")
        page.until("document.querySelector('.event.stopped')")
        until(lambda: world.recorder.records)
        assert world.recorder.records[0].error == "client_gone"
        assert world.device.stopped == 1
        assert world.device.open == 0

        world.device.scripts = [ASKS]
        page.js("{ const to = document.querySelector('#bias'); to.value = 1.5; to.dispatchEvent(new Event('input')) }")
        ask(page)
        page.until("!document.querySelector('#facts').hidden")
        shown = page.js("[...document.querySelector('#turns').children].map((e) => [e.className, e.innerText])")
        assert [kind for kind, _ in shown] == ["turn device", "event handed", "turn cloud"]
        assert HOSTILE in shown[0][1]
        assert shown[1][1].startswith("The device asks the cloud")
        assert shown[2][1].endswith(f"five {HOSTILE}")
        assert world.device.requests[-1].bias == 1.5
        facts = text(page, "#facts")
        for fact in ("cloud", "+2.25", "0.002 USD", "5 cloud"):
            assert fact in facts
        assert "Answered by the cloud." in page.js("document.querySelector('#said').textContent")
        page.js("document.querySelector('#facts a').click()")
        page.until("location.pathname.startsWith('/dashboard/requests/')")
        page.until("document.querySelector('main')?.innerText.includes('The device asked for help.')")


def test_the_playground_shows_denials_answers_and_refusals(tmp_path: Path, page: Page) -> None:
    world = World(tmp_path, limits=Limits(calls_per_minute=0))
    world.device.scripts = [ASKS, ANSWERS, ANSWERS]
    with world.visited(page) as url:
        page.open(f"{url}/dashboard/playground")
        ask(page)
        page.until("!document.querySelector('#facts').hidden")
        kinds = "[...document.querySelector('#turns').children].map((e) => e.className)"
        assert page.js(kinds) == ["turn device", "event handed", "event denied", "turn device"]
        assert "too many calls this minute" in text(page, "#turns")
        assert text(page, "#facts .chip") == "denied"
        ask(page)
        page.until("document.querySelector('#facts .chip')?.textContent === 'device'")
        assert page.js(kinds) == ["turn device"]
        assert page.js("document.querySelector('.content').textContent") == f"5 {HOSTILE}"
        page.js("document.querySelector('#model').value = 'selfroute-cloud'")
        page.js("document.querySelector('#model').dispatchEvent(new Event('change'))")
        assert page.js("document.querySelector('#policy').disabled")
        ask(page)
        page.until("document.querySelector('.event.failed')")
        assert "the budget of cloud calls is used up (calls_per_minute)" in text(page, "#turns")
    # A refusal is a failed load to the browser, and no error of the page.
    assert all("429" in complaint for complaint in page.complaints)
    page.complaints.clear()


def test_signing_in_and_out(tmp_path: Path, page: Page) -> None:
    world = World(tmp_path, keyed=True)
    with world.store.begin() as connection:
        token, key = keys.new(connection, HOSTILE[:100], admin=True)
    world.write(record(1, key_id=key.id))
    with world.visited(page) as url:
        page.open(f"{url}/dashboard")
        assert page.js("location.pathname") == "/dashboard/sign-in"
        # The browser gives it the focus once the page is shown.
        page.until("document.activeElement.id === 'key'")
        page.type(token)
        page.press("Enter")
        page.until("location.pathname === '/dashboard' && document.querySelector('#r-r1')")
        assert page.js("document.cookie") == ""
        assert not any(token in asked for asked in page.asked)
        page.open(f"{url}/dashboard/playground")
        ask(page)
        page.until("!document.querySelector('#facts').hidden")
        assert world.recorder.records[0].key_id == key.id
        page.js("document.querySelector('.leave button').click()")
        page.until("location.pathname === '/dashboard/sign-in' && document.readyState === 'complete'")


FOREIGN = """<!doctype html><title>evil</title><iframe src="URL/dashboard"></iframe><script>
const body = '{"model": "selfroute", "messages": [{"role": "user", "content": "?"}]}';
fetch("URL/v1/chat/completions", {method: "POST", mode: "no-cors", credentials: "include", body})
  .finally(() => window.sent = true);
</script>"""


def test_a_foreign_page_can_neither_frame_nor_ask(tmp_path: Path, page: Page) -> None:
    world = World(tmp_path)
    with world.visited(page) as url:

        async def evil(request: Request) -> HTMLResponse:
            return HTMLResponse(FOREIGN.replace("URL", url))

        with serving(Starlette(routes=[Route("/", evil)])) as foreign:
            page.open(foreign)
            page.until("window.sent")
            page.until("frames.length === 1")
            until(lambda: any("frame-ancestors" in complaint for complaint in page.complaints))
    assert any(asked == f"{url}/v1/chat/completions" for asked in page.asked)
    assert not world.device.requests
    page.complaints.clear()
