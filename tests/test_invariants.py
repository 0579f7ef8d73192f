"""The twelve invariants of the design, tested through the real app and a real database.

Each test runs on both engines, except those of a slow or full disk: each of these has a counterpart
for a PostgreSQL server that is slow or unavailable.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio.to_thread
import asyncpg
import httpx
import pytest

from receiver import Context, Event, Retry, Skip, on
from receiver.model.retry import Decision
from receiver.store.deliveries import ClaimRequest, Settlement
from receiver.store.sqlite.engine import SQLiteStore
from tests.conftest import Disk, Start
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.receiving import (
    PICTURE,
    Clock,
    Network,
    Station,
    breaks,
    eventually,
    receiving,
    write,
)

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

PUSHING = ["eachlabs", "fal"]
TABLES = ("predictions", "callbacks", "events", "deliveries", "attempts")


def all_rows(station: Station) -> list[list[Any]]:
    """Return all rows of all tables, without the counts of duplicate callbacks."""
    dumps = [station.rows(f"SELECT * FROM {table} ORDER BY 1, 2") for table in TABLES]
    dumps[1] = [row[:-3] for row in dumps[1]]  # repeats, repeated_at, provider
    return dumps


async def assert_unanswered(station: Station, answering: asyncio.Task[Any]) -> None:
    """Check that a request is not answered, although the receiver answers later ones."""
    for _ in range(5):
        assert (await station.world.get("/healthz")).status_code == 200
    assert not answering.done()


@pytest.mark.parametrize("provider", PUSHING)
async def test_1_no_2xx_before_the_sqlite_commit(start: Start, disk: Disk, provider: str) -> None:
    async with start() as station:
        sent = await station.submitted(provider)
        disk.may_commit.clear()
        answering = asyncio.create_task(station.push(sent))
        assert await anyio.to_thread.run_sync(disk.commits_waiting.wait, PATIENCE)
        await assert_unanswered(station, answering)
        assert station.count("events") == 0
        disk.may_commit.set()
        answer = await answering
        assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})
        assert station.count("events") == 1


async def test_1_failed_sqlite_commit_is_503_not_2xx(start: Start, disk: Disk) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs")
        disk.full = True
        assert (await station.push(sent)).status_code == 503
        disk.full = False
        assert (await station.push(sent)).json() == {"status": "accepted"}


@pytest.mark.parametrize("provider", PUSHING)
async def test_1_no_2xx_before_the_postgres_commit(
    database: Database, network: Network, provider: str
) -> None:
    held = await asyncpg.connect(database.url)
    await held.execute("SELECT pg_advisory_lock(7)")
    with database.at_commit("PERFORM pg_advisory_xact_lock_shared(7)"):
        async with receiving(database, network) as station:
            sent = await station.submitted(provider)
            answering = asyncio.create_task(station.push(sent))
            waits = (
                "SELECT 1 FROM pg_locks JOIN pg_database d ON d.oid = database"
                " WHERE datname = current_database() AND objid = 7 AND NOT granted"
            )
            try:
                await eventually(lambda: station.rows(waits))
                await assert_unanswered(station, answering)
                assert station.count("events") == 0
            finally:
                await held.close()  # its lock would block the receiver's stop
            answer = await answering
            assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})
            assert station.count("events") == 1


async def test_1_failed_postgres_commit_is_503_not_2xx(
    database: Database, network: Network
) -> None:
    @on(name="pending")
    async def pending(_: Event) -> None: ...

    async with receiving(database, network, [pending]) as station:
        sent = await station.submitted("eachlabs")
        with database.at_commit("RAISE EXCEPTION 'no'"):
            assert (await station.push(sent)).status_code == 503
            for table in ("events", "callbacks", "deliveries", "pgqueuer"):
                assert station.count(table) == 0
        assert (await station.push(sent)).json() == {"status": "accepted"}


class Test2HandlersDoNotRunInTheCallbackRequest:
    async def test_hanging_handlers_do_not_delay_the_callback_response(self, start: Start) -> None:
        entered = asyncio.Event()
        entered_too = threading.Event()
        leave = threading.Event()
        leave_too = asyncio.Event()

        @on(name="hangs-async")
        async def hang(_: Event) -> None:
            entered.set()
            await leave_too.wait()

        @on(name="hangs-sync")
        def block(_: Event) -> None:
            entered_too.set()
            leave.wait(2 * PATIENCE)

        async with start(hang, block) as station:
            for prompt in ("one", "two"):
                sent = await station.submitted("eachlabs", prompt)
                async with asyncio.timeout(PATIENCE):
                    answer = await station.push(sent)
                assert answer.json() == {"status": "accepted"}
                await eventually(lambda: entered.is_set() and entered_too.is_set())
            leave.set()
            leave_too.set()

    async def test_callback_is_answered_before_its_handler_is_called(self, start: Start) -> None:
        during: list[int] = []

        @on()
        async def count(_: Event) -> None:
            during.append(requests)

        requests = 0
        async with start(count) as station:
            sent = await station.submitted("fal")
            requests = 1
            answer = await station.push(sent)
            requests = 0
            assert answer.status_code == 200
            await eventually(lambda: during)
        assert during == [0]


UNPROVED: dict[str, bytes] = {
    "empty": b"",
    "words": b"not json",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "no text": b"\xff\xfe\x00",
    "huge number": b'{"exec_id": 1e400}',
    "with a mark": b"\xef\xbb\xbf{}",
}
SPELLINGS: dict[str, Callable[[dict[str, Any]], str]] = {
    "indented": lambda content: json.dumps(content, indent=7),
    "reordered": lambda content: json.dumps(
        dict(reversed(content.items())), separators=(" , ", " : ")
    ),
    "padded": lambda content: "\r\n\t " + json.dumps(content) + " \n",
    "unicode": lambda content: json.dumps({**content, "größe": "\u2028"}, ensure_ascii=False),
    "escaped": lambda content: json.dumps(content).replace("status", "\\u0073tatus"),
}


class Test3UnprovedCallbacksAreNotParsed:
    async def test_unproved_callback_is_refused_without_being_parsed(self, start: Start) -> None:
        async with start() as station:
            for provider in PUSHING:
                sent = await station.submitted(provider, provider)
                before = all_rows(station)
                for name, body in UNPROVED.items():
                    callback = write(station.network, sent, body=body)
                    callback.headers = [("content-type", "application/json")]
                    assert (await station.post(callback)).status_code == 401, (provider, name)
                    assert all_rows(station) == before, (provider, name)

    async def test_proof_holds_for_any_json_formatting_of_the_body(self, start: Start) -> None:
        async with start() as station:
            for provider, (name, spell) in itertools.product(PUSHING, SPELLINGS.items()):
                sent = await station.submitted(provider, case := f"{provider} {name}")
                proved = write(station.network, sent)
                body = spell(json.loads(proved.body)).encode()
                answer = await station.push(sent, body=body)
                assert answer.json() == {"status": "accepted"}, case
                found = await station.read(sent.prediction_id)
                assert found["output"] == [{"url": PICTURE}], case
                sql = "SELECT CAST(body AS BLOB) FROM callbacks WHERE prediction_id = ?"
                assert station.one(sql, sent.prediction_id) == body, case

    async def test_signature_fails_if_only_whitespace_of_the_body_changes(
        self, start: Start
    ) -> None:
        async with start() as station:
            sent = await station.submitted("fal")
            callback = write(station.network, sent)
            callback.body += b" "
            assert (await station.post(callback)).status_code == 401


@pytest.mark.parametrize("provider", PUSHING)
async def test_4_duplicate_callback_returns_200_and_adds_no_row(
    start: Start, provider: str
) -> None:
    @on()
    async def done(_: Event) -> None: ...

    async with start(done) as station:
        sent = await station.submitted(provider)
        callback = write(station.network, sent)
        assert (await station.post(callback)).json() == {"status": "accepted"}
        await eventually(lambda: station.rows("SELECT 1 FROM deliveries WHERE state = 'done'"))
        before = all_rows(station)
        again = write(station.network, sent, at=station.clock() + 20)
        for one in (callback, callback, again):
            answer = await station.post(one)
            assert (answer.status_code, answer.json()) == (200, {"status": "duplicate"})
        assert all_rows(station) == before
        assert station.one("SELECT repeats FROM callbacks") == 3


@pytest.mark.parametrize("provider", PUSHING)
@pytest.mark.parametrize("first", [True, False], ids=["succeeded", "failed"])
async def test_5_terminal_state_never_changes(start: Start, provider: str, first: bool) -> None:
    async with start() as station:
        sent = await station.submitted(provider)
        await station.push(sent, ok=first)
        before = await station.read(sent.prediction_id)
        assert (await station.push(sent, ok=not first)).json() == {"status": "duplicate"}
        assert await station.read(sent.prediction_id) == before
        assert station.count("events") == 1
        verdicts = station.rows("SELECT verdict, reason FROM callbacks ORDER BY verdict")
        other = "failed" if first else "succeeded"
        assert verdicts[1] == ("late", f"already {before['status']}, then told {other}")


async def test_6_failing_handler_never_delays_repeats_or_hides_another_handler(
    start: Start,
) -> None:
    ran: list[str] = []
    leave = threading.Event()
    last_attempt, may_end = asyncio.Event(), asyncio.Event()

    @on(name="fails")
    async def fail(_: Event, ctx: Context) -> None:
        ran.append("fails")
        if ctx.attempt < 3:
            raise RuntimeError("on purpose")
        last_attempt.set()
        await may_end.wait()

    @on(name="exits")
    def leave_the_process(_: Event) -> None:
        raise SystemExit(3)

    @on(name="hangs")
    def hang(_: Event) -> None:
        leave.wait(2 * PATIENCE)

    @on(name="skips")
    async def skip(_: Event) -> None:
        raise Skip("not for me")

    @on(name="works")
    async def work(_: Event) -> None:
        ran.append("works")

    async with start(
        fail, leave_the_process, hang, skip, work, RECEIVER_RETRY_ATTEMPTS="3"
    ) as station:
        await station.push(await station.submitted("eachlabs"))
        sql = "SELECT handler, state FROM deliveries"
        settled = {"exits": "dead", "skips": "skipped", "works": "done"}
        running = {"fails": "running", "hangs": "running"}
        # The others end although one handler hangs and another has not ended after its failures.
        await eventually(last_attempt.is_set)
        await eventually(lambda: dict(station.rows(sql)), lambda found: found == settled | running)
        may_end.set()
        leave.set()
        ended = {"fails": "done", "hangs": "done"}
        await eventually(lambda: dict(station.rows(sql)), lambda found: found == settled | ended)
    assert (ran.count("fails"), ran.count("works")) == (3, 1)


class Test7EveryLivingPredictionIsPolled:
    LIVING = "status NOT IN ('succeeded', 'failed', 'canceled')"

    async def test_prediction_is_polled_in_every_state_that_a_submit_can_reach(
        self, start: Start, network: Network
    ) -> None:
        network.script("eachlabs.submit", breaks(httpx.ReadError))
        async with start(RECEIVER_POLL_AFTER="0.02") as station:
            for provider in ("eachlabs", "oxen", "fal", "eachlabs"):
                await station.submit(provider, f"of {provider}")
            polls = f"SELECT polls FROM predictions WHERE {self.LIVING}"
            await eventually(
                lambda: station.rows(polls),
                lambda rows: len(rows) == 4 and all(count >= 2 for (count,) in rows),
            )
            assert (
                station.rows(f"SELECT id FROM predictions WHERE {self.LIVING} AND due_at IS NULL")
                == []
            )

    async def test_row_left_in_submitting_is_polled_after_a_restart(
        self, start: Start, network: Network
    ) -> None:
        async with start() as station:
            sent = await station.submitted("fal")
        # On SQLite the next process knows that this one is dead; on PostgreSQL it waits for due_at.
        due_at = "1e12" if isinstance(station.database, Path) else "1"
        station.edit(f"UPDATE predictions SET status = 'submitting', due_at = {due_at}")
        network.always("fal.poll", network.ends)
        async with start() as station:
            found = await station.until(sent.prediction_id, "succeeded")
            assert found["channel"] == "poll"

    async def test_database_refuses_a_status_that_contradicts_the_due_time(
        self, start: Start
    ) -> None:
        async with start() as station:
            await station.submit("fal")
        for change in ("due_at = NULL", "status = 'succeeded'", "status = 'failed'"):
            with pytest.raises((sqlite3.IntegrityError, asyncpg.CheckViolationError)):
                station.edit(f"UPDATE predictions SET {change}")


@pytest.mark.parametrize("channel", ["webhook", "sse", "poll", "sync"])
async def test_8_pushed_streamed_polled_and_sync_outcomes_are_recorded_alike(
    start: Start, network: Network, channel: str
) -> None:
    events: list[Event] = []

    @on("succeeded")
    async def keep(event: Event) -> None:
        events.append(event)

    async with start(keep, RECEIVER_POLL_AFTER="0.02" if channel == "poll" else "30") as station:
        provider = "oxen" if channel == "sse" else "eachlabs"
        prediction = await station.submit(
            provider, metadata={"k": "v"}, mode="sync" if channel == "sync" else "queue"
        )
        if channel == "webhook":
            await station.push(network.sent[0])
        elif channel == "sse":
            network.end_and_broadcast(network.sent[0])
        elif channel == "poll":
            network.always("eachlabs.poll", network.ends)
        found = await station.until(prediction["id"], "succeeded")
        await eventually(lambda: events)
        assert (found["channel"], found["output"]) == (channel, [{"url": PICTURE}])
        assert station.rows("SELECT channel, verdict FROM callbacks") == [(channel, "accepted")]
        assert station.rows("SELECT type, channel FROM events") == [
            ("prediction.succeeded", channel)
        ]
        assert station.count("deliveries") == 1
    (event,) = events
    assert (event.channel, event.prediction.id) == (channel, prediction["id"])
    assert event.prediction.metadata == {"k": "v"}
    assert isinstance(event.raw, dict)


class Test9AmbiguousSubmitsAreNotResent:
    async def test_ambiguous_submit_is_not_resent_by_this_or_the_next_process(
        self, start: Start, network: Network
    ) -> None:
        errors = (httpx.ReadError, httpx.ReadTimeout, httpx.WriteError)
        least = "SELECT min(polls) FROM predictions"
        async with start(RECEIVER_POLL_AFTER="0.02") as station:
            for provider, error in itertools.product(("oxen", *PUSHING), errors):
                network.script(f"{provider}.submit", breaks(error))
                prediction = await station.submit(provider, case := f"{provider} {error.__name__}")
                assert prediction["status"] == "unconfirmed", case
                assert prediction["provider_id"] is None, case
            await eventually(lambda: station.one(least) >= 2)
        later = Clock()
        later.ahead = 100.0  # after several polls the next is due within a minute, not at once
        async with start(RECEIVER_POLL_AFTER="0.02", clock=later) as station:
            before = dict(station.rows(looks := "SELECT id, polls FROM predictions"))
            await eventually(lambda: all(n > before[id] for id, n in station.rows(looks)))
            statuses = station.rows("SELECT DISTINCT status FROM predictions")
            assert statuses == [("unconfirmed",)]
        submits = {name: network.count(f"{name}.submit") for name in ("oxen", *PUSHING)}
        assert submits == dict.fromkeys(submits, len(errors))

    @pytest.mark.usefixtures("stops_soon")
    async def test_submit_interrupted_by_shutdown_is_not_resent(
        self, start: Start, network: Network
    ) -> None:
        async def taken_in_silence(request: httpx.Request) -> httpx.Response:
            await network.by_emulator(request)
            await asyncio.Event().wait()
            raise AssertionError

        network.script("eachlabs.submit", taken_in_silence)
        async with start() as station:
            submitting = asyncio.create_task(station.submit())
            await eventually(lambda: network.sent)
        await asyncio.gather(submitting, return_exceptions=True)
        later = Clock()
        if not isinstance(station.database, Path):
            later.ahead = 100.0  # on PostgreSQL another process might still be submitting
        async with start(clock=later) as station:
            (sent,) = network.sent
            await station.until(sent.prediction_id, "unconfirmed")
            assert (await station.push(sent)).json() == {"status": "accepted"}
            assert (await station.read(sent.prediction_id))["provider_id"] == sent.id
        assert network.count("eachlabs.submit") == 1


async def test_10_full_disk_is_503_never_4xx(start: Start, disk: Disk) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs", "before")
        signed = await station.submitted("fal", "before, too")
        disk.full = True
        for answer in (
            await station.push(sent),
            await station.push(signed),
            await station.http.get("/readyz"),
            await station.http.post(
                "/v1/predictions", json={"provider": "fal", "model": "a/b", "input": {}}
            ),
            await station.http.post(f"/v1/predictions/{sent.prediction_id}/replay"),
            await station.http.post(f"/v1/deliveries/dlv_{'0' * 40}/retry"),
        ):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["type"] == "urn:receiver:problem:unavailable"
        forged = write(station.network, sent)
        forged.headers = []
        assert (await station.post(forged)).status_code == 401
        assert (await station.http.get("/healthz")).status_code == 200
        disk.full = False
        assert (await station.http.get("/readyz")).status_code == 200
        assert (await station.push(sent)).json() == {"status": "accepted"}
        assert (await station.push(signed)).json() == {"status": "accepted"}


async def test_10_unavailable_postgres_is_503_never_4xx(
    database: Database, network: Network
) -> None:
    async with receiving(database, network) as station:
        sent = await station.submitted("eachlabs", "before")
        signed = await station.submitted("fal", "before, too")
        with database.refusing():
            for answer in (
                await station.push(sent),
                await station.push(signed),
                await station.http.get("/readyz"),
                await station.http.get(f"/v1/predictions/{sent.prediction_id}"),
                await station.http.get("/v1/predictions"),
                await station.http.post(
                    "/v1/predictions", json={"provider": "fal", "model": "a/b", "input": {}}
                ),
                await station.http.post(f"/v1/predictions/{sent.prediction_id}/cancel"),
                await station.http.post(f"/v1/predictions/{sent.prediction_id}/replay"),
                await station.http.post(f"/v1/deliveries/dlv_{'0' * 40}/retry"),
                await station.http.get("/v1/deliveries"),
            ):
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.json()["type"] == "urn:receiver:problem:unavailable"
            forged = write(station.network, sent)
            forged.headers = []
            assert (await station.post(forged)).status_code == 401
            assert (await station.http.get("/healthz")).status_code == 200
        assert (await station.http.get("/readyz")).status_code == 200
        assert (await station.push(sent)).json() == {"status": "accepted"}
        assert (await station.push(signed)).json() == {"status": "accepted"}


async def test_11_no_redirect_on_the_webhook_path(start: Start) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs")
        callback = write(station.network, sent)
        path = callback.path
        for spelt in (
            path + "/",
            path + "//",
            "/" + path,
            path.replace("/eachlabs/", "//eachlabs/"),
            path.replace("/eachlabs/", "/eachlabs//"),
            path.replace("webhooks", "Webhooks"),
            path.replace("eachlabs", "Eachlabs"),
            path.upper(),
            path + "/more",
            path + "%2F",
            path + "%0A",
            path.rpartition("/")[0],
            path.rpartition("/")[0] + "/",
            "/webhooks",
            "/webhooks/",
        ):
            url = httpx.URL("https://hooks.test").copy_with(raw_path=spelt.encode())
            for method in ("POST", "GET", "HEAD", "PUT"):
                answer = await station.world.request(
                    method,
                    url,
                    content=callback.body,
                    headers=callback.headers,  # type: ignore[arg-type]
                )
                assert answer.status_code in {401, 404, 405}, (method, spelt)
                assert "location" not in answer.headers, (method, spelt)
            assert station.count("callbacks") == 0, spelt


@pytest.mark.usefixtures("on_sqlite")  # PgQueuer does not use the test's clock; see tests/store
async def test_12_settling_twice_or_after_lease_loss_changes_nothing(
    start: Start, tmp_path: Path
) -> None:
    @on(name="pending")
    async def pending(_: Event) -> None:
        raise Retry(after=100)

    async with start(pending) as station:
        await station.push(await station.submitted("eachlabs"))
        await eventually(lambda: station.count("attempts"))
    store = SQLiteStore(str(tmp_path / "receiver.db"), lambda _: None)
    store.open()
    try:
        now = station.clock() + 200
        (first,) = await _claim(store, "first", now, lease=1)
        # The lease expires; another owner claims the delivery and settles it.
        await store.reclaim("second", now + 2)
        (second,) = await _claim(store, "second", now + 2, lease=30)
        again = Decision(state="pending", delay=5)
        assert not await store.settle(_settlement(first, "first", again))
        assert await store.settle(_settlement(second, "second", Decision(state="done")))
        before = all_rows(station)
        for late in (
            _settlement(second, "second", Decision(state="done")),
            _settlement(second, "second", again),
            _settlement(first, "first", Decision(state="dead", reason="too late")),
            _settlement(first, "second", again),
            _settlement(second, "first", again),
        ):
            assert not await store.settle(late)
        assert all_rows(station) == before
    finally:
        store.close()
    assert station.rows("SELECT state, reason FROM deliveries") == [("done", "")]
    results = station.rows("SELECT result FROM attempts ORDER BY number")
    assert [result for (result,) in results] == ["retry", "lost", "done"]


async def _claim(store: SQLiteStore, owner: str, now: float, lease: float) -> list[Any]:
    wanted = ClaimRequest(handler="pending", owner=owner, most=1, now=now, lease_until=now + lease)
    return (await store.claim(wanted)).claims


def _settlement(claim: Any, owner: str, decision: Decision) -> Settlement:
    return Settlement(
        id=claim.id,
        owner=owner,
        number=claim.number,
        decision=decision,
        result="done",
        started_at=1.0,
        ended_at=2.0,
    )
