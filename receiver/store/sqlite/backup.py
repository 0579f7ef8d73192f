"""Online backup: a complete and consistent copy of a SQLite database that is in use.

One read transaction covers the copy, so it is the database of one moment, however long it takes.
Readers never delay the writer of a write-ahead log; the log grows meanwhile.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import msgspec

from receiver.model.errors import StoreUnusable

_PAGES: Final = 256
"""Pages copied in one step: 1 MB."""
_SYNC_EVERY: Final = 16
"""Steps after which the copy is synced: one sync of all of it could delay the writer's own."""
_PAUSE: Final = 0.002
"""Seconds of pause after each step, in which only the writer uses the disk."""


class Backup(msgspec.Struct, frozen=True):
    """A finished backup: sizes in bytes, the number of its predictions, and how long it took."""

    path: Path
    size: int
    of: int
    """The size of the source database, without its log."""
    predictions: int
    seconds: float


def back_up(
    source: str,
    target: str,
    *,
    force: bool = False,
    pause: Callable[[float], None] = time.sleep,
) -> Backup:
    """Copy the database `source` into a new file, which appears complete or not at all.

    Raises StoreUnusable: there is no database, the file exists already (unless `force`), or it
    cannot be written.
    """
    started = time.monotonic()
    database, path = Path(source), Path(target)
    try:
        _check(database, path, force=force)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        part = Path(name)
        try:
            with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
                predictions = _copy(database, part, file.fileno(), pause)
                os.fsync(file.fileno())
            _place(part, path, force=force)
        finally:
            for left in ("", "-journal", "-wal", "-shm"):
                Path(name + left).unlink(missing_ok=True)
    except (OSError, sqlite3.Error) as error:
        raise StoreUnusable(f"cannot back up {database} to {path}: {error}") from error
    return Backup(
        path,
        path.stat().st_size,
        database.stat().st_size,
        predictions,
        time.monotonic() - started,
    )


def _check(database: Path, path: Path, *, force: bool) -> None:
    if not database.is_file():
        raise StoreUnusable(
            f"there is no database {database}: set RECEIVER_DATABASE_URL as for `receiver serve`"
        )
    own = {Path(f"{database.resolve()}{end}") for end in ("", "-wal", "-shm", "-journal", ".lock")}
    if path.resolve() in own or (path.exists() and path.samefile(database)):
        raise StoreUnusable(f"{path} is the database itself: name another file")
    if path.exists() and not path.is_file():
        raise StoreUnusable(f"{path} is not a file")
    if path.exists() and not force:
        raise StoreUnusable(f"{path} exists: name another file, or use --force to replace it")


def _copy(database: Path, part: Path, fd: int, pause: Callable[[float], None]) -> int:
    """Copy the database and check the copy; return the number of its predictions."""
    steps = 0

    def between(_status: int, _remaining: int, _total: int) -> None:
        nonlocal steps
        steps += 1
        if steps % _SYNC_EVERY == 0:
            os.fsync(fd)
        pause(_PAUSE)

    # Not read-only: opening recovers the log of a receiver that has died.
    with closing(_open(database, "mode=rw")) as source:
        source.execute("BEGIN")
        [version] = source.execute("PRAGMA user_version").fetchone()
        if not version:
            raise StoreUnusable(f"{database} is not a database of a receiver")
        with closing(_open(part, "mode=rw")) as copy:
            copy.execute("PRAGMA synchronous = OFF")  # it is synced below, before it gets its name
            source.backup(copy, pages=_PAGES, progress=between)
    with closing(_open(part, "mode=ro&immutable=1")) as copy:
        [verdict] = copy.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise StoreUnusable(f"the copy of {database} is damaged: {verdict}")
        [predictions] = copy.execute("SELECT count(*) FROM predictions").fetchone()
        return int(predictions)


def _open(path: Path, how: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, isolation_level=None)


def _place(part: Path, path: Path, *, force: bool) -> None:
    """Rename the copy; without `force` never replace a file that was created meanwhile."""
    if force:
        part.replace(path)
    else:
        os.link(part, path)
    with suppress(OSError):  # some file systems cannot sync a folder
        fd = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
