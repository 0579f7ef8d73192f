"""Read-only checks of the database, whether or not a receiver is running.

A SQLite file that is in use (it has a `-wal` file) is opened read-only; any other is opened as
immutable, so that SQLite creates no files beside it. PostgreSQL is read in a read-only transaction.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgspec

from receiver.cli.doctor.findings import Finding, Findings, fail, ok, warn
from receiver.deliveries.registry import Registry
from receiver.model.errors import StoreUnusable
from receiver.providers import NAMES
from receiver.settings import Settings
from receiver.store.backlog import Backlog, backlog_of, sql, wanted
from receiver.store.postgres import address
from receiver.store.schema import migrations

LATEST: Final = len(migrations("sqlite"))
"""The schema version that this program creates and needs."""
OVERDUE: Final = 300.0
"""Seconds past its due time after which a delivery or prediction counts as overdue."""
_TIMEOUT: Final = 6.0
"""Time limit of reading the database, in seconds."""
_MEGABYTE: Final = 1024 * 1024
_FULL: Final = 64 * _MEGABYTE
_LOW: Final = 1024 * _MEGABYTE
SKEWED: Final = 2.0
WRONG: Final = 60.0
"""Seconds of difference between two clocks above which we warn (SKEWED) or fail (WRONG)."""


class DatabaseState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the configured database."""

    findings: Findings = []
    backlog: Backlog | None = None
    """None: it cannot be read, or has another schema."""
    skew: float | None = None
    """Seconds by which the server's clock is ahead of ours; None: there is no server."""


async def inspect_database(settings: Settings) -> DatabaseState:
    """Return the state of the database; if it cannot be read in time, that is the finding."""
    try:
        async with asyncio.timeout(_TIMEOUT):
            if settings.sqlite_path is None:
                return await _inspect_server(settings)
            return await asyncio.to_thread(_inspect_file, settings.database, settings.sqlite_path)
    except TimeoutError:
        text = f"{settings.database} does not answer within {_TIMEOUT:g} s"
        return _failed(text, "check its disk, or its server")


def _failed(*finding: str) -> DatabaseState:
    return DatabaseState(findings=[fail(*finding)])


# --- SQLite ---


def _inspect_file(name: str, path: str) -> DatabaseState:
    folders = Path(path).absolute().parents
    folder = next(above for above in folders if above.exists())  # missing folders are created in it
    there = Path(path).exists()
    findings: Findings = []
    version, backlog = LATEST, None
    if there:
        try:
            version, backlog = _read_file(path)
        except (OSError, sqlite3.Error) as error:
            text = f"{name} cannot be read: {type(error).__name__}: {error}"
            fix = "restore a backup, or set RECEIVER_DATABASE_URL to another file"
            findings.append(fail(text, fix))
    if not os.access(folder, os.W_OK | os.X_OK) or (there and not os.access(path, os.W_OK)):
        text = f"{name} or its folder cannot be written by this user"
        fix = "let the user that runs the receiver write there; SQLite writes files beside it, too"
        findings.append(fail(text, fix))
    free = shutil.disk_usage(folder).free
    if free < _LOW:
        level = fail if free < _FULL else warn
        text = f"only {_size(free)} are free on the disk of {name}"
        findings.append(level(text, "free some space: on a full disk callbacks are answered 503"))
    findings += _schema(version)
    text = f"schema {version}," if there else "not there yet: `receiver serve` makes it;"
    well = [ok(f"{name}: {text} {_size(free)} free")]
    return DatabaseState(findings=findings or well, backlog=backlog)


def _read_file(path: str) -> tuple[int, Backlog | None]:
    """Return the schema's version, and the backlog if it is the latest."""
    mode = "mode=ro" if Path(f"{path}-wal").exists() else "mode=ro&immutable=1"
    uri = f"{Path(path).absolute().as_uri()}?{mode}"
    with closing(sqlite3.connect(uri, uri=True, timeout=2.0)) as connection:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != LATEST:
            return version, None
        connection.row_factory = sqlite3.Row
        before = time.time() - OVERDUE
        counted = {"before": before, "rows": json.dumps(wanted(NAMES))}
        rows = connection.execute(sql.count_all.sqlite, counted).fetchall()
        return version, backlog_of(rows, before)


# --- PostgreSQL ---


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """A PostgreSQL server, and what our role may do there."""

    release: str
    replica: bool
    read_only: bool = False
    """Whether transactions are read-only by default; hosts set this if a database is full."""
    free_connections: int
    version: int | None
    """The schema's version; None: there is no schema yet, or it cannot be read."""
    may_create: bool
    """Whether our role may create a schema."""
    closed: list[str]
    """Our tables that our role may not read and write."""
    is_pooled: bool = False
    """Whether the connection goes through a pooler in transaction mode."""


_SERVER: Final = """
SELECT current_setting('server_version') AS release,
       pg_is_in_recovery() AS replica,
       current_setting('default_transaction_read_only')::boolean AS read_only,
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


async def _inspect_server(settings: Settings) -> DatabaseState:
    try:
        return await _query_server(settings)
    except TimeoutError:
        raise
    except ModuleNotFoundError as error:
        return _failed(
            f"PostgreSQL support is not installed ({error.name} is missing)",
            "pip install 'prediction-receiver[postgres]'",
        )
    except StoreUnusable as error:
        return _failed(*str(error).rsplit("; ", 1))
    except Exception as error:  # noqa: BLE001 - any error here is about the server
        from receiver.store.postgres.engine import what_to_do  # noqa: PLC0415 - loaded only when used

        text = what_to_do(error, address.read(settings.database_url))
        return _failed(*text.rsplit("; ", 1))


async def _query_server(settings: Settings) -> DatabaseState:
    from receiver.store.postgres import sessions  # noqa: PLC0415 - loaded only when used

    access = sessions.Access(pooled=settings.database_pooled)
    way = sessions.Sessions(settings.database_url, access)
    connection: Any = await way.connect_first()
    try:
        given = {**way.address.settings, "search_path": "receiver"}
        only_read = f"BEGIN READ ONLY; {address.set_config(given, is_local=True)}"
        await connection.execute(only_read)
        began = time.time()
        there = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        skew = there - (began + time.time()) / 2
        server = await _read_server(connection, is_pooled=way.is_pooled)
        backlog = None
        if server.version == LATEST and not server.closed:
            before = time.time() - OVERDUE
            columns = map(list, zip(*wanted(NAMES), strict=True))
            rows = await connection.fetch(sql.count_all.postgres, before, *columns)
            backlog = backlog_of(rows, before)
        return DatabaseState(findings=judge(server, settings), backlog=backlog, skew=skew)
    finally:
        connection.terminate()


async def _read_server(connection: Any, *, is_pooled: bool) -> Server:
    facts = dict(await connection.fetchrow(_SERVER))
    closed = [row["relname"] for row in await connection.fetch(_CLOSED)]
    version = None
    if facts.pop("migrated") and "migrations" not in closed:
        version = await connection.fetchval("SELECT max(number) FROM receiver.migrations")
    return Server(version=version, is_pooled=is_pooled, closed=closed, **facts)


def judge(server: Server, settings: Settings) -> Findings:
    """Return what is wrong with a server, or that nothing is."""
    if findings := list(_faults(server, settings)):
        return findings
    text = f"PostgreSQL {server.release.split()[0]}, schema {server.version}"
    text += ", through a pooler in transaction mode" if server.is_pooled else ""
    return [ok(f"{settings.database}: {text}")]


def _faults(server: Server, settings: Settings) -> Iterator[Finding]:
    if server.replica:
        text = "the server is a replica and takes no writes"
        yield fail(text, "set RECEIVER_DATABASE_URL to the primary")
    if server.read_only:
        yield fail(
            "default_transaction_read_only is on, and nothing can be written",
            "see why (hosts set it where a disk is full), and turn it off for the database and for "
            "our role",
        )
    if server.free_connections < settings.connections:
        yield warn(
            f"the server has {server.free_connections} connections left, and each process of ours "
            f"opens up to {settings.connections}",
            "raise max_connections, or lower RECEIVER_DATABASE_CONNECTIONS",
        )
    if server.closed:
        yield fail(
            f"our role may not read and write {_some(server.closed)}",
            "GRANT USAGE ON SCHEMA receiver, and SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN "
            "SCHEMA receiver, to it",
        )
    elif server.version is not None:
        yield from _schema(server.version)
    elif server.may_create:
        yield warn("it is empty", "`receiver migrate` makes the schema")
    else:
        yield fail(
            "it has no schema of ours, and our role may not create one",
            "run `receiver migrate` once as a role that may create a schema",
        )


def _schema(version: int) -> Iterator[Finding]:
    if version > LATEST:
        yield fail(
            f"it was written by a newer receiver (schema {version}, this one knows {LATEST})",
            "upgrade this receiver",
        )
    elif version < LATEST:
        yield warn(
            f"it has schema {version}, and this receiver needs {LATEST}",
            "`receiver serve` or `migrate` brings it up to date; make a backup first",
        )


_DEAD: Final = (
    "see `receiver deliveries --state dead`, fix the handler, then `receiver retry ID`, or "
    "`receiver replay --state dead` for all"
)
_WORKER_IDLE: Final = "check that `receiver serve` or `receiver worker` runs, and is not overloaded"
_POLLER_IDLE: Final = "check that `receiver serve` runs, and reaches the providers"


def check_backlog(state: DatabaseState) -> Findings:
    backlog = state.backlog
    if backlog is None:
        return []
    late = f"overdue by {OVERDUE:g} s"
    counted = (
        (backlog.dead, "deliveries are dead", _DEAD),
        (backlog.overdue_deliveries, f"deliveries are {late}", _WORKER_IDLE),
        (backlog.overdue_predictions, f"predictions are {late}", _POLLER_IDLE),
    )
    findings = [warn(f"{number} {text}", fix) for number, text, fix in counted if number]
    if paused := sorted(name for name, state in backlog.held.items() if state == "paused"):
        fix = "`receiver resume HANDLER` when it can work again"
        findings.append(warn(f"{_some(paused)}: paused by hand", fix))
    for name in sorted(backlog.held.keys() - {*paused}):
        text = f"{name} is held back after many failures in a row: {backlog.reasons[name]}"
        findings.append(warn(text, "fix the service that it calls; it is retried automatically"))
    return findings or [ok(f"{sum(backlog.of_handlers().values())} deliveries pending, none dead")]


def check_pending(state: DatabaseState, registry: Registry) -> Iterator[Finding]:
    """Warn of pending deliveries whose handler is not registered here."""
    pending = state.backlog.of_handlers() if state.backlog else {}
    for name in sorted(pending.keys() - registry.handlers.keys()):
        yield warn(
            f"{pending[name]} deliveries are pending for {name}, which is not a handler here",
            "add its file to RECEIVER_HANDLERS again, or give a handler that name",
        )


def check_clocks(state: DatabaseState, skews: Mapping[str, float]) -> Findings:
    """Compare our clock with the closest of the providers' and with the database server's.

    `skews` are seconds by which providers' clocks are ahead; if one of them agrees, ours is right.
    """
    nearest = sorted(skews, key=lambda name: abs(skews[name]))[:1]
    findings = [_compare(skews[name], f"the clock of {name}") for name in nearest]
    if state.skew is not None:
        findings.append(_compare(state.skew, "the database server's clock"))
    return findings


def _compare(skew: float, whose: str) -> Finding:
    """Report a clock that is `skew` seconds ahead of ours."""
    text = f"{whose} is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} ours"
    if abs(skew) > SKEWED:
        level = fail if abs(skew) > WRONG else warn
        return level(text, "set both clocks by NTP (timedatectl set-ntp true)")
    return ok(f"{whose} agrees with ours")


def _some(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _size(count: int) -> str:
    return f"{count / _MEGABYTE / 1024:.1f} GB" if count > _LOW else f"{count // _MEGABYTE} MB"
