"""The list of events, and the live stream: no gaps, no repeats, bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import pytest
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from receiver import Context, Dead, Event, on
from receiver.http import connection, live
from receiver.http.connection import protocol
from receiver.http.live import LiveStream, StreamFilter
from receiver.model.errors import StoreUnavailable
from receiver.model.tasks import Wakeups
from receiver.store.attempts import AttemptNews
from receiver.store.changes import ChangeLog, StatusChange
from receiver.store.engine import AttemptName
from receiver.store.postgres.engine import PostgresStore
from tests.conftest import Start
from tests.emulator.serving import serve
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.receiving import API_KEY, Json, Network, Station, eventually, receiving

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]


class Ear:
    """A client of the stream, on ASGI; it reads only while `may_take` is set."""

    def __init__(self, station: Station, query: str = "", after: object = None) -> None:
        headers = [(b"authorization", f"Bearer {API_KEY}".encode())]
        if after is not None:
            headers.append((b"last-event-id", str(after).encode()))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "path": "/v1/events/stream",
            "raw_path": b"/v1/events/stream",
            "root_path": "",
            "scheme": "http",
            "query_string": query.encode(),
            "headers": headers,
            "client": ("203.0.113.9", 50000),
            "server": ("hooks.test", 80),
            "app": station.app,
        }
        self.status: int | None = None
        self.ended = False
        self.said: list[bytes] = []
        self.may_take = asyncio.Event()
        self.may_take.set()
        self._gone = asyncio.Event()
        self._asked = False
        self._task = asyncio.create_task(station.app(scope, self._receive, self._send))

    async def _receive(self) -> Json:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.may_take.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.said.append(message.get("body", b""))
        self.ended = not message.get("more_body", False)

    @property
    def text(self) -> str:
        return b"".join(self.said).decode()

    @property
    def messages(self) -> list[Json]:
        """The messages received, without the one that gives the start position."""
        return [message for message in parse(self.text) if message["event"] != "stream.open"]

    @property
    def begins(self) -> int:
        return next(int(message["id"]) for message in parse(self.text))

    async def until(self, count: int) -> list[Json]:
        return await eventually(lambda: self.messages, lambda found: len(found) >= count)

    async def live(self) -> Ear:
        await eventually(lambda: ": live" in self.text or self.ended)
        return self

    async def leave(self) -> None:
        self.may_take.set()
        self._gone.set()
        await self._task


def parse(text: str) -> Iterator[Json]:
    """Parse server-sent events as the standard says."""
    for block in text.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in block.split("\n") if line[:1] not in {"", ":"}
        )
        if "data" in fields:
            data = json.loads(fields["data"])
            yield {"id": int(fields["id"]), "event": fields["event"], "data": data}


@asynccontextmanager
async def listening(station: Station, query: str = "", after: object = None) -> AsyncIterator[Ear]:
    ear = await Ear(station, query, after).live()
    try:
        yield ear
    finally:
        await ear.leave()


async def whole(station: Station, prompt: str, provider: str = "eachlabs", **more: Any) -> str:
    """Submit a prediction, let it succeed, and return its id."""
    sent = await station.submitted(provider, prompt, **more)
    assert (await station.push(sent)).status_code == 200
    return sent.prediction_id


def told(messages: list[Json]) -> list[tuple[str, str]]:
    return [(m["data"]["prediction"]["id"], m["event"].rpartition(".")[2]) for m in messages]


WHOLE: Final = ["queued", "submitting", "processing", "succeeded"]


async def test_stream_sends_every_status_change_and_the_terminal_event(start: Start) -> None:
    async with start() as station, listening(station) as ear:
        prediction = await whole(station, "a lighthouse", metadata={"kind": "avatar"})
        messages = await ear.until(4)
        assert told(messages) == [(prediction, status) for status in WHOLE]
        *changes, end = [message["data"] for message in messages]
        assert changes[0]["prediction"] == {
            "id": prediction,
            "provider": "eachlabs",
            "model": "nano-banana",
            "status": "queued",
            "metadata": {"kind": "avatar"},
        }
        assert [change["type"] for change in changes] == [f"prediction.{s}" for s in WHOLE[:3]]
        assert end["id"] == f"evt_{prediction[5:]}"
        assert end["type"] == "prediction.succeeded"
        assert end["channel"] == "webhook"
        assert end["prediction"] == await station.read(prediction)


async def test_reconnect_with_last_event_id_has_no_gap_and_no_repeat(
    start: Start,
) -> None:
    heard: list[Json] = []
    async with start() as station:
        async with listening(station) as ear:
            first = await whole(station, "before")
            heard += await ear.until(4)
        second = await whole(station, "meanwhile")
        async with listening(station, after=heard[-1]["id"]) as ear:
            third = await whole(station, "after")
            heard += await ear.until(8)
        assert told(heard) == [(p, status) for p in (first, second, third) for status in WHOLE]


async def test_reconnect_after_a_server_restart_resumes_the_stream(start: Start) -> None:
    async with start() as station, listening(station) as ear:
        first = await whole(station, "before")
        last = (await ear.until(4))[-1]["id"]
        second = await station.submitted("fal", "under way")
    async with start() as station:
        assert (await station.push(second)).status_code == 200
        async with listening(station, after=last) as ear:
            assert told(await ear.until(4)) == [(second.prediction_id, s) for s in WHOLE]
        async with listening(station, after=0) as ear:
            assert {name for name, _ in told(await ear.until(8))} == {first, second.prediction_id}


async def test_reconnect_before_any_message_resumes_at_the_start_position(start: Start) -> None:
    async with start() as station:
        await whole(station, "before")
        async with listening(station) as ear:
            assert ear.messages == []
    async with start() as station:
        missed = await whole(station, "meanwhile")
        for _ in range(2):  # the same position can be used again
            async with listening(station, after=ear.begins) as back:
                assert told(await back.until(4)) == [(missed, status) for status in WHOLE]
                assert back.begins == ear.begins


@pytest.mark.usefixtures("on_sqlite")
@pytest.mark.parametrize(
    ("query", "heard"),
    [
        ("type=succeeded", [("fal", "succeeded"), ("eachlabs", "succeeded")]),
        (
            "type=prediction.queued,processing&provider=fal",
            [("fal", "queued"), ("fal", "processing")],
        ),
        ("provider=eachlabs,oxen&type=succeeded", [("eachlabs", "succeeded")]),
        ("metadata.kind=avatar&type=queued", [("fal", "queued")]),
        ("metadata.big=true&metadata.kind=avatar&type=queued", [("fal", "queued")]),
        ("metadata.big=false&type=queued", []),
    ],
)
async def test_stream_filters_by_type_provider_and_metadata(
    start: Start, query: str, heard: list[tuple[str, str]]
) -> None:
    async with start() as station, listening(station, query) as ear, listening(station) as all_:
        await whole(station, "one", "fal", metadata={"kind": "avatar", "big": True})
        await whole(station, "two", "eachlabs", metadata={"kind": "banner"})
        last = (await all_.until(8))[-1]["id"]
        found = await ear.until(len(heard))
        said = [(m["data"]["prediction"]["provider"], m["event"].rpartition(".")[2]) for m in found]
        assert said == heard
        async with listening(station, query, after=0) as again:  # the store returns the same
            assert await again.until(len(heard)) == found
        assert all(message["id"] <= last for message in found)


async def test_stream_filters_by_prediction(start: Start) -> None:
    async with start() as station:
        await whole(station, "one")
        two = await whole(station, "two")
        async with listening(station, f"prediction={two}", after=0) as ear:
            found = await ear.until(4)
        assert {message["data"]["prediction"]["id"] for message in found} == {two}


@pytest.mark.usefixtures("on_sqlite")
@pytest.mark.parametrize(
    ("query", "after", "words"),
    [
        ("prediction=one", None, "prediction must be like"),
        ("type=exploded", None, "type must be like"),
        ("type=failed%0A", None, "type"),
        ("kind=avatar", None, "`kind`"),
        ("deliveries=1", None, "deliveries must be one of"),
        ("", "evt_what", "Last-Event-ID"),
        ("", "-1", "Last-Event-ID"),
        ("", "9" * 40, "Last-Event-ID"),
    ],
)
async def test_invalid_stream_request_is_rejected_before_the_stream_begins(
    start: Start, query: str, after: str | None, words: str
) -> None:
    async with start() as station:
        headers = {} if after is None else {"last-event-id": after}
        answer = await station.http.get(f"/v1/events/stream?{query}", headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (
            422,
            "application/problem+json",
        )
        assert words in answer.json()["detail"]
        assert (await station.world.get("/v1/events/stream")).status_code == 401
        assert (await station.world.get("/v1/events")).status_code == 401
        head = await station.http.head("/v1/events/stream")
        assert (head.status_code, head.headers["content-type"][:17]) == (200, "text/event-stream")


@pytest.mark.parametrize(("marked", "after"), [(2, 1), (0, 1000)])
async def test_resume_from_an_unavailable_position_sends_a_gap_message(
    start: Start, marked: int, after: int
) -> None:
    async with start() as station:
        await whole(station, "one")
        station.edit(f"DELETE FROM changes WHERE seq <= {marked}")
        station.edit(f"INSERT INTO watermarks (name, value) VALUES ('changes', {marked})")
        async with listening(station, after=after) as ear:
            [gap, *more] = await ear.until(1 if after > 4 else 3)
            assert gap["event"] == "stream.gap"
            assert gap["data"] == {"after": after, "until": gap["id"]}
            assert gap["id"] == (marked or 4)
            assert [m["id"] for m in more] == list(range(marked + 1, 5)) * (after < 4)


async def test_slow_reader_is_disconnected_and_others_continue(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_MOST_WAITING", 10)
    async with start() as station, listening(station) as slow, listening(station) as quick:
        await whole(station, "one")
        last = (await eventually(lambda: slow.messages, lambda m: len(m) == 4))[-1]["id"]
        slow.may_take.clear()
        for number in range(2, 8):  # up to ten are on their way when it stops reading
            await whole(station, f"more {number}")
            assert len(await quick.until(4 * number)) == 4 * number
        slow.may_take.set()
        await eventually(lambda: slow.ended)
        assert ": cut" in slow.text
        seen = max(message["id"] for message in slow.messages)
        async with listening(station, after=seen) as back:
            found = slow.messages + await back.until(28 - len(slow.messages))
        assert [message["id"] for message in found] == [m["id"] for m in quick.messages]
        assert last in [message["id"] for message in found]


@pytest.mark.usefixtures("on_sqlite")
async def test_shutdown_ends_open_streams(start: Start) -> None:
    async with start() as station:
        ear = await Ear(station).live()
        station.app.state.release()
        await eventually(lambda: ear.ended)
        await ear.leave()


@pytest.mark.usefixtures("on_sqlite")
async def test_idle_stream_sends_keep_alive_comments(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "KEEP_ALIVE", 0.05)
    async with start() as station, listening(station) as ear:
        await eventually(lambda: ear.text.count(": still here") > 2)
        assert ear.messages == []


@pytest.mark.usefixtures("on_sqlite")
async def test_stream_over_the_limit_of_readers_returns_503(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MOST_READERS", 1)
    async with start() as station:
        async with listening(station):
            answer = await station.http.get("/v1/events/stream")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
        async with listening(station) as ear:
            assert ear.status == 200


class TakesOne(Ear):
    """A client that stops reading after the first message."""

    async def _send(self, message: Any) -> None:
        await super()._send(message)
        if len(self.said) == 1:
            self.may_take.clear()


async def test_catching_up_reader_that_stops_reading_buffers_few_events(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_MOST_WRITTEN", 2)
    asked: list[int] = []
    real = ChangeLog.events

    async def counted(changes: ChangeLog, names: Any) -> Any:
        asked.append(len(names))
        return await real(changes, names)

    async with start() as station:
        for number in range(5):
            await whole(station, f"one of {number}")
        monkeypatch.setattr(ChangeLog, "events", counted)
        ear = TakesOne(station, "type=succeeded", after=0)
        await eventually(lambda: asked)
        assert asked == [2]
        ear.may_take.set()
        assert len(await ear.until(5)) == 5
        assert asked == [2, 2, 1]
        await ear.leave()


async def test_change_log_is_not_polled_without_readers() -> None:
    class Quiet:
        asked = 0

        async def end(self) -> int:
            self.asked += 1
            return 0

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    quiet: Any = Quiet()
    wakeups = Wakeups()
    nobody = LiveStream(quiet, AttemptNews(quiet, wakeups), wakeups)
    task = asyncio.create_task(nobody.run())
    for _ in range(50):
        wakeups.wake_all("changes")
        await asyncio.sleep(0)
    task.cancel()
    assert quiet.asked == 0


@on("*", name="tests.recovers")
async def recovers(_: Event, ctx: Context) -> None:
    if ctx.attempt < 3:
        raise ConnectionError(f"nobody there at {ctx.attempt}")


@on("*", name="tests.gives_up")
async def gives_up(_: Event) -> None:
    raise Dead("there is no such channel")


def attempts(messages: list[Json]) -> dict[str, list[tuple[int, str, str]]]:
    """Return number, state and reason of each attempt, by handler."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    for message in messages:
        if delivery := message["data"].get("delivery"):
            assert message["event"] == message["data"]["type"] == f"delivery.{delivery['state']}"
            told = (delivery["number"], delivery["state"], delivery["reason"])
            found.setdefault(delivery["handler"], []).append(told)
    return found


ATTEMPTS: Final = {
    "tests.recovers": [
        (1, "pending", "ConnectionError: nobody there at 1"),
        (2, "pending", "ConnectionError: nobody there at 2"),
        (3, "done", ""),
    ],
    "tests.gives_up": [(1, "dead", "there is no such channel")],
}


async def test_stream_sends_delivery_attempts_if_requested(start: Start) -> None:
    async with (
        start(recovers, gives_up) as station,
        listening(station, "deliveries=true&provider=fal&metadata.kind=avatar") as ear,
        listening(station) as plain,
    ):
        await whole(station, "of another kind", "fal", metadata={"kind": "banner"})
        prediction = await whole(station, "wanted", "fal", metadata={"kind": "avatar"})
        messages = await ear.until(8)
        assert attempts(messages) == ATTEMPTS
        assert told(messages)[:4] == [(prediction, status) for status in WHOLE]  # the event first
        first = next(m["data"] for m in messages if m["event"] == "delivery.pending")
        assert first["delivery"]["result"] == "error"
        assert first["prediction"]["id"] == prediction
        assert first["prediction"]["metadata"] == {"kind": "avatar"}
        assert len(await plain.until(8)) == 8
        assert attempts(plain.messages) == {}
        query, last = "deliveries=true&metadata.kind=later", messages[-1]["id"]
        async with listening(station, query, after=last) as back:
            more = await whole(station, "later", "fal", metadata={"kind": "later"})
            assert told(await back.until(8))[:4] == [(more, status) for status in WHOLE]


async def test_stream_sends_delivery_attempts_of_another_process(
    database: Database, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Counter[str]()
    notify = PostgresStore.notify

    async def counted(store: PostgresStore, ended: list[AttemptName]) -> None:
        sent["told" if ended else "asked"] += 1
        await notify(store, ended)

    monkeypatch.setattr(PostgresStore, "notify", counted)
    async with (
        receiving(database, network, [recovers, gives_up], dispatch=False) as front,
        receiving(database, network, [recovers, gives_up]) as worker,
    ):
        await whole(front, "while nobody follows")
        rows = "SELECT state FROM deliveries WHERE state IN ('done', 'dead')"
        await eventually(lambda: len(worker.rows(rows)) == 2)
        assert sent == {}  # without readers, the end of an attempt notifies no process
        async with listening(front, "deliveries=true") as ear:
            news = worker.app.state.release.__self__._http.parts.live._attempts  # noqa: SLF001 - nothing public shows it
            await eventually(lambda: news._followed_elsewhere)  # noqa: SLF001 - likewise
            await whole(front, "while somebody does")
            assert attempts(await ear.until(8)) == ATTEMPTS
        assert sent["told"] >= 1


async def test_stream_continues_after_the_store_was_unavailable(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: ChangeLog, *__: Any) -> Any:
        raise StoreUnavailable("the disk is on fire")

    async with start() as station, listening(station) as ear:
        with monkeypatch.context() as patch:
            patch.setattr(ChangeLog, "events", broken)
            await whole(station, "while it is broken")
        assert len(await ear.until(4)) == 4
        with monkeypatch.context() as patch:
            patch.setattr(ChangeLog, "end", broken)
            assert (await station.http.get("/v1/events/stream")).status_code == 503


# --- the list ---


async def test_events_are_listed_newest_first_page_by_page(start: Start) -> None:
    async with start() as station:
        names = [await whole(station, f"number {n}") for n in range(5)]
        await station.submitted("fal", "not ended")
        found: list[Json] = []
        cursor = ""
        for count in (2, 2, 1):
            page = (await station.http.get(f"/v1/events?limit=2{cursor}")).json()
            assert len(page["data"]) == count
            found += page["data"]
            cursor = f"&cursor={page['next_cursor']}"
        assert cursor == "&cursor=None"
        assert [event["prediction"]["id"] for event in found] == names[::-1]
        assert found[0]["prediction"] == await station.read(names[-1])
        assert set(found[0]) == {"id", "type", "time", "channel", "prediction"}


@pytest.mark.usefixtures("on_sqlite")
async def test_event_list_filters_by_type_provider_and_metadata(start: Start) -> None:
    async with start() as station:
        one = await whole(station, "one", "fal", metadata={"kind": "avatar", "n": 5})
        two = await whole(station, "two", "eachlabs", metadata={"kind": "banner"})
        for query, names in {
            "provider=fal": [one],
            "type=failed": [],
            "type=succeeded": [two, one],
            "type=prediction.failed,prediction.succeeded": [two, one],
            "metadata.kind=banner": [two],
            "metadata.n=5": [one],
            "metadata.m=5": [],
        }.items():
            answer = await station.http.get(f"/v1/events?{query}")
            found = answer.json()
            assert [event["prediction"]["id"] for event in found["data"]] == names, query
            assert found["next_cursor"] is None


async def test_long_event_search_stops_early_and_returns_a_cursor(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.http.routes.events._MOST_LOOKED_AT", 2)
    monkeypatch.setattr("receiver.store.changes._PAGE", 2)
    async with start() as station:
        rare = await whole(station, "rare", metadata={"kind": "rare"})
        for number in range(3):
            await whole(station, f"common {number}")
        first = (await station.http.get("/v1/events?metadata.kind=rare")).json()
        assert first["data"] == []
        path = f"/v1/events?metadata.kind=rare&cursor={first['next_cursor']}"
        second = (await station.http.get(path)).json()
        assert [event["prediction"]["id"] for event in second["data"]] == [rare]


@pytest.mark.usefixtures("on_sqlite")
@pytest.mark.parametrize(
    "query", ["type=queued", "limit=0", "limit=101", "cursor=x", "cursor=-5", "what=ever"]
)
async def test_invalid_event_list_query_returns_422(start: Start, query: str) -> None:
    async with start() as station:
        answer = await station.http.get(f"/v1/events?{query}")
        assert (answer.status_code, answer.json()["type"]) == (
            422,
            "urn:receiver:problem:invalid-request",
        )


# --- on a real socket ---


@contextmanager
def connected(port: int, path: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        yield sock


def test_client_that_does_not_read_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_SLOWEST_READ", 0.2)
    ended = asyncio.Event()

    async def endless(_: object) -> StreamingResponse:
        async def frames() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 100_000
                    await asyncio.sleep(0)
            finally:
                ended.set()

        return StreamingResponse(frames())

    app = Starlette(routes=[Route("/endless", endless)])
    with serve(app, http=protocol()) as port, connected(port, "/endless") as sock:
        deadline = time.monotonic() + PATIENCE
        while not ended.is_set():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        sock.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1_000_000):
                pass


def test_metadata_filter_compares_text_or_the_json_of_a_value() -> None:
    move = StatusChange(1, "queued", 0.0, "pred_1", "fal", "m", {"a": None, "b": 1.5, "c": "x"})
    for metadata, fits in (
        ({"a": "null"}, True),
        ({"b": "1.5"}, True),
        ({"c": "x", "a": "null"}, True),
        ({"c": "y"}, False),
        ({"d": ""}, False),
    ):
        assert (move in StreamFilter(metadata=metadata)) is fits
