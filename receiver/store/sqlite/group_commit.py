"""One thread that writes: whatever waits is committed together (group commit).

All the items that wait for one transaction are handed to it at once. A batch is one transaction, so
its cost is shared and each caller is told only after COMMIT has reached the disk. If a batch fails
for a reason of one item, it is rolled back and every item is tried again alone: the culprit fails,
its neighbours do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

import msgspec

from receiver.model.errors import StoreUnavailable
from receiver.store.sqlite.descriptors import CLOSED
from receiver.store.statement import Row, Run, Statement, Step, Steps, Transaction, Write

Item = TypeVar("Item")
Result = TypeVar("Result")

_LARGEST_BATCH: Final = 1000
_LARGEST_INLINE: Final = 32 * 1024
"""Bytes up to which a body travels inside the batch's JSON; larger ones are bound one by one."""

# What the disk or another process does to us, as opposed to what is wrong with a statement.
_UNAVAILABLE: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOTADB,
    }
)


class _Work:
    __slots__ = ("future", "item", "transaction")

    def __init__(
        self, transaction: Transaction[Any, Any], item: Any, future: asyncio.Future[Any] | None
    ) -> None:
        self.transaction = transaction
        self.item = item
        self.future = future


class Writer:
    """Owns the one writing connection.

    `report` hears when writing stops and starts to work, `committed` of every commit and how many
    writes it had; `ensure` raises StoreUnavailable where a commit would be in vain. `is_sound` says
    whether a connection still has its files, `close` ends one.
    """

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        report: Callable[[StoreUnavailable | None], None],
        committed: Callable[[int], None] = lambda _size: None,
        ensure: Callable[[], None] = lambda: None,
        is_sound: Callable[[sqlite3.Connection], bool] = lambda _: True,
        close: Callable[[sqlite3.Connection], None] = sqlite3.Connection.close,
    ) -> None:
        self._is_sound = is_sound
        self._close = close
        self._is_astray = False
        """Whether a commit may have gone to other files, so that none after it can be found."""
        self._ensure = ensure
        self._connect = connect
        self._committed = committed
        self._report = report
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._connection: sqlite3.Connection | None = None
        self._broken = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="receiver-writer", daemon=True)

    def start(self) -> None:
        """Open the database (raising what is wrong with it) and start the thread."""
        self._connection = self._connect()
        self._thread.start()

    def close(self) -> None:
        """Commit what waits, then stop."""
        self._closed = True
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()
        elif self._connection is not None:  # a start that failed
            self._close(self._connection)

    async def write(self, transaction: Transaction[Item, Result], item: Item) -> Result:
        """Run `transaction` for `item`; return only after the commit."""
        if self._closed:
            raise StoreUnavailable("the database is closed")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.put(_Work(transaction, item, future))
        return await future

    def post(self, transaction: Transaction[Item, Any], item: Item) -> None:
        """Run `transaction` for `item` some time, from any thread; nobody waits for it."""
        self._queue.put(_Work(transaction, item, None))

    def _run(self) -> None:
        while batch := self._next_batch():
            self._tell(self._attempt(batch))
        if self._connection is not None:
            self._close(self._connection)

    def _next_batch(self) -> list[_Work]:
        work = self._queue.get()
        batch: list[_Work] = []
        try:
            while work is not None:
                batch.append(work)
                if len(batch) == _LARGEST_BATCH:
                    return batch
                work = self._queue.get_nowait()
        except Empty:
            return batch
        if batch:
            self._queue.put(None)  # the end, to be met again when this batch is done
        return batch

    def _attempt(self, batch: list[_Work]) -> list[tuple[_Work, Any]]:
        try:
            if self._connection is not None and not self._is_sound(self._connection):
                self._reopen_later()
            self._ensure_found()
            results = self._transact(batch)
            self._ensure_found()  # nothing is promised that no restart would find
        except StoreUnavailable as error:
            return self._refuse(batch, error)
        except sqlite3.Error as error:
            if _is_unavailable(error):
                return self._give_up(batch, error)
            return self._one_by_one(batch, error)
        except Exception as error:  # noqa: BLE001 - a fault in one transaction must not end the thread
            return self._one_by_one(batch, error)
        if self._broken:
            self._broken = False
            self._tell_of(None)
        return results

    def _ensure_found(self) -> None:
        """Raise StoreUnavailable unless a restart would find what is committed."""
        if self._is_astray:
            raise StoreUnavailable(CLOSED)
        if self._connection is not None:
            self._ensure()

    def _transact(self, batch: list[_Work]) -> list[tuple[_Work, Any]]:
        if self._connection is None:
            self._connection = self._connect()
        groups: dict[Transaction[Any, Any], list[_Work]] = {}
        for work in batch:
            groups.setdefault(work.transaction, []).append(work)
        results: list[tuple[_Work, Any]] = []
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for transaction, works in groups.items():
                steps = transaction([work.item for work in works])
                results.extend(zip(works, _drive(self._connection, steps), strict=True))
            self._connection.execute("COMMIT")
            self._is_astray = not self._is_sound(self._connection)
            self._committed(len(batch))
        except BaseException:
            self._roll_back(self._connection)
            raise
        return results

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        """End the transaction; a connection that cannot even do that takes no other."""
        if not connection.in_transaction:
            return
        try:
            connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._reopen_later()

    def _one_by_one(self, batch: list[_Work], error: Exception) -> list[tuple[_Work, Any]]:
        if len(batch) == 1:
            return [(batch[0], error)]
        return [result for work in batch for result in self._attempt([work])]

    def _give_up(self, batch: list[_Work], error: sqlite3.Error) -> list[tuple[_Work, Any]]:
        self._reopen_later()
        return self._refuse(batch, StoreUnavailable(f"the database does not take writes: {error}"))

    def _refuse(self, batch: list[_Work], unavailable: StoreUnavailable) -> list[tuple[_Work, Any]]:
        if not self._broken:
            self._broken = True
            self._tell_of(unavailable)
        return [(work, unavailable) for work in batch]

    def _tell_of(self, trouble: StoreUnavailable | None) -> None:
        with contextlib.suppress(Exception):  # who reports must not end the thread that writes
            self._report(trouble)

    def _reopen_later(self) -> None:
        """Let the next batch open anew: after an I/O error a connection may stay unusable."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                self._close(connection)
            except sqlite3.Error:
                return

    def _tell(self, results: list[tuple[_Work, Any]]) -> None:
        awaited = [(work.future, result) for work, result in results if work.future is not None]
        loops = {future.get_loop() for future, _ in awaited}
        for loop in loops:
            mine = [(future, result) for future, result in awaited if future.get_loop() is loop]
            try:
                loop.call_soon_threadsafe(_resolve, mine)
            except RuntimeError:
                continue  # that loop is closed: nobody is left to be told


def _resolve(results: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in results:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def _is_unavailable(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and (code & 0xFF) in _UNAVAILABLE


def _drive(connection: sqlite3.Connection, steps: Steps[Sequence[Result]]) -> Sequence[Result]:
    """Run an transaction's steps; there is one process, and its queue is the rows: no news."""
    try:
        step = next(steps)
        while True:
            step = steps.send(_run(connection, step))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def _run(connection: sqlite3.Connection, step: Step) -> list[Row]:
    match step:
        case Run(statement, params, rows):
            if rows is None:
                return fetch(connection, statement, statement.sqlite, params)
            return _batch(connection, statement, params, rows)
        case Write(parts):
            for statement, rows in parts:
                _batch(connection, statement, {}, rows)
    return []


def _batch(
    connection: sqlite3.Connection,
    statement: Statement,
    params: Mapping[str, Any],
    rows: Sequence[Row],
) -> list[Row]:
    single, together = _parted(statement, rows) if statement.blobs else ([], rows)
    text = msgspec.json.encode(together).decode()
    if "\\u0000" in text:  # of a text in JSON, SQLite's functions give what comes before a NUL
        single, together = [*single, *together], []
    found: list[Row] = []
    for row in single:
        cells = {f"c{index}": cell for index, cell in enumerate(row)}
        found += fetch(connection, statement, statement.sqlite_one, {**params, **cells})
    if together or not single:
        found += fetch(connection, statement, statement.sqlite, {**params, "rows": text})
    return found


def fetch(
    connection: sqlite3.Connection, statement: Statement, sql: str, params: Mapping[str, Any]
) -> list[Row]:
    rows = connection.execute(sql, params).fetchall()
    return msgspec.json.decode(rows[0][0]) if statement.gathers else rows


def _parted(statement: Statement, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Tell rows whose bytes JSON cannot hold, or would not hold well, from all others."""
    single: list[Row] = []
    together: list[Row] = []
    for row in rows:
        cells = list(row)
        for index in statement.blobs:
            cells[index] = _as_text(cells[index])
        inline = all(
            isinstance(cells[index], str) and len(cells[index]) <= _LARGEST_INLINE
            for index in statement.blobs
        )
        (together if inline else single).append(cells)
    return single, together


def _as_text(body: bytes) -> str | bytes:
    """Return bytes that are text as text: a handler is given those back, decoded."""
    try:
        return body if b"\0" in body else body.decode()
    except UnicodeDecodeError:
        return body
