"""The store on SQLite: WAL, synchronous=FULL, one writing thread, a few reading ones."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from receiver.errors import StoreUnavailable, StoreUnusable
from receiver.model import (
    Prediction,
    new_id,
)
from receiver.store import operations
from receiver.store import queries as q
from receiver.store import rows as to
from receiver.store.checkpoint import RESTART, Checkpointer
from receiver.store.schema import MIGRATIONS
from receiver.store.values import (
    Arrival,
    Claims,
    Created,
    Filter,
    Found,
    Job,
    Known,
    NewPrediction,
    Progress,
    Replayed,
    Settlement,
    Slots,
    Taken,
    Wanted,
)
from receiver.store.writer import Writer

T = TypeVar("T")

_READERS: Final = 2


class SQLiteStore:
    """All that is remembered. Every method that writes returns after its commit.

    Raises StoreUnavailable when the disk does not take writes; then nothing was kept.
    """

    def __init__(self, path: str, report: Callable[[StoreUnavailable | None], None]) -> None:
        self._path = path
        self._lock = _FileLock(path)
        self._file = _SameFile(path)
        self._checkpointer = Checkpointer(partial(_open, path), self._file.check)
        self._writer = Writer(
            partial(_connect, path), report, self._checkpointer.dirty.set, self._file.ensure
        )
        self._local = threading.local()
        self._reading: list[sqlite3.Connection] = []
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="receiver-reader")

    def open(self) -> None:
        """Lock, open and migrate the file, or raise StoreUnusable with what to do."""
        try:
            self._lock.acquire()
            self._writer.start()
            self._file.remember()
            self._checkpointer.start()
        except StoreUnusable:
            self._lock.release()
            raise
        except (OSError, sqlite3.Error) as error:
            self._lock.release()
            raise StoreUnusable(
                f"cannot open the database {self._path}: {error}; "
                "set RECEIVER_DATABASE_URL to a file in a folder that can be written"
            ) from error

    def close(self) -> None:
        """Commit what waits and give the file free."""
        self._checkpointer.close()
        self._writer.close()
        self._readers.shutdown()
        for connection in self._reading:
            connection.close()
        self._lock.release()

    # --- predictions ---

    async def create(self, new: NewPrediction) -> Created:
        return await self._writer.write(operations.create, new)

    async def begin_submits(self, slots: Slots) -> list[Job]:
        """Move queued predictions to `submitting`, oldest first, as many as there is room for."""
        return await self._writer.write(operations.begin_submits, slots)

    async def progress(self, progress: Progress) -> bool:
        """Record a step; False if the provider's id belongs to another prediction."""
        try:
            await self._writer.write(operations.progress, progress)
        except sqlite3.IntegrityError as error:
            if not _is_taken(error):
                raise
            return False
        return True

    async def claim_due(self, provider: str, now: float, hold_until: float, most: int) -> list[Job]:
        """Take a provider's predictions that are due, and make them due again at `hold_until`."""
        return await self._writer.write(operations.claim_due, (provider, now, hold_until, most))

    async def mark_cancel(self, prediction_id: str) -> None:
        await self._writer.write(operations.mark_cancel, prediction_id)

    async def recover(self, owner: str, now: float) -> None:
        """At start: what dead processes were doing is owed again, or in doubt."""
        await self._writer.write(operations.recover, (owner, now))

    async def job(self, prediction_id: str) -> Job | None:
        rows = await self._read(q.SELECT_JOB, (prediction_id,))
        return to.job(rows[0]) if rows else None

    async def prediction(self, prediction_id: str) -> Prediction | None:
        rows = await self._read(q.SELECT_PREDICTION, (prediction_id,))
        return to.prediction(rows[0]) if rows else None

    async def predictions(self, wanted: Filter) -> Found:
        given = {"status": wanted.status, "provider": wanted.provider, "cursor": wanted.cursor}
        rows = await self._list(q.LIST_PREDICTIONS, q.PREDICTION_CLAUSES, given, wanted.limit)
        return to.page([to.prediction(row) for row in rows], wanted.limit)

    async def find(self, provider: str, provider_id: str) -> str | None:
        """Give our id for the provider's."""
        rows = await self._read(q.SELECT_ID_BY_PROVIDER_ID, (provider, provider_id))
        return rows[0][0] if rows else None

    async def next_due(self, provider: str) -> float | None:
        return (await self._read(q.NEXT_DUE, (provider,)))[0][0]  # type: ignore[no-any-return]

    async def stale(self, provider: str, before: float, most: int) -> list[str]:
        """Name predictions that have been queued since before then."""
        return [row[0] for row in await self._read(q.SELECT_STALE, (provider, before, most))]

    async def hasten(self, provider: str, now: float) -> None:
        """Make every prediction that is at the provider due for a look."""
        await self._writer.write(operations.hasten, (provider, now))

    async def next_queued(self, provider: str) -> float | None:
        return (await self._read(q.NEXT_QUEUED, (provider,)))[0][0]  # type: ignore[no-any-return]

    async def submit_times(self, provider: str, since: float) -> list[float]:
        """Give when submits were begun since then, for limits that outlive a restart."""
        oldest = new_id("pred", max(since - 86400.0, 0.0))
        rows = await self._read(q.SELECT_SUBMIT_TIMES, (provider, oldest, since))
        return [row[0] for row in rows]

    # --- the inbox ---

    async def accept(self, arrival: Arrival) -> Taken:
        """Take one outcome: evidence, new state, event and deliveries in one transaction."""
        try:
            return await self._writer.write(operations.accept, arrival)
        except sqlite3.IntegrityError as error:
            if not _is_taken(error):
                raise
            # The one rule a stranger's words can run into: a provider's id has one owner.
            return Taken("mismatch", None, "its id belongs to another prediction")

    # --- deliveries ---

    async def claim(self, wanted: Wanted) -> Claims:
        return await self._writer.write(operations.claim, wanted)

    async def settle(self, settlement: Settlement) -> bool:
        """End an attempt; False if the claim was lost meanwhile, and then nothing changed."""
        return await self._writer.write(operations.settle, settlement)

    async def release(self, owner: str, now: float) -> None:
        """Give back every claim of `owner`, as if it had not been made."""
        await self._writer.write(operations.release, (owner, now))

    def renew(self, owner: str, delivery_ids: list[str], lease_until: float) -> None:
        """Keep claims of `owner`; from any thread, so that a blocked loop keeps them too."""
        self._writer.post(operations.renew, (owner, delivery_ids, lease_until))

    async def reclaim(self, owner: str, now: float) -> list[str]:
        """Owe again what was claimed by somebody whose lease ran out; name the handlers."""
        return await self._writer.write(operations.reclaim, (owner, now))

    async def replay(
        self, prediction_id: str, match: Callable[[Known, str], Sequence[str]], now: float
    ) -> Replayed:
        """Owe the event of a prediction to its matching handlers again."""
        return await self._writer.write(operations.replay, (prediction_id, match, now))

    async def retry(self, delivery_id: str, now: float) -> str | None:
        """Owe one dead or skipped delivery again (a pending one: at once); name its handler."""
        return await self._writer.write(operations.retry, (delivery_id, now))

    async def deliveries(self, limit: int, **given: str | None) -> Found:
        """List by any of: state, handler, prediction, id, cursor."""
        rows = await self._list(q.LIST_DELIVERIES, q.DELIVERY_CLAUSES, given, limit)
        return to.page([to.delivery(row) for row in rows], limit)

    async def owed(self) -> dict[str, int]:
        """Count pending deliveries by handler."""
        return dict(await self._read(q.COUNT_OWED))

    async def recall(self, delivery_id: str, key: str) -> str | None:
        """Give the remembered result of a handler's sub-step, as JSON."""
        rows = await self._read(q.SELECT_STEP, (delivery_id, key))
        return rows[0][0] if rows else None

    async def remember(self, delivery_id: str, key: str, result: str) -> None:
        await self._writer.write(operations.remember, (delivery_id, key, result))

    async def probe(self, now: float) -> None:
        """Write one row for nothing, to know that it can be done."""
        await self._writer.write(operations.probe, now)

    # --- reading ---

    async def _read(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._read_now, sql, params)

    async def _list(
        self, sql: str, clauses: Mapping[str, str], given: Mapping[str, Any], limit: int
    ) -> list[Any]:
        params = {name: value for name, value in given.items() if value is not None}
        terms = " AND ".join(clauses[name] for name in params)
        where = f"WHERE {terms}" if terms else ""
        return await self._read(sql.format(where=where), {**params, "limit": limit + 1})

    def _read_now(self, sql: str, params: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
        try:
            return self._reader().execute(sql, params).fetchall()
        except sqlite3.DatabaseError as error:
            self._drop_reader()
            raise StoreUnavailable(f"the database cannot be read: {error}") from error

    def _reader(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = _open(self._path)
            self._reading.append(connection)
            connection.execute("PRAGMA query_only = ON")
        return connection

    def _drop_reader(self) -> None:
        """Let this thread's next read open anew: a connection may stay unusable."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            self._local.connection = None
            self._reading.remove(connection)
            connection.close()


def _is_taken(error: sqlite3.IntegrityError) -> bool:
    return error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_UNIQUE


class _SameFile:
    """Notices that the database was removed or replaced under us.

    The open connection would go on, with a file that no restart will find.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._first: tuple[int, int] | None = None
        self._is_same = True

    def remember(self) -> None:
        self._first = self._identity()

    def check(self) -> bool:
        """Look, ten times a second at most, as a commit has no time for it."""
        self._is_same = self._identity() == self._first
        return self._is_same

    def ensure(self) -> None:
        """Raise StoreUnavailable unless the last look found our file."""
        if not self._is_same and not self.check():
            raise StoreUnavailable(
                f"the database {self._path} was removed or replaced while we ran: put it back, or "
                "stop this receiver"
            )

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)  # noqa: PTH116 - a name, as SQLite is given it
        except OSError:
            return None
        return found.st_dev, found.st_ino


class _FileLock:
    """A lock on `<path>.lock` that dies with its process, however that ends."""

    def __init__(self, path: str) -> None:
        # By its real name: a link is no second database.
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
                "RECEIVER_DATABASE_URL=sqlite:///other.db"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _open(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)


def _connect(path: str) -> sqlite3.Connection:
    connection = _open(path)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA wal_autocheckpoint = {RESTART}")
        _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: str) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreUnusable(
            f"the database {path} was written by a newer receiver (schema {version}, this one "
            f"knows {len(MIGRATIONS)}): upgrade this receiver, or use another file"
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        # executescript commits what is open, so the transaction is in the script itself.
        connection.executescript(f"BEGIN;{script};PRAGMA user_version = {number};COMMIT;")
