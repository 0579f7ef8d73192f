"""The store of a serverless function: few connections, opened on demand and closed when idle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from receiver.model.errors import StoreUnavailable, StoreUnusable
from receiver.model.tasks import Topic, Wakeups
from receiver.settings import Settings
from receiver.settings.platforms import NAMES
from receiver.store.inbox import accept_outcome
from receiver.store.opening import store_maker
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.group_commit import Connection
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.postgres.sessions import Access, Sessions
from receiver.store.sqlite.engine import SQLiteStore
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.receiving import ENV, eventually
from tests.store.parts import NOW, arrival, new, pred, settlement, wanted

pytestmark = pytest.mark.anyio

_OURS = "FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'function'"


class Glances(Wakeups):
    """Counts how often the store asks whether a caller waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def is_awaited(self, topic: Topic) -> bool:
        self.count += topic == "prediction"
        return super().is_awaited(topic)


class Function:
    """A store as a serverless function has it, and its connections on the server."""

    def __init__(self, database: Database, **given: Any) -> None:
        self.reports: list[StoreUnavailable | None] = []
        self.wakeups = Glances()
        self.database = database
        access = Access(**{"serverless": True, "connections": 2, **given})
        self.store = PostgresStore(
            f"{database.url}{'&' if '?' in database.url else '?'}application_name=function",
            self.reports.append,
            PgQueuerJobs(),
            wakeups=self.wakeups,
            access=access,
        )

    def cut(self) -> int:
        """Terminate its connections; return how many there were."""
        return len(self.database.rows(f"SELECT pg_terminate_backend(pid, 5000) {_OURS}"))

    def connections(self) -> list[Any]:
        """Return the server's process, last statement and last change of each connection."""
        return self.database.rows(f"SELECT pid, query_start, state_change {_OURS} ORDER BY 1")


@asynccontextmanager
async def function(database: Database, **given: Any) -> AsyncIterator[Function]:
    made = Function(database, **given)
    await made.store.start()
    try:
        yield made
    finally:
        await made.store.stop()


async def work(store: PostgresStore, number: int) -> None:
    await store.predictions.create(new(number))
    await accept_outcome(store, arrival(number, handlers=("greet",)))
    await store.predictions.get(pred(number))


async def test_start_runs_one_statement_on_one_connection(database: Database) -> None:
    async with function(database) as made:
        [[pid, started, _]] = made.connections()
        assert await made.store.recover("me", NOW) == []
        assert [row[:2] for row in made.connections()] == [(pid, started)]


async def test_missing_schema_is_an_error_and_is_not_created(bare_database: Database) -> None:
    made = Function(bare_database)
    with pytest.raises(StoreUnusable, match="is not set up: run `receiver migrate` once"):
        await made.store.start()
    await made.store.stop()
    await eventually(lambda: made.connections() == [])
    assert bare_database.rows("SELECT FROM pg_namespace WHERE nspname = 'receiver'") == []
    await made.store.migrate()
    async with function(bare_database):
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DELETE FROM receiver.migrations", "has schema 0, and this receiver needs"),
        ("INSERT INTO receiver.migrations VALUES (99)", "written by a newer receiver (schema 99"),
        ("COMMENT ON TABLE receiver.pgqueuer IS 'pgqueuer 0.1'", "has the queue of pgqueuer 0.1"),
    ],
)
async def test_other_schema_version_is_rejected(
    bare_database: Database, change: str, words: str
) -> None:
    made = Function(bare_database)
    await made.store.migrate()
    bare_database.execute(change)
    before = _schema(bare_database)
    with pytest.raises(StoreUnusable) as refused:
        await made.store.start()
    assert words in str(refused.value)
    await eventually(lambda: made.connections() == [])
    assert _schema(bare_database) == before


def _schema(database: Database) -> tuple[Any, Any]:
    """Return the versions of the schema, and all its tables with their numbers and comments."""
    tables = database.rows(
        "SELECT oid, relname, relfilenode, obj_description(oid) FROM pg_class "
        "WHERE relnamespace = 'receiver'::regnamespace ORDER BY 1"
    )
    return database.rows("SELECT * FROM receiver.migrations ORDER BY 1"), tables


@pytest.fixture
def open_at_a_time(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list with the number of open connections after each one that a store opens."""
    opened: list[Connection] = []
    counts: list[int] = []
    open_one = Sessions.open

    async def counted(self: Sessions, *given: Any, **named: Any) -> Connection:
        made = await open_one(self, *given, **named)
        opened.append(made)
        counts.append(sum(not one.is_closed() for one in opened))
        return made

    monkeypatch.setattr(Sessions, "open", counted)
    return counts


async def test_function_opens_at_most_two_connections_under_load(
    database: Database, open_at_a_time: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A loop that is blocked for longer lets the heartbeat open a third.
    monkeypatch.setattr("receiver.store.postgres.heartbeat._PATIENCE", PATIENCE)
    async with function(database) as made:
        store = made.store
        await asyncio.gather(*(work(store, number) for number in range(60)))
        while claims := (await store.claim(wanted())).claims:
            store.renew("me", [claim.id for claim in claims], NOW + 500)
            await eventually(lambda: _lease(database) == NOW + 500)
            await asyncio.gather(*(store.settle(settlement(claim)) for claim in claims))
        await store.trim_queue()
        assert max(open_at_a_time) == len(made.connections()) == 2
        [[folded]] = database.rows(
            "SELECT sum(count)::int FROM pgqueuer_statistics WHERE status = 'successful'"
        )
        assert folded == 60
        assert database.rows("SELECT DISTINCT state FROM deliveries") == [("done",)]
        assert made.reports == []


def _lease(database: Database) -> float:
    [[lease]] = database.rows("SELECT min(lease_until) FROM deliveries WHERE state = 'running'")
    return float(lease)


async def test_leases_are_renewed_while_the_loop_is_blocked(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.store.postgres.heartbeat._PATIENCE", 0.05)
    async with function(database) as made:
        await work(made.store, 1)
        [claim] = (await made.store.claim(wanted())).claims
        made.store.renew("me", [claim.id], NOW + 500)
        ends = time.monotonic() + PATIENCE
        while _lease(database) != NOW + 500:  # while the event loop is blocked
            assert time.monotonic() < ends
        assert await made.store.settle(settlement(claim))
        await eventually(lambda: len(made.connections()) <= 2)


async def test_idle_function_runs_no_statement_until_a_caller_waits(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.store.postgres.engine._GLANCE", 0.001)
    async with function(database) as made:
        await work(made.store, 1)
        before = made.connections()
        assert len(before) == 2
        count = made.wakeups.count
        await eventually(lambda: made.wakeups.count > count + 200)
        assert made.connections() == before
        with made.wakeups.listen("prediction", pred(2)) as news:  # now a caller waits
            async with function(database) as other:
                await work(other.store, 2)
            async with asyncio.timeout(PATIENCE):
                await news.wait()


async def test_connections_closed_by_the_server_are_reopened_without_a_report(
    database: Database,
) -> None:
    async with function(database, connections=4) as made:
        for number in range(3):
            await asyncio.gather(*(work(made.store, 10 * number + more) for more in range(8)))
            assert made.cut() >= 2
        [claim, *_] = (await made.store.claim(wanted())).claims
        assert made.cut() >= 1
        assert await made.store.settle(settlement(claim))
        assert made.cut() >= 1
        assert (await made.store.due("other", ["greet"], ["fal"], NOW + 20)).claimed
        assert made.reports == []


async def test_unused_connections_are_closed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.store.postgres.engine._IDLE", 0.05)
    async with function(database) as made:
        for number in range(2):
            await work(made.store, number)
            await eventually(lambda: made.connections() == [])
        assert made.reports == []


async def test_server_stays_within_its_connection_limit(
    database: Database, open_at_a_time: list[int]
) -> None:
    """It writes, reads, claims, renews and listens; the sixth connection is for housekeeping."""
    async with function(database, serverless=False, connections=6) as made:
        await asyncio.gather(*(work(made.store, number) for number in range(40)))
        claims = (await made.store.claim(wanted())).claims
        made.store.renew("me", [claim.id for claim in claims], NOW + 500)
        await eventually(lambda: _lease(database) == NOW + 500)
        await eventually(made.connections, lambda found: len(found) >= 5)
        assert max(open_at_a_time) == 5


# --- SQLite on an ephemeral disk ---


@pytest.mark.parametrize("name", NAMES)
def test_sqlite_is_rejected_on_an_ephemeral_disk(name: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/receiver.db"
    settings = Settings.read({**ENV, "RECEIVER_DATABASE_URL": url, name: "x"})
    with pytest.raises(StoreUnusable, match=f"{name} says that this is a function") as refused:
        store_maker(settings)
    assert "set RECEIVER_DATABASE_URL to a PostgreSQL server" in str(refused.value)
    store_maker(
        Settings.read({**ENV, "RECEIVER_DATABASE_URL": "postgresql://me@host/x", name: "x"})
    )


@pytest.mark.parametrize(("mounted", "taken"), [("/mnt/disk", True), ("/", False), ("/tmp", False)])
def test_sqlite_is_accepted_only_on_a_mounted_disk(
    monkeypatch: pytest.MonkeyPatch, mounted: str, *, taken: bool
) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == mounted)
    folder = mounted.rstrip("/")
    url = f"sqlite:///{folder}/data/receiver.db"
    settings = Settings.read({**ENV, "RECEIVER_DATABASE_URL": url, "K_SERVICE": "x"})
    if taken:
        store = store_maker(settings)(lambda _: None, lambda _: None, Wakeups())
        assert isinstance(store, SQLiteStore)
        return
    with pytest.raises(StoreUnusable, match="on a disk that is mounted"):
        store_maker(settings)


def test_minimum_number_of_connections_depends_on_the_mode() -> None:
    def problems(**env: str) -> list[str]:
        return Settings.parse({**ENV, **env})[1]

    few = "RECEIVER_DATABASE_CONNECTIONS: must be {} or more"
    assert problems(RECEIVER_DATABASE_CONNECTIONS="5") == [few.format(6)]
    assert problems(RECEIVER_DATABASE_CONNECTIONS="5", RECEIVER_MODE="serverless") == []
    assert problems(RECEIVER_DATABASE_CONNECTIONS="1", RECEIVER_MODE="serverless") == [
        few.format(2)
    ]
    [said] = problems(RECEIVER_MIGRATE_URL="sqlite:///x.db")
    assert said == "RECEIVER_MIGRATE_URL: must be postgresql://user@host/name"
