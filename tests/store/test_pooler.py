"""The store through PgBouncer, as hosting services use it: in session and transaction mode."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from receiver import Event, on
from receiver.cli.doctor.database import inspect_database
from receiver.model.errors import StoreUnavailable, StoreUnusable
from receiver.model.tasks import Wakeups
from receiver.settings import Settings
from receiver.store.inbox import accept_outcome
from receiver.store.postgres import sessions
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.postgres.sessions import Access, Pooled
from receiver.store.schema import migrations
from receiver.store.statement import Statement
from tests.conftest import Logged
from tests.patience import PATIENCE
from tests.pgbouncer import pgbouncer, variants
from tests.postgres import Database
from tests.receiving import Network, Station, eventually, receiving
from tests.store.parts import advisory_locks, arrival, ended, new, pred, settlement, wanted

pytestmark = pytest.mark.anyio

Pooler = Callable[[str], str]
NOWHERE = "postgresql://me@127.0.0.1:1/nowhere"
_MANY = 100


@pytest.fixture(params=variants())
def pooler(
    request: pytest.FixtureRequest, bare_database: Database, tmp_path: Path
) -> Iterator[Pooler]:
    """Yield a function that returns the bare database's URL through PgBouncer in a pool mode."""
    with ExitStack() as stack:
        yield lambda mode: stack.enter_context(
            pgbouncer(tmp_path, bare_database, mode, request.param)
        )


def made(
    url: str,
    pooled: Pooled = "auto",
    migrate_url: str | None = None,
    wakeups: Wakeups | None = None,
) -> PostgresStore:
    access = Access(pooled=pooled, migrate_url=migrate_url)
    return PostgresStore(url, print, PgQueuerJobs(), wakeups=wakeups, access=access)


@asynccontextmanager
async def started(*stores: PostgresStore) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for store in stores:
            await store.start()
            stack.push_async_callback(store.stop)
        yield


async def use(store: PostgresStore, number: int, other: PostgresStore) -> None:
    """Create a prediction, accept its outcome, and claim and settle its delivery by two stores."""
    await store.predictions.create(new(number))
    await accept_outcome(other, arrival(number, handlers=("greet",)))
    [claim] = (await store.claim(wanted())).claims
    assert await store.settle(settlement(claim))


async def test_session_mode_supports_all_operations(
    bare_database: Database, pooler: Pooler
) -> None:
    url = pooler("session")
    await made(url).migrate()
    places = bare_database.rows(
        "SELECT DISTINCT schemaname FROM pg_tables WHERE schemaname IN ('public', 'receiver')"
    )
    assert places == [("receiver",)]
    for number in range(2):  # the second round gets sessions that were used before
        stores = [made(url, "off"), made(url)]
        async with started(*stores):
            await use(stores[0], number, stores[1])


async def test_error_of_a_pooler_with_too_few_sessions_names_the_setting(
    bare_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pgbouncer(tmp_path, bare_database, "session", {"default_pool_size": "3"}) as url:
        await made(url).migrate()
        wakeups = Wakeups()
        store = made(url, wakeups=wakeups)
        with wakeups.listen("changes") as listens:
            async with started(store):
                async with asyncio.timeout(PATIENCE):
                    await listens.wait()  # it uses one session, and the test the two others
                held = [await store.connect() for _ in "ab"]
                said = r"no session was given: .* pooler .*RECEIVER_DATABASE_CONNECTIONS \(9\)"
                with monkeypatch.context() as patch:
                    patch.setattr(sessions, "COMMAND_TIMEOUT", 0.1)
                    with pytest.raises(StoreUnavailable, match=said):
                        await store.predictions.create(new(1))
                for connection in held:
                    await connection.close()
                await store.predictions.create(new(1))


async def test_transaction_mode_is_rejected_if_turned_off_and_leaves_no_lock(
    bare_database: Database, pooler: Pooler
) -> None:
    url = pooler("transaction")
    for begins in (made(url, "off").migrate, made(url, "off").start):
        with pytest.raises(StoreUnusable, match="RECEIVER_DATABASE_POOLED is off; set that"):
            await begins()
    assert advisory_locks(bare_database) == 0
    await made(bare_database.url).migrate()


async def test_transaction_mode_is_detected_and_logged_once_per_store(
    pooler: Pooler, logged: Logged
) -> None:
    url = pooler("transaction")
    store, other = made(url), made(f"{url}?options=-c%20work_mem%3D5MB")
    async with started(store, other):
        await use(store, 1, other)
    told = [line for line in logged if line["event"] == "store.pooled"]
    assert len(told) == 2  # one for each store
    assert "looked for, each second" in told[0]["reason"]


@pytest.mark.parametrize("pooled", ["auto", "on"])
async def test_ten_concurrent_starts_leave_no_lock_and_no_session_setting(
    bare_database: Database, pooler: Pooler, pooled: Pooled
) -> None:
    url = pooler("transaction")
    stores = [made(url, pooled) for _ in range(10)]
    await asyncio.gather(*(store.start() for store in stores))
    for number, store in enumerate(stores):
        await use(store, number, stores[number - 1])
    await asyncio.gather(*(store.stop() for store in stores))
    assert advisory_locks(bare_database) == 0
    assert bare_database.rows(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'relation' AND database ="
        " (SELECT oid FROM pg_database WHERE datname = current_database())"
        " AND pid <> pg_backend_pid()"
    ) == [(0,)]
    seen = await inspect_database(Settings(database_url=url, database_pooled=pooled))
    [line] = seen.findings
    schema = f"schema {len(migrations('postgres'))}, through a pooler in transaction mode"
    assert (line.level, schema in line.says) == ("ok", True)
    for traces in await seen_in_sessions(url, 12):
        assert traces == '"$user", public000off'
    await made(bare_database.url).migrate()  # no lock blocks a direct connection


async def seen_in_sessions(url: str, count: int) -> list[Any]:
    """Return the settings that earlier clients left in `count` sessions of the pool."""
    async with AsyncExitStack() as stack:
        found = []
        for _ in range(count):
            connection = await asyncpg.connect(url, statement_cache_size=0)
            stack.push_async_callback(connection.close)
            await stack.enter_async_context(connection.transaction())
            found.append(
                await connection.fetchval(
                    "SELECT current_setting('search_path') || current_setting('lock_timeout') ||"
                    " (SELECT count(*) FROM pg_listening_channels()) ||"
                    " (SELECT count(*) FROM pg_prepared_statements WHERE name <> '') ||"
                    " current_setting('default_transaction_read_only')"
                )
            )
        return found


async def test_settings_in_the_url_apply_in_transaction_mode(pooler: Pooler) -> None:
    url = pooler("transaction")
    store = made(f"{url}?work_mem=5MB&options=-c%20lock_timeout%3D1s%20-c%20geqo%3Doff")
    async with started(store):
        settings = Statement(
            "SELECT name, setting FROM pg_settings"
            " WHERE name IN ('work_mem', 'lock_timeout', 'geqo', 'enable_seqscan')"
        )
        rows = await store.run(settings)
        assert {row["name"]: row["setting"] for row in rows} == {
            "work_mem": "5120",
            "lock_timeout": "8000",
            "geqo": "off",
            "enable_seqscan": "off",
        }


async def test_commits_of_other_stores_are_polled_while_a_caller_waits(
    pooler: Pooler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.store.postgres.engine._GLANCE", 0.01)
    url = pooler("transaction")
    wakeups = Wakeups()
    here, there = made(url), made(url, wakeups=wakeups)
    async with started(here, there):
        for number in range(2):
            with (
                wakeups.listen("prediction", pred(number)) as over,
                wakeups.listen("changes") as changed,
                wakeups.listen("handler", "greet") as pending,
            ):
                await ended(here, number, "greet")
                async with asyncio.timeout(PATIENCE):
                    for event in (over, changed, pending):
                        await event.wait()


async def test_migrate_url_is_used_only_if_the_schema_needs_a_migration(
    bare_database: Database, pooler: Pooler
) -> None:
    url = pooler("transaction")
    await made(NOWHERE, migrate_url=bare_database.url).migrate()
    async with started(made(url, migrate_url=NOWHERE)):  # which is not connected to
        pass
    bare_database.execute("COMMENT ON TABLE receiver.pgqueuer IS 'pgqueuer 0.1'")
    with pytest.raises(StoreUnusable, match="set RECEIVER_MIGRATE_URL to the server itself"):
        await made(url).start()
    async with started(made(url, migrate_url=bare_database.url)):
        assert advisory_locks(bare_database) == 0


async def test_duplicate_callbacks_through_a_pooler_run_each_handler_once(
    bare_database: Database, pooler: Pooler, network: Network
) -> None:
    url = pooler("transaction")
    ran: Counter[tuple[str, str]] = Counter()

    @on(name="greet")
    async def greet(event: Event) -> None:
        ran["greet", event.id] += 1

    @on(name="save")
    async def save(event: Event) -> None:
        ran["save", event.id] += 1

    def station() -> Any:
        return receiving(
            bare_database, network, [greet, save], dispatch=False, RECEIVER_DATABASE_URL=url
        )

    async with station() as here, station() as there:
        await asyncio.gather(*(here.submit("fal", f"prompt {number}") for number in range(_MANY)))
        await eventually(lambda: len(network.sent) == _MANY)
        stations: list[Station] = [here, there]
        few = asyncio.Semaphore(8)

        async def push(number: int, times: int) -> None:
            for turn in range(times):
                async with few:
                    answer = await stations[(number + turn) % 2].push(network.sent[number])
                assert answer.status_code == 200, answer.text

        await asyncio.gather(*(push(number, 1 + number % 3) for number in range(_MANY)))
        done = 0
        while done < 2 * _MANY:
            answers = await asyncio.gather(
                *(one.http.post("/v1/drain?seconds=30", timeout=PATIENCE) for one in stations)
            )
            counts = [answer.json()["deliveries"] for answer in answers]
            assert sum(counts) > 0
            done += sum(counts)
        assert len(ran) == 2 * _MANY
        assert set(ran.values()) == {1}
        assert here.rows("SELECT DISTINCT state FROM deliveries") == [("done",)]
        assert advisory_locks(bare_database) == 0
