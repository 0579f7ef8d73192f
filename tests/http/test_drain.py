"""Drains run due work on request, on both engines: for cron and serverless platforms."""

from __future__ import annotations

import asyncio
import builtins
import importlib.metadata
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import httpx
import msgspec
import pytest

from receiver import Context, Event, Retry, on
from receiver.app import create_app, migrate, work
from receiver.app import drain as drain_once
from receiver.deliveries.heartbeat import TIMING
from receiver.deliveries.worker import Worker
from receiver.model.answers import Drained
from receiver.model.errors import StoreUnusable
from receiver.model.tasks import wait_for_all
from receiver.settings import Settings
from tests.cli.running import environment, inside, receiver, running
from tests.clocks import LoopClock
from tests.conftest import Logged, Start
from tests.forked import Forked
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.receiving import (
    API_KEY,
    ENV,
    Clock,
    Network,
    Station,
    breaks,
    eventually,
    receiving,
    reply,
)

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

NOTHING: Final = {"deliveries": 0, "submits": 0, "polls": 0, "more": False}
EMPTY: Final = {**NOTHING, "next_due": None, "pending": 0, "cut_short": 0}
PASSWORD: Final = "hush-hush-password"
UNREACHABLE: Final = f"postgresql://me:{PASSWORD}@127.0.0.1:1/x"


async def drained(station: Station, seconds: int = 25) -> dict[str, Any]:
    """Drain; return the counts of work done, without those of remaining work."""
    return {
        name: value for name, value in (await drain(station, seconds)).items() if name in NOTHING
    }


async def drain(station: Station, seconds: int = 25) -> dict[str, Any]:
    answer = await station.http.post(f"/v1/drain?seconds={seconds}", timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def states(station: Station) -> list[tuple[str, str]]:
    return [tuple(row) for row in station.rows("SELECT handler, state FROM deliveries ORDER BY 1")]


@on(name="fine")
async def fine(_: Event) -> None: ...


# --- POST /v1/drain ---


@pytest.mark.usefixtures("on_sqlite")  # the store is not used
async def test_drain_without_a_valid_key_returns_401(start: Start) -> None:
    async with start(dispatch=False) as station:
        for key in ("", "Bearer wrong", f"Basic {API_KEY}"):
            headers = {"authorization": key} if key else {}
            for method in ("POST", "GET"):
                answer = await station.world.request(method, "/v1/drain", headers=headers)
                assert answer.status_code == 401, key


@pytest.mark.usefixtures("on_sqlite")  # the store is not used
async def test_drain_with_invalid_seconds_returns_422(start: Start) -> None:
    of_seconds = ("0", "901", "-1", "1.5", "x", "\u0661", "1e2")
    async with start(dispatch=False) as station:
        for query in ("minutes=1", *(f"seconds={text}" for text in of_seconds)):
            answer = await station.http.post(f"/v1/drain?{query}")
            assert answer.status_code == 422, query
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["type"] == "urn:receiver:problem:invalid-request"


async def test_drain_with_nothing_due_does_nothing(start: Start) -> None:
    async with start(fine, dispatch=False) as station:
        for _ in range(2):
            assert await drained(station) == NOTHING


async def test_without_dispatch_deliveries_stay_pending_until_a_drain(start: Start) -> None:
    ran: list[str] = []

    @on(name="async")
    async def on_the_loop(event: Event) -> None:
        ran.append(event.id)

    @on(name="plain")
    def in_a_thread(event: Event) -> None:
        ran.append(event.id)

    async with start(on_the_loop, in_a_thread, dispatch=False) as station:
        for number in range(3):
            await station.push(await station.submitted("eachlabs", f"prompt {number}"))
        # Neither a callback nor a replay runs them.
        replayed = station.network.sent[0].prediction_id
        await station.http.post(f"/v1/predictions/{replayed}/replay")
        assert {state for _, state in states(station)} == {"pending"}
        assert ran == []
        assert await drained(station, 20) == {**NOTHING, "deliveries": 6}
        assert {state for _, state in states(station)} == {"done"}
        assert len(ran) == 6
        assert await drained(station) == NOTHING


async def test_drain_runs_retries_that_become_due_but_no_later_ones(start: Start) -> None:
    attempts: list[int] = []

    @on(name="soon", retry=Retry(attempts=3, base=0.0001, cap=0.0001))
    async def soon(_: Event, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise Retry(after=0 if ctx.attempt < 3 else 500)

    @on(name="late")
    async def late(_: Event) -> None:
        raise Retry(after=500)

    async with start(soon, late, dispatch=False) as station:
        await station.push(await station.submitted("eachlabs"))
        done = 0
        while (found := await drained(station, 20))["deliveries"]:
            done += found["deliveries"]
        assert done == 4
        assert states(station) == [("late", "pending"), ("soon", "dead")]
    assert attempts == [1, 2, 3]


async def test_drain_retries_a_queued_submit_once(start: Start, network: Network) -> None:
    network.script("eachlabs.submit", breaks(httpx.ConnectError))
    clock = Clock()
    # Only a drain submits in this mode.
    async with start(RECEIVER_MODE="serverless", clock=clock) as station:
        prediction = await station.submit("eachlabs")
        assert prediction["status"] == "queued"  # it is sent again after the backoff
        clock.ahead = 5
        assert await drained(station, 20) == {**NOTHING, "submits": 1}
        assert (await station.read(prediction["id"]))["status"] == "processing"
        assert await drained(station, 20) == NOTHING
        assert network.count("eachlabs.submit") == 2


async def test_drain_polls_each_due_prediction_once_and_runs_its_handler(
    start: Start, network: Network
) -> None:
    # Only a drain polls in this mode.
    async with start(fine, RECEIVER_MODE="serverless", RECEIVER_POLL_AFTER="1000") as station:
        for number in range(3):
            await station.submitted("fal", f"{number}")
        assert await drained(station) == NOTHING
        network.always("fal.poll", network.ends)
        station.edit("UPDATE predictions SET due_at = 1")
        assert await drained(station, 20) == {**NOTHING, "polls": 3, "deliveries": 3}
        assert states(station) == [("fine", "done")] * 3
        assert network.count("fal.poll") == 3


async def test_drain_does_not_repeat_the_polls_that_the_poller_has_begun(
    start: Start, network: Network
) -> None:
    may_answer = asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        await may_answer.wait()
        return await network.ends(request)

    network.always("fal.poll", slowly)
    async with start(fine, dispatch=False, RECEIVER_POLL_AFTER="0.001") as station:
        for number in range(3):
            await station.submitted("fal", f"{number}")
        await eventually(lambda: network.count("fal.poll") == 3)
        assert await drained(station, 20) == NOTHING
        may_answer.set()
        for sent in network.sent:
            await station.until(sent.prediction_id, "succeeded")
        assert network.count("fal.poll") == 3


async def test_drain_runs_handlers_of_an_outcome_that_the_poller_gets_meanwhile(
    start: Start, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_answer = asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        await may_answer.wait()
        return await network.ends(request)

    async def answer_and_wait(*work: Any) -> Any:
        may_answer.set()
        return await wait_for_all(*work)

    network.always("fal.poll", slowly)
    network.always("eachlabs.poll", reply({}, 429, retry_after="3600"))
    monkeypatch.setattr("receiver.http.drain.wait_for_all", answer_and_wait)
    limits = {"RECEIVER_POLL_AFTER": "0.001", "EACHLABS_MAX_IN_FLIGHT": "1"}
    async with start(fine, dispatch=False, **limits) as station:
        await station.submitted("eachlabs", "in flight")
        await station.submit("eachlabs", "queued")  # due, but there is no room
        await eventually(lambda: network.count("eachlabs.poll") == 1)
        await station.submitted("fal")
        await eventually(lambda: network.count("fal.poll") == 1)
        assert (await drained(station, 20))["deliveries"] == 1
        assert states(station) == [("fine", "done")]


@pytest.mark.parametrize("plain", [False, True])
async def test_drain_ends_at_its_deadline_and_releases_unfinished_attempts(
    start: Start, monkeypatch: pytest.MonkeyPatch, *, plain: bool
) -> None:
    # A slow machine may release an attempt late.
    monkeypatch.setattr("receiver.deliveries.handler_worker._TO_GIVE_BACK", PATIENCE)
    monkeypatch.setattr("receiver.http.drain._OVERTIME", 3 * PATIENCE)
    loop_clock = LoopClock()
    entered, may_end = threading.Event(), threading.Event()

    @on(name="slow", concurrency=1)
    async def slow(_: Event) -> None:
        entered.set()
        await asyncio.Event().wait()

    @on(name="slow", concurrency=1)
    def blocking(_: Event) -> None:
        entered.set()
        may_end.wait(PATIENCE)

    handler = blocking if plain else slow
    async with start(handler, RECEIVER_MODE="serverless", RECEIVER_RETRY_BASE="100") as station:
        for number in range(2):
            await station.push(await station.submitted("eachlabs", f"prompt {number}"))
        draining = asyncio.create_task(drain(station, 30))
        await eventually(entered.is_set)
        assert not draining.done()
        loop_clock.ahead += 30
        await eventually(
            lambda: station.rows("SELECT state, attempts FROM deliveries"),
            lambda rows: rows == [("pending", 0)] * 2,
        )
        loop_clock.ahead += PATIENCE  # the drain ends, although the thread does not
        found = await draining
        may_end.set()
        assert (found["more"], found["deliveries"], found["cut_short"]) == (True, 0, 1)
        assert (found["pending"], found["next_due"]) == (2, 0.0)
        assert station.count("attempts") == 0


async def test_concurrent_drains_share_one_run_and_run_nothing_twice(start: Start) -> None:
    ran: list[str] = []
    together = asyncio.Event()

    @on(name="counts", concurrency=2)
    async def count(event: Event) -> None:
        ran.append(event.id)
        await together.wait()

    async with start(count, dispatch=False) as station:
        for number in range(5):
            await station.push(await station.submitted("eachlabs", f"prompt {number}"))
        calls = [asyncio.create_task(drained(station, 20)) for _ in range(3)]
        await eventually(lambda: len(ran) == 2)
        together.set()
        for found in await asyncio.gather(*calls):
            assert found == {**NOTHING, "deliveries": 5}
        assert sorted(set(ran)) == sorted(ran)
        assert station.count("attempts") == 5


async def test_shorter_concurrent_drain_reports_more_work(start: Start) -> None:
    may_end = asyncio.Event()

    @on(name="slow")
    async def slow(_: Event) -> None:
        await may_end.wait()

    async with start(slow, dispatch=False) as station:
        await station.push(await station.submitted("eachlabs"))
        long = asyncio.create_task(drained(station, 20))
        await eventually(lambda: ("slow", "running") in states(station))
        assert await drained(station, 1) == {**NOTHING, "more": True}
        may_end.set()
        assert (await long)["deliveries"] == 1


async def test_drain_continues_after_its_client_disconnects(start: Start) -> None:
    may_end = asyncio.Event()

    @on(name="slow")
    async def slow(_: Event) -> None:
        await may_end.wait()

    async with start(slow, dispatch=False) as station:
        await station.push(await station.submitted("eachlabs"))
        gone = asyncio.create_task(drained(station, 20))
        await eventually(lambda: ("slow", "running") in states(station))
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        may_end.set()
        await eventually(lambda: states(station) == [("slow", "done")])


async def test_drain_beside_dispatch_runs_each_delivery_once(start: Start) -> None:
    ran: list[str] = []

    @on(name="counts")
    async def count(event: Event) -> None:
        ran.append(event.id)

    async with start(count) as station:
        for number in range(5):
            await station.push(await station.submitted("eachlabs", f"prompt {number}"))
            await drained(station, 20)
        await eventually(lambda: station.count("attempts") == 5)
    assert len(ran) == len(set(ran)) == 5


async def test_shutdown_during_a_drain_loses_no_delivery(start: Start, logged: Logged) -> None:
    entered = asyncio.Event()
    may_end = asyncio.Event()

    @on(name="slow")
    async def slow(_: Event) -> None:
        entered.set()
        await may_end.wait()

    async def end_during_shutdown() -> None:
        await eventually(lambda: "receiver.stopping" in {line["event"] for line in logged})
        may_end.set()

    async with start(slow, dispatch=False) as station:
        await station.push(await station.submitted("eachlabs"))
        draining = asyncio.create_task(station.http.post("/v1/drain?seconds=60"))
        await entered.wait()
        ending = asyncio.create_task(end_during_shutdown())
    await ending
    # The waiting client gets an answer too.
    assert (await asyncio.wait({draining}, timeout=PATIENCE))[0]
    async with start(slow, dispatch=False) as station:
        await drained(station, 20)
        assert states(station) == [("slow", "done")]
        assert station.count("attempts") == 1


async def test_drains_in_two_processes_run_each_delivery_once(
    database: Database, network: Network
) -> None:
    ran: list[str] = []

    @on(name="counts", concurrency=2)
    async def count(event: Event) -> None:
        ran.append(event.id)
        await asyncio.sleep(0)

    async with (
        receiving(database, network, [count], dispatch=False) as here,
        receiving(database, network, [count], dispatch=False) as there,
    ):
        for number in range(12):
            await here.push(await here.submitted("eachlabs", f"prompt {number}"))
        found = await asyncio.gather(drained(here, 20), drained(there, 20))
        assert sum(one["deliveries"] for one in found) == 12
        assert len(set(ran)) == len(ran) == 12
        assert here.rows("SELECT DISTINCT state FROM deliveries") == [("done",)]
        assert here.count("attempts") == 12


# --- the functions behind the commands ---


def settings_for(url: str, **env: str) -> Settings:
    return Settings.read({**ENV, "RECEIVER_DATABASE_URL": url, **env})


async def leave_one_pending(start: Start) -> Station:
    async with start(fine, dispatch=False) as station:
        await station.push(await station.submitted("eachlabs"))
    return station


def url_of(station: Station) -> str:
    if isinstance(station.database, Database):
        return station.database.url
    return f"sqlite:///{station.database}"


HANDLER: Final = """
from receiver import Event, on


@on(name="fine")
def fine(event: Event) -> None:
    print("it ran", flush=True)
"""


async def test_drain_function_runs_pending_deliveries(start: Start, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HANDLER)
    station = await leave_one_pending(start)
    settings = settings_for(url_of(station), RECEIVER_HANDLERS=str(tmp_path / "mine.py"))
    assert await drain_once(settings, 20) == Drained(1, 0, 0, more=False)
    assert states(station) == [("fine", "done")]
    assert await drain_once(settings, 20) == Drained(0, 0, 0, more=False)


SLOW: Final = """
import asyncio
from receiver import Event, on


@on(name="fine")
async def fine(event: Event) -> None:
    await asyncio.sleep(3600)
"""


async def test_stopped_drain_releases_its_running_attempt(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Running attempts get less time to end.
    defaults = Worker.__init__.__kwdefaults__
    assert defaults
    monkeypatch.setitem(defaults, "pace", msgspec.structs.replace(TIMING, drain=0.05))
    (tmp_path / "mine.py").write_text(SLOW)
    station = await leave_one_pending(start)
    settings = settings_for(url_of(station), RECEIVER_HANDLERS=str(tmp_path / "mine.py"))
    stop = asyncio.Event()
    draining = asyncio.create_task(drain_once(settings, 3600, stop))
    await eventually(lambda: states(station) == [("fine", "running")])
    stop.set()
    assert await draining == Drained(0, 0, 0, more=True)
    assert station.rows("SELECT state, attempts FROM deliveries") == [("pending", 0)]


async def test_migrating_twice_changes_nothing(start: Start) -> None:
    station = await leave_one_pending(start)
    before = station.rows("SELECT * FROM deliveries")
    for _ in range(2):
        await migrate(settings_for(url_of(station)))
    assert station.rows("SELECT * FROM deliveries") == before


async def test_worker_runs_deliveries_recorded_by_another_process(
    database: Database, network: Network, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(HANDLER)
    settings = settings_for(database.url, RECEIVER_HANDLERS=str(tmp_path / "mine.py"))
    stop = asyncio.Event()
    async with receiving(database, network, [fine], dispatch=False) as station:
        working = asyncio.create_task(work(settings, stop))
        await station.push(await station.submitted("eachlabs", "one"))
        await eventually(lambda: states(station) == [("fine", "done")])
        await station.push(await station.submitted("eachlabs", "two"))
        await eventually(lambda: states(station) == [("fine", "done")] * 2)
        stop.set()
        async with asyncio.timeout(PATIENCE):
            await working


async def test_worker_on_sqlite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="a worker needs PostgreSQL: with SQLite one process"):
        await work(settings_for(f"sqlite:///{tmp_path}/receiver.db"), asyncio.Event())
    assert not (tmp_path / "receiver.db").exists()


async def test_drain_of_a_sqlite_file_in_use_is_refused(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "receiver.db"
    async with receiving(path, network):
        with pytest.raises(StoreUnusable, match="is in use by another receiver"):
            await drain_once(settings_for(f"sqlite:///{path}"), 5)


@pytest.mark.parametrize(("missing", "modules"), [("asyncpg", ["engine"]), ("pgqueuer", ["queue"])])
def test_missing_postgres_extra_gives_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, missing: str, modules: list[str]
) -> None:
    # Reload only the module that imports it: compiled parts of asyncpg would crash.
    for module in modules:
        monkeypatch.delitem(sys.modules, f"receiver.store.postgres.{module}", raising=False)
    really = builtins.__import__

    def blocked(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return really(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", blocked)
    version = importlib.metadata.version

    def versioned(name: str) -> str:
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", versioned)
    with pytest.raises(StoreUnusable) as error:
        create_app(settings_for(f"postgresql://me:{PASSWORD}@db.test/books"))
    assert str(error.value) == (
        f"PostgreSQL support is not installed ({missing} is missing): "
        "pip install 'prediction-receiver[postgres]'"
    )


async def test_database_password_is_in_no_log_line_and_no_error(
    database: Database, network: Network, logged: Logged
) -> None:
    parts = urlsplit(database.url)
    place = parts.netloc.rpartition("@")[2]
    user = parts.username or "postgres"
    # The test server asks local clients for no password.
    known = Database(urlunsplit(parts._replace(netloc=f"{user}:{PASSWORD}@{place}")))
    async with receiving(known, network, [fine]) as station:
        await station.push(await station.submitted("eachlabs"))
        await eventually(lambda: states(station) == [("fine", "done")])
        with database.refusing():
            answer = await station.http.get("/readyz")
            assert answer.status_code == 503
            assert PASSWORD not in answer.text
            answer = await station.http.get("/v1/predictions")
            assert PASSWORD not in answer.text
        await eventually(lambda: _ready(station))
    assert [line for line in logged if line["event"] == "store.unavailable"]
    started = [line for line in logged if line["event"] == "receiver.started"]
    assert started[0]["database"].endswith(f"/{database.name}")
    assert all(PASSWORD not in repr(line) for line in logged)
    with database.refusing(), pytest.raises(StoreUnusable) as error:
        await migrate(settings_for(known.url))
    assert PASSWORD not in str(error.value)


async def _ready(station: Station) -> bool:
    return (await station.http.get("/readyz")).status_code == 200


# --- the commands ---


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("database").url)
    return f"sqlite:///{tmp_path}/receiver.db"


def run(
    *args: str,
    cwd: Path,
    url: str,
    by: Callable[..., subprocess.CompletedProcess[str]] = receiver,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    return by(
        *args,
        cwd=cwd,
        RECEIVER_SECRET_KEY=ENV["RECEIVER_SECRET_KEY"],
        RECEIVER_DATABASE_URL=url,
        **env,
    )


def test_migrate_and_drain_commands_print_their_results(tmp_path: Path, url: str) -> None:
    (tmp_path / "mine.py").write_text(HANDLER)
    migrated = run("migrate", cwd=tmp_path, url=url)
    assert migrated.returncode == 0, migrated.stderr
    assert migrated.stdout == f"{settings_for(url).database} is up to date\n"
    done = run("drain", "mine.py", "--seconds", "5", cwd=tmp_path, url=url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EMPTY


@pytest.mark.parametrize(
    ("args", "url", "words", "by"),
    [
        (("worker",), "sqlite:///receiver.db", "a worker needs PostgreSQL", receiver),
        (("worker", "a.py"), "postgresql://127.0.0.1:1/x", "a.py: no such file", receiver),
        (("migrate",), UNREACHABLE, "cannot open the database", inside),
        (("serve", "--port", "0"), UNREACHABLE, "cannot open the database", receiver),
    ],
)
def test_command_error_is_a_message_without_traceback_or_password(
    tmp_path: Path, args: tuple[str, ...], url: str, words: str, by: Callable[..., Any]
) -> None:
    done = run(*args, cwd=tmp_path, url=url, by=by)
    assert done.returncode == 1
    assert words in done.stderr
    assert PASSWORD not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_drain_command_names_the_server_process_that_uses_the_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/receiver.db"
    env = {"RECEIVER_SECRET_KEY": ENV["RECEIVER_SECRET_KEY"], "RECEIVER_DATABASE_URL": url}
    with running("serve", "--no-dispatch", cwd=tmp_path, **env) as server:
        server.wait_for("receiver.started")
        done = run("drain", cwd=tmp_path, url=url)
    assert done.returncode == 1
    assert f"in use by another receiver (process {server.process.pid})" in done.stderr
    assert "Traceback" not in done.stderr


def test_worker_command_stops_cleanly_on_sigterm(tmp_path: Path, database: Database) -> None:
    (tmp_path / "mine.py").write_text(HANDLER)
    log = tmp_path / "worker.log"
    log.touch()
    env = {
        "RECEIVER_SECRET_KEY": ENV["RECEIVER_SECRET_KEY"],
        "RECEIVER_DATABASE_URL": database.url,
    }
    command = ["-m", "receiver", "worker", "mine.py"]
    worker = Forked(command, tmp_path, environment(env), log, log)
    asyncio.run(_until(lambda: "receiver.started" in log.read_text()))
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE) == 0
    assert "receiver.stopped" in log.read_text()
    assert "Traceback" not in log.read_text()


async def _until(condition: Callable[[], bool]) -> None:
    await eventually(condition)
