"""The client against a running receiver: in this process, and over sockets."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from receiver import AsyncReceiver, ClientError, Event, Receiver, on
from receiver.client import Message
from tests.conftest import Start
from tests.http.test_webhooks import listening
from tests.receiving import API_KEY, Station, eventually

pytestmark = pytest.mark.anyio


def within(station: Station, key: str = API_KEY) -> AsyncReceiver:
    return AsyncReceiver("https://hooks.test", key, transport=httpx.ASGITransport(station.app))


def readers(station: Station) -> int:
    """Return the number of readers of the live stream."""
    return int(station.app.state.release.__self__._http.parts.live._count)  # noqa: SLF001 - no public name


@on("*", name="tests.handles")
def handles(_: Event) -> None: ...


async def heard_by(client: AsyncReceiver, count: int, after: int) -> list[Message]:
    found: list[Message] = []
    async with aclosing(client.changes(after)) as changes:
        async for message in changes:
            found.append(message)
            if len(found) == count:
                break
    return found


@pytest.mark.both_engines
async def test_client_in_process_submits_waits_and_follows_the_stream(start: Start) -> None:
    async with start(handles) as station, within(station) as client:
        made = await client.submit("fal", "fal-ai/x", {"prompt": "a"}, metadata={"a": "1"})
        waiting = asyncio.create_task(client.wait(made.id))
        following = asyncio.create_task(heard_by(client, 4, 0))
        await eventually(lambda: readers(station) == 2)
        await station.push(station.network.of("a"))
        assert (await waiting).status == "succeeded"
        assert [one.type.rpartition(".")[2] for one in await following] == [
            "queued", "submitting", "processing", "succeeded",
        ]  # fmt: skip
        assert (await client.list(status="succeeded")).data[0].id == made.id
        assert (await client.list_events()).data[0].prediction.id == made.id
        assert (await client.handlers()).data[0].name == "tests.handles"
        assert (await client.explain(made.id)).handlers[0].runs
        await eventually(lambda: readers(station) == 0)


async def test_both_clients_over_sockets_submit_and_wait(start: Start) -> None:
    async with start() as station, listening(station) as port:
        url = f"http://127.0.0.1:{port}"

        def block() -> str:
            with Receiver(url, API_KEY) as client:
                made = client.submit("fal", "fal-ai/x", {"prompt": "a"})
                return client.wait(made.id).status

        blocked = asyncio.create_task(asyncio.to_thread(block))
        async with AsyncReceiver(url, f" {API_KEY}\n") as client:
            made = await client.submit("eachlabs", "x", {"prompt": "a"})
            waiting = asyncio.create_task(client.wait(made.id, seconds=3600))
            await eventually(lambda: readers(station) == 2)
            for sent in list(station.network.sent):
                await station.push(sent)
            assert await waiting == await client.get(made.id)
            assert (await blocked, (await waiting).status) == ("succeeded", "succeeded")
        async with AsyncReceiver(url, "wrong") as client:
            with pytest.raises(ClientError) as raised:
                await client.wait(made.id)
            assert (raised.value.type, raised.value.status) == ("unauthorized", 401)
            with pytest.raises(ClientError, match=r"refuses this \(HTTP 401, unauthorized\)"):
                await client.place()


async def test_failing_app_is_unreachable() -> None:
    begun = asyncio.Event()

    async def hangs(_scope: Any, _receive: Any, _send: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def raises(_scope: Any, _receive: Any, _send: Any) -> None:
        raise ValueError("a fault")

    async def says_nothing(_scope: Any, _receive: Any, _send: Any) -> None: ...

    async def stops(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})

    for app, words in ((raises, "a fault"), (says_nothing, "no answer"), (stops, "in the middle")):
        async with asking(app) as client:
            with pytest.raises(ClientError, match=words) as raised:
                await client.ready()
        assert raised.value.type == "unreachable"
    async with asking(hangs) as client:
        waiting = asyncio.create_task(client.ready())
        await begun.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


def asking(app: Any) -> AsyncReceiver:
    return AsyncReceiver("http://app", patience=0, transport=httpx.ASGITransport(app))
