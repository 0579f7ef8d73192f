"""Sources of plugins: the route of the same name handles what they poll, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from receiver import Call, Door, Reply, Unproved, route, source
from receiver.deliveries.importing import register
from receiver.settings import Settings
from receiver.store.leases import LeaseRequest, LeaseStore
from tests.conftest import Disk, Logged, Start
from tests.receiving import ENV, Network, eventually

pytestmark = pytest.mark.anyio


def refuse(_: Call) -> None:
    raise Unproved


class Updates:
    """A polled platform: it repeats an update until the next one is requested."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self._news = asyncio.Event()
        self.offset = 0
        self.pollers = 0
        self.most = 0
        self.requested: list[int] = []

    def add(self, text: str) -> None:
        self.texts.append(text)
        self._news.set()

    async def next(self) -> str:
        self.requested.append(self.offset)
        while self.offset >= len(self.texts):
            self._news.clear()
            await self._news.wait()
        return self.texts[self.offset]


def plugin(updates: Updates) -> list[Any]:
    @route("chat", proof=refuse)
    async def chat(call: Call, door: Door) -> Reply:
        text = call.body.decode()
        if text == "breaks":
            raise ZeroDivisionError
        key = f"update-{updates.offset}"
        made = await door.submit("fal", "fal-ai/nano-banana", {"prompt": text}, key=key)
        return Reply.json(made.id)

    @source("chat")
    async def poll(_: Door) -> AsyncGenerator[Call, Reply]:
        updates.pollers += 1
        updates.most = max(updates.most, updates.pollers)
        try:
            while True:
                reply = yield Call(body=(await updates.next()).encode())
                if reply.status < 500:
                    updates.offset += 1
                elif updates.texts[updates.offset] == "breaks":
                    raise ConnectionError(updates.texts[updates.offset])
        finally:
            updates.pollers -= 1

    return [chat, poll]


async def test_polled_updates_are_handled_by_the_route_and_confirmed(
    start: Start, network: Network
) -> None:
    updates = Updates("a lighthouse", "a ship")
    async with start(*plugin(updates)) as station:
        await eventually(lambda: len(network.sent) == 2)
        assert [sent.prompt for sent in network.sent] == ["a lighthouse", "a ship"]
        assert station.count("predictions") == 2
        await eventually(lambda: updates.offset == 2)
        assert (await station.world.post("/in/chat")).status_code == 401
    assert updates.pollers == 0


async def test_failed_update_is_polled_again_after_the_store_recovers(
    start: Start, disk: Disk, network: Network
) -> None:
    updates = Updates()
    async with start(*plugin(updates)) as station:
        disk.full = True
        updates.add("a lighthouse")
        await eventually(lambda: len(updates.requested) >= 3)
        disk.full = False
        await eventually(lambda: [sent.prompt for sent in network.sent] == ["a lighthouse"])
        assert station.count("predictions") == 1


async def test_failing_source_is_restarted_and_logged(
    start: Start, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.http.polled._REST", 0.0)
    updates = Updates("breaks")
    async with start(*plugin(updates)) as station:
        await eventually(lambda: len(updates.requested) >= 2)
        updates.texts[0] = "a lighthouse"
        await eventually(lambda: station.count("predictions") == 1)
    failed = [line for line in logged if line["event"] == "source.failed"]
    assert {line["plugin"] for line in failed} == {"chat"}
    assert {line["plugin"] for line in logged if line["event"] == "route.failed"} == {"chat"}


@pytest.mark.parametrize("ends", [SystemExit(3), asyncio.CancelledError(), None], ids=repr)
async def test_source_that_ends_or_exits_is_restarted(
    start: Start, monkeypatch: pytest.MonkeyPatch, ends: BaseException | None
) -> None:
    monkeypatch.setattr("receiver.http.polled._REST", 0.0)
    begun: list[int] = []

    @source("ending")
    async def ending(_: Door) -> AsyncGenerator[Call | None, Reply]:
        begun.append(1)
        reply = yield Call()
        assert reply.status == 500, "there is no route of that name"
        yield None
        if ends is not None:
            raise ends

    async with start(ending) as station:
        await eventually(lambda: len(begun) >= 3)
        assert (await station.world.get("/healthz")).is_success


async def test_reload_replaces_routes_and_sources(start: Start) -> None:
    before, after = Updates("a lighthouse"), Updates("a ship")
    async with start(*plugin(before)) as station:
        await eventually(lambda: before.offset == 1)
        renamed = [replace(one, name="news") for one in register(plugin(after)).all()]
        await station.app.state.exchange(register(renamed), Settings.read(ENV))
        await eventually(lambda: after.offset == 1)
        assert (before.pollers, after.pollers) == (0, 1)
        assert (await station.world.post("/in/chat")).status_code == 404
        assert (await station.world.post("/in/news")).status_code == 401
        assert station.count("predictions") == 2


async def test_sources_do_not_run_in_serverless_mode(start: Start) -> None:
    updates = Updates("a lighthouse")
    async with start(*plugin(updates), RECEIVER_MODE="serverless") as station:
        await station.http.post("/v1/drain?seconds=1")
        for _ in range(100):  # a source that ran would poll within fewer turns of the loop
            await asyncio.sleep(0)
        assert updates.requested == []


@pytest.mark.parametrize("start", ["postgres"], indirect=True)
async def test_one_of_two_processes_polls_and_the_other_takes_over(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[bool] = []
    hold = LeaseStore.hold

    async def recorded(leases: LeaseStore, request: LeaseRequest) -> bool:
        is_held = await hold(leases, request)
        if request.name == "source chat":
            answers.append(is_held)
        return is_held

    monkeypatch.setattr(LeaseStore, "hold", recorded)
    updates = Updates()
    async with AsyncExitStack() as first, AsyncExitStack() as second:
        await first.enter_async_context(start(*plugin(updates)))
        await eventually(lambda: updates.pollers)
        await second.enter_async_context(start(*plugin(updates)))
        await eventually(lambda: False in answers)  # the second was refused the lease
        assert updates.pollers == 1
        await first.aclose()
        await eventually(lambda: updates.pollers)
        assert updates.most == 1
