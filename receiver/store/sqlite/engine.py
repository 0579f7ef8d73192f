"""The store on SQLite: WAL, synchronous=FULL, one writing thread, a few reading ones."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import structlog

from receiver.model import forks
from receiver.model.errors import StoreUnavailable, StoreUnusable
from receiver.model.tasks import Wakeups, start_thread
from receiver.store import deliveries
from receiver.store.deliveries import ClaimRequest, Claims, LostAttempt, ReleaseRequest, Settlement
from receiver.store.engine import AttemptName, each
from receiver.store.facade import Housekeeping, Store
from receiver.store.facade import sql as facade_sql
from receiver.store.predictions import sql as predictions_sql
from receiver.store.schema import unapplied
from receiver.store.sqlite.checkpoint import RESTART, Checkpointer
from receiver.store.sqlite.descriptors import CLOSED, Descriptors, Identity, identity_of
from receiver.store.sqlite.group_commit import Writer, fetch
from receiver.store.statement import Cells, Row, Run, Statement, Steps, Transaction

Item = TypeVar("Item")
Result = TypeVar("Result")

log = structlog.get_logger("receiver")

_READERS: Final = 2
_HEADER: Final = 32
_MAGIC: Final = b"\x37\x7f\x06"
"""The first bytes of the header of a write-ahead log, which has `_HEADER` bytes."""
_SCRUBBED_WITHIN: Final = 5.0
"""Seconds for which an erasure waits until the log is empty; otherwise it is emptied later."""


class SQLiteStore(Store):
    """The store in one file, for one process; its queue is the rows themselves."""

    def __init__(
        self,
        path: str,
        report: Callable[[StoreUnavailable | None], None],
        committed: Callable[[int], None] = lambda _size: None,
        wakeups: Wakeups | None = None,
    ) -> None:
        super().__init__(wakeups or Wakeups())
        self._committed = committed
        self._path = path
        self._lock = _FileLock(path)
        self._file = _SameFile(path)
        self._descriptors = Descriptors(path)
        self._checkpointer = Checkpointer(
            self._connect_to_checkpoint,
            self._may_checkpoint,
            self._is_sound,
            self._descriptors.close,
        )
        self._writer = Writer(
            self._connect,
            report,
            self._has_committed,
            self._ensure,
            self._is_sound,
            self._descriptors.close,
        )
        self._writing: sqlite3.Connection | None = None
        self._handle: sqlite3.Connection | None = None
        """The writer's connection, until its data is saved."""
        self._saving: threading.Thread | None = None
        self._local = threading.local()
        self._reading: list[sqlite3.Connection] = []
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="receiver-reader")

    def open(self) -> None:
        """Lock, open and migrate the file, or raise StoreUnusable with what to do."""
        try:
            self._lock.acquire()
            self._writer.start()
            self._begin_log()
            self._checkpointer.start()
            self._checkpointer.empty(0.0)  # a dead process may have erased something
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise StoreUnusable(
                f"cannot open the database {self._path}: {error}; "
                "set RECEIVER_DATABASE_URL to a file in a folder that can be written"
            ) from error
        except BaseException:
            self.close()
            raise

    def _begin_log(self) -> None:
        """Empty a log without a valid header, as left by a power failure: it has no commit."""
        if self._writing is not None and not self._file.check():
            self._writing.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Commit waiting writes and release the file."""
        self._checkpointer.close()
        if self._saving is not None:
            self._saving.join()
        self._writer.close()
        self._readers.shutdown()
        for connection in self._reading:
            self._descriptors.close(connection)
        self._lock.release()

    def _connect(self) -> sqlite3.Connection:
        self._file.ensure_database()
        connection = self._descriptors.open(partial(_connect, self._path))
        self._writing = self._handle = connection
        self._checkpointer.renew()
        self._file.remember()
        return connection

    def _is_sound(self, connection: sqlite3.Connection) -> bool:
        """Return whether a connection still has its files; note if the log's index is lost."""
        lost = self._descriptors.lost(connection)
        self._file.is_index_lost |= any(path.endswith("-shm") for path in lost)
        return not lost

    def _may_checkpoint(self) -> bool:
        is_sound = self._writing is not None and not self._descriptors.lost(self._writing)
        return self._file.check() and is_sound

    def _connect_to_checkpoint(self) -> sqlite3.Connection:
        return self._descriptors.open(partial(_open_and_read, self._path))

    def _ensure(self) -> None:
        """Raise StoreUnavailable if a commit would be lost, and start to save the data."""
        self._lock.ensure()
        try:
            self._file.ensure()
        except StoreUnavailable:
            if self._handle is not None:
                # In a thread, as callers wait here for their error.
                self._saving = start_thread("receiver-save", _save, self._handle, self._path)
                self._handle = None
            raise

    def _has_committed(self, size: int) -> None:
        self._checkpointer.dirty.set()
        self._committed(size)

    async def migrate(self) -> None:
        self.open()
        self.close()

    async def keep_house(self, housekeeping: Housekeeping) -> None:
        """Do nothing: the only process does the housekeeping in its own loops."""

    async def start(self) -> None:
        self.open()

    async def stop(self) -> None:
        self.close()

    async def recover(self, owner: str, now: float) -> list[LostAttempt]:
        # There is no other process, so no earlier work is still running.
        return await self.write(recover, (owner, now))

    async def scrub(self) -> bool:
        return await asyncio.to_thread(self._checkpointer.empty, _SCRUBBED_WITHIN)

    async def claim(self, wanted: ClaimRequest) -> Claims:
        try:
            return await self.write(deliveries.claim, wanted)
        except sqlite3.DataError:  # all of them together are longer than a text may be
            if wanted.most == 1:
                raise
        fewer = await self.claim(msgspec.structs.replace(wanted, most=wanted.most // 2))
        return msgspec.structs.replace(fewer, next_due=wanted.now)

    async def settle(self, settlement: Settlement) -> bool:
        return await self.write(deliveries.settle, settlement)

    async def release(
        self, owner: str, now: float, only: tuple[str, ...] = ()
    ) -> list[LostAttempt]:
        return (await self.write(deliveries.release, ReleaseRequest(owner, now, only))).lost

    def renew(self, owner: str, delivery_ids: list[str], lease_until: float) -> None:
        self._writer.post(deliveries.renew, (owner, delivery_ids, lease_until))

    async def reclaim(self, owner: str, now: float) -> list[LostAttempt]:
        return await self.write(deliveries.reclaim, (owner, now))

    async def write(self, transaction: Transaction[Item, Result], item: Item) -> Result:
        return await self._writer.write(transaction, item)

    async def change_log_end(self) -> int:
        # One connection writes, so positions are in the order of the commits.
        return int((await self.read(facade_sql.last_change))[0]["seq"])

    async def notify(self, ended: list[AttemptName]) -> None:
        """Do nothing: there is no other process."""

    def is_taken(self, error: Exception) -> bool:
        return (
            isinstance(error, sqlite3.IntegrityError)
            and error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_UNIQUE
        )

    # --- reading ---

    async def read(
        self, statement: Statement, rows: Sequence[Cells] | None = None, **params: Any
    ) -> list[Row]:
        if rows is not None:
            params["rows"] = msgspec.json.encode(rows).decode()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._read_now, statement, params)

    def _read_now(self, statement: Statement, params: Mapping[str, Any]) -> list[Row]:
        try:
            return fetch(self._reader(), statement, statement.sqlite, params)
        except sqlite3.DatabaseError as error:
            self._drop_reader()
            raise StoreUnavailable(f"the database cannot be read: {error}") from error

    def _reader(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None and self._descriptors.lost(connection):
            self._drop_reader()
            connection = None
        if connection is None:
            connection = self._descriptors.open(partial(_open_and_read, self._path))
            connection.execute("PRAGMA query_only = ON")
            self._local.connection = connection
            self._reading.append(connection)
        return connection

    def _drop_reader(self) -> None:
        """Let this thread's next read open a new connection: this one may be unusable."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            self._local.connection = None
            self._reading.remove(connection)
            self._descriptors.close(connection)


class _SameFile:
    """Detects that the database, or a file that SQLite has beside it, was removed or replaced.

    The open connection would continue with files that no restart finds: the newest commits are only
    in the write-ahead log.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._beside = (f"{path}-wal", f"{path}-shm")
        self._first: Identity | None = None
        self._first_beside: list[Identity | None] = []
        self._lengths: dict[bytes, int] = {}
        """The length of the write-ahead log, by the header that it had then."""
        self.is_index_lost = False
        """Whether the log's index is lost; all connections of a process share it and its locks."""

    def remember(self) -> None:
        """Record which files a connection has just opened."""
        self._first = self._first or identity_of(self._path)
        self._first_beside = [identity_of(path) for path in self._beside]

    def check(self) -> bool:
        """Return whether no file is missing, replaced or cut."""
        return self._trouble() is None

    def ensure(self) -> None:
        """Raise StoreUnavailable unless a restart would find a commit made now."""
        if self.is_index_lost:
            raise StoreUnavailable(CLOSED)
        if trouble := self._trouble():
            raise StoreUnavailable(f"{trouble} while we ran: put it back, or stop this receiver")

    def ensure_database(self) -> None:
        """Raise StoreUnavailable if another file has replaced ours, or the log's index is lost."""
        if self.is_index_lost:
            raise StoreUnavailable(CLOSED)
        if self._first not in {None, identity_of(self._path)}:
            raise StoreUnavailable(f"the database {self._path} is not the one that we opened")

    def _trouble(self) -> str | None:
        if identity_of(self._path) != self._first:
            return f"the database {self._path} was removed or replaced"
        for path, first in zip(self._beside, self._first_beside, strict=True):
            if identity_of(path) != first:
                return f"{path}, which belongs to the database, was removed or replaced"
        if self._first is not None and _is_empty(self._path):
            return f"the database {self._path} was cut"
        if not self._is_log_whole():
            return f"{self._beside[0]}, which belongs to the database, was cut"
        return None

    def _is_log_whole(self) -> bool:
        """Return whether the log has not become shorter under the same header.

        SQLite itself restarts it with other salts in its header, or truncates it to nothing.
        """
        known = self._lengths  # read first: another thread may check later, and see a longer log
        try:
            with open(self._beside[0], "rb", buffering=0) as file:  # noqa: PTH123 - a name, as SQLite is given it
                head, size = file.read(_HEADER), os.fstat(file.fileno()).st_size
        except OSError:
            return True  # it is missing, which `_trouble` has checked
        if head and size:
            if head[:3] != _MAGIC or size < known.get(head, _HEADER):
                return False
            self._lengths = {head: size}
        return True


def _is_empty(path: str) -> bool:
    # Not opened for this: closing any descriptor of the database releases SQLite's locks on it.
    with contextlib.suppress(OSError):
        return os.stat(path).st_size == 0  # noqa: PTH116 - a name, as SQLite is given it
    return False


def _save(connection: sqlite3.Connection, path: str) -> None:
    """Copy the data that an open connection still has to a new file beside the database."""
    saved = next(name for n in count(1) if not os.path.lexists(name := f"{path}.saved-{n}"))
    try:
        os.close(os.open(saved, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with contextlib.closing(sqlite3.connect(saved)) as copy:
            connection.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, and nothing beside it
    except (OSError, sqlite3.Error) as error:
        log.warning("store.saved", file=None, reason=f"{type(error).__name__}: {error}")
        Path(saved).unlink(missing_ok=True)
    else:
        log.warning("store.saved", file=saved, reason="what the open connection still has")


class _FileLock:
    """A lock on `<path>.lock` that ends with its process, however that ends."""

    def __init__(self, path: str) -> None:
        # The real path: a link is not a second database.
        self._path = f"{os.path.realpath(path)}.lock"
        self._fd: int | None = None

    def acquire(self) -> None:
        Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 20).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise StoreUnusable(
                f"the database {self._path.removesuffix('.lock')} is in use by another receiver "
                f"(process {holder}): stop that one first, or give this one its own file by "
                "RECEIVER_DATABASE_URL=sqlite:///other.db; to run what is due there, ask it by "
                "POST /v1/drain"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        self._fd = fd
        forks.PRIVATE.add(fd)

    def ensure(self) -> None:
        """Take the lock again if its file was removed, or raise StoreUnavailable."""
        held = self._fd
        if held is None or identity_of(self._path) == identity_of(held):
            return
        try:
            self.acquire()
        except (StoreUnusable, OSError) as error:
            raise StoreUnavailable(
                f"the lock {self._path} was removed while we ran: {error}"
            ) from None
        forks.PRIVATE.discard(held)
        os.close(held)

    def release(self) -> None:
        if self._fd is not None:
            forks.PRIVATE.discard(self._fd)
            os.close(self._fd)
            self._fd = None


def _open(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    connection.row_factory = sqlite3.Row
    return connection


def _open_and_read(path: str) -> sqlite3.Connection:
    """Open a connection and its files, which SQLite alone opens only at the first read."""
    connection = _open(path)
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: str) -> sqlite3.Connection:
    # Only its owner may read a new file, and those that SQLite creates beside it, as they contain
    # people's prompts and pictures. An existing file keeps its mode.
    with contextlib.suppress(OSError):  # SQLite raises the error again, in words that we know
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = _open(path)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        # Deleted content is overwritten with zeros, even if SQLite's default differs.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute(f"PRAGMA wal_autocheckpoint = {RESTART}")
        connection.execute("PRAGMA journal_size_limit = -1")  # so only other programs cut the log
        _migrate(connection, path)
        connection.execute("PRAGMA foreign_keys = ON")  # only now: a migration may rebuild a table
        # The loop waits for no other connection; see Writer.
        connection.execute("PRAGMA busy_timeout = 0")
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: str) -> None:
    [version] = connection.execute("PRAGMA user_version").fetchone()
    for number, script in unapplied("sqlite", version, f"database {path}").items():
        # executescript commits an open transaction, so the script itself contains one.
        connection.executescript(f"BEGIN;{script};PRAGMA user_version = {number};COMMIT;")


@each()
def recover(item: tuple[str, float]) -> Steps[list[LostAttempt]]:
    """Reclaim the submits and claims of an earlier process."""
    owner, now = item
    yield Run(predictions_sql.mark_abandoned_submits, {"now": now})
    return (yield from deliveries.reclaim_all(owner, now))
