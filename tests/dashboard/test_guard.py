"""Sign-in, sessions and CSRF protection: pages need a session, actions a form of these pages."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from receiver.dashboard.guard import COOKIE, DEV_COOKIE, LONGEST
from tests.conftest import Logged, Start
from tests.dashboard.people import NAMED, ON, VIEWER_KEY, Person, buttons, hidden, person
from tests.receiving import API_KEY

pytestmark = pytest.mark.anyio

PAGES = (
    "",
    "/predictions",
    "/predictions?view=grid",
    "/deliveries",
    "/handlers",
    "/replays",
    "/discarded",
    "/recipes",
    "/costs",
    "/audit",
)
UNKNOWN = f"pred_{'0' * 32}"
POSTS = (
    f"/predictions/{UNKNOWN}/cancel",
    f"/predictions/{UNKNOWN}/replay",
    f"/predictions/{UNKNOWN}/erase",
    f"/predictions/{UNKNOWN}/again",
    f"/deliveries/dlv_{'0' * 40}/retry",
    "/handlers/pause",
    "/handlers/resume",
    "/replays",
    f"/replays/rep_{'0' * 32}/start",
    f"/replays/rep_{'0' * 32}/cancel",
    "/recipes/imagine",
)


async def test_dashboard_is_off_by_default(start: Start) -> None:
    async with start() as station:
        assert (await station.world.get("/ui")).status_code == 404


async def test_dashboard_is_on_in_dev_mode_unless_turned_off(start: Start) -> None:
    async with start(RECEIVER_DEV="1") as station:
        assert (await station.world.get("/ui")).status_code == 303
    async with start(RECEIVER_DEV="1", RECEIVER_DASHBOARD="off") as station:
        assert (await station.world.get("/ui")).status_code == 404


@pytest.mark.parametrize("prefix", ["", "/api"])
async def test_root_redirects_browsers_to_the_dashboard_if_it_is_on(
    start: Start, prefix: str
) -> None:
    browser = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    url = {"RECEIVER_PUBLIC_URL": f"https://hooks.test{prefix}"}
    async with start(**ON, **url) as station:
        led = await station.world.get(f"{prefix}/", headers=browser)
        assert (led.status_code, led.headers["location"]) == (303, f"{prefix}/ui")
        assert led.headers["vary"] == "Accept"
        said = await station.world.get(f"{prefix}/")
        assert said.text.startswith("A prediction receiver: ")
    async with start(**url) as station:
        assert (await station.world.get(f"{prefix}/", headers=browser)).text == said.text


async def test_page_returns_503_after_shutdown(start: Start) -> None:
    async with start(**ON) as station:
        pass
    transport = httpx.ASGITransport(station.app)
    async with httpx.AsyncClient(transport=transport, base_url="https://hooks.test") as world:
        assert (await world.get("/ui/predictions")).status_code == 503


async def test_unauthenticated_page_redirects_to_the_sign_in_and_back(start: Start) -> None:
    async with start(**ON) as station:
        for path in (*PAGES, f"/predictions/{UNKNOWN}", "/predictions/no-id"):
            answer = await station.world.get(f"/ui{path}")
            assert answer.status_code == 303
            assert answer.headers["location"].startswith("/ui/sign-in?next=")
            after = httpx.URL(answer.headers["location"]).params["next"]
            back = await person(station).sign_in(after=after)
            assert back.headers["location"] == f"/ui{path or '/'}"


async def test_unauthenticated_image_or_htmx_request_returns_401(start: Start) -> None:
    async with start(**ON) as station:
        path = f"/ui/predictions/{UNKNOWN}/outputs/0/thumbnail"
        image = await station.world.get(path, headers={"sec-fetch-dest": "image"})
        assert image.status_code == 401
        live = await station.world.get("/ui/handlers", headers={"hx-request": "true"})
        assert live.status_code == 401
        assert live.headers["hx-redirect"].startswith("/ui/sign-in?next=")


async def test_action_without_session_valid_token_or_same_origin_is_rejected(
    start: Start,
) -> None:
    async with start(**ON) as station:
        someone, another = person(station), person(station)
        before = await someone.token()  # from before the sign-in
        await someone.sign_in()
        await another.sign_in()
        form = {"token": hidden(await someone.see("/handlers"), "token"), "name": "x"}
        wrong: list[dict[str, Any]] = [
            {"data": {"name": "x"}},
            {"data": {**form, "token": form["token"][:-1] + "!"}},
            {"data": {**form, "token": await another.token("/handlers")}},
            {"data": {**form, "token": before}},
            *(
                {"data": form, "headers": {"sec-fetch-site": site}}
                for site in ("cross-site", "same-site")
            ),
            *(
                {"data": form, "headers": {"origin": origin}}
                for origin in ("https://evil.test", "null", "http://[")
            ),
        ]
        for path in POSTS:
            assert (await station.world.post(f"/ui{path}", data=form)).status_code == 303
            refused = [await someone.http.post(f"/ui{path}", **each) for each in wrong]
            assert [answer.status_code for answer in refused] == [403] * len(wrong), path
            bare = await someone.http.post(f"/ui{path}", headers={"content-type": "text/plain"})
            assert bare.status_code == 415
        assert station.count("audit") == 0


async def test_viewer_key_sees_all_pages_and_cannot_act(start: Start) -> None:
    async with start(**ON) as station:
        made = await station.submit()
        someone = person(station)
        await someone.sign_in(VIEWER_KEY)
        for path in (*PAGES, f"/predictions/{made['id']}"):
            page = await someone.see(path)
            assert {*buttons(page)} <= {"Sign out", "Filter", "Show"}, path
            assert "guest, looks only" in page
        for path in POSTS:
            answer = await someone.act(path)
            assert answer.status_code == 403
            assert "may look" in answer.text
        assert station.count("audit") == 0


async def test_removed_key_ends_its_sessions(start: Start) -> None:
    async with start(**ON) as station:
        someone = person(station)
        await someone.sign_in()
        await someone.see("/handlers")
        cookies = someone.http.cookies
    async with start(**ON, RECEIVER_API_KEYS="another-key-of-this-receiver") as station:
        again = person(station, cookies=cookies)
        await again.see("/handlers", 303)


async def test_session_expires_after_twelve_hours(start: Start, on_sqlite: None) -> None:  # noqa: ARG001
    async with start(**ON) as station:
        someone = person(station)
        await someone.sign_in()
        station.clock.ahead = LONGEST - 60
        await someone.see("/handlers")
        station.clock.ahead = LONGEST + 60
        await someone.see("/handlers", 303)


async def test_sign_out_deletes_the_cookie(start: Start) -> None:
    async with start(**ON) as station:
        someone = person(station)
        await someone.sign_in()
        await someone.press("/handlers", "Sign out")
        await someone.see("/handlers", 303)


async def test_forged_or_malformed_cookie_is_rejected(start: Start) -> None:
    async with start(**ON) as station:
        for cookie in ("", "x", "e30.AAAA", "ImEi.x", "a" * 4000):
            await person(station, cookies={COOKIE: cookie}).see("/handlers", 303)


async def test_cookie_is_secure_http_only_and_for_this_host_only(start: Start) -> None:
    async with start(**ON) as station:
        signed = await person(station).sign_in()
        said = signed.headers["set-cookie"]
        assert said.startswith(f"{COOKIE}=")
        kept = {part.strip().lower() for part in said.split(";")[1:]}
        assert {"httponly", "secure", "samesite=strict", "path=/", f"max-age={LONGEST}"} <= kept
        assert not any(part.startswith("domain") for part in kept)
        assert API_KEY not in said


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("http://localhost:8000", DEV_COOKIE),
        ("http://127.0.0.1:8000", DEV_COOKIE),
        ("https://localhost:8000", COOKIE),
        ("http://box.lan:8000", COOKIE),
    ],
)
async def test_dev_mode_allows_plain_http_on_loopback_only(
    start: Start, address: str, name: str
) -> None:
    async with start(RECEIVER_DEV="1") as station:
        answer = await station.world.get(f"{address}/ui/sign-in")
        said = answer.headers["set-cookie"]
        assert said.startswith(f"{name}=")
        assert ("secure" in said.lower()) == (name == COOKIE)
        assert ("plain http" in answer.text) == (address == "http://box.lan:8000")


async def test_plain_http_without_dev_mode_shows_a_warning(start: Start) -> None:
    async with start(**ON) as station:
        assert "plain http" in await person(station, base_url="http://127.0.0.1").see("/sign-in")


async def test_failed_sign_ins_are_rate_limited_and_logged(start: Start, logged: Logged) -> None:
    async with start(**ON, RECEIVER_LIMIT_UNPROVED_PER_MINUTE="3") as station:
        someone = person(station)
        answers = [await someone.sign_in("wrong") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [401, 401, 401, 429]
        assert "no key of this receiver" in answers[0].text
        assert int(answers[3].headers["retry-after"]) > 0
        assert (await station.world.get("/v1/predictions")).status_code == 429
        assert (await someone.sign_in()).status_code == 303  # a valid key is not limited
    said = [line for line in logged if line["event"] == "dashboard.action"]
    assert [line["result"] for line in said] == ["unauthorized"] * 3 + ["done"]


async def test_sign_in_does_not_redirect_to_other_sites(start: Start) -> None:
    elsewhere = ("https://evil.test/", "//evil.test", "/\\evil.test", "javascript:1", "/\n/evil")
    async with start(**ON) as station:
        for after in elsewhere:
            answer = await person(station).sign_in(after=after)
            assert answer.headers["location"] == "/ui/"


async def test_every_page_has_security_headers_and_no_inline_script_or_style(start: Start) -> None:
    async with start(**ON) as station:
        someone = person(station)
        await someone.sign_in()
        for path in (
            *PAGES,
            "/sign-in",
            "/nothing",
            f"/predictions/{UNKNOWN}",
            "/predictions?status=x",
        ):
            answer = await someone.http.get(f"/ui{path}")
            policy = answer.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src=)", answer.text), path


async def test_actions_are_audited_and_logged_as_is_the_sign_in(
    start: Start, logged: Logged
) -> None:
    async with start(**{**ON, **NAMED}) as station:
        made = await station.submit()
        someone: Person = person(station)
        await someone.sign_in()
        await someone.act(f"/predictions/{made['id']}/cancel")
        await someone.act(f"/predictions/{made['id']}/erase")
        rows = station.rows("SELECT who, action, target, result FROM audit ORDER BY id")
        lines = [line for line in logged if line["event"] == "dashboard.action"]
        assert [tuple(row)[1:] for row in rows][-1][0] == "erase"
        assert {row[0] for row in rows} == {"web"}
        assert [line["action"] for line in lines] == ["sign in", "cancel", "erase"]
        assert "Done by hand" in await someone.see("")


async def test_only_static_files_of_the_pages_are_served(start: Start) -> None:
    async with start(**ON) as station:
        page = (await station.world.get("/ui/sign-in")).text
        for address in re.findall(r'(?:src|href)="(/ui/static/[^"]+)"', page):
            answer = await station.world.get(address)
            assert answer.status_code == 200
            assert "immutable" in answer.headers["cache-control"]
        for name in ("vendored.toml", "..%2Fsite.py", "nothing.css"):
            assert (await station.world.get(f"/ui/static/{name}")).status_code == 404
