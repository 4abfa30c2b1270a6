"""The dashboard over real sockets: what it shows, to whom, and what hostile content can do to it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.serving import MemoryRecorder, ScriptedCloud, ScriptedDevice, said, serving

from selfroute.protocol import HELP_CALL
from selfroute.serve import history, keys
from selfroute.serve.account import Limits
from selfroute.serve.app import Gateway, make_app
from selfroute.serve.budget import Budget
from selfroute.serve.config import GatewayConfig
from selfroute.serve.handoff import Pair
from selfroute.serve.history import RequestRecord
from selfroute.serve.keys import Key, Keyring
from selfroute.serve.sessions import Sessions
from selfroute.serve.store import Store

CHAT = {"model": "selfroute", "messages": [{"role": "user", "content": "2+3?"}]}
HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'`{{7*7}}"
LIMITS = Limits(share=0.25, usd_per_day=2.0)


def record(number: int = 0, **changes: Any) -> RequestRecord:
    made = RequestRecord(
        id=f"r{number}", at=time.time() - 90 - number, model="selfroute", decision="answer", route="device",
        score=-1.25, device_completion_tokens=20, first_ms=12.0, device_ms=80.0, total_ms=81.0,
    )  # fmt: skip
    return replace(made, **changes)


CLOUD: dict[str, Any] = {"decision": "help", "route": "cloud", "score": 2.5, "cost_usd": 0.125, "cloud_ms": 950.0}
DENIED: dict[str, Any] = {"decision": "help", "denied": "share"}


@dataclass
class Site:
    """A gateway whose dashboard is visited."""

    store: Store
    keyed: bool = False
    limits: Limits = LIMITS
    config: dict[str, Any] = field(default_factory=dict)

    def make_key(self, name: str, limits: Limits | None = None, **settings: Any) -> tuple[str, Key]:
        with self.store.begin() as connection:
            return keys.new(connection, name, limits, **settings)

    def write(self, *records: RequestRecord) -> None:
        with self.store.begin() as connection:
            history.add(connection, records)

    def spend(self, requests: int, usd: float, key: Key | None = None) -> None:
        async def use() -> None:
            budget, scope = Budget(self.store, self.limits), key.scope if key else None
            for _ in range(requests):
                await budget.arrive(scope)
            held = await budget.reserve(usd, scope)
            await budget.settle(held, usd)  # type: ignore[arg-type]

        asyncio.run(use())

    @contextmanager
    def client(self) -> Iterator[httpx2.Client]:
        config = GatewayConfig(budget=self.limits, keys=self.keyed, **self.config)
        budget = Budget(self.store, self.limits)
        pair = Pair(ScriptedDevice(said("hard", HELP_CALL)), ScriptedCloud("five"), budget, MemoryRecorder())
        ring = Keyring(self.store, fresh_s=0) if self.keyed else None
        sessions = Sessions(self.store, ring) if ring else None
        app = make_app(Gateway(config, pair, budget, ring, sessions, self.store))
        with ExitStack() as stack:
            url = stack.enter_context(serving(app))
            yield stack.enter_context(httpx2.Client(base_url=url, timeout=20))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    store = Store(str(tmp_path / "gateway.sqlite"))
    yield Site(store)
    store.close()


def words_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def tile(html: str, name: str) -> str:
    found = re.search(rf'<article class="tile" id="tile-{name}">(.*?)</article>', html, re.S)
    assert found
    return words_of(found[1])


def card(html: str, name: str) -> str:
    found = re.search(rf'<section class="card" id="{name}">(.*?)</section>', html, re.S)
    assert found
    return words_of(found[1])


def test_what_the_store_has_is_what_the_page_shows(site: Site) -> None:
    site.spend(30, 0.5)
    site.write(
        *(record(n) for n in range(6)),
        *(record(10 + n, **CLOUD) for n in range(3)),
        record(20, **DENIED),
        record(21, route="cloud", policy="cloud-only", decision="", status=502, error="cloud_unavailable"),
    )
    with site.client() as client:
        html = client.get("/dashboard").text
    assert tile(html, "calls") == "Call rate 3.3 % budget 25 % · 13.3 % used 1 of 30 requests in 60 min"
    assert tile(html, "cost").startswith("Cost today 0.500 USD limit 2.00 USD · 25 % used")
    assert tile(html, "cloud").startswith("Cloud Unsteady 1 of 4 calls failed in 5 min")
    assert card(html, "routes").startswith("Where answers came from device 6 call denied 1 cloud 3 failed 1")
    assert card(html, "denials") == "Calls denied 1 in all share of requests 1"
    assert "device 80 ms 80 ms 80 ms" in card(html, "latency")
    rows = card(html, "requests")
    assert "device answers −1.25" in rows
    assert "cloud asks +2.50" in rows
    assert "denied asks share of requests" in rows
    assert "failed 502 – cloud_unavailable" in rows
    assert "0.125" in rows


def test_a_new_gateway_says_what_to_do(site: Site) -> None:
    with site.client() as client:
        assert client.get("/").headers["location"] == "/dashboard"
        html = client.get("/dashboard").text
    assert "No request yet." in html
    assert "Not asked" in tile(html, "cloud")
    assert tile(html, "calls").startswith("Call rate 0 %")


def test_without_limits_there_are_no_meters(site: Site) -> None:
    site.limits = Limits()
    with site.client() as client:
        html = client.get("/dashboard").text
    assert tile(html, "cost").startswith("Cost today 0 USD no limit set")
    assert 'class="meter' not in html


@pytest.mark.parametrize("span", ["1h", "6h", "24h", "7d", "30d", "", "1y", "<b>"])
def test_each_stretch_of_time_and_any_other(site: Site, span: str) -> None:
    site.write(record(), record(1, at=time.time() - 20 * 86_400))
    with site.client() as client:
        response = client.get("/dashboard", params={"span": span})
    assert response.status_code == 200
    assert card(response.text, "routes").startswith(f"Where answers came from device {2 if span == '30d' else 1} ")
    assert response.text.count("<g>") >= 2 * 48
    assert "<b>" not in response.text.split('data-source="')[1].split('"')[0]


def test_pages_of_requests(site: Site) -> None:
    site.write(*(record(n) for n in range(60)))
    with site.client() as client:
        ids, address = [], "/dashboard"
        while address:
            html = client.get(address).text
            ids += re.findall(r'<tr id="r-(\w+)"', html)
            more = re.search(r'<p class="more"><a href="([^"#]+)', html)
            address = f"/dashboard{more[1].replace('&amp;', '&')}" if more else ""
        assert client.get("/dashboard?before=unknown").status_code == 200
    assert ids == [f"r{n}" for n in range(60)]


def test_the_live_part_is_that_of_the_page(site: Site) -> None:
    site.write(record(), record(1, **CLOUD))
    with site.client() as client:
        page, live = client.get("/dashboard?span=6h"), client.get("/dashboard/live?span=6h")
    assert "<html" not in live.text
    assert card(live.text, "routes") == card(page.text, "routes")
    assert 'data-source="/dashboard/live?span=6h"' in page.text
    # Without scripts it loads itself again.
    assert '<noscript><meta http-equiv="refresh" content="10"></noscript>' in page.text


@pytest.mark.parametrize("logged", [True, False])
def test_one_request_with_its_content_only_where_that_is_kept(site: Site, logged: bool) -> None:
    texts = {"request": '[{"content": "canary-1"}]', "response": "canary-2"} if logged else {}
    site.write(record(**CLOUD, **texts))
    with site.client() as client:
        html = client.get("/dashboard/requests/r0").text
        assert client.get("/dashboard/requests/r1").status_code == 404
        assert "canary" not in client.get("/dashboard").text
    assert ("canary-1" in html, "canary-2" in html) == (logged, logged)
    assert ("is not kept" in html) != logged
    assert "The device asked for help." in html


def test_what_a_rule_kept_here_and_what_the_cloud_did_not_see_are_told(site: Site) -> None:
    site.write(record(1, denied="rule", rule="no-contracts"), record(2, redacted='{"EMAIL_ADDRESS": 2}'))
    with site.client() as client:
        kept, hidden = (client.get(f"/dashboard/requests/r{n}").text for n in (1, 2))
    assert "a rule: it must not leave" in kept
    assert "no-contracts" in kept
    assert "EMAIL_ADDRESS 2" in hidden


class Loads(HTMLParser):
    """What a page would load or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: set[str] = set()
        self.runs: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.runs += [name for name, _ in attributes if name.startswith("on") or name == "style"]
        self.runs += [tag] if tag in ("style", "iframe", "object", "embed", "base") else []
        self.runs += ["inline"] if tag == "script" and not dict(attributes).get("src") else []
        for name, value in attributes:
            if name in ("src", "action", "data-source", "srcset", "poster") or (name == "href" and tag != "a"):
                self.loads.add((value or "").partition("?")[0])
            self.runs += [str(value)] if "javascript:" in (value or "") else []


def test_hostile_content_is_text_and_loads_and_runs_nothing(site: Site) -> None:
    site.config = {"log_content": True}
    site.keyed = True
    admin, _ = site.make_key("ops", admin=True)
    _, hostile = site.make_key(HOSTILE)
    texts: dict[str, Any] = dict.fromkeys(("model", "policy", "error", "rule", "request", "response"), HOSTILE)
    site.write(record(1, key_id=hostile.id, **texts, status=500), record(2, key_id=HOSTILE, denied=HOSTILE))
    with site.client() as client:
        sign_in(client, admin)
        pages = {
            path: client.get(path)
            for path in (
                *("/dashboard", "/dashboard/live", "/dashboard/requests/r1", "/dashboard/requests/r2"),
                *(
                    "/dashboard/playground",
                    f"/dashboard/requests/{HOSTILE.replace('/', '')}",
                    f"/dashboard?span={HOSTILE}",
                ),
                f"/dashboard?before={HOSTILE}",
            )
        }
    for path, page in pages.items():
        assert "<script>alert" not in page.text, path
        assert "<img src=x" not in page.text
        assert ">49<" not in page.text
        found = Loads(page.text)
        assert not found.runs, path
        assert all(load.startswith("/dashboard") for load in found.loads), path
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["cache-control"] == "no-store"
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in pages["/dashboard"].text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in pages["/dashboard/requests/r1"].text


def test_files_are_those_of_the_pages_and_no_others(site: Site) -> None:
    with site.client() as client:
        html = client.get("/dashboard").text + client.get("/dashboard/playground").text
        for load in Loads(html).loads - {"/dashboard/live"}:
            response = client.get(load)
            assert response.status_code == 200
            assert response.headers["x-content-type-options"] == "nosniff"
        for path in ("base.html.jinja", "..%2fapp.py", "%2e%2e/app.py", "page.css%00", "x"):
            assert client.get(f"/dashboard/files/{path}").status_code == 404


def sign_in(client: httpx2.Client, shown: str) -> httpx2.Response:
    return client.post("/dashboard/sign-in", data={"key": shown})


def test_signing_in_with_a_key(site: Site) -> None:
    site.keyed = True
    token, key = site.make_key("laptop")
    with site.client() as client:
        for path in ("/dashboard", "/dashboard/playground", "/dashboard/requests/r0"):
            sent = client.get(path)
            assert (sent.status_code, sent.headers["location"]) == (303, "/dashboard/sign-in")
        assert client.get("/dashboard/live").status_code == 401
        # Never in an address.
        assert client.get("/dashboard/sign-in", params={"key": token}).headers.get("set-cookie") is None
        assert 'method="post"' in client.get("/dashboard/sign-in").text
        for wrong in ("", "sr-no", f"{token}x", key.id, HOSTILE, "x" * 10_000):
            refused = sign_in(client, wrong)
            assert (refused.status_code, refused.headers.get("set-cookie")) == (403, None)
            assert "<script>alert" not in refused.text
        done = sign_in(client, token)
        assert (done.status_code, done.headers["location"]) == (303, "/dashboard")
        cookie = done.headers["set-cookie"]
        assert re.fullmatch(r"selfroute_session=[\w-]{43}; HttpOnly; Max-Age=28800; Path=/; SameSite=strict", cookie), (
            cookie
        )
        page = client.get("/dashboard")
        assert page.status_code == 200
        assert "laptop" in page.text
        for secret in (token, key.prefix, cookie.split(";")[0].partition("=")[2]):
            assert secret not in page.text
        out = client.post("/dashboard/sign-out")
        assert 'selfroute_session=""' in out.headers["set-cookie"]
        client.cookies.set("selfroute_session", cookie.split(";")[0].partition("=")[2])
        assert client.get("/dashboard").status_code == 303


def test_behind_https_the_cookie_stays_there(site: Site) -> None:
    site.keyed = True
    token, _ = site.make_key("laptop")
    with site.client() as client:
        done = client.post("/dashboard/sign-in", data={"key": token}, headers={"x-forwarded-proto": "https"})
    assert "; Secure" in done.headers["set-cookie"]


def test_a_key_sees_its_own_requests_and_an_admins_all(site: Site) -> None:
    site.keyed = True
    token, key = site.make_key("laptop", Limits(share=0.5, usd_per_day=1.0))
    other, others = site.make_key("phone")
    admin, _ = site.make_key("ops", admin=True)
    site.spend(40, 0.25, key)
    site.spend(40, 0.5, others)
    mine = [record(n, key_id=key.id) for n in range(2)]
    theirs = [record(10 + n, key_id=others.id, **CLOUD) for n in range(3)]
    site.write(*mine, *theirs)
    with site.client() as client:
        sign_in(client, token)
        html = client.get("/dashboard").text
        assert set(re.findall(r'<tr id="r-(\w+)"', html)) == {"r0", "r1"}
        assert "phone" not in html
        assert 'id="keys"' not in html
        assert tile(html, "calls").startswith("Call rate 2.5 % budget 50 %")
        assert tile(html, "cost").startswith("Cost today 0.250 USD limit 1.00 USD")
        assert card(html, "routes").startswith("Where answers came from device 2 call denied 0 cloud 0")
        assert client.get("/dashboard/requests/r0").status_code == 200
        assert client.get("/dashboard/requests/r10").status_code == 404
        # A page that begins behind another's request tells nothing of it.
        assert re.findall(r'<tr id="r-(\w+)"', client.get("/dashboard?before=r12").text) == ["r0", "r1"]
        client.cookies.clear()
        sign_in(client, admin)
        html = client.get("/dashboard").text
        assert len(re.findall(r'<tr id="r-(\w+)"', html)) == 5
        assert tile(html, "calls").startswith("Call rate 2.5 % budget 25 %")
        assert re.search(r"phone \w{8} 40 2.5 % – 0.500 – laptop \w{8} 40 2.5 % 50 % 0.250 1.00", card(html, "keys"))
        assert client.get("/dashboard/requests/r10").status_code == 200
    assert other not in html


def test_a_revoked_key_ends_its_sessions(site: Site) -> None:
    site.keyed = True
    token, key = site.make_key("laptop")
    with site.client() as client:
        sign_in(client, token)
        assert client.get("/dashboard").status_code == 200
        with site.store.begin() as connection:
            keys.revoke(connection, key.id)
        assert client.get("/dashboard").status_code == 303


def test_the_playground_asks_under_the_session_and_what_it_may(site: Site) -> None:
    site.keyed = True
    token, _ = site.make_key("laptop", policies=["device-only"], models=["selfroute", "selfroute-device"])
    with site.client() as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 401
        sign_in(client, token)
        html = client.get("/dashboard/playground").text
        assert re.findall(r'<option value="([\w-]+)"', html) == ["selfroute", "selfroute-device"]
        assert re.findall(r"<option(?: selected)?>([\w-]+)<", html) == ["device-only"]
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 403
        asked = {**CHAT, "selfroute": {"policy": "device-only"}}
        assert client.post("/v1/chat/completions", json=asked).status_code == 200
        # Not from a page of another site, whatever the browser sends along.
        for origin in ("https://evil.example", "null", "http://localhost:1", "http://127.0.0.1", ""):
            for path in ("/v1/chat/completions", "/dashboard/sign-out"):
                refused = client.post(path, json=asked, headers={"origin": origin})
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin")
        own = str(client.base_url).rstrip("/")
        assert client.post("/v1/chat/completions", json=asked, headers={"origin": own}).status_code == 200
        # A header goes before the cookie.
        assert client.get("/v1/models", headers={"authorization": "Bearer no"}).status_code == 401


def test_without_keys_there_is_nothing_to_sign_in_to(site: Site) -> None:
    with site.client() as client:
        for method in ("GET", "POST"):
            sent = client.request(method, "/dashboard/sign-in")
            assert (sent.status_code, sent.headers["location"]) == (303, "/dashboard")
        assert client.get("/dashboard", headers={"host": "evil.example"}).status_code == 421
        html = client.get("/dashboard").text
    assert "Sign out" not in html
    assert 'id="keys"' not in html


def test_a_store_that_fails_says_so(site: Site) -> None:
    with site.client() as client:
        with site.store.begin() as connection:
            connection.exec_driver_sql("DROP TABLE usage")
        page = client.get("/dashboard")
    assert page.status_code == 503
    assert "The store cannot be read now" in page.text
    assert "usage" not in page.text


def test_pages_are_read_one_after_the_other(tmp_path: Path) -> None:
    """Many at once would have the keys of everybody's requests wait for them."""

    class Counting(Store):
        now = most = 0

        async def read(self, work: Any) -> Any:
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                return await super().read(work)
            finally:
                self.now -= 1

    async def main() -> set[int]:
        budget = Budget(store, LIMITS)
        pair = Pair(ScriptedDevice(said("5")), ScriptedCloud("five"), budget, MemoryRecorder())
        http = httpx2.ASGITransport(app=make_app(Gateway(GatewayConfig(), pair, budget, store=store)))
        async with httpx2.AsyncClient(transport=http, base_url="http://localhost") as client:
            asked = [client.get(path) for path in ("/dashboard?span=30d", "/dashboard/live") for _ in range(5)]
            return {response.status_code for response in await asyncio.gather(*asked)}

    store = Counting(str(tmp_path / "counted.sqlite"))
    assert asyncio.run(main()) == {200}
    assert store.most == 1
    store.close()
