"""The store on PostgreSQL: its migrations, its job queue, and several processes that share it."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import msgspec
import pytest
from pgqueuer import Queries

from receiver.model.errors import StoreUnavailable, StoreUnusable
from receiver.model.ids import delivery_id
from receiver.model.retry import DONE, Decision
from receiver.model.tasks import Topic, Wakeups
from receiver.model.values import Recipients, Shift
from receiver.store import statement
from receiver.store.deliveries import Claim, Claims
from receiver.store.inbox import accept_outcome
from receiver.store.postgres import migrating
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.group_commit import Connection
from receiver.store.postgres.notices import Notices
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.postgres.sessions import Access
from receiver.store.schema import migrations
from receiver.store.search import Wanted
from receiver.store.statement import Statement
from tests.conftest import Logged
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.receiving import eventually
from tests.store.parts import (
    GIVEN_UP,
    NOW,
    TABLES,
    advisory_locks,
    arrival,
    claimed,
    ended,
    new,
    pred,
    settlement,
    submitting,
    wanted,
)

pytestmark = pytest.mark.anyio

News = tuple[Sequence[str] | None, Sequence[str] | None]
GAP: Final[News] = (None, None)


class Heard(Wakeups):
    """Records each wakeup of this process, as (handlers, predictions)."""

    def __init__(self, heard: list[News]) -> None:
        super().__init__()
        self._heard = heard
        self._handlers: list[str] = []

    def wake(self, topic: Topic, *names: str) -> None:
        if topic == "handler":
            self._handlers = list(names)
        elif topic == "prediction":
            self._heard.append((self._handlers, list(names)))

    def wake_all(self, topic: Topic) -> None:
        if topic == "prediction":
            self._heard.append(GAP)


class Process:
    """A store as a separate process has it, and the wakeups that it received."""

    def __init__(self, url: str, access: Access | None = None) -> None:
        self.reports: list[StoreUnavailable | None] = []
        self.heard: list[News] = []
        self.jobs = PgQueuerJobs()
        self.store = PostgresStore(
            url, self.reports.append, self.jobs, wakeups=Heard(self.heard), access=access
        )

    async def listens(self) -> None:
        """Wait until it listens for notifications, and clear the recorded wakeups."""
        await until(lambda: GAP in self.heard)
        self.heard.clear()

    async def hears(self, count: int) -> None:
        await until(lambda: len(self.heard) >= count)


@asynccontextmanager
async def processes(database: Database, count: int = 1) -> AsyncIterator[list[Process]]:
    async with AsyncExitStack() as stack:
        made = [Process(database.url, database.made) for _ in range(count)]
        for process in made:
            await process.store.start()
            stack.push_async_callback(process.store.stop)
        yield made


async def until(condition: Callable[[], Any]) -> Any:
    ends = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)
    return found


async def refusal(url: str) -> str:
    """Return the error with which a store does not start."""
    store = PostgresStore(url, print, PgQueuerJobs())
    with pytest.raises(StoreUnusable) as error:
        await store.start()
    await store.stop()
    return str(error.value)


async def refusal_to_migrate(url: str) -> str:
    with pytest.raises(StoreUnusable) as error:
        await PostgresStore(url, print, PgQueuerJobs()).migrate()
    return str(error.value)


def tables(database: Database) -> set[str]:
    found = database.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'receiver'")
    return {name for (name,) in found}


def jobs(database: Database) -> list[tuple[str, str, str]]:
    """Return (delivery, handler, status) of every PgQueuer job."""
    sql = "SELECT convert_from(payload, 'utf8'), entrypoint, status::text FROM pgqueuer ORDER BY 1"
    return database.rows(sql)


# --- migrations ---


class TestMigrations:
    async def test_ten_concurrent_starts_migrate_an_empty_database_once(
        self, bare_database: Database
    ) -> None:
        made = [Process(bare_database.url) for _ in range(10)]
        await asyncio.gather(*(process.store.start() for process in made))
        versions = bare_database.rows("SELECT number FROM migrations ORDER BY number")
        assert versions == [(number,) for number in range(1, len(migrations("postgres")) + 1)]
        created = await asyncio.gather(
            *(process.store.predictions.create(new(number)) for number, process in enumerate(made))
        )
        assert all(one.is_new for one in created)
        await asyncio.gather(*(process.store.stop() for process in made))
        queue = {"pgqueuer", "pgqueuer_log", "pgqueuer_statistics", "pgqueuer_schedules"}
        assert tables(bare_database) >= {*TABLES, "limits", "requests", "leases", *queue}
        others = bare_database.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        assert others == []
        # The queue must be as durable as the rows: a crash would empty an unlogged table.
        [[durability]] = bare_database.rows(
            "SELECT relpersistence::text FROM pg_class WHERE oid = 'pgqueuer'::regclass"
        )
        assert durability == "p"

    async def test_newer_schema_is_rejected(self, bare_database: Database) -> None:
        async with processes(bare_database):
            pass
        bare_database.execute("INSERT INTO receiver.migrations VALUES (99)")
        said = await refusal(bare_database.url)
        assert said == (
            "the database was written by a newer receiver (schema 99, this one knows "
            f"{len(migrations('postgres'))}): upgrade this receiver, or use another database"
        )

    async def test_failed_migration_is_rolled_back(self, bare_database: Database) -> None:
        bare_database.execute(
            "CREATE SCHEMA receiver", "CREATE TABLE receiver.steps (in_the_way BOOLEAN)"
        )
        assert 'relation "steps" already exists' in await refusal(bare_database.url)
        assert tables(bare_database) == {"steps"}
        bare_database.execute("DROP TABLE receiver.steps")
        async with processes(bare_database) as [process]:
            assert (await process.store.predictions.create(new(1))).is_new

    async def test_pgqueuer_tables_are_upgraded_if_their_version_differs(
        self, bare_database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upgrades: list[str] = []
        upgrade = Queries.apply_upgrade

        async def watched(queries: Queries) -> None:
            upgrades.append("upgraded")
            await upgrade(queries)

        monkeypatch.setattr(Queries, "apply_upgrade", watched)
        note = "SELECT obj_description('receiver.pgqueuer'::regclass)"
        async with processes(bare_database) as [process]:
            await ended(process.store, 1, "greet")
            [[current]] = bare_database.rows(note)
        assert current.startswith("pgqueuer 1.")
        async with processes(bare_database):
            assert upgrades == []
        bare_database.execute("COMMENT ON TABLE receiver.pgqueuer IS 'pgqueuer 0.1'")
        async with processes(bare_database) as [process]:
            assert upgrades == ["upgraded"]
            assert bare_database.rows(note) == [(current,)]
            [claim] = (await process.store.claim(wanted())).claims
            assert await process.store.settle(settlement(claim))
        async with processes(bare_database):
            assert upgrades == ["upgraded"]

    async def test_tables_in_the_public_schema_are_named_and_can_be_moved(
        self, bare_database: Database
    ) -> None:
        async with processes(bare_database):
            pass
        for name in ("deliveries", "predictions"):
            bare_database.execute(f"ALTER TABLE receiver.{name} SET SCHEMA public")
        said = await refusal(bare_database.url)
        assert "these tables are not in the PostgreSQL schema `receiver`: " in said
        moves = re.findall("ALTER TABLE [^;]*;", said)
        assert len(moves) == 2
        bare_database.execute(*moves)
        async with processes(bare_database) as [process]:
            assert (await process.store.predictions.create(new(1))).is_new
        bare_database.execute("DROP TABLE receiver.steps")
        assert "restore a backup" in await refusal(bare_database.url)

    @staticmethod
    @asynccontextmanager
    async def setting_up(database: Database) -> AsyncIterator[None]:
        """Hold the schema's lock, as a process that migrates does."""
        holder = await asyncpg.connect(database.url)
        begun = holder.transaction()
        await begun.start()
        await holder.execute("SELECT pg_advisory_xact_lock(hashtext('receiver schema'))")
        yield
        await begun.rollback()
        await holder.close()

    async def test_migration_that_waits_for_another_process_logs_it(
        self, bare_database: Database, logged: Logged
    ) -> None:
        async with self.setting_up(bare_database):
            starting = asyncio.create_task(Process(bare_database.url).store.migrate())
            await until(lambda: any(line["event"] == "schema.waiting" for line in logged))
        await starting
        assert advisory_locks(bare_database) == 0

    async def test_start_gives_up_after_the_migration_lock_timeout(
        self, bare_database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(migrating, "_TO_MIGRATE", "SET LOCAL lock_timeout = '100ms'")
        async with self.setting_up(bare_database):
            assert "another process has been setting up" in await refusal(bare_database.url)
        async with processes(bare_database):
            pass


async def test_unused_url_parameters_are_logged_and_server_settings_applied(
    bare_database: Database, logged: Logged
) -> None:
    more = "connection_limit=1&channel_binding=prefer&work_mem=5MB"
    process = Process(bare_database.url_with(more))
    await process.store.migrate()
    said = [line["unused"] for line in logged if line["event"] == "store.parameters"]
    assert said == ["connection_limit, channel_binding"]
    connection = await process.store.connect()
    assert await connection.fetchval("SHOW work_mem") == "5MB"
    assert await connection.fetchval("SHOW search_path") == "receiver"
    await connection.close()


class TestRefusals:
    @pytest.fixture
    def stranger(self, bare_database: Database) -> Iterator[str]:
        """Create a role that may only connect; yield its URL."""
        role = f"stranger_of_{bare_database.name}"
        bare_database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'hush-hush'")
        parts = urlsplit(bare_database.url)
        place = parts.netloc.rpartition("@")[2]
        yield urlunsplit(parts._replace(netloc=f"{role}:hush-hush@{place}"))
        bare_database.execute(f"DROP OWNED BY {role}", f"DROP ROLE {role}")

    async def test_role_without_create_privilege_gets_instructions(self, stranger: str) -> None:
        said = await refusal(stranger)
        assert said.startswith("the database cannot be set up: InsufficientPrivilegeError: ")
        assert "run `receiver migrate` once as a role that may create the schema" in said
        assert "hush" not in said

    async def test_role_without_privileges_on_the_schema_gets_instructions(
        self, bare_database: Database, stranger: str
    ) -> None:
        async with processes(bare_database):
            pass
        said = await refusal(stranger)
        assert "InsufficientPrivilegeError" in said
        assert "let the receiver's role use it" in said

    async def test_role_with_only_data_privileges_can_claim_and_settle(
        self, bare_database: Database, stranger: str
    ) -> None:
        async with processes(bare_database):
            pass
        role = urlsplit(stranger).username
        bare_database.execute(
            f"GRANT USAGE ON SCHEMA receiver TO {role}",
            "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA receiver "
            f"TO {role}",
            f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA receiver TO {role}",
        )
        process = Process(stranger)
        await process.store.start()
        claim = await claimed(process.store)
        assert await process.store.settle(settlement(claim))
        await process.store.stop()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"path": "/no_such_database"}, 'database "no_such_database" does not exist'),
            ({"netloc": "nobody:hush-hush@"}, 'role "nobody" does not exist'),
            ({"netloc": "me:hush-hush@127.0.0.1:1", "query": ""}, "ConnectionRefusedError"),
            ({"netloc": "me:hush-hush@no.invalid:1", "query": ""}, "gaierror"),
        ],
    )
    async def test_failed_connection_gives_a_clear_error_without_the_password(
        self,
        server: Database,
        monkeypatch: pytest.MonkeyPatch,
        change: dict[str, str],
        words: str,
    ) -> None:
        resolve = socket.getaddrinfo

        def resolve_locally(host: Any, *args: Any, **more: Any) -> Any:
            if host == "no.invalid":
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return resolve(host, *args, **more)

        monkeypatch.setattr(socket, "getaddrinfo", resolve_locally)
        said = await refusal(urlunsplit(urlsplit(server.url)._replace(**change)))
        assert said.startswith("cannot open the database: ")
        assert words in said
        assert "set RECEIVER_DATABASE_URL to a PostgreSQL server that answers" in said
        assert "hush" not in said

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://me:hush@127.0.0.1:port/x",
            "postgresql://me:hush@127.0.0.1:99999/x",
            "postgresql://me:hush@127.0.0.1/x?sslmode=odd",
            "postgresql://me:hu/sh@127.0.0.1/x",
            "postgresql://me:hush@[::1/x",
        ],
    )
    async def test_invalid_url_gives_a_clear_error_without_the_password(self, url: str) -> None:
        said = await refusal(url)
        assert said.startswith("cannot open the database: ")
        assert "hu" not in said

    @pytest.mark.parametrize(
        "parameter", ["nonsense=1", "statement_timeout=odd", "pgbouncer=true&nonsense=1"]
    )
    async def test_url_parameter_that_the_server_rejects_is_named(
        self, database: Database, parameter: str
    ) -> None:
        url = database.url_with(parameter)
        for said in (await refusal(url), await refusal_to_migrate(url)):
            assert "RECEIVER_DATABASE_URL has a parameter " in said
            assert parameter.rpartition("&")[2].partition("=")[0] in said

    @pytest.mark.parametrize(
        ("name", "value", "url"),
        [
            ("PGPORT", "odd", "postgresql:///app"),
            ("PGSSLMODE", "odd", "postgresql://127.0.0.1:1/app"),
            ("PGSSLROOTCERT", "/nowhere", "postgresql://127.0.0.1:1/app?sslmode=require"),
        ],
    )
    async def test_invalid_libpq_environment_variable_is_named(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, url: str
    ) -> None:
        monkeypatch.setenv(name, value)
        assert f"by RECEIVER_DATABASE_URL, {name} (" in await refusal(url)

    async def test_database_with_latin1_encoding_is_rejected(self, server: Database) -> None:
        name = f"latin_{os.getpid()}"
        server.execute(
            f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 "
            "LC_COLLATE 'C' LC_CTYPE 'C'"
        )
        try:
            said = await refusal(server.sibling(name).url)
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")
        assert "LATIN1" in said
        assert "ENCODING 'UTF8'" in said


@pytest.mark.parametrize("is_set_right", [False, True])
async def test_leases_expire_by_the_server_clock(database: Database, *, is_set_right: bool) -> None:
    ahead = 3600.0  # this machine's clock is an hour fast

    def clock() -> float:
        return time.time() + ahead

    async with processes(database) as [here]:
        await claimed(here.store)
        store = PostgresStore(database.url, print, PgQueuerJobs(), clock=clock)
        await store.start()
        if is_set_right:
            ahead = 0.0

        async def skew() -> float:
            await store.reclaim("other", 0.0)  # compares the clocks, unless that takes too long
            return store.ahead

        try:
            await eventually(skew, lambda found: abs(found + ahead) < 2)
            assert await store.reclaim("other", NOW + ahead + 25) == []
            assert [one.handler for one in await store.reclaim("other", NOW + ahead + 75)] == [
                "greet"
            ]
        finally:
            await store.stop()


@pytest.mark.parametrize(("ahead", "deadline_at"), [(3600.0, NOW + 3600), (0.0, NOW)])
async def test_correction_of_one_wrong_clock_shortens_no_deadline_of_other_machines(
    database: Database, *, ahead: float, deadline_at: float
) -> None:
    """If this machine's clock was right before the step, the server's has stepped with it."""
    async with processes(database) as [other]:
        await submitting(other.store, 1)
        store = PostgresStore(
            database.url, print, PgQueuerJobs(), clock=lambda: time.time() + ahead
        )
        await store.start()
        ahead = 0.0

        async def follow(owner: str) -> float:
            await store.shift(Shift(due=-3600.0, deadline=-3600.0), owner, NOW)
            return store.ahead

        try:
            await follow("me")
            # At once, as leases are made by it; only a comparison that takes too long is ignored.
            await eventually(lambda: follow("another"), lambda skew: skew == 0.0)
        finally:
            await store.stop()
    times = database.rows("SELECT due_at, deadline_at, latest_at FROM predictions")
    assert times == [(NOW + 90 - 3600, deadline_at, deadline_at)]


async def test_each_step_of_the_clock_moves_stored_times_once_for_all_processes(
    database: Database,
) -> None:
    async with processes(database, 3) as made:
        await submitting(made[0].store, 1)
        due_at, clock = NOW + 90, NOW
        owners = ["first", "second", "third"]
        for step in (-3600.0, -3600.0, 7200.0, -3600.0):
            clock += step
            due_at += step
            for owner, process in zip((owners[0], *owners), (made[0], *made), strict=True):
                clock += 0.5  # the first one repeats it, as after a commit without an answer
                await process.store.shift(Shift(due=step, deadline=step), owner, clock)
            assert database.rows("SELECT due_at FROM predictions") == [(due_at,)]
            owners.reverse()


# --- the job queue ---


async def test_outcome_deliveries_and_jobs_are_one_transaction(database: Database) -> None:
    async with processes(database) as [process]:
        await process.store.predictions.create(new(1))
        before = {name: database.rows(f"SELECT count(*) FROM {name}") for name in TABLES}
        with (
            database.at_commit("RAISE EXCEPTION 'the disk is full'"),
            pytest.raises(StoreUnavailable, match="the disk is full"),
        ):
            await accept_outcome(process.store, arrival(1, handlers=("greet", "log")))
        assert jobs(database) == []
        assert before == {name: database.rows(f"SELECT count(*) FROM {name}") for name in TABLES}
        assert (await accept_outcome(process.store, arrival(1, handlers=("greet", "log")))).handlers
        names = sorted(delivery_id(pred(1), name) for name in ("greet", "log"))
        assert [name for name, _, _ in jobs(database)] == names
        assert {(handler, status) for _, handler, status in jobs(database)} == {
            ("greet", "queued"),
            ("log", "queued"),
        }
        assert [report is None for report in process.reports] == [False, True]


async def test_settlement_and_the_end_of_its_job_are_one_transaction(database: Database) -> None:
    async with processes(database) as [process]:
        claim = await claimed(process.store)
        assert [status for _, _, status in jobs(database)] == ["picked"]
        with (
            database.at_commit("RAISE EXCEPTION 'no'", "receiver.attempts"),
            pytest.raises(StoreUnavailable),
        ):
            await process.store.settle(settlement(claim))
        assert [status for _, _, status in jobs(database)] == ["picked"]
        assert database.rows("SELECT state FROM deliveries") == [("running",)]
        # A worker settles again after an error, because the handler has already run.
        assert await process.store.settle(settlement(claim))
        assert jobs(database) == []
        assert database.rows("SELECT state FROM deliveries") == [("done",)]


@pytest.mark.parametrize(
    ("state", "result"), [("done", "successful"), ("skipped", "successful"), ("dead", "exception")]
)
async def test_queue_log_records_how_a_job_ended(
    database: Database, state: Any, result: str
) -> None:
    async with processes(database) as [process]:
        claim = await claimed(process.store)
        decision = Decision(state=state, reason="as told")
        assert await process.store.settle(settlement(claim, decision))
    assert jobs(database) == []
    logged = database.rows("SELECT entrypoint, status::text FROM pgqueuer_log ORDER BY id")
    assert logged[-1] == ("greet", result)


async def test_failed_attempt_keeps_its_job_for_the_retry(database: Database) -> None:
    async with processes(database) as [process]:
        claim = await claimed(process.store)
        again = Decision(state="pending", delay=3600.0, reason="no luck")
        assert await process.store.settle(settlement(claim, again))
        assert [status for _, _, status in jobs(database)] == ["queued"]
        found = await process.store.claim(wanted())
        assert found.claims == []
        assert found.next_due is not None
        assert 3600 - PATIENCE < found.next_due - wanted().now <= 3600
        # A manual retry makes it due at once.
        assert await process.store.deliveries.retry(claim.id, time.time()) == "greet"
        [second] = (await process.store.claim(wanted())).claims
        assert (second.id, second.attempt, second.number) == (claim.id, 2, 2)


async def test_pending_delivery_without_a_job_gets_one_after_a_minute(database: Database) -> None:
    async with processes(database) as [process]:
        await ended(process.store, 1, "greet")  # due at NOW + 10
        database.execute("DELETE FROM receiver.pgqueuer")
        due_at = database.rows("SELECT due_at FROM deliveries")[0][0]
        await process.store.reclaim("me", due_at + 59)
        assert (await process.store.claim(wanted())).claims == []
        await process.store.reclaim("me", due_at + 120)  # missing jobs are searched once a minute
        [claim] = (await process.store.claim(wanted())).claims
        assert await process.store.settle(settlement(claim))
        assert jobs(database) == []


async def test_missing_job_is_replaced_despite_many_of_a_removed_handler(
    database: Database,
) -> None:
    async with processes(database) as [process]:
        await ended(process.store, 1, "greet")
        database.execute(
            "SET search_path = receiver",
            """INSERT INTO predictions (id, provider, model, mode, status, input, metadata, output,
                    created_at, completed_at)
                SELECT 'pred_9' || lpad(n::text, 31, '0'), 'fal', 'm', 'queue', 'succeeded', '{}',
                    '{}', '[]', 1, 1 FROM generate_series(1, 1200) n""",
            """INSERT INTO events (prediction_id, type, time)
                SELECT id, 'prediction.succeeded', 1 FROM predictions WHERE id LIKE 'pred_9%'""",
            """INSERT INTO deliveries (id, prediction_id, handler, state, due_at, created_at)
                SELECT 'dlv_' || substr(id, 6) || '00000000', id, 'gone', 'pending', 1, 1
                FROM predictions WHERE id LIKE 'pred_9%'""",
            "DELETE FROM pgqueuer",
        )
        for minute in range(1, 5):
            await process.store.reclaim("me", 2e9 + minute * 61)
        assert len((await process.store.claim(wanted())).claims) == 1


async def test_failed_replacement_of_a_missing_job_is_retried(database: Database) -> None:
    async with processes(database) as [process]:
        await ended(process.store, 1, "greet")
        database.execute("DELETE FROM receiver.pgqueuer")
        with (
            database.at_commit("RAISE EXCEPTION 'no'", "receiver.pgqueuer"),
            pytest.raises(StoreUnavailable),
        ):
            await process.store.reclaim("me", 2e9)
        await process.store.reclaim("me", 2e9 + 5)
        assert len((await process.store.claim(wanted())).claims) == 1


async def test_running_delivery_without_a_job_can_be_settled(
    database: Database,
) -> None:
    async with processes(database) as [process]:
        claim = await claimed(process.store)
        database.execute("DELETE FROM receiver.pgqueuer")
        assert await process.store.settle(settlement(claim))
        assert database.rows("SELECT state FROM deliveries") == [("done",)]
        assert jobs(database) == []


async def test_retried_delivery_without_a_job_gets_a_new_one(database: Database) -> None:
    async with processes(database) as [process]:
        claim = await claimed(process.store)
        database.execute("DELETE FROM receiver.pgqueuer")
        again = Decision(state="pending", delay=0.0, reason="no luck")
        assert await process.store.settle(settlement(claim, again))
        await process.store.reclaim("me", settlement(claim).ended_at + 61)
        [second] = (await process.store.claim(wanted())).claims
        assert second.attempt == 2


@pytest.mark.parametrize("state", ["done", "dead", "missing"])
async def test_job_of_an_ended_or_missing_delivery_is_deleted(
    database: Database, state: str
) -> None:
    async with processes(database) as [process]:
        await ended(process.store, 1, "greet")
        if state == "missing":
            database.execute("DELETE FROM receiver.deliveries")
        else:
            database.execute(
                f"UPDATE receiver.deliveries SET state = '{state}', due_at = NULL, ended_at = 1"
            )
        assert (await process.store.claim(wanted())).claims == []
        assert jobs(database) == []


async def test_delivery_has_one_job_after_retries_and_replays(database: Database) -> None:
    async with processes(database) as [process]:
        await ended(process.store, 1, "greet")
        for _ in range(3):
            assert (
                await process.store.deliveries.retry(delivery_id(pred(1), "greet"), 1.0) == "greet"
            )
        await process.store.reclaim("me", 1e12)
        assert len(jobs(database)) == 1
        [claim] = (await process.store.claim(wanted())).claims
        await process.store.settle(settlement(claim))
        await process.store.deliveries.replay(pred(1), lambda *_: Recipients(("greet",)), 1.0)
        await process.store.reclaim("me", 1e12)
        assert len(jobs(database)) == 1


async def test_released_delivery_can_be_claimed_at_once(database: Database) -> None:
    async with processes(database, 2) as [here, there]:
        first = await claimed(here.store)
        await here.store.release("me", 2e9)
        [second] = (await there.store.claim(wanted(owner="another"))).claims
        assert (second.id, second.attempt, second.number) == (first.id, 1, 2)


# --- several processes ---


async def test_concurrent_claims_of_two_processes_never_overlap(database: Database) -> None:
    async with processes(database, 2) as [here, there]:
        for number in range(40):
            await ended(here.store, number, "greet")
        found = await asyncio.gather(
            *(
                process.store.claim(wanted(owner=str(index), most=5))
                for _ in range(4)
                for index, process in enumerate((here, there))
            )
        )
        names = [claim.id for one in found for claim in one.claims]
        assert len(names) == len(set(names)) == 40


async def test_lost_claim_can_be_settled_only_by_its_new_owner(database: Database) -> None:
    async with processes(database, 2) as [here, there]:
        first = await claimed(here.store)
        lost = await there.store.reclaim("another", wanted().lease_until + 1)
        assert [one.handler for one in lost] == ["greet"]
        # PgQueuer gives away a job without a heartbeat, by the server's clock.
        database.execute("UPDATE receiver.pgqueuer SET heartbeat = NOW() - interval '31 seconds'")
        later = wanted(owner="another", now=first_lease() + 1, lease_until=first_lease() + 31)
        [second] = (await there.store.claim(later)).claims
        assert second.number == 2
        assert not await here.store.settle(settlement(first))
        assert [status for _, _, status in jobs(database)] == ["picked"]
        assert await there.store.settle(settlement(second, owner="another"))
        assert jobs(database) == []
        history = database.rows("SELECT number, result FROM attempts")
        assert history == [(1, "lost"), (2, "done")]


Acts = Callable[[PostgresStore, Sequence[Claim]], Awaitable[object]]
AT_ONCE = Decision(state="pending", reason="no luck")


async def _renew(store: PostgresStore, claims: Sequence[Claim]) -> None:
    store.renew("me", [claim.id for claim in claims], NOW + 90)


def _replay(store: PostgresStore, claims: Sequence[Claim]) -> Awaitable[object]:
    names = [claim.event.prediction.id for claim in claims]
    return asyncio.gather(
        *(store.deliveries.replay(n, lambda *_: Recipients(("greet",)), NOW + 30) for n in names)
    )


TAKES: dict[str, tuple[Decision | None, Acts]] = {
    "settle": (None, lambda st, all_: asyncio.gather(*(st.settle(settlement(c)) for c in all_))),
    "renew": (None, _renew),
    "release": (None, lambda store, _: store.release("me", NOW + 30)),
    "reclaim": (None, lambda store, _: store.reclaim("another", NOW + 3600)),
    "claim": (AT_ONCE, lambda store, _: store.claim(wanted(now=NOW + 30))),
    "retry": (
        GIVEN_UP,
        lambda store, all_: asyncio.gather(*(store.deliveries.retry(c.id, NOW + 30) for c in all_)),
    ),
    "replay": (DONE, _replay),
}
"""For each operation: how the claims are settled before it, if at all, and its call."""


@pytest.mark.parametrize("name", TAKES)
async def test_two_deliveries_are_locked_in_the_order_of_their_ids(
    database: Database, name: str
) -> None:
    """Two processes that locked them in opposite orders would deadlock."""
    before, acts = TAKES[name]
    async with processes(database) as [process]:
        for number in (2, 1):
            await ended(process.store, number, "greet")
        claims = (await process.store.claim(wanted())).claims
        claims.sort(key=lambda claim: claim.id, reverse=True)
        if before is not None:
            for claim in claims:
                await process.store.settle(settlement(claim, before))
        last, first = (claim.id for claim in claims)
        take = "SELECT id FROM receiver.deliveries WHERE id = $1 FOR UPDATE"
        held = await asyncpg.connect(database.url)
        async with held.transaction():
            await held.execute(take, last)
            acting = asyncio.ensure_future(acts(process.store, claims))
            await until(lambda: not database.rows(f"{take} SKIP LOCKED", first))
        await held.close()
        await acting


@contextmanager
def without(database: Database, table: str) -> Iterator[None]:
    database.execute(f"ALTER TABLE receiver.{table} RENAME TO gone")
    try:
        yield
    finally:
        database.execute(f"ALTER TABLE receiver.gone RENAME TO {table}")


async def test_job_whose_claim_failed_halfway_is_claimed_by_the_next_call(
    database: Database,
) -> None:
    async with processes(database) as [process]:
        for number in (1, 2, 3):
            await ended(process.store, number, "greet")
        with without(database, "deliveries"), pytest.raises(StoreUnavailable):
            await process.store.claim(wanted())
        assert {status for _, _, status in jobs(database)} == {"picked"}
        first = (await process.store.claim(wanted(most=1))).claims
        rest = (await process.store.claim(wanted())).claims
        assert len({claim.id for claim in (*first, *rest)}) == 3
        for claim in (*first, *rest):
            assert await process.store.settle(settlement(claim))
        assert jobs(database) == []


async def test_release_gives_back_jobs_whose_claim_failed_halfway(database: Database) -> None:
    async with processes(database, 2) as [here, there]:
        await ended(here.store, 1, "greet")
        with without(database, "deliveries"), pytest.raises(StoreUnavailable):
            await here.store.claim(wanted())
        await here.store.release("me", wanted().now)
        assert len((await there.store.claim(wanted(owner="another"))).claims) == 1


async def test_claim_succeeds_if_only_the_next_due_time_is_unavailable(database: Database) -> None:
    """Claimed deliveries must run even if a later part of the answer fails."""
    async with processes(database) as [process]:
        await ended(process.store, 1, "greet")

        class Silent(PgQueuerJobs):
            async def next_due(self, *_: Any) -> float | None:
                raise ConnectionResetError

        silent = PostgresStore(database.url, print, Silent())
        await silent.start()
        try:
            found = await silent.claim(wanted())
            assert len(found.claims) == 1
            with pytest.raises(StoreUnavailable):
                await silent.claim(wanted())
        finally:
            await silent.stop()


@pytest.mark.parametrize(
    ("error", "told"), [(ValueError("odd"), ValueError), (OSError("away"), StoreUnavailable)]
)
async def test_failed_claim_does_not_affect_a_concurrent_claim(
    database: Database, error: Exception, told: type[Exception]
) -> None:
    async with processes(database) as [process]:
        await ended(process.store, 1, "greet")

        class Unfit(PgQueuerJobs):
            async def pick(self, connection: Connection, handler: str, most: int) -> dict[str, Any]:
                if handler == "unfit":
                    raise error
                return await super().pick(connection, handler, most)

        store = PostgresStore(database.url, print, Unfit())
        await store.start()
        try:
            found, refused = await asyncio.gather(
                store.claim(wanted()), store.claim(wanted("unfit")), return_exceptions=True
            )
            assert isinstance(found, Claims)
            assert len(found.claims) == 1
            assert isinstance(refused, told)
        finally:
            await store.stop()


async def test_claim_takes_over_a_delivery_with_an_expired_lease(database: Database) -> None:
    async with processes(database, 2) as [here, there]:
        first = await claimed(here.store)
        database.execute("UPDATE receiver.pgqueuer SET heartbeat = NOW() - interval '31 seconds'")
        later = wanted(owner="another", now=first_lease() + 1, lease_until=first_lease() + 31)
        none = await there.store.claim(msgspec.structs.replace(later, most=1))
        assert none.claims == []
        # The next claim is due at once, or slightly later by the server's clock.
        assert none.next_due is not None
        assert later.now <= none.next_due < later.now + PATIENCE
        assert [(one.delivery, one.attempt, one.reason) for one in none.lost] == [
            (first.id, 1, "its lease ran out")
        ]
        [second] = (await there.store.claim(later)).claims
        assert (second.number, second.attempt) == (2, 2)
        assert not await here.store.settle(settlement(first))
        assert await there.store.settle(settlement(second, owner="another"))
        assert jobs(database) == []


def first_lease() -> float:
    return wanted().lease_until


async def test_job_taken_over_early_waits_until_the_lease_expires(database: Database) -> None:
    """The job's heartbeat is only a hint; the lease in the row decides who owns a delivery."""
    async with processes(database, 2) as [here, there]:
        first = await claimed(here.store)
        database.execute("UPDATE receiver.pgqueuer SET heartbeat = NOW() - interval '31 seconds'")
        [[began]] = database.rows("SELECT NOW()")
        assert (await there.store.claim(wanted(owner="another"))).claims == []
        [waits] = database.rows(
            "SELECT EXTRACT(EPOCH FROM execute_after - $1), "
            "EXTRACT(EPOCH FROM execute_after - NOW()) FROM pgqueuer",
            began,
        )
        assert waits[0] >= 30 >= waits[1]  # 30 seconds of the lease are left
        assert await here.store.settle(settlement(first))
        assert database.rows("SELECT state FROM deliveries") == [("done",)]


async def test_renewal_thread_extends_the_lease_and_the_job_heartbeat(
    database: Database,
) -> None:
    async with processes(database) as [process]:
        claim = await claimed(process.store)
        database.execute("UPDATE receiver.pgqueuer SET heartbeat = NOW() - interval '1 hour'")
        read = (
            "SELECT d.lease_until, j.heartbeat > NOW() - interval '10 seconds' "
            "FROM deliveries d, pgqueuer j"
        )
        assert database.rows(read) == [(first_lease(), False)]
        process.store.renew("me", [claim.id, "dlv_of_somebody"], 4e9)
        ends = time.monotonic() + PATIENCE
        while database.rows(read) != [(4e9, True)]:  # while the event loop is blocked
            assert time.monotonic() < ends
        process.store.renew("another", [claim.id], 5e9)
        process.store.renew("me", [claim.id], 6e9)
        await until(lambda: database.rows(read) == [(6e9, True)])


async def test_lease_renewal_reconnects_after_a_lost_connection(
    database: Database, logged: list[dict[str, Any]]
) -> None:
    async with processes(database) as [process]:
        claim = await claimed(process.store)
        lease = "SELECT lease_until FROM deliveries"
        process.store.renew("me", [claim.id], 3e9)
        await until(lambda: database.rows(lease) == [(3e9,)])
        database.terminate()
        process.store.renew("me", [claim.id], 4e9)  # notices the lost connection
        await until(lambda: [line for line in logged if line["event"] == "lease.unrenewed"])
        process.store.renew("me", [claim.id], 5e9)
        await until(lambda: database.rows(lease) == [(5e9,)])


class TestNews:
    async def test_commit_notifies_the_other_processes_but_not_its_own(
        self, database: Database
    ) -> None:
        async with processes(database, 3) as [here, *others]:
            for process in (here, *others):
                await process.listens()
            await ended(here.store, 1, "log", "greet")
            for other in others:
                await other.hears(1)
                assert other.heard == [(["greet", "log"], [pred(1)])]
            await here.store.deliveries.retry(delivery_id(pred(1), "log"), 1.0)
            for other in others:
                await other.hears(2)
                assert other.heard[1] == (["log"], [])
            await others[0].store.predictions.create(new(2))
            await accept_outcome(others[0].store, arrival(2))
            await until(lambda: here.heard)
            assert here.heard == [([], [pred(2)])]  # and none of its own notifications

    async def test_all_ended_predictions_of_a_large_batch_are_notified(
        self, database: Database
    ) -> None:
        async with processes(database, 2) as [here, there]:
            await there.listens()
            await asyncio.gather(
                *(here.store.predictions.create(new(number)) for number in range(400))
            )
            await asyncio.gather(
                *(
                    accept_outcome(here.store, arrival(number, handlers=("greet",)))
                    for number in range(400)
                )
            )

            def told() -> set[str]:
                return {name for _, names in there.heard for name in names or ()}

            await until(lambda: len(told()) == 400)
            assert told() == {pred(number) for number in range(400)}

    async def test_rolled_back_outcome_is_not_notified(self, database: Database) -> None:
        async with processes(database, 2) as [here, there]:
            await there.listens()
            await here.store.predictions.create(new(1))
            await here.store.predictions.create(new(2))
            with database.at_commit("RAISE EXCEPTION 'no'"), pytest.raises(StoreUnavailable):
                await accept_outcome(here.store, arrival(1))
            await accept_outcome(here.store, arrival(2))
            await until(lambda: there.heard)
            assert there.heard == [([], [pred(2)])]

    async def test_listener_reconnects_and_reports_a_gap(self, database: Database) -> None:
        async with processes(database, 2) as [here, there]:
            await here.listens()
            await there.listens()
            there.heard.clear()
            assert database.terminate("query LIKE '%LISTEN%' OR query = ''") >= 2
            await until(lambda: there.heard)  # it has reconnected, and may have missed some
            assert set(there.heard) == {GAP}
            there.heard.clear()
            await ended(here.store, 1, "greet")
            await until(lambda: there.heard)
            assert there.heard == [(["greet"], [pred(1)])]

    async def test_malformed_notifications_are_ignored(self, database: Database) -> None:
        async with processes(database, 2) as [here, there]:
            await there.listens()
            for text in ("", "{}", "[1, 2, 3]", '["x", null, null]', "\\", "[" * 4000):
                database.rows("SELECT pg_notify('receiver_news', $1)", text)
            await ended(here.store, 1, "greet")
            await until(lambda: there.heard)
            assert there.heard == [(["greet"], [pred(1)])]


async def test_reads_reconnect_after_lost_connections(database: Database) -> None:
    async with processes(database) as [process]:
        await process.store.predictions.create(new(1))
        for _ in range(2):
            database.terminate()
            found = await asyncio.gather(
                *(process.store.predictions.get(pred(1)) for _ in range(5)), return_exceptions=True
            )
            for one in found:
                # StoreUnavailable is the only error that a lost connection may cause.
                assert isinstance(one, StoreUnavailable) or getattr(one, "id", None) == pred(1)
            await asyncio.sleep(0)
        assert await readable(process.store)


async def readable(store: PostgresStore) -> bool:
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        try:
            return await store.predictions.get(pred(1)) is not None
        except StoreUnavailable:
            await asyncio.sleep(0.01)
    return False


async def test_list_query_never_gets_a_generic_plan(
    database: Database,
) -> None:
    """A generic plan would scan all predictions to find those of a rare provider."""
    kept = Statement(
        "SELECT coalesce(sum(generic_plans), 0) AS plans FROM pg_prepared_statements "
        "WHERE cardinality(parameter_types) > 0"
    )
    async with processes(database) as [process]:
        for _ in range(10):
            await process.store.search.page(Wanted(provider="oxen"))
        assert (await process.store.read(kept))[0]["plans"] == 0


@pytest.mark.parametrize(
    ("handlers", "longest", "ends"), [(25, 80, 150), (60, 300, 1), (0, 0, 500)]
)
def test_notifications_stay_below_the_limit_of_8000_bytes(
    handlers: int, longest: int, ends: int
) -> None:
    names = {f"{number:03}{'é' * longest}"[:longest] for number in range(handlers)}
    predictions = [pred(number) for number in range(ends)]
    news = statement.News([(f"dlv_{name}", name) for name in names], predictions)
    texts = Notices(Wakeups(), None).of_commit(news)  # type: ignore[arg-type] # for receiving only
    assert max(len(text.encode()) for text in texts) < 8000
    told = [msgspec.json.decode(text) for text in texts]
    assert {name for _, found, _ in told for name in found} == names
    assert [name for _, _, found in told for name in found] == predictions


async def test_store_that_is_not_started_is_unavailable(database: Database) -> None:
    store = PostgresStore(database.url, print, PgQueuerJobs())
    with pytest.raises(StoreUnavailable):
        await store.predictions.get(pred(1))
    await store.stop()
