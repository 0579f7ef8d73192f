"""The live stream tells open pages that something has changed, without any content."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.types import Message

from receiver import Event, on
from tests.conftest import Start
from tests.dashboard.people import ON, VIEWER_KEY, Person, hidden, person
from tests.patience import PATIENCE
from tests.receiving import Station

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]


class Listening:
    """The stream of one page, read line by line."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[str] = asyncio.Queue()

    async def until(self, wanted: str) -> list[str]:
        seen: list[str] = []
        async with asyncio.timeout(PATIENCE):
            while wanted not in seen:
                seen.append(await self.lines.get())
        return seen


@asynccontextmanager
async def listening(station: Station, someone: Person, query: str) -> AsyncIterator[Listening]:
    """Read a stream by ASGI directly, because httpx in process waits for the whole response."""
    found = Listening()
    gone = asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            await found.lines.put(f"status {message['status']}")
        for line in message.get("body", b"").decode().split("\n"):
            await found.lines.put(line)

    cookies = "; ".join(f"{name}={value}" for name, value in someone.http.cookies.items())
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "https",
        "path": "/ui/live",
        "raw_path": b"/ui/live",
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(b"host", b"hooks.test"), (b"cookie", cookies.encode())],
        "client": ("203.0.113.9", 5),
        "server": ("hooks.test", 443),
    }
    task = asyncio.create_task(station.app(scope, receive, send))
    try:
        yield found
    finally:
        gone.set()
        await asyncio.wait_for(task, PATIENCE)


def place_of(page: str) -> str:
    """Return the place from which a page's stream begins."""
    return page.partition("/ui/live?after=")[2].partition('"')[0]


@on("succeeded", name="tell")
async def tell(event: Event) -> None:
    assert event.id


async def test_stream_reports_a_change_without_its_content(start: Start) -> None:
    async with start(tell, **ON) as station:
        someone = person(station)
        await someone.sign_in(VIEWER_KEY)
        async with listening(station, someone, "") as stream:
            assert (await stream.until("status 200")) == ["status 200"]
            await stream.until(": live")
            words = {"note": "a secret id: 9"}
            sent = await station.submitted("fal", "a secret prompt", metadata=words)
            seen = await stream.until("event: changed")
            await station.push(sent)
            seen += await stream.until("event: changed")
        places = [line.removeprefix("id: ") for line in seen if line.startswith("id")]
        assert all(place.isdecimal() for place in places)
        assert {line.partition(":")[0] for line in seen} <= {"", "id", "event", "data"}
        assert not any("secret" in line or "pred_" in line for line in seen)


async def test_stream_reports_changes_since_the_page_was_rendered(start: Start) -> None:
    async with start(**ON) as station:
        someone = person(station)
        await someone.sign_in()
        place = place_of(await someone.see("/predictions"))
        await station.submitted("fal")
        async with listening(station, someone, f"after={place}") as stream:
            await stream.until("event: changed")


async def test_stream_of_one_prediction_ignores_others(start: Start) -> None:
    async with start(**ON) as station:
        someone = person(station)
        await someone.sign_in()
        one = await station.submitted("fal", "the one")
        await station.until(one.prediction_id, "processing")
        place = place_of(await someone.see("/predictions"))
        await station.push(await station.submitted("fal", "another"))
        query = f"prediction={one.prediction_id}&after={place}"
        async with listening(station, someone, query) as stream:
            assert "event: changed" not in await stream.until(": live")
            await station.push(one)
            await stream.until("event: changed")
        await someone.see("/live", 422, prediction="x")
        head = await asyncio.wait_for(someone.http.head("/ui/live"), PATIENCE)
        assert (head.status_code, head.headers["cache-control"]) == (200, "no-store")


async def test_form_token_is_the_same_on_every_page_load(start: Start) -> None:
    async with start(**ON) as station:
        someone = person(station)
        await someone.sign_in()
        first, second = [hidden(await someone.see("/handlers"), "token") for _ in range(2)]
        assert first == second
