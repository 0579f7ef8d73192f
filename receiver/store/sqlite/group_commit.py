"""Group commit for SQLite: one connection writes, and all waiting writes are committed together.

A batch is one transaction, so its cost is shared; each caller gets its result after COMMIT has
reached the disk. If a batch fails because of one item, it is rolled back and every item is tried
again alone, so that only that one fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, TypeVar

import msgspec

from receiver.model.errors import StoreUnavailable
from receiver.model.tasks import start_thread
from receiver.store.sqlite.descriptors import CLOSED
from receiver.store.statement import (
    Cells,
    Row,
    Run,
    Statement,
    Step,
    Steps,
    Transaction,
    Write,
    is_in_turn,
    is_short,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

_LARGEST_BATCH: Final = 1000
_LARGEST_ON_LOOP: Final = 64
"""Most writes in a batch on the loop: their statements block it for about two milliseconds."""
_BUSY: Final = 5000
"""Milliseconds for which the thread waits for another connection that writes."""
_LARGEST_INLINE: Final = 32 * 1024
"""Most bytes of a body inside the batch's JSON; larger ones are bound one by one."""

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


_Results: TypeAlias = list[tuple[_Work, Any]]
_Holder: TypeAlias = Literal["nobody", "loop", "committer", "thread"]
"""Which side uses the connection: the loop runs the statements of a batch, and the thread its
COMMIT (`committer`), or the thread does both."""


class Writer:
    """Owns the one writing connection, and the thread that waits for the disk.

    Short transactions run on the loop's own thread, where they do not compete for the interpreter
    lock, and only the COMMIT, which releases the lock, runs in the thread; meanwhile the next batch
    gathers. All other transactions, and a batch that fails, run in the thread.

    `report` is called when writing stops and when it works again, `committed` with the number of
    writes of each commit; `ensure` raises StoreUnavailable if a commit would be lost. `is_sound`
    returns whether a connection still has its files, `close` closes one.
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
        """Whether a commit may have gone to other files, so that no later one can be found."""
        self._ensure = ensure
        self._connect = connect
        self._committed = committed
        self._report = report
        self._connection: sqlite3.Connection | None = None
        self._broken = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        """Held to read or change the attributes below; never while statements run."""
        self._holder: _Holder = "nobody"
        self._queue: deque[_Work] = deque()
        """Writes for the thread."""
        self._gathered: deque[_Work] = deque()
        """Writes for the loop's next batch."""
        self._executed: tuple[list[_Work], _Results] = ([], [])
        """The batch that the committer is to commit, with its results."""

    def start(self) -> None:
        """Open the database, raising its errors, and start the thread."""
        self._connection = self._connect()
        self._thread = start_thread("receiver-writer", self._run)

    def close(self) -> None:
        """Commit waiting writes, then stop."""
        with self._changed:
            self._closed = True
            self._leave_to_thread()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        elif self._connection is not None:  # a start that failed
            self._close(self._connection)

    async def write(self, transaction: Transaction[Item, Result], item: Item) -> Result:
        """Run `transaction` for `item`; return only after the commit."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        work = _Work(transaction, item, future)
        with self._changed:
            if self._closed:
                raise StoreUnavailable("the database is closed")
            if self._holder == "thread" or self._queue or not is_short(transaction, item):
                self._leave_to_thread(work)
            else:
                self._gathered.append(work)
                if self._holder == "nobody" and len(self._gathered) == 1:
                    # In the loop's next turn, so that all writes of this one are in the batch.
                    loop.call_soon(self._execute)
        return await future

    def post(self, transaction: Transaction[Item, Any], item: Item) -> None:
        """Queue `transaction` for `item`, from any thread, without a result."""
        with self._changed:
            self._leave_to_thread(_Work(transaction, item, None))

    def _leave_to_thread(self, *more: _Work) -> None:
        """Queue the gathered writes and `more` for the thread, in their order of arrival."""
        self._queue.extend(self._gathered)
        self._gathered.clear()
        self._queue.extend(more)
        self._changed.notify_all()

    # --- on the loop ---

    def _execute(self) -> None:
        """Run the statements of the gathered writes, and leave their COMMIT to the thread."""
        with self._changed:
            if not self._gathered or self._holder != "nobody":
                return  # the end of the batch under way calls this again
            if self._connection is None or self._queue:
                self._leave_to_thread()
                return
            self._holder = "loop"
            most = min(len(self._gathered), _LARGEST_ON_LOOP)
            batch = [self._gathered.popleft() for _ in range(most)]
        results = None
        try:
            results = self._statements(self._connection, batch)
        except Exception:  # noqa: BLE001 - the thread gets and handles it too
            results = None
        finally:  # also if a signal handler raises
            if results is None:
                self._roll_back(self._connection)
            with self._changed:
                if results is None:
                    self._holder = "nobody"
                    self._queue.extendleft(reversed(batch))
                else:
                    self._holder = "committer"
                    self._executed = (batch, results)
                self._changed.notify_all()

    # --- in the thread ---

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            results = self._commit(*self._executed) if self._holder == "committer" else None
            results = self._attempt(batch) if results is None else results
            with self._changed:
                self._holder = "nobody"
                if self._queue:
                    self._leave_to_thread()  # which continues
            self._answer_all(results)
        if self._connection is not None:
            self._close(self._connection)

    def _next_batch(self) -> list[_Work] | None:
        """Wait for a batch to be committed, or to be run; None at the end."""
        with self._changed:
            while True:
                if self._holder == "committer":
                    return self._executed[0]
                if self._holder == "nobody" and self._queue:
                    self._holder = "thread"
                    most = min(len(self._queue), _LARGEST_BATCH)
                    return [self._queue.popleft() for _ in range(most)]
                if self._holder == "nobody" and self._closed:
                    return None
                self._changed.wait()

    def _commit(self, batch: list[_Work], results: _Results) -> _Results | None:
        """Commit a batch that the loop has run; None: that failed, and it must be run again."""
        connection = self._connection
        if connection is None:
            return None
        try:
            # Checked here, as nothing is written before: the check costs the loop too much time.
            if not self._is_sound(connection):
                self._roll_back(connection)
                return None
            self._ensure_found()
            self._finish(connection, batch)
            self._ensure_found()  # no result is given that a restart would not find
        except StoreUnavailable as error:
            self._roll_back(connection)
            return self._refuse(batch, error)
        except sqlite3.Error as error:
            if _is_unavailable(error):
                return self._give_up(batch, error)
            self._roll_back(connection)
            return None
        self._works_again()
        return results

    def _attempt(self, batch: list[_Work]) -> _Results:
        try:
            if self._connection is not None and not self._is_sound(self._connection):
                self._reopen_later()
            self._ensure_found()
            results = self._transact(batch)
            self._ensure_found()  # no result is given that a restart would not find
        except StoreUnavailable as error:
            return self._refuse(batch, error)
        except sqlite3.Error as error:
            if _is_unavailable(error):
                return self._give_up(batch, error)
            return self._one_by_one(batch, error)
        except Exception as error:  # noqa: BLE001 - a fault in one transaction must not end the thread
            return self._one_by_one(batch, error)
        self._works_again()
        return results

    def _works_again(self) -> None:
        if self._broken:
            self._broken = False
            self._report_change(None)

    def _ensure_found(self) -> None:
        """Raise StoreUnavailable unless a restart would find a commit."""
        if self._is_astray:
            raise StoreUnavailable(CLOSED)
        if self._connection is not None:
            self._ensure()

    def _transact(self, batch: list[_Work]) -> _Results:
        if self._connection is None:
            self._connection = self._connect()
        try:
            results = self._statements(self._connection, batch, patient=True)
            self._finish(self._connection, batch)
        except BaseException:
            self._roll_back(self._connection)
            raise
        return results

    def _finish(self, connection: sqlite3.Connection, batch: list[_Work]) -> None:
        """Commit, and check whether the commit went to the right files."""
        connection.execute("COMMIT")
        self._is_astray = not self._is_sound(connection)
        with contextlib.suppress(Exception):  # a failing report must not end the writing
            self._committed(len(batch))

    def _statements(
        self, connection: sqlite3.Connection, batch: list[_Work], *, patient: bool = False
    ) -> _Results:
        """Begin a transaction, and run all statements of a batch except its COMMIT."""
        groups: dict[tuple[int, Transaction[Any, Any]], list[_Work]] = {}
        turn = 0
        for work in batch:
            turn += is_in_turn(work.transaction)
            groups.setdefault((turn, work.transaction), []).append(work)
        results: _Results = []
        _begin(connection, patient=patient)
        for (_, transaction), works in groups.items():
            steps = transaction([work.item for work in works])
            results.extend(zip(works, _drive(connection, steps), strict=True))
        return results

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        """Roll back the transaction; a connection that cannot even do that is replaced."""
        if not connection.in_transaction:
            return
        try:
            connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._reopen_later()

    def _one_by_one(self, batch: list[_Work], error: Exception) -> _Results:
        if len(batch) == 1:
            return [(batch[0], error)]
        return [result for work in batch for result in self._attempt([work])]

    def _give_up(self, batch: list[_Work], error: sqlite3.Error) -> _Results:
        self._reopen_later()
        return self._refuse(batch, StoreUnavailable(f"the database does not take writes: {error}"))

    def _refuse(self, batch: list[_Work], unavailable: StoreUnavailable) -> _Results:
        if not self._broken:
            self._broken = True
            self._report_change(unavailable)
        return [(work, unavailable) for work in batch]

    def _report_change(self, trouble: StoreUnavailable | None) -> None:
        with contextlib.suppress(Exception):  # a failing report must not end the writing
            self._report(trouble)

    def _reopen_later(self) -> None:
        """Let the next batch open a new connection: an I/O error may leave this one unusable."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._close(connection)

    def _answer_all(self, results: _Results) -> None:
        """Answer waiting callers in their loops, which then run the gathered writes."""
        awaited = [(work.future, result) for work, result in results if work.future is not None]
        loops = {future.get_loop() for future, _ in awaited}
        for loop in loops:
            mine = [(future, result) for future, result in awaited if future.get_loop() is loop]
            try:
                loop.call_soon_threadsafe(self._answer, mine)
            except RuntimeError:
                loops = set()  # it is closed: no caller waits, and no loop can continue
        if not loops:
            with self._changed:
                self._leave_to_thread()

    def _answer(self, results: list[tuple[asyncio.Future[Any], Any]]) -> None:
        _resolve(results)
        self._execute()


def _begin(connection: sqlite3.Connection, *, patient: bool) -> None:
    """Begin a write transaction; only the thread may wait for another connection's."""
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if not patient or getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_BUSY:
            raise
        connection.execute(f"PRAGMA busy_timeout = {_BUSY}")
        try:
            connection.execute("BEGIN IMMEDIATE")
        finally:
            connection.execute("PRAGMA busy_timeout = 0")


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
    if "\\u0000" in text:  # SQLite's JSON functions cut a text at a NUL
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
    # Not strict, to save time at each callback: names and cells come from the same statement.
    return [dict(zip(names, cells)) for cells in msgspec.json.decode(packed)]  # noqa: B905


def _parted(statement: Statement, rows: Sequence[Cells]) -> tuple[list[Cells], list[Cells]]:
    """Split rows into those whose bytes are too large or not text for JSON, and all others."""
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
    """Return bytes as text if they are text without NUL: handlers get them decoded."""
    try:
        return body if b"\0" in body else body.decode()
    except UnicodeDecodeError:
        return body
