"""Judges what a look at the database found, on either engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias

from receiver.cli.doctor.checkup import (
    LATEST,
    OVERDUE,
    File,
    Server,
    look_at_file,
    look_at_server,
)
from receiver.cli.doctor.findings import Finding, Findings, fail, ok, warn
from receiver.deliveries.registry import Registry
from receiver.model.errors import StoreUnusable
from receiver.settings import Settings
from receiver.store.backlog import Backlog
from receiver.store.postgres import address

_LOOK: Final = 6.0
"""Seconds for a look at the database."""
_MEGABYTE: Final = 1024 * 1024
_FULL: Final = 64 * _MEGABYTE
_LOW: Final = 1024 * _MEGABYTE
_LARGE_WAL: Final = 256 * _MEGABYTE
"""It is begun anew from 16 MB on, unless somebody reads from it all the time."""
_OLDEST: Final = 130000
SKEWED: Final = 2.0
WRONG: Final = 60.0
"""Seconds by which two clocks may differ before it is worth a warning, and before it does harm."""

Look: TypeAlias = File | Server | Finding | None
"""A finding where there was nothing to look at; None where another check says so."""


async def look(settings: Settings) -> Look:
    try:
        async with asyncio.timeout(_LOOK + 1):
            if settings.sqlite_path is None:
                return await _look_at_server(settings)
            return await asyncio.to_thread(look_at_file, settings.sqlite_path, _LOOK)
    except TimeoutError:
        said = f"{settings.database} says nothing within {_LOOK:g} s"
        return fail("database", said, "see that its disk or its server answers")


async def _look_at_server(settings: Settings) -> Server | Finding:
    try:
        return await look_at_server(settings, _LOOK)
    except ModuleNotFoundError as error:
        return fail(
            "database",
            f"PostgreSQL needs more than is installed here ({error.name} is missing)",
            "pip install 'prediction-receiver[postgres]'",
        )
    except StoreUnusable as error:
        return fail("database", *str(error).rsplit("; ", 1))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is about the server
        from receiver.store.postgres.engine import what_to_do  # noqa: PLC0415 - paid for when used

        said = what_to_do(error, address.read(settings.database_url))
        return fail("database", *said.rsplit("; ", 1))


def check_database(seen: Look, settings: Settings) -> Findings:
    if seen is None or isinstance(seen, Finding):
        return [] if seen is None else [seen]
    found = list(_file(seen, settings) if isinstance(seen, File) else _server(seen, settings))
    if found:
        return found
    if isinstance(seen, Server):
        said = f"PostgreSQL {seen.release.split()[0]}, schema {seen.version}"
        said += ", through a pooler in transaction mode" if seen.is_pooled else ""
    elif seen.exists:
        checked = "quick_check ok" if seen.integrity else "too large for a quick_check now"
        said = f"schema {seen.version}, {_size(seen.free)} free, {checked}"
    else:
        said = f"not there yet: `receiver serve` makes it; {_size(seen.free)} free"
    return [ok("database", f"{settings.database}: {said}")]


def _file(seen: File, settings: Settings) -> Iterator[Finding]:
    path = settings.database
    if seen.trouble is not None:
        yield fail(
            "database",
            f"{path} cannot be read: {seen.trouble}",
            "restore a backup, or set RECEIVER_DATABASE_URL to another file",
        )
    if not seen.writable:
        yield fail(
            "database",
            f"{path} or its folder cannot be written by this user",
            "give it to the user that runs the receiver; SQLite writes files beside it, too",
        )
    if seen.free < _LOW:
        level = fail if seen.free < _FULL else warn
        yield level(
            "database",
            f"{_size(seen.free)} are left on the disk of {path}",
            "make room: without any, callbacks are answered 503",
        )
    if seen.wal > _LARGE_WAL:
        yield warn(
            "database",
            f"{path}-wal has grown to {_size(seen.wal)}",
            "end what reads the file for hours (a backup, a shell): it shrinks by itself then",
        )
    if seen.exists and seen.trouble is None:
        yield from _read(seen, path)


def _read(seen: File, path: str) -> Iterator[Finding]:
    yield from _schema(seen.version)
    if seen.integrity not in {"ok", None}:
        yield fail(
            "database",
            f"{path} is damaged: {seen.integrity}",
            "stop the receiver, keep the file, and restore a backup",
        )


def _server(seen: Server, settings: Settings) -> Iterator[Finding]:
    if seen.number < _OLDEST:
        said = f"PostgreSQL {seen.release} is older than the queue needs"
        yield fail("database", said, f"use {_OLDEST // 10000} or later")
    if seen.encoding != "UTF8":
        yield fail(
            "database",
            f"it keeps its texts as {seen.encoding}, which cannot hold all that providers say",
            "make a database with ENCODING 'UTF8'",
        )
    if seen.replica:
        said = "the server is a replica and takes no writes"
        yield fail("database", said, "set RECEIVER_DATABASE_URL to the primary")
    if seen.free_connections < settings.connections:
        yield warn(
            "database",
            f"the server has {seen.free_connections} connections left, and each process of ours "
            f"opens up to {settings.connections}",
            "raise max_connections, or lower RECEIVER_DATABASE_CONNECTIONS",
        )
    yield from _tables(seen)


def _tables(seen: Server) -> Iterator[Finding]:
    if seen.closed:
        yield fail(
            "database",
            f"our role may not read and write {_some(seen.closed)}",
            "GRANT USAGE ON SCHEMA receiver, and SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN "
            "SCHEMA receiver, to it",
        )
    elif seen.version is None:
        if seen.may_create:
            yield warn("database", "it is empty", "`receiver migrate` sets it up")
        else:
            yield fail(
                "database",
                "it is not set up, and our role may not create a schema in it",
                "run `receiver migrate` once as a role that may",
            )
    else:
        yield from _schema(seen.version)


def _schema(version: int) -> Iterator[Finding]:
    if version > LATEST:
        yield fail(
            "database",
            f"it was written by a newer receiver (schema {version}, this one knows {LATEST})",
            "upgrade this receiver",
        )
    elif version < LATEST:
        yield warn(
            "database",
            f"it has schema {version}, and this receiver needs {LATEST}",
            "`receiver serve` or `migrate` brings it up to date; make a backup first",
        )


def check_backlog(seen: Look) -> Findings:
    backlog = _backlog(seen)
    if backlog is None:
        return []
    found = [
        warn("backlog", said.format(number), fix)
        for number, said, fix in (
            (backlog.dead, "{} deliveries are dead", _DEAD),
            (
                backlog.overdue_deliveries,
                f"{{}} deliveries are overdue by {OVERDUE:g} s",
                _UNATTENDED,
            ),
            (
                backlog.overdue_predictions,
                f"{{}} predictions are overdue by {OVERDUE:g} s",
                _UNASKED,
            ),
        )
        if number
    ]
    if paused := sorted(name for name, state in backlog.held.items() if state == "paused"):
        fix = "resume them when what they do can be done again"
        found.append(warn("backlog", f"{_some(paused)}: paused by hand", fix))
    for name in sorted(backlog.held.keys() - {*paused}):
        said = f"{name} is held back after a run of failures: {backlog.reasons[name]}"
        found.append(warn("backlog", said, "fix what it calls; it is tried again by itself"))
    return found or [
        ok("backlog", f"{sum(backlog.of_handlers().values())} deliveries pending, none dead")
    ]


_DEAD: Final = (
    "see `receiver deliveries --state dead`, fix the handler, then `receiver retry ID`, or "
    "`receiver replay --state dead` for all"
)
_UNATTENDED: Final = "see that `receiver serve` or `receiver worker` runs and is not out of breath"
_UNASKED: Final = "see that `receiver serve` runs and reaches the providers"


def check_pending(seen: Look, registry: Registry) -> Iterator[Finding]:
    """Find deliveries that no handler of ours will ever run."""
    backlog = _backlog(seen)
    pending: Mapping[str, int] = backlog.of_handlers() if backlog else {}
    for name in sorted(pending.keys() - registry.handlers.keys()):
        yield warn(
            "handlers",
            f"{pending[name]} deliveries are pending for {name}, which is no handler here",
            "name its file in RECEIVER_HANDLERS again, or give a handler that name",
        )


def check_server_clock(seen: Look) -> Findings:
    if not isinstance(seen, Server):
        return []
    return [compare(seen.skew, "the database server's clock")]


def compare(skew: float, whose: str) -> Finding:
    """Judge a clock by the seconds that it is ahead of ours."""
    said = f"{whose} is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} ours"
    if abs(skew) > SKEWED:
        level = fail if abs(skew) > WRONG else warn
        return level("clock", said, "set both by NTP (timedatectl set-ntp true)")
    return ok("clock", f"{whose} agrees with ours")


def _backlog(seen: Look) -> Backlog | None:
    return seen.backlog if isinstance(seen, File | Server) else None


def _some(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _size(count: int) -> str:
    return f"{count / _MEGABYTE / 1024:.1f} GB" if count > _LOW else f"{count // _MEGABYTE} MB"
