"""Group commit for SQLite: one thread writes, and all writes that wait are committed together.

A batch is one transaction, so its cost is shared; each caller gets its result after COMMIT has
reached the disk. If a batch fails because of one item, it is rolled back and every item is tried
again alone, so that only that one fails.
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
from receiver.model.tasks import start_thread
from receiver.store.statement import Cells, Row, Run, Statement, Step, Steps, Transaction, Write

Item = TypeVar("Item")
Result = TypeVar("Result")

_LARGEST_BATCH: Final = 1000
_LARGEST_INLINE: Final = 32 * 1024
"""Bytes up to which a body travels inside the batch's JSON; larger ones are bound one by one."""

# Errors of the disk or of other processes; all others are wrong statements or values.
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

    `report` is called when writing fails or works again, `committed` after every commit with the
    number of its writes. `ensure` raises StoreUnavailable where a commit would be lost.
    """

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        report: Callable[[StoreUnavailable | None], None],
        committed: Callable[[int], None] = lambda _size: None,
        ensure: Callable[[], None] = lambda: None,
    ) -> None:
        self._ensure = ensure
        self._connect = connect
        self._committed = committed
        self._report = report
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._connection: sqlite3.Connection | None = None
        self._broken = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Open the database (raising what is wrong with it) and start the thread."""
        self._connection = self._connect()
        self._thread = start_thread("receiver-writer", self._run)

    def close(self) -> None:
        """Commit what waits, then stop."""
        self._closed = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        elif self._connection is not None:  # a start that failed
            self._connection.close()

    async def write(self, transaction: Transaction[Item, Result], item: Item) -> Result:
        """Run `transaction` for `item`; return only after the commit."""
        if self._closed:
            raise StoreUnavailable("the database is closed")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.put(_Work(transaction, item, future))
        return await future

    def post(self, transaction: Transaction[Item, Any], item: Item) -> None:
        """Run `transaction` for `item` later, from any thread; there is no result."""
        self._queue.put(_Work(transaction, item, None))

    def _run(self) -> None:
        while batch := self._next_batch():
            self._tell(self._attempt(batch))
        if self._connection is not None:
            self._connection.close()

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
            if self._connection is not None:
                self._ensure()
            results = self._transact(batch)
            self._ensure()  # nothing is promised that no restart would find
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
        with contextlib.suppress(Exception):  # a failing report must not end the writing
            self._report(trouble)

    def _reopen_later(self) -> None:
        """Let the next batch open a new connection: an I/O error may leave this one unusable."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
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
                continue  # that loop is closed, and no caller is left


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
    """Run a transaction's steps. News is dropped: there is no other process."""
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
    rows: Sequence[Cells],
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
    if not (names := statement.gathers):
        return rows
    [[packed]] = rows
    # Every microsecond here is one of each callback, and names and cells come of one text.
    return [dict(zip(names, cells)) for cells in msgspec.json.decode(packed)]  # noqa: B905


def _parted(statement: Statement, rows: Sequence[Cells]) -> tuple[list[Cells], list[Cells]]:
    """Split rows into those whose bytes do not go into JSON well, and all others."""
    single: list[Cells] = []
    together: list[Cells] = []
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
