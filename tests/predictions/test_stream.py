"""Oxen's event stream: connected before the first submit, and reconnected whenever it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver.observability.runtime import Runtime
from receiver.predictions.stream import Listener
from receiver.providers.declared import Api
from receiver.providers.oxen import Oxen
from receiver.store.predictions import PredictionStore
from receiver.store.sqlite.engine import SQLiteStore
from tests.conftest import Logged, Start
from tests.patience import PATIENCE
from tests.receiving import PICTURE, Network, breaks, eventually, reply

pytestmark = pytest.mark.anyio


@pytest.fixture
def reconnects_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("receiver.predictions.stream._BASE", 0.01)


async def test_stream_is_connected_before_the_first_submit(
    start: Start, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.predictions.stream._READY_TIMEOUT", PATIENCE)
    connecting = asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        await connecting.wait()
        return await network.by_emulator(request)

    network.script("oxen.stream", slowly)
    async with start() as station:
        submitting = asyncio.create_task(station.submit("oxen"))
        await eventually(lambda: network.count("oxen.stream"))
        await eventually(lambda: station.rows("SELECT 1 FROM predictions WHERE submits = 1"))
        await station.submit("eachlabs")  # takes the same steps, but has no stream to wait for
        assert not submitting.done()
        assert network.count("oxen.submit") == 0
        connecting.set()
        assert (await submitting)["status"] == "processing"
    kinds = [kind for kind, _ in network.calls if kind in {"oxen.stream", "oxen.submit"}]
    assert kinds == ["oxen.stream", "oxen.submit"]


@pytest.mark.usefixtures("reconnects_soon")
@pytest.mark.parametrize(
    "answer", [breaks(httpx.ConnectError), reply({}, 401), reply(text="no stream"), reply({}, 302)]
)
async def test_stream_that_is_down_does_not_block_submits(
    start: Start, network: Network, answer: object
) -> None:
    network.always("oxen.stream", answer)  # type: ignore[arg-type]
    network.always("oxen.poll", network.ends)
    async with start(RECEIVER_POLL_AFTER="0.05") as station:
        await eventually(lambda: network.count("oxen.stream") >= 3)
        prediction = await station.submit("oxen")
        found = await station.until(prediction["id"], "succeeded")
        assert found["channel"] == "poll"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ({"status": "succeeded", "url": PICTURE, "model": "nano-banana"}, "succeeded"),
        ({"status": "failed", "error": "Insufficient credits"}, "failed"),
    ],
)
async def test_stream_event_ends_its_prediction(
    start: Start, network: Network, data: dict[str, str], status: str
) -> None:
    async with start() as station:
        sent = await station.submitted("oxen")
        network.broadcast(generation_id=sent.id, media_type="image", **data)
        found = await eventually(
            lambda: station.rows("SELECT status, channel FROM predictions"),
            lambda rows: rows[0][0] == status,
        )
        assert found == [(status, "sse")]
    assert network.count("oxen.poll") == 0


async def test_stream_event_before_the_submit_answer_ends_its_prediction(
    start: Start, network: Network
) -> None:
    answering = asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        answer = await network.by_emulator(request)
        network.end_and_broadcast(network.sent[0])
        await answering.wait()
        return answer

    network.script("oxen.submit", slowly)
    async with start() as station:
        submitting = asyncio.create_task(station.submit("oxen"))
        await eventually(lambda: network.streams and network.sent)
        await eventually(lambda: not network.streams[0].unread)
        answering.set()
        await submitting
        found = await eventually(
            lambda: station.rows("SELECT status, channel FROM predictions"),
            lambda rows: rows[0][0] == "succeeded",
        )
        assert found == [("succeeded", "sse")]


async def test_unknown_and_malformed_stream_events_are_ignored(
    start: Start, network: Network, logged: Logged
) -> None:
    async with start() as station:
        sent = await station.submitted("oxen")
        network.broadcast_raw("deployment_updated", '{"deployment_id": "x"}')
        network.broadcast_raw("deployment_updated", json.dumps({"generation_id": sent.id}))
        network.broadcast(generation_id="another-users", status="succeeded", url=PICTURE)
        for garbage in ("not json", "[]", "{}", "[" * 5000, '{"generation_id": 7}', "\ud7ff\x00"):
            network.broadcast_raw("media_generation_completed", garbage)
        network.broadcast(generation_id="x" * 500, status="succeeded")
        network.broadcast(generation_id=sent.id, status="an unknown status")
        network.end_and_broadcast(sent)
        await eventually(lambda: station.rows("SELECT 1 FROM events"))
        assert station.count("callbacks") == 1
        assert network.count("oxen.stream") == 1
    assert not [line for line in logged if line["log_level"] == "error"]


async def test_stream_event_without_a_url_is_followed_by_a_poll(
    start: Start, network: Network
) -> None:
    network.always("oxen.poll", network.ends)
    async with start() as station:
        sent = await station.submitted("oxen")
        network.broadcast(generation_id=sent.id, status="succeeded")
        await eventually(lambda: station.rows("SELECT 1 FROM events WHERE channel = 'poll'"))


async def test_lost_stream_is_reconnected_and_its_predictions_are_polled(
    start: Start, network: Network
) -> None:
    async with start() as station:
        missed = await station.submitted("oxen", "missed")
        later = await station.submitted("oxen", "later")
        await eventually(lambda: network.streams)
        network.script("oxen.poll", network.ends)
        network.cut()
        await eventually(lambda: network.count("oxen.poll") >= 2)
        await eventually(lambda: station.count("events") == 1)
        polled = station.one("SELECT provider_id FROM predictions WHERE channel = 'poll'")
        (other,) = (sent for sent in (missed, later) if sent.id != polled)
        network.end_and_broadcast(other)
        await eventually(lambda: station.count("events") == 2)
    assert network.count("oxen.stream") == 2


async def test_stream_ended_by_the_provider_is_reconnected(start: Start, network: Network) -> None:
    async with start():
        [stream] = await eventually(lambda: network.streams)
        stream.end()
        await eventually(lambda: network.streams and network.streams[0] is not stream)


class _Hastened(PredictionStore):
    """Counts how often the predictions at the provider were made due."""

    times = 0

    async def hasten(self, provider: str, now: float) -> None:
        assert provider == "oxen"
        await super().hasten(provider, now)
        self.times += 1


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(
    tmp_path: Path, answer: Answer, silence: float = PATIENCE
) -> AsyncIterator[tuple[Listener, _Hastened, asyncio.Event]]:
    """Run a listener, with a server that answers with `answer`.

    Yields the listener, its store, and the event that wakes the poller.
    """
    inbox: Any = object()  # no event of the server reaches it
    store = SQLiteStore(str(tmp_path / "receiver.db"), lambda _: None)
    runtime = Runtime(random=lambda: 0.0)
    hastened = store.predictions = _Hastened(store)
    await store.start()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, httpx.AsyncClient() as client:
        oxen = Oxen(Api(f"http://127.0.0.1:{port}", {}), None)
        listener = Listener("oxen", oxen, client, inbox, store, runtime, silence=silence)
        with runtime.wakeups.listen("poll") as polled:
            task = asyncio.create_task(listener.run())
            yield listener, hastened, polled
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await store.stop()


@pytest.mark.usefixtures("reconnects_soon")
async def test_last_event_id_is_sent_on_reconnect_until_it_is_refused(tmp_path: Path) -> None:
    answers = [
        (200, "id: 7\ndata: x\n\nid: 8\ndata: cut off"),
        (200, "data: that is still 7\n\nid: no\theader\n\n"),
        (409, ""),
        (200, "id: 9\n\nid\n\n"),
        (200, ""),
    ]
    ids: list[str] = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        ids.append(request.partition("last-event-id: ")[2].partition("\r\n")[0])
        status, text = answers[min(len(ids), len(answers)) - 1]
        head = f"HTTP/1.1 {status} X\r\ncontent-type: text/event-stream\r\n\r\n"
        writer.write((head + text).encode())
        writer.close()

    async with listening(tmp_path, speak):
        await eventually(lambda: len(ids) >= len(answers))
    assert ids[: len(answers)] == ["", "7", "7", "", ""]


async def test_silent_stream_is_reconnected(tmp_path: Path) -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n: hello\n\n")
        await reader.read()
        writer.close()

    async with listening(tmp_path, swallow, silence=0.05) as (listener, hastened, polled):
        await eventually(lambda: hastened.times >= 2)
        await polled.wait()
        await eventually(listener.ready)
