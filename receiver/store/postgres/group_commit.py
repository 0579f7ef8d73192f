"""Group commit for PostgreSQL: all waiting writes of one operation are committed together.

All the items that wait for one operation form one transaction, and each caller gets its result
after the commit. A few connections take turns: one batch is prepared while another reaches the
disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import asyncpg

from receiver.model.errors import StoreUnavailable

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
else:
    Connection: TypeAlias = asyncpg.Connection

Item = TypeVar("Item")
Result = TypeVar("Result")

Work: TypeAlias = Callable[[Connection, Sequence[Item]], Awaitable[Sequence[Result]]]
"""Handles all waiting items, inside a transaction if atomic; returns one result per item."""

BEGIN: Final = "BEGIN"
_LARGEST_BATCH: Final = 500
_TRIES: Final = 6
_PAUSE: Final = 0.01
"""Most seconds before the first retry of a transaction that collided with another."""
_FROZEN_FOR: Final = 5.0
"""Seconds after which a session that has prepared a statement and not run it counts as frozen."""
# The server counts it as active, so its idle_in_transaction_session_timeout never applies.
_END_FROZEN: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND usename = current_user
  AND application_name = current_setting('application_name')
  AND state = 'active' AND wait_event = 'ClientRead'
  AND state_change < clock_timestamp() - make_interval(secs => $1)
"""

# Errors in values; all others are the server's. Missing tables and rights count as the server's, as
# an administrator may bring them back.
_FAULTS: Final = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,  # such as a text that is too long for an index
    TypeError,
    ValueError,
)
_COLLISIONS: Final = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
# asyncpg raises InternalClientError, too, if the server ends a connection just as it is used.
_TROUBLE: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)


def is_trouble(error: BaseException) -> bool:
    """Return whether an error means that the server is away or takes no writes."""
    # That of an expired certificate is a ValueError too, and so is that of a missing file of
    # certificates, which may be about to be replaced.
    if isinstance(error, (OSError, asyncpg.exceptions.ClientConfigurationError)):
        return True
    return isinstance(error, _TROUBLE) and not isinstance(error, _FAULTS)


class _Batch:
    """The items that wait for one piece of work, which is a transaction or several statements."""

    def __init__(self, key: Hashable, work: Work[Any, Any], *, is_atomic: bool) -> None:
        self.key = key
        self.work = work
        self.is_atomic = is_atomic
        self.items: list[Any] = []
        self._futures: list[asyncio.Future[Any]] = []

    def add(self, item: Any, future: asyncio.Future[Any]) -> None:
        self.items.append(item)
        self._futures.append(future)

    def one_by_one(self) -> list[_Batch]:
        batches = [_Batch(self.key, self.work, is_atomic=self.is_atomic) for _ in self.items]
        for batch, item, future in zip(batches, self.items, self._futures, strict=True):
            batch.add(item, future)
        return batches

    def check(self, results: Sequence[Any]) -> None:
        """Raise unless there is one result per item, while the transaction can be rolled back."""
        if len(results) != len(self.items):
            raise RuntimeError(f"{len(results)} results for {len(self.items)} items")

    def answer(self, results: Sequence[Any]) -> None:
        for future, result in zip(self._futures, results, strict=True):
            if not future.done():
                future.set_result(result)

    def refuse(self, error: Exception) -> None:
        for future in self._futures:
            if not future.done():
                future.set_exception(error)


class Committer:
    """Owns `size` connections that write; `report` is called when writing fails or works again.

    `committed` is called after every commit, with the number of its writes. `begin` returns the
    statement that begins a transaction. Connections unused for `idle` seconds are closed.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        report: Callable[[StoreUnavailable | None], None],
        size: int,
        *,
        committed: Callable[[int], None] = lambda _size: None,
        begin: Callable[[], str] = lambda: BEGIN,
        idle: float | None = None,
    ) -> None:
        self._connect = connect
        self._report = report
        self._size = size
        self._committed = committed
        self._begin = begin
        self._idle = idle
        self._queue: asyncio.Queue[_Batch | None] = asyncio.Queue()
        self._open: dict[Hashable, _Batch] = {}
        """The batches that still take items, by key."""
        self._tasks: list[asyncio.Task[None]] = []
        self._broken = False
        self._closed = False

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run()) for _ in range(self._size)]

    async def stop(self) -> None:
        """Commit waiting writes, then stop."""
        self._closed = True
        for _ in self._tasks:
            self._queue.put_nowait(None)
        await asyncio.gather(*self._tasks)

    async def write(
        self, key: Hashable, work: Work[Item, Result], item: Item, *, is_atomic: bool = True
    ) -> Result:
        """Do `work` for `item`, together with all items of that key; return after the commit.

        Work that is not atomic is no transaction: each of its statements is committed by itself.
        """
        if self._closed:
            raise StoreUnavailable("the database is closed")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        batch = self._open.get(key)
        if batch is None:
            batch = self._open[key] = _Batch(key, work, is_atomic=is_atomic)
            self._queue.put_nowait(batch)
        batch.add(item, future)
        if len(batch.items) == _LARGEST_BATCH:
            del self._open[key]
        return await future

    async def _run(self) -> None:
        connection: Connection | None = None
        while True:
            try:
                async with asyncio.timeout(None if connection is None else self._idle):
                    batch = await self._queue.get()
            except TimeoutError:
                await _close(connection)
                connection = None
                continue
            if batch is None:
                break
            if self._open.get(batch.key) is batch:
                del self._open[batch.key]
            connection = await self._commit(connection, batch)
        await _close(connection)

    async def _commit(self, connection: Connection | None, batch: _Batch) -> Connection | None:
        """Commit a batch, on a new connection if need be; return the connection for the next."""
        last: Exception | None = None
        for number in range(_TRIES):
            attempt = _Attempt(connection, self._begin())
            try:
                results = await attempt.run(self._connect, batch)
            except _COLLISIONS as error:
                connection, last = attempt.connection, error
                await asyncio.sleep(_PAUSE * 2**number * random.random())  # noqa: S311
                continue
            except Exception as error:  # noqa: BLE001 - the callers that wait must get it
                if not is_trouble(error):
                    return await self._blame(attempt.connection, batch, error)
                attempt.drop()
                connection, last = None, error
                if await self._end_frozen(error) or attempt.may_repeat:
                    continue
                break
            self._report_change(None)
            if batch.is_atomic:
                self._committed(len(batch.items))
            batch.answer(results)
            return attempt.connection
        unavailable = StoreUnavailable(f"the database does not take writes: {_reason(last)}")
        self._report_change(unavailable)
        batch.refuse(unavailable)
        return connection

    async def _end_frozen(self, error: Exception) -> bool:
        """End the sessions of frozen processes after a lock timeout; return whether any were."""
        if not isinstance(error, asyncpg.LockNotAvailableError):
            return False
        connection: Connection | None = None
        try:
            connection = await self._connect()
            return bool(await connection.fetch(_END_FROZEN, _FROZEN_FOR))
        except _TROUBLE:
            return False
        finally:
            await _close(connection)

    async def _blame(
        self, connection: Connection | None, batch: _Batch, error: Exception
    ) -> Connection | None:
        """Commit the items one by one, so that only the one with the error fails."""
        if len(batch.items) == 1:
            batch.refuse(error)
            return connection
        for single in batch.one_by_one():
            connection = await self._commit(connection, single)
        return connection

    def _report_change(self, trouble: StoreUnavailable | None) -> None:
        if self._broken == (trouble is None):
            self._broken = trouble is not None
            with contextlib.suppress(Exception):  # a failing report must not end the writing
                self._report(trouble)


class _Attempt:
    """One try of one batch."""

    def __init__(self, connection: Connection | None, begin: str) -> None:
        self.connection = connection
        self._used = connection is not None
        self._begin = begin
        self._committing = False

    @property
    def may_repeat(self) -> bool:
        """Whether an old connection turned out to be dead before any commit was under way."""
        return self._used and not self._committing

    async def run(
        self, connect: Callable[[], Awaitable[Connection]], batch: _Batch
    ) -> Sequence[Any]:
        if self.connection is None:
            self.connection = await connect()
        if not batch.is_atomic:
            return await self._work(self.connection, batch)
        async with in_transaction(self.connection, self._begin):
            results = await self._work(self.connection, batch)
            self._committing = True
        return results

    async def _work(self, connection: Connection, batch: _Batch) -> Sequence[Any]:
        results = await batch.work(connection, batch.items)
        batch.check(results)
        return results

    def drop(self) -> None:
        """Terminate a connection, which may be in any state."""
        if self.connection is not None:
            self.connection.terminate()


@contextlib.asynccontextmanager
async def in_transaction(connection: Connection, begin: str) -> AsyncIterator[None]:
    """Commit the statements run inside, or roll them back on an error."""
    try:
        await connection.execute(begin)
        yield
    except BaseException:
        with contextlib.suppress(*_TROUBLE):
            await connection.execute("ROLLBACK")
        raise
    await connection.execute("COMMIT")


async def _close(connection: Connection | None) -> None:
    if connection is not None:
        with contextlib.suppress(*_TROUBLE):
            await connection.close(timeout=1.0)


def _reason(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
