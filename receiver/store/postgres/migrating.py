"""Migrations on PostgreSQL: in one transaction, by one process at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import asyncpg
import structlog

from receiver.model.errors import StoreUnusable
from receiver.store.postgres.group_commit import Connection
from receiver.store.schema import tables, unapplied

if TYPE_CHECKING:  # PgQueuer takes long to import
    from receiver.store.postgres.queue import PgQueuerJobs

log = structlog.get_logger("receiver")

_MIGRATE: Final = "run `receiver migrate` once, where you deploy, and start again"
_NEEDS_A_SESSION: Final = (
    "the queue's own tables are of another release, and to upgrade them takes a session, which no "
    "pooler in transaction mode gives: set RECEIVER_MIGRATE_URL to the server itself, and run "
    "`receiver migrate`"
)
_STATE: Final = """
SELECT coalesce(max(number), 0) AS version,
       obj_description(to_regclass($1::text), 'pg_class') AS note,
       extract(epoch FROM clock_timestamp())::double precision AS seconds
FROM receiver.migrations
"""
_MISSING: Final = (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError)
_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtext('receiver schema'))"
_TO_MIGRATE: Final = "SET LOCAL search_path = receiver; SET LOCAL lock_timeout = '60s'"
_LONGEST_MIGRATION: Final = 3600.0
_SILENT: Final = 2.0
"""Seconds of waiting for another process after which the wait is logged."""
_FIRST: Final = """
CREATE SCHEMA IF NOT EXISTS receiver;
CREATE TABLE receiver.migrations (number BIGINT PRIMARY KEY, at TIMESTAMPTZ NOT NULL DEFAULT now());
"""


_PLACES: Final = """
SELECT name, (SELECT min(schemaname) FROM pg_tables
              WHERE tablename = name AND schemaname = 'public') AS elsewhere
FROM unnest($1::text[]) name WHERE to_regclass('receiver.' || name) IS NULL
"""


async def bring_up_to_date(connection: Connection, jobs: PgQueuerJobs, *, is_pooled: bool) -> None:
    """Create or migrate the schema, or raise StoreUnusable with the obstacle."""
    # One transaction, so that a crash leaves no partial schema and a pooler keeps no setting.
    async with connection.transaction():
        await connection.execute(_TO_MIGRATE)
        await _lock(connection)
        await _make(connection, jobs)
    if await jobs.is_other(connection):
        if is_pooled:
            raise StoreUnusable(_NEEDS_A_SESSION)
        await jobs.upgrade(connection)


async def check(connection: Connection, jobs: PgQueuerJobs) -> float:
    """Raise StoreUnusable unless the schema is exactly ours; return the server's time.

    It is one statement, for processes that start often and must not wait.
    """
    try:
        [row] = await connection.fetch(_STATE, jobs.table)
    except _MISSING as error:
        raise StoreUnusable(f"the database is not set up: {_MIGRATE}") from error
    if missing := unapplied("postgres", row["version"], "database"):
        raise StoreUnusable(
            f"the database has schema {row['version']}, and this receiver needs {max(missing)}: "
            f"{_MIGRATE}"
        )
    if row["note"] != jobs.note:
        raise StoreUnusable(
            f"the database has the queue of {row['note']}, and this receiver that of {jobs.note}: "
            f"{_MIGRATE}"
        )
    return float(row["seconds"])


async def _make(connection: Connection, jobs: PgQueuerJobs) -> None:
    encoding = await connection.fetchval("SHOW server_encoding")
    if encoding != "UTF8":
        raise StoreUnusable(
            f"the database keeps its texts as {encoding}, and providers say more than that can "
            "hold: make one with ENCODING 'UTF8'"
        )
    version = 0
    if await connection.fetchval("SELECT to_regclass('receiver.migrations')") is not None:
        version = await connection.fetchval(
            "SELECT coalesce(max(number), 0) FROM receiver.migrations"
        )
    missing = unapplied("postgres", version, "database")
    await _check_tables(connection, version)
    for number, script in missing.items():
        if number == 1:
            await connection.execute(_FIRST)
        await connection.execute(script, timeout=_LONGEST_MIGRATION)
        await connection.execute("INSERT INTO receiver.migrations VALUES ($1)", number)
    await jobs.install(connection)


async def _lock(connection: Connection) -> None:
    """Lock out other processes that set up the schema, until the transaction ends."""
    notice = asyncio.get_running_loop().call_later(
        _SILENT, lambda: log.warning("schema.waiting", reason="another process sets it up")
    )
    try:
        await connection.execute(_LOCK, timeout=70.0)
    except asyncpg.LockNotAvailableError as error:
        raise StoreUnusable(
            "another process has been setting up the schema for a minute: wait for it, or end it "
            "(pg_locks names it), and start again"
        ) from error
    finally:
        notice.cancel()


async def _check_tables(connection: Connection, version: int) -> None:
    """Raise StoreUnusable unless the tables of this version are in their schema."""
    missing = await connection.fetch(_PLACES, sorted(tables(version)))
    if not missing:
        return
    names = ", ".join(row["name"] for row in missing)
    problem = f"the database says that it has schema {version}, but these tables are not in the "
    problem += f"PostgreSQL schema `receiver`: {names}"
    elsewhere = [row["name"] for row in missing if row["elsewhere"]]
    moves = [f"ALTER TABLE public.{name} SET SCHEMA receiver;" for name in elsewhere]
    if moves:
        problem += f"; they were made in `public`, so run {' '.join(moves)} and start again"
    else:
        problem += "; restore a backup, or run DROP SCHEMA receiver CASCADE to begin with nothing"
    raise StoreUnusable(problem)
