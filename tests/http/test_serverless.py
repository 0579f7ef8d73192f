"""Serverless mode: work is done only in requests, by drains or in the request of a callback."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from receiver import Call, Context, Door, Event, Reply, Retry, on, route
from receiver.deliveries.handler_worker import HandlerWorker
from receiver.deliveries.replay import Replayer
from receiver.model.errors import SettingsError
from receiver.predictions.poller import Poller
from receiver.predictions.stream import Listener
from receiver.predictions.submitter import Submitter
from receiver.predictions.tokens import Tokens
from receiver.settings import Settings
from receiver.store.leases import Leader
from receiver.store.retention import Retention
from tests.cli.running import receiver
from tests.clocks import LoopClock, StoppedClock
from tests.conftest import Logged, Start
from tests.loopback import free_port
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.receiving import ENV, Clock, Network, Station, eventually, hangs, write

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

CRON: Final = "the-key-of-the-scheduler"
SERVERLESS: Final = {"RECEIVER_MODE": "serverless"}
WAKE: Final = f"/wake/{Tokens([ENV['RECEIVER_SECRET_KEY']]).wake()}"


@on(name="fine")
async def fine(_: Event) -> None: ...


def deliveries(station: Station) -> list[tuple[Any, ...]]:
    return [
        tuple(row)
        for row in station.rows("SELECT handler, state, attempts FROM deliveries ORDER BY 1")
    ]


async def drain(station: Station, **more: Any) -> dict[str, Any]:
    answer = await station.http.post("/v1/drain?seconds=20", timeout=PATIENCE, **more)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


# --- access to drains ---


@pytest.mark.parametrize("name", ["CRON_SECRET", "RECEIVER_CRON_SECRET"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_cron_secret_allows_drains_and_nothing_else(
    start: Start, name: str, method: str
) -> None:
    key = {"authorization": f"Bearer {CRON}"}
    async with start(fine, **SERVERLESS, **{name: CRON}) as station:
        await station.push(await station.submitted("eachlabs"))
        answer = await station.world.request(method, "/v1/drain?seconds=20", headers=key)
        assert (answer.status_code, answer.json()["deliveries"]) == (200, 1)
        for path in ("/v1/predictions", "/v1/deliveries", "/v1/handlers"):
            assert (await station.world.get(path, headers=key)).status_code == 401


async def test_wake_url_drains_without_a_key(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    async with start(fine, **SERVERLESS) as station:
        await station.push(await station.submitted("eachlabs"))
        for token in ("x", "wake", WAKE[6:-1], f"{WAKE[6:]}x", "ü", "a" * 9999):
            answer = await station.world.post(f"/wake/{token}", json={"source": "aws.events"})
            assert answer.status_code == 401
        assert (await station.world.get(WAKE)).status_code == 405
        answer = await station.world.post(WAKE, content=b"\xff{not json", timeout=PATIENCE)
        assert (answer.status_code, answer.json()["deliveries"]) == (200, 1)
    assert WAKE not in caplog.text


def test_wake_url_command_prints_the_url(tmp_path: Path) -> None:
    done = receiver("wake-url", cwd=tmp_path, **ENV)
    assert done.stdout == f"https://hooks.test{WAKE}\n", done.stderr


# --- what a drain does ---


async def test_drain_reports_the_next_due_time_and_pending_deliveries(start: Start) -> None:
    @on(name="later")
    async def later(_: Event) -> None:
        raise Retry(after=500)

    async with start(later, **SERVERLESS) as station:
        done = dict.fromkeys(["deliveries", "submits", "polls", "pending", "cut_short"], 0)
        assert await drain(station) == {**done, "more": False, "next_due": None}
        await station.push(await station.submitted("eachlabs"))
        found = await drain(station)
        assert (found["deliveries"], found["more"], found["pending"]) == (1, False, 1)
        assert 400 < found["next_due"] <= 500


async def test_drain_deletes_expired_predictions(start: Start) -> None:
    clock = Clock()
    async with start(fine, clock=clock, RECEIVER_RETENTION_DAYS="1", **SERVERLESS) as station:
        for number in range(2):
            await station.push(await station.submitted("eachlabs", f"prompt {number}"))
        await drain(station)
        clock.ahead = 2 * 86400
    # Another process, as is usual on such platforms.
    async with start(fine, clock=clock, RECEIVER_RETENTION_DAYS="1", **SERVERLESS) as station:
        await drain(station)
        assert station.count("predictions") == 1  # that of the last event is never deleted


async def test_bulk_replay_is_run_by_drains(start: Start) -> None:
    ran: list[str] = []

    @on(name="counts")
    async def count(event: Event) -> None:
        ran.append(event.id)

    async with start(count, **SERVERLESS) as station:
        for number in range(3):
            await station.push(await station.submitted("eachlabs", f"prompt {number}"))
        assert (await drain(station))["deliveries"] == 3
        counted = (await station.http.post("/v1/replays", json={"handler": "counts"})).json()
        await station.http.post(f"/v1/replays/{counted['id']}/start")
        assert (await drain(station))["deliveries"] == 3
        found = (await station.http.get(f"/v1/replays/{counted['id']}")).json()
        assert (found["state"], found["replayed"]) == ("done", 3)
    assert len(ran) == 6


async def test_delivery_of_a_dead_process_is_drained_after_its_lease(
    start: Start, clock: Clock
) -> None:
    async with start(fine, clock=clock, **SERVERLESS) as station:
        await station.push(await station.submitted("eachlabs"))
        station.edit(
            "UPDATE deliveries SET state = 'running', owner = 'gone', attempts = 1, claims = 1, "
            f"due_at = NULL, lease_until = {clock() + 25}"
        )
        found = await drain(station)
        assert (found["deliveries"], found["more"], found["pending"]) == (0, True, 1)
        assert 0 < found["next_due"] <= 25
        clock.ahead = 26
        # The lease must be over by the clock of PostgreSQL too.
        station.edit("UPDATE deliveries SET lease_until = 1")
        found = await drain(station)
        assert (found["deliveries"], found["more"]) == (1, False)
        assert deliveries(station) == [("fine", "done", 2)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


BACKGROUND: Final = {
    one.run.__qualname__
    for one in (Submitter, Poller, Listener, Leader, HandlerWorker, Replayer, Retention)
}


def running() -> set[str]:
    """Return the names of the functions that run as tasks."""
    return {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}


async def test_serverless_process_does_no_background_work(start: Start, network: Network) -> None:
    """Until there is a drain, there is no write, no poll and no handler."""
    async with start(fine):  # a server has such tasks
        assert {"Submitter.run", "Poller.run", "HandlerWorker.run"} <= running() & BACKGROUND
    async with start(fine, RECEIVER_POLL_AFTER="0.001", **SERVERLESS) as station:
        sent = await station.submitted("fal", "polled")
        await station.push(await station.submitted("eachlabs", "pushed"))
        assert not running() & BACKGROUND
        assert network.count("fal.poll") == 0
        network.always("fal.poll", network.ends)
        await eventually(
            lambda: (
                station.one("SELECT due_at FROM predictions WHERE provider = 'fal'") < time.time()
            )
        )
        found = await drain(station)
        assert (found["polls"], found["deliveries"]) == (1, 2)
        assert network.count("fal.poll") == 1
        assert (await station.read(sent.prediction_id))["status"] == "succeeded"


# --- orders ---

RECIPE: Final = """
[imagine]
provider = "fal"
model = "fal-ai/nano-banana"
input = { prompt = "a fox" }

[[allow]]
place = "club"
"""


@route("shop", proof=lambda _: None)
async def shop(call: Call, door: Door) -> Reply:
    ordered = await door.order("imagine", {}, key=call.body.decode(), person="ada", place="club")
    submitted = await door.submit("eachlabs", "nano-banana", {"prompt": "an owl"})
    return Reply.json([ordered.status, submitted.status])


@pytest.mark.usefixtures("stops_soon")
async def test_serverless_order_is_submitted_before_the_answer(
    start: Start, network: Network, tmp_path: Path
) -> None:
    (tmp_path / "recipes.toml").write_text(RECIPE)
    recipes = {"RECEIVER_RECIPES": str(tmp_path / "recipes.toml")}
    async with start(shop, **recipes, **SERVERLESS) as station:
        answer = await station.http.post("/v1/recipes/imagine", json={})
        assert (answer.status_code, answer.json()["status"]) == (202, "processing"), answer.text
        answer = await station.world.post("/in/shop", content=b"order-1")
        assert answer.json() == ["processing", "processing"], answer.text
        # A provider that is too slow is not waited for, and the order is not lost.
        network.script("fal.submit", hangs)
        answer = await station.http.post("/v1/recipes/imagine", json={})
        assert (answer.status_code, answer.json()["status"]) == (202, "submitting")
        assert network.count("fal.submit") == 3


# --- work in the request of a submit or a callback ---


async def test_serverless_submit_does_not_wait_for_an_event_stream(
    start: Start, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[object] = []

    async def ready(stream: object) -> bool:
        waits.append(stream)
        return False

    for kind in (Listener, Leader):
        monkeypatch.setattr(kind, "ready", ready)
    async with start(**SERVERLESS) as station:
        assert (await station.submit("oxen"))["status"] == "processing"
    assert not waits
    assert network.count("oxen.stream") == 0


async def test_serverless_sync_submit_waits_despite_respond_async(
    start: Start, network: Network
) -> None:
    async def slowly(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.2)
        return await network.by_emulator(request)

    network.script("eachlabs.run", slowly)
    async with start(**SERVERLESS) as station:
        answer = await station.http.post(
            "/v1/predictions",
            json={"provider": "eachlabs", "model": "m", "input": {"prompt": "x"}, "mode": "sync"},
            headers={"prefer": "respond-async"},
        )
        assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")


async def test_inline_dispatch_runs_handlers_before_the_answer(start: Start) -> None:
    order: list[str] = []

    @on(name="first", timeout=20)
    async def first(_: Event) -> None:
        order.append("first")

    @on(name="second", after="first", timeout=20)
    def second(_: Event) -> None:
        order.append("second")

    @on(name="long", timeout=600)
    async def long(_: Event) -> None:
        order.append("long")

    async with start(first, second, long, RECEIVER_AFTER="inline=60", **SERVERLESS) as station:
        answer = await station.push(await station.submitted("eachlabs"))
        assert (answer.status_code, order) == (200, ["first", "second"])
        assert deliveries(station) == [
            ("first", "done", 1),
            ("long", "pending", 0),
            ("second", "done", 1),
        ]
        assert (await drain(station))["deliveries"] == 1


@pytest.mark.parametrize("plain", [False, True])
async def test_inline_dispatch_releases_slow_handlers_and_runs_only_its_event(
    start: Start, monkeypatch: pytest.MonkeyPatch, *, plain: bool
) -> None:
    # A slow machine may release an attempt late.
    monkeypatch.setattr("receiver.deliveries.handler_worker._TO_GIVE_BACK", PATIENCE)
    loop_clock = LoopClock()
    entered: list[str] = []
    may_end = threading.Event()

    @on(name="slow", inline=True, timeout=600)
    async def slow(event: Event) -> None:
        entered.append(event.prediction.id)
        if not may_end.is_set():
            await asyncio.Event().wait()

    @on(name="slow")
    def blocking(event: Event) -> None:
        entered.append(event.prediction.id)
        may_end.wait(PATIENCE)

    handler = blocking if plain else slow
    async with start(handler, RECEIVER_AFTER="drain", **SERVERLESS) as station:
        await station.push(await station.submitted("eachlabs", "before"))
    async with start(handler, RECEIVER_AFTER="inline=20", **SERVERLESS) as station:
        sent = await station.submitted("eachlabs", "now")
        pushing = asyncio.create_task(station.push(sent))
        await eventually(lambda: entered)
        assert not pushing.done()
        loop_clock.ahead += 20
        await eventually(lambda: deliveries(station) == [("slow", "pending", 0)] * 2)
        loop_clock.ahead += PATIENCE  # the callback is answered, although the thread runs on
        assert (await pushing).json() == {"status": "accepted"}
        assert entered == [sent.prediction_id]
        assert station.count("attempts") == 0
        may_end.set()
        assert (await drain(station))["deliveries"] == 2


async def test_inline_dispatch_can_be_set_by_an_argument(start: Start) -> None:
    async with start(fine, dispatch="inline") as station:
        await station.push(await station.submitted("eachlabs"))
        assert deliveries(station) == [("fine", "done", 1)]


async def test_handler_that_fails_inline_is_retried_by_a_drain_not_by_a_duplicate(
    start: Start, clock: Clock
) -> None:
    @on(name="fails", retry=Retry(base=10, cap=10))
    async def fails(_: Event, ctx: Context) -> None:
        if ctx.attempt == 1:
            raise ConnectionError

    async with start(fails, clock=clock, RECEIVER_AFTER="inline=20", **SERVERLESS) as station:
        sent = await station.submitted("eachlabs")
        assert (await station.push(sent)).json() == {"status": "accepted"}
        assert deliveries(station) == [("fails", "pending", 1)]
        # A repeated callback is a duplicate, and runs no handler.
        assert (await station.push(sent)).json() == {"status": "duplicate"}
        assert deliveries(station) == [("fails", "pending", 1)]
        clock.ahead = 20
        if isinstance(station.database, Database):  # PgQueuer uses the server's clock
            station.edit("UPDATE pgqueuer SET execute_after = now()")
        assert (await drain(station))["deliveries"] == 1
        assert deliveries(station) == [("fails", "done", 2)]


async def test_after_dispatch_runs_handlers_once_the_answer_is_sent(start: Start) -> None:
    order: list[str] = []

    @on(name="looks")
    async def look(_: Event) -> None:
        order.append("handler")

    async with start(look, RECEIVER_AFTER="after=20", **SERVERLESS) as station:

        async def noting(scope: Scope, receive: Receive, send: Send) -> None:
            async def note(message: Message) -> None:
                order.append(message["type"])
                await send(message)

            await station.app(scope, receive, note)

        letter = write(station.network, await station.submitted("eachlabs"))
        transport = httpx.ASGITransport(noting)
        async with httpx.AsyncClient(transport=transport, base_url="https://hooks.test") as world:
            content = world.build_request("POST", letter.path, content=letter.body)
            content.headers.update(dict(letter.headers))  # type: ignore[arg-type] # bytes and text may mix
            assert (await world.send(content)).json() == {"status": "accepted"}
        assert order == ["http.response.start", "http.response.body", "handler"]
        assert deliveries(station) == [("looks", "done", 1)]


class Endless(httpx.AsyncByteStream):
    """An answer that has begun, and never ends."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0)


async def unanswered(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("the drain takes its time", request=request)


@pytest.mark.parametrize(
    ("answer", "seconds", "reason"),
    [
        (unanswered, PATIENCE, None),
        (lambda _: httpx.Response(200, stream=Endless()), PATIENCE, None),
        (hangs, 0.05, "TimeoutError: it could not be sent within 0.05 s"),
        (
            lambda _: httpx.Response(302, headers={"location": "/"}),
            *(PATIENCE, "hooks.test answered 302"),
        ),
    ],
    ids=["unanswered", "endless", "unsent", "redirected"],
)
async def test_wake_dispatch_requests_a_drain_without_waiting_for_it(
    start: Start,
    logged: Logged,
    monkeypatch: pytest.MonkeyPatch,
    answer: Any,
    seconds: float,
    reason: str | None,
) -> None:
    monkeypatch.setattr("receiver.http.after._SEND_TIMEOUT", seconds)
    clock = StoppedClock()
    requested: list[str] = []

    async def world(request: httpx.Request) -> httpx.Response:
        requested.append(str(request.url))
        answered = answer(request)
        found: httpx.Response = await answered if inspect.isawaitable(answered) else answered
        return found

    async with start(
        fine, others=httpx.MockTransport(world), clock=clock, RECEIVER_AFTER="wake", **SERVERLESS
    ) as station:
        sent = [await station.submitted("eachlabs", f"prompt {number}") for number in range(4)]
        for one in sent[:3]:
            assert (await station.push(one)).json() == {"status": "accepted"}
        url = f"https://hooks.test{WAKE}?again=1"
        assert requested == [url]  # at most one in each second
        clock.ahead = 1
        assert (await station.push(sent[3])).json() == {"status": "accepted"}
        assert requested == [url] * 2
        assert (await station.world.post(WAKE, timeout=PATIENCE)).json()["deliveries"] == 4
    found = [line["reason"] for line in logged if line["event"] == "wake.failed"]
    assert found == ([reason] * 2 if reason else [])


async def test_wake_with_again_also_runs_events_of_the_next_seconds(start: Start) -> None:
    loop_clock = LoopClock()
    async with start(fine, **SERVERLESS) as station:
        sent = await station.submitted("eachlabs")
        path = f"{WAKE}?seconds=900&again=5"
        waking = asyncio.create_task(station.world.post(path, timeout=PATIENCE))
        # It does the housekeeping after it has looked for work.
        held = "SELECT 1 FROM leases WHERE name = 'housekeeping'"
        await eventually(lambda: station.rows(held))
        await station.push(sent)
        assert deliveries(station) == [("fine", "pending", 0)]
        loop_clock.ahead += 5
        assert (await waking).json()["deliveries"] == 1
        assert deliveries(station) == [("fine", "done", 1)]


async def test_shutdown_answers_the_callback_and_lets_an_inline_handler_end(start: Start) -> None:
    entered, may_end = asyncio.Event(), asyncio.Event()

    @on(name="slow", inline=True)
    async def slow(_: Event) -> None:
        entered.set()
        await may_end.wait()

    async with start(slow, RECEIVER_AFTER="inline=600", **SERVERLESS) as station:
        pushing = asyncio.create_task(station.push(await station.submitted("eachlabs")))
        await entered.wait()
        station.app.state.release()
        assert (await pushing).json() == {"status": "accepted"}
        assert deliveries(station) == [("slow", "running", 1)]
        may_end.set()
        await eventually(lambda: deliveries(station) == [("slow", "done", 1)])


def test_wake_dispatch_requires_the_public_url() -> None:
    env = {name: value for name, value in ENV.items() if name != "RECEIVER_PUBLIC_URL"}
    with pytest.raises(SettingsError, match="wake needs RECEIVER_PUBLIC_URL"):
        Settings.read({**env, "RECEIVER_AFTER": "wake"})


def test_serverless_server_without_a_schema_refuses_to_start(
    bare_database: Database, tmp_path: Path
) -> None:
    env = {**ENV, **SERVERLESS, "RECEIVER_DATABASE_URL": bare_database.url}
    done = receiver("serve", "--port", str(free_port()), cwd=tmp_path, **env)
    assert done.returncode == 3
    assert "receiver: the database is not set up: run `receiver migrate` once" in done.stderr
    assert "Traceback" not in done.stderr
    assert bare_database.rows("SELECT FROM pg_namespace WHERE nspname = 'receiver'") == []
