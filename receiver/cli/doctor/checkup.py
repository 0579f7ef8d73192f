"""Looks at a database from outside: beside a running receiver or without one, and writes nothing.

A file that somebody has open is read beside him; one that nobody has open is read without the files
that SQLite would make for that. A server is told that we only read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from receiver.providers import NAMES
from receiver.settings import Settings
from receiver.store.backlog import Backlog, backlog_of, sql, wanted
from receiver.store.postgres import address
from receiver.store.schema import migrations

T = TypeVar("T")

LATEST: Final = len(migrations("sqlite"))
"""The schema that this program makes and needs."""
OVERDUE: Final = 300.0
"""Seconds past its time after which nobody seems to see to something."""
_COUNT: Final = 3.0
"""Seconds for counting on a server."""
_STEPS: Final = 20_000
"""Steps of SQLite between two looks at the clock."""


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A database file, as it lies there."""

    exists: bool
    writable: bool
    """It, and the folder it is in (or will be)."""
    free: int
    """Bytes left on its disk."""
    wal: int = 0
    """Bytes of the log beside it."""
    version: int = 0
    integrity: str | None = None
    """What is wrong with it, `ok`, or None where the time did not suffice to know."""
    backlog: Backlog | None = None
    """None, too, where the time did not suffice to count it."""
    trouble: str | None = None
    """Why it cannot be read."""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """A PostgreSQL database, as its server describes it."""

    release: str
    number: int
    """Of the release, as 160004."""
    encoding: str
    replica: bool
    skew: float
    """Seconds by which its clock is ahead of ours."""
    free_connections: int
    version: int | None
    """Of the schema; None: there is none yet."""
    may_create: bool
    """It lets our role make a schema."""
    closed: list[str]
    """Tables of ours that our role may not fully use."""
    is_pooled: bool = False
    """We reach it through a pooler in transaction mode."""
    backlog: Backlog | None = None


# --- SQLite ---


def look_at_file(path: str, seconds: float) -> File:
    """Look at a file, for so long at most; never raises for what is wrong with it."""
    folder = _standing(Path(path).absolute().parent)
    there = Path(path).exists()
    facts: dict[str, Any] = {
        "exists": there,
        "writable": os.access(folder, os.W_OK | os.X_OK)
        and (not there or os.access(path, os.W_OK)),
        "free": shutil.disk_usage(folder).free,
    }
    if there:
        try:
            facts |= _read_file(path, time.monotonic() + seconds)
        except (OSError, sqlite3.Error) as error:
            facts["trouble"] = f"{type(error).__name__}: {error}"
    return File(**facts)


def _standing(folder: Path) -> Path:
    """Find the first folder upwards that is there: the others will be made in it."""
    return next(above for above in (folder, *folder.parents) if above.exists())


def _read_file(path: str, until: float) -> dict[str, Any]:
    with contextlib.suppress(sqlite3.DatabaseError):
        facts = _read_once(path, until)
        if facts["integrity"] in {"ok", None}:
            return facts
    # Whoever opened it meanwhile may have written below us; now we read beside him.
    return _read_once(path, until)


def _read_once(path: str, until: float) -> dict[str, Any]:
    with closing(_open(path)) as connection:
        connection.set_progress_handler(lambda: time.monotonic() > until, _STEPS)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        return {
            "wal": _size(f"{path}-wal"),
            "version": version,
            "backlog": _in_time(connection, _count) if version == LATEST else None,
            "integrity": _in_time(connection, _integrity),
        }


def _open(path: str) -> sqlite3.Connection:
    mode = "mode=ro" if Path(f"{path}-wal").exists() else "mode=ro&immutable=1"
    return sqlite3.connect(f"{Path(path).absolute().as_uri()}?{mode}", uri=True, timeout=2.0)


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except FileNotFoundError:
        return 0


def _in_time(connection: sqlite3.Connection, look: Callable[[sqlite3.Connection], T]) -> T | None:
    """Return what a look finds; None: it took too long."""
    try:
        return look(connection)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            return None
        raise


def _integrity(connection: sqlite3.Connection) -> str:
    return str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])


def _count(connection: sqlite3.Connection) -> Backlog:
    connection.row_factory = sqlite3.Row
    before = time.time() - OVERDUE
    rows = json.dumps(wanted(NAMES))
    found = connection.execute(sql.count_all.sqlite, {"before": before, "rows": rows})
    return backlog_of(found.fetchall(), before)


# --- PostgreSQL ---

_SERVER: Final = """
SELECT current_setting('server_version') AS release,
       current_setting('server_version_num')::int AS number,
       current_setting('server_encoding') AS encoding,
       pg_is_in_recovery() AS replica,
       current_setting('max_connections')::int
           - current_setting('superuser_reserved_connections')::int
           - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')
           AS free_connections,
       has_database_privilege(current_database(), 'CREATE') AS may_create,
       EXISTS (SELECT FROM pg_tables WHERE schemaname = 'receiver' AND tablename = 'migrations')
           AS migrated
"""
_CLOSED: Final = """
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'receiver' AND c.relkind = 'r' AND NOT (
    has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
    AND has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'UPDATE')
    AND has_table_privilege(c.oid, 'DELETE'))
ORDER BY 1
"""


async def look_at_server(settings: Settings, seconds: float) -> Server:
    """Ask a PostgreSQL server about the database; raise what asyncpg raises, or ImportError."""
    from receiver.store.postgres import sessions  # noqa: PLC0415 - paid for when used

    access = sessions.Access(pooled=settings.database_pooled)
    way = sessions.Sessions(settings.database_url, access)
    async with asyncio.timeout(seconds):
        connection = await way.connect_first()
    try:
        wanted = {**way.address.settings, "search_path": "receiver"}
        only_read = f"BEGIN READ ONLY; {address.set_config(wanted, is_local=True)}"
        await connection.execute(only_read)
        return await _ask(connection, is_pooled=way.is_pooled)
    finally:
        connection.terminate()


async def _ask(connection: Any, *, is_pooled: bool) -> Server:
    facts = dict(await connection.fetchrow(_SERVER))
    began = time.time()
    there = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
    facts["skew"] = there - (began + time.time()) / 2
    facts["closed"] = [row["relname"] for row in await connection.fetch(_CLOSED)]
    version = None
    if facts.pop("migrated") and "migrations" not in facts["closed"]:
        version = await connection.fetchval("SELECT max(number) FROM receiver.migrations")
    if version == LATEST and not facts["closed"]:
        with contextlib.suppress(TimeoutError):
            facts["backlog"] = await _count_there(connection)
    return Server(version=version, is_pooled=is_pooled, **facts)


async def _count_there(connection: Any) -> Backlog:
    before = time.time() - OVERDUE
    columns = zip(*wanted(NAMES), strict=True)
    async with asyncio.timeout(_COUNT):
        return backlog_of(
            await connection.fetch(sql.count_all.postgres, before, *map(list, columns)), before
        )
