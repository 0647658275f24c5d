"""The JSON API over made-up pictures: contents, tags, errors, addresses, and what strangers may not do."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from made_monitor import ALICE_ADDRESS, MadeMonitor, usual_picture, write_page

from swarm.errors import (
    CacheFull,
    MissingBlocks,
    NetworkError,
    PeerUnreachable,
    SwarmError,
    UsageError,
)
from swarm.monitor.api import OPENAPI_PATH, make_app
from swarm.monitor.guard import BODY_TIMEOUT, MAX_BODY, Guard, host_of
from swarm.monitor.limits import Rate
from swarm.monitor.monitor import MonitorConfig
from swarm.monitor.report import ModelOverview, ReachabilityReport, SwarmReport, TraceReport
from swarm.monitor.web_settings import LOCAL_HOSTS, WebSettings

HOME = "http://127.0.0.1:8700"


class Site:
    """A monitor and a browser of it."""

    def __init__(self, monitor: MadeMonitor, page: Path, settings: WebSettings | None = None):
        self.monitor = monitor
        self.app = make_app(monitor, settings or WebSettings(), page)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.browser = httpx.AsyncClient(transport=transport, base_url=HOME)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.browser.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    async def trace(self, **wanted: Any) -> httpx.Response:
        return await self.browser.post("/api/v1/trace", json={"model": "llama"} | wanted)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_page(tmp_path)


@pytest.fixture
async def site(page: Path) -> AsyncIterator[Site]:
    site = Site(MadeMonitor(), page)
    async with site.browser:
        yield site


def detail_of(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/json"
    (detail,) = response.json().values()
    assert isinstance(detail, str)
    return detail


async def test_the_state_is_the_report(site: Site) -> None:
    response = await site.get("/api/v1/state")
    assert response.status_code == 200
    report = SwarmReport.model_validate_json(response.content)
    assert report == site.monitor.report()
    assert not report.healthy and "mistral" in report.problems[0]
    assert [model.complete for model in report.models] == [True, False]


async def test_the_state_is_made_once_for_each_revision(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    write = SwarmReport.model_dump_json
    monkeypatch.setattr(SwarmReport, "model_dump_json", lambda self: made.append(self.revision) or write(self))
    await asyncio.gather(*[site.get("/api/v1/state") for _ in range(10)])
    assert made == [1]
    await site.monitor.watcher.show(usual_picture())
    await site.get("/api/v1/state")
    assert made == [1, 2]


async def test_who_has_the_state_is_told_so(site: Site, page: Path) -> None:
    first = await site.get("/api/v1/state")
    again = await site.get("/api/v1/state", if_none_match=first.headers["etag"])
    assert again.status_code == 304 and again.content == b""
    assert again.headers["etag"] == first.headers["etag"]
    await site.monitor.watcher.show(usual_picture())
    assert (await site.get("/api/v1/state", if_none_match=first.headers["etag"])).status_code == 200
    # another monitor counts its revisions anew
    async with Site(MadeMonitor(), page).browser as other:
        response = await other.get("/api/v1/state", headers={"if-none-match": first.headers["etag"]})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("accepted", "compressed"), [("gzip, br", True), ("GZIP;q=1.0", True), ("identity", False), ("gzip;q=0, br", False)]
)
async def test_the_state_is_compressed_for_who_takes_that(site: Site, accepted: str, compressed: bool) -> None:
    async with site.browser.stream("GET", "/api/v1/state", headers={"Accept-Encoding": accepted}) as response:
        raw = b"".join([part async for part in response.aiter_raw()])
    assert (response.headers.get("content-encoding") == "gzip") is compressed
    plain = gzip.decompress(raw) if compressed else raw
    assert json.loads(plain)["revision"] == 1
    assert response.headers["vary"] == "Accept-Encoding"


async def test_models_come_without_their_servers(site: Site) -> None:
    models = (await site.get("/api/v1/models")).json()
    assert [model["name"] for model in models] == ["llama", "mistral"]
    assert models[1]["missing_blocks"] == [4, 5, 6, 7] and models[1]["best_chain"] is None
    assert set(models[0]) == set(ModelOverview.model_fields)


async def test_one_server_by_model(site: Site) -> None:
    (fingerprint, server), *rest = (await site.get("/api/v1/servers/QmA")).json().items()
    assert (fingerprint, rest) == ("ab" * 32, [])
    assert server["span"] == [0, 4] and server["departure"]["lost_blocks"] == [0, 1, 2, 3]
    unknown = await site.get("/api/v1/servers/QmUnknown")
    assert unknown.status_code == 404
    assert detail_of(unknown) == "no server of this swarm has the peer id QmUnknown"
    assert (await site.get("/api/v1/servers/Qm.A")).status_code == 422


async def test_what_strangers_wrote_stays_text(site: Site) -> None:
    response = await site.get("/api/v1/servers/QmA")
    assert response.json()["ab" * 32]["public_name"] == "<script>alert(1)</script>"
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_addresses_are_hidden_unless_shown(page: Path) -> None:
    troubled = replace(usual_picture(), trouble=f"{ALICE_ADDRESS} does not answer")
    failed = ReachabilityReport(
        peer_id="QmA",
        reachable=False,
        way=None,
        round_trip=None,
        step="dial",
        reason=f"nobody answers at {ALICE_ADDRESS} or [2001:db8::7]:31330",
    )
    for show in (True, False):
        monitor = MadeMonitor(troubled, MonitorConfig(show_addresses=show, probe_period=0))
        monitor.reachability = failed
        monitor.tracer.error = PeerUnreachable(f"QmA at {ALICE_ADDRESS}: dial tcp4 203.0.113.7:31330: refused")
        site = Site(monitor, page)
        texts = [
            (await site.get("/api/v1/state")).text,
            (await site.get("/api/v1/servers/QmA")).text,
            (await site.get("/api/v1/is_reachable/QmA")).text,
            (await site.trace()).text,
        ]
        assert [("203.0.113.7" in text) for text in texts] == [show] * 4
        assert ("2001:db8::7" in texts[2]) is show
        assert "QmA" in texts[3] and "refused" in texts[3]


async def test_a_trace(site: Site) -> None:
    response = await site.trace(peers=["QmA", "QmB"], prompt_tokens=3, new_tokens=2)
    assert response.status_code == 200
    report = TraceReport.model_validate_json(response.content)
    assert report.fingerprint == "ab" * 32 and report.step_times == (0.03, 0.03)
    ((_, asked),) = site.monitor.tracer.asked
    assert (asked.peers, asked.prompt_tokens, asked.new_tokens) == (("QmA", "QmB"), 3, 2)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("QmA and QmB leave out block 3"), 422),
        (MissingBlocks("no server holds blocks 4:8", (4, 5, 6, 7)), 409),
        (PeerUnreachable("QmA is gone"), 503),
        (CacheFull("QmA has no room"), 503),
        (NetworkError("this peer is not connected"), 503),
    ],
)
async def test_a_failed_trace_says_why(site: Site, error: SwarmError, status: int) -> None:
    site.monitor.tracer.error = error
    response = await site.trace()
    assert (response.status_code, detail_of(response)) == (status, str(error))


async def test_a_trace_of_an_absent_model(site: Site) -> None:
    response = await site.trace(model="gpt")
    assert response.status_code == 404
    assert detail_of(response) == "no server of this swarm serves gpt: choose one of /api/v1/models"


@pytest.mark.parametrize(
    ("wanted", "where"),
    [
        ({"new_tokens": 1000}, "new_tokens: "),
        ({"peers": ["Qm/A"]}, "peers.0: string should match pattern '^[A-Za-z0-9]+$'"),
        ({"more": 1}, "more: "),
        ({"model": ""}, "model: "),
    ],
)
async def test_a_wrong_request_is_told_what_is_wrong(site: Site, wanted: dict[str, Any], where: str) -> None:
    response = await site.trace(**wanted)
    assert response.status_code == 422
    assert detail_of(response).startswith(where)
    assert site.monitor.tracer.asked == []


async def test_a_bug_is_an_error_of_ours(site: Site) -> None:
    site.monitor.tracer.error = KeyError("secret")
    response = await site.trace()
    assert response.status_code == 500
    assert detail_of(response) == "the monitor has a bug: its log says more"
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_unknown_addresses_and_methods(site: Site) -> None:
    response = await site.get("/api/v1/nothing")
    assert response.status_code == 404 and OPENAPI_PATH in detail_of(response)
    response = await site.browser.delete("/api/v1/state")
    assert response.status_code == 405 and response.headers["allow"] == "GET"
    assert detail_of(response) == "DELETE does not work here"


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8700", "127.0.0.1", "localhost:1", "LOCALHOST", "[::1]:8700", "[::1]", "swarm.example:80"]
)
async def test_hosts_that_are_ours(page: Path, host: str) -> None:
    site = Site(MadeMonitor(), page, WebSettings(hosts=WebSettings.hosts_for("swarm.example")))
    assert (await site.get("/api/v1/state", host=host)).status_code == 200


@pytest.mark.parametrize("path", ["/", "/api/v1/state", "/metrics", OPENAPI_PATH])
@pytest.mark.parametrize(
    "host", ["evil.example:8700", "127.0.0.1.evil.example", "127.0.0.1:8700@evil", "[::1].evil", ""]
)
async def test_other_hosts_are_refused(site: Site, path: str, host: str) -> None:
    response = await site.get(path, host=host)
    assert response.status_code == 421 and "host name" in detail_of(response)


def test_which_hosts_are_ours() -> None:
    assert WebSettings.hosts_for("127.0.0.1") == LOCAL_HOSTS
    assert WebSettings.hosts_for("[2001:DB8::7]") == LOCAL_HOSTS | {"2001:db8::7"}
    assert "2001:db8::7" in (WebSettings.hosts_for("2001:db8:0:0::0007") or ())
    assert WebSettings.hosts_for("0.0.0.0") is None and WebSettings.hosts_for("::") is None
    assert host_of("[2001:DB8::7]:80") == "2001:db8::7"


async def test_any_host_if_the_owner_listens_everywhere(page: Path) -> None:
    site = Site(MadeMonitor(), page, WebSettings(hosts=None))
    assert (await site.get("/api/v1/state", host="anything.example")).status_code == 200


@pytest.mark.parametrize("path", ["/", "/api/v1/state", "/metrics", "/api/v1/nothing"])
async def test_what_answers_tell_the_browser(site: Site, path: str) -> None:
    headers = (await site.get(path, origin="http://evil.example")).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data", ""])
async def test_forms_of_other_sites_start_no_trace(site: Site, kind: str) -> None:
    response = await site.browser.post("/api/v1/trace", content=b'{"model": "llama"}', headers={"Content-Type": kind})
    assert response.status_code == 415
    assert site.monitor.tracer.asked == []


@pytest.mark.parametrize("relation", ["cross-site", "same-site"])
async def test_pages_of_other_sites_start_no_probe(site: Site, relation: str) -> None:
    headers = {"Sec-Fetch-Site": relation}
    response = await site.browser.post("/api/v1/trace", json={"model": "llama"}, headers=headers)
    assert response.status_code == 403
    assert (await site.get("/api/v1/is_reachable/QmA", sec_fetch_site=relation)).status_code == 403
    assert (await site.get("/api/v1/is_reachable/QmA", sec_fetch_site="same-origin")).status_code == 200
    assert site.monitor.tracer.asked == []


async def test_long_bodies_are_refused(site: Site) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(1 + MAX_BODY // 1024):
            yield b" " * 1024

    headers = {"Content-Type": "application/json"}
    for content in (b" " * (MAX_BODY + 1), parts()):
        response = await site.browser.post("/api/v1/trace", content=content, headers=headers)
        assert response.status_code == 413 and "longer than" in detail_of(response)


async def test_slow_bodies_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BODY_TIMEOUT <= 30
    monkeypatch.setattr("swarm.monitor.guard.BODY_TIMEOUT", 0.01)

    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    response = await site.browser.post("/api/v1/trace", content=never(), headers={"Content-Type": "application/json"})
    assert response.status_code == 408


async def test_a_caller_who_leaves_while_he_sends() -> None:
    async def app(*_: Any) -> None:
        raise AssertionError("it has nothing to do")

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        raise AssertionError("nobody listens")

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    await Guard(app, None)(scope, gone, send)


async def test_one_trace_at_a_time(site: Site) -> None:
    tracer = site.monitor.tracer
    tracer.go.clear()
    first = asyncio.create_task(site.trace())
    while not tracer.asked:
        await asyncio.sleep(0)
    second = await site.trace()
    assert second.status_code == 429 and second.headers["retry-after"] == "1"
    assert "under way" in detail_of(second)
    tracer.go.set()
    assert (await first).status_code == 200
    assert (await site.trace()).status_code == 200


async def test_not_too_often(page: Path) -> None:
    seldom, often = Rate(per_minute=1, burst=1), Rate(per_minute=600, burst=600)
    site = Site(MadeMonitor(), page, WebSettings(traces_each=seldom, traces=often, reachability=seldom))
    assert (await site.trace()).status_code == 200
    refused = await site.trace()
    assert refused.status_code == 429 and 50 <= int(refused.headers["retry-after"]) <= 60
    assert detail_of(refused).startswith("you have asked too often: try again in ")
    assert (await site.get("/api/v1/is_reachable/QmA")).status_code == 200
    refused = await site.get("/api/v1/is_reachable/QmB")
    assert refused.status_code == 429 and detail_of(refused).startswith("all callers together have asked too often")


async def test_a_wrong_request_does_not_count(page: Path) -> None:
    once = Rate(per_minute=1, burst=1)
    site = Site(MadeMonitor(), page, WebSettings(traces=once))
    assert (await site.trace(new_tokens=0)).status_code == 422
    assert (await site.trace()).status_code == 200


async def test_the_page(site: Site, page: Path) -> None:
    index = await site.get("/")
    assert index.text == (page / "index.html").read_text()
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    assert (await site.get("/index.html")).content == index.content
    script = await site.get("/app.js")
    assert (
        script.headers["content-type"] == "text/javascript; charset=utf-8"
        and script.headers["cache-control"] == "no-cache"
    )
    assert (await site.get("/app.js", if_none_match=script.headers["etag"])).status_code == 304
    assert (await site.get("/app.js", if_none_match='"other"')).status_code == 200
    for path in ("/../guard.py", "/..%2fguard.py", "/api.py"):
        assert (await site.get(path)).status_code == 404


def test_an_installation_without_a_page_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"index\.html"):
        make_app(MadeMonitor(), WebSettings(), tmp_path)


async def test_the_description_names_every_route(site: Site, page: Path) -> None:
    described = (await site.get(OPENAPI_PATH)).json()["paths"]
    files = {"/", *(f"/{file.name}" for file in page.iterdir())}
    served = {route.path for route in iter_route_contexts(site.app.routes)}
    assert served - files - {OPENAPI_PATH} == set(described)
    assert set(described) == {
        "/api/v1/events",
        "/api/v1/is_reachable/{peer_id}",
        "/api/v1/models",
        "/api/v1/servers/{peer_id}",
        "/api/v1/state",
        "/api/v1/trace",
        "/metrics",
    }
