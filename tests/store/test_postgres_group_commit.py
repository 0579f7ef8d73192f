"""Group commit on PostgreSQL: many writes, few transactions, and a result for each caller."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from operator import not_
from typing import Any, Final

import asyncpg
import pytest

from receiver.model.errors import StoreUnavailable
from receiver.store.postgres import group_commit
from receiver.store.postgres.group_commit import Committer, Connection, is_trouble
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.receiving import eventually

pytestmark = pytest.mark.anyio

_TABLE: Final = "CREATE TABLE public.kept (n BIGINT PRIMARY KEY, told BIGINT NOT NULL DEFAULT 0)"
_PUT: Final = "INSERT INTO public.kept (n) SELECT unnest($1::bigint[])"


class Counted(asyncpg.Connection):
    begun = 0

    async def execute(self, query: str, *args: Any, **given: Any) -> str:
        Counted.begun += query == "BEGIN"
        return await super().execute(query, *args, **given)


class Line:
    """A committer, with its reports and its connections."""

    def __init__(self, database: Database, size: int, **settings: str) -> None:
        self.database = database
        self.reports: list[StoreUnavailable | None] = []
        self.pids: list[int] = []
        self._settings = {"application_name": "receiver", **settings}
        self.committer = Committer(self._connect, self.reports.append, size)
        Counted.begun = 0

    async def _connect(self) -> Connection:
        connection: Connection = await asyncpg.connect(
            self.database.url, connection_class=Counted, server_settings=self._settings
        )
        self.pids.append(connection.get_server_pid())
        return connection

    async def put(self, number: Any) -> int:
        return await self.committer.write("put", put, number)

    def kept(self) -> list[int]:
        return [n for (n,) in self.database.rows("SELECT n FROM public.kept ORDER BY n")]


async def put(cx: Connection, items: Sequence[int]) -> Sequence[int]:
    await cx.execute(_PUT, items)
    return [item * 10 for item in items]


@pytest.fixture
async def scratch(database: Database) -> AsyncIterator[Database]:
    database.execute(_TABLE)
    yield database
    database.execute("SET lock_timeout = '5s'", "DROP TABLE public.kept")


@asynccontextmanager
async def committing(database: Database, size: int = 1, **settings: str) -> AsyncIterator[Line]:
    line = Line(database, size, **settings)
    line.committer.start()
    yield line
    async with asyncio.timeout(PATIENCE):
        await line.committer.stop()


def connections(line: Line) -> list[tuple[int, str, str]]:
    """Return a committer's open connections, with the state and last statement of each."""
    return line.database.rows(
        "SELECT pid, state, query FROM pg_stat_activity WHERE pid = ANY($1)", line.pids
    )


async def until(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds; the server notices a lost client only after a moment."""
    ends = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)
    return found


def work_then(
    reached: asyncio.Event, may_go_on: asyncio.Event
) -> Callable[[Connection, Sequence[int]], Awaitable[Sequence[int]]]:
    """Return an operation that writes half of its items, and the rest after `may_go_on`."""

    async def work(cx: Connection, items: Sequence[int]) -> Sequence[int]:
        half = len(items) // 2
        await cx.execute(_PUT, items[:half])
        reached.set()
        await may_go_on.wait()
        await cx.execute(_PUT, items[half:])
        return items

    return work


async def test_concurrent_writes_share_one_transaction(scratch: Database) -> None:
    async with committing(scratch, 2) as line:
        results = await asyncio.gather(*(line.put(number) for number in range(200)))
        assert Counted.begun == 1
    assert results == [number * 10 for number in range(200)]
    assert line.kept() == list(range(200))
    assert line.reports == []


async def test_batch_has_at_most_500_writes(scratch: Database) -> None:
    sizes: list[int] = []

    async def sized(cx: Connection, items: Sequence[int]) -> Sequence[int]:
        sizes.append(len(items))
        return await put(cx, items)

    async with committing(scratch, 2) as line:
        writes = (line.committer.write("put", sized, number) for number in range(1200))
        assert await asyncio.gather(*writes) == [number * 10 for number in range(1200)]
    assert sorted(sizes) == [200, 500, 500]
    assert line.kept() == list(range(1200))


async def test_writes_during_a_transaction_form_the_next_one(scratch: Database) -> None:
    reached, may_go_on = asyncio.Event(), asyncio.Event()
    async with committing(scratch) as line:
        work = work_then(reached, may_go_on)
        first = asyncio.create_task(line.committer.write("slow", work, 1))
        await reached.wait()
        meanwhile = [asyncio.create_task(line.put(number)) for number in range(10, 60)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in meanwhile)
        may_go_on.set()
        await asyncio.gather(first, *meanwhile)
        assert Counted.begun == 2


async def test_different_operations_do_not_share_a_transaction(scratch: Database) -> None:
    async with committing(scratch) as line:
        first = line.committer.write("one", put, 1)
        second = line.committer.write("two", put, 2)
        assert list(await asyncio.gather(first, second)) == [10, 20]
        assert Counted.begun == 2


async def test_second_connection_writes_while_the_first_is_busy(scratch: Database) -> None:
    reached, may_go_on = asyncio.Event(), asyncio.Event()
    async with committing(scratch, 2) as line:
        slow = asyncio.create_task(line.committer.write("slow", work_then(reached, may_go_on), 1))
        await reached.wait()
        assert await line.put(2) == 20  # while the first write is still running
        assert line.kept() == [2]
        may_go_on.set()
        await slow
        assert len(line.pids) == 2


@pytest.mark.parametrize(
    ("bad", "error"),
    [(0, asyncpg.UniqueViolationError), ("x", asyncpg.DataError), (2**70, asyncpg.DataError)],
)
async def test_invalid_item_fails_alone(
    scratch: Database, bad: Any, error: type[Exception]
) -> None:
    async with committing(scratch) as line:
        await line.put(0)
        results = await asyncio.gather(
            *(line.put(item) for item in [1, 2, bad, 3, 4]), return_exceptions=True
        )
        assert isinstance(results.pop(2), error)
        assert results == [10, 20, 30, 40]
        assert await line.put(5) == 50
        assert len(line.pids) == 1
    assert line.kept() == [0, 1, 2, 3, 4, 5]
    assert line.reports == []


async def test_deadlocked_transactions_are_retried_and_both_succeed(scratch: Database) -> None:
    scratch.execute("INSERT INTO public.kept (n) VALUES (1), (2)")
    met = asyncio.Barrier(2)
    tries = 0

    async def tell(cx: Connection, items: Sequence[tuple[int, int]]) -> Sequence[int]:
        nonlocal tries
        tries += 1
        is_first = tries <= 2
        for row in items[0]:
            await cx.execute("UPDATE public.kept SET told = told + 1 WHERE n = $1", row)
            if is_first and row == items[0][0]:
                await met.wait()
        return [tries]

    async with (
        committing(scratch, deadlock_timeout="20ms") as here,
        committing(scratch, deadlock_timeout="20ms") as there,
    ):
        await asyncio.gather(
            here.committer.write("tell", tell, (1, 2)), there.committer.write("tell", tell, (2, 1))
        )
    assert tries >= 3
    assert scratch.rows("SELECT told FROM public.kept") == [(2,), (2,)]
    assert here.reports == there.reports == []


async def test_repeated_serialization_failure_is_given_up(scratch: Database) -> None:
    tries = 0

    async def collide(cx: Connection, items: Sequence[int]) -> Sequence[int]:
        nonlocal tries
        tries += 1
        await put(cx, items)
        await cx.execute("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")
        raise AssertionError

    async with committing(scratch) as line:
        with pytest.raises(StoreUnavailable, match="SerializationError: again"):
            await line.committer.write("collide", collide, 1)
        assert 2 <= tries <= 10
        assert await line.put(2) == 20
    assert line.kept() == [2]
    assert [report is None for report in line.reports] == [False, True]


async def test_session_of_a_frozen_process_is_ended_to_free_its_locks(
    scratch: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's idle timeout does not apply between preparing a statement and running it."""
    monkeypatch.setattr(group_commit, "_FROZEN_FOR", 0.1)
    async with committing(scratch, lock_timeout="300ms") as line:
        named = {"application_name": "receiver"}
        frozen = await asyncpg.connect(scratch.url, server_settings=named)
        await frozen.execute("BEGIN")
        await frozen.execute(_PUT, [1])
        await frozen.prepare("SELECT $1::int")  # and never runs it
        assert await line.put(1) == 10
        with pytest.raises(Exception) as found:  # noqa: PT011 - asyncpg raises several types
            await frozen.execute("COMMIT")
        assert is_trouble(found.value)
        frozen.terminate()
    assert (line.kept(), line.reports) == ([1], [])


async def test_connection_lost_while_idle_is_replaced_without_an_error(scratch: Database) -> None:
    async with committing(scratch, 2) as line:
        for number in range(3):
            await line.put(number)
        assert scratch.terminate() >= 1
        await eventually(partial(connections, line), not_)
        results = await asyncio.gather(*(line.put(number) for number in range(3, 8)))
        assert results == [30, 40, 50, 60, 70]
    assert line.kept() == list(range(8))
    assert line.reports == []


async def test_reused_connection_lost_in_a_transaction_is_replaced_and_retried(
    scratch: Database,
) -> None:
    reached, may_go_on = asyncio.Event(), asyncio.Event()
    work = work_then(reached, may_go_on)
    async with committing(scratch) as line:
        await line.put(0)
        writes = [
            asyncio.create_task(line.committer.write("slow", work, number)) for number in (1, 2)
        ]
        await reached.wait()
        assert scratch.terminate("state = 'idle in transaction'") == 1
        may_go_on.set()
        assert await asyncio.gather(*writes) == [1, 2]
        assert len(line.pids) == 2
    assert line.kept() == [0, 1, 2]
    assert line.reports == []


async def test_new_connection_lost_in_a_transaction_is_rolled_back(
    scratch: Database,
) -> None:
    reached, may_go_on = asyncio.Event(), asyncio.Event()
    work = work_then(reached, may_go_on)
    async with committing(scratch) as line:
        writes = [
            asyncio.create_task(line.committer.write("slow", work, number)) for number in (1, 2)
        ]
        await reached.wait()
        assert scratch.terminate("state = 'idle in transaction'") == 1
        may_go_on.set()
        for result in await asyncio.gather(*writes, return_exceptions=True):
            assert isinstance(result, StoreUnavailable)
        assert line.kept() == []
        assert list(await asyncio.gather(line.put(1), line.put(2))) == [10, 20]
    assert line.kept() == [1, 2]
    assert [report is None for report in line.reports] == [False, True]


async def test_unanswered_commit_is_not_retried(scratch: Database) -> None:
    """It may have succeeded: only the caller can know whether to write again."""
    held = await asyncpg.connect(scratch.url)
    await held.execute("SELECT pg_advisory_lock(7)")
    works = 0

    async def counted(cx: Connection, items: Sequence[int]) -> Sequence[int]:
        nonlocal works
        works += 1
        return await put(cx, items)

    async with committing(scratch) as line:
        await line.put(0)
        with scratch.at_commit("PERFORM pg_advisory_xact_lock_shared(7)", "public.kept"):
            writing = asyncio.create_task(line.committer.write("once", counted, 1))
            await until(lambda: scratch.terminate("wait_event = 'advisory'"))
            with pytest.raises(StoreUnavailable):
                await writing
            await held.close()
        assert works == 1
        assert line.kept() == [0]
        await line.put(1)
    assert [report is None for report in line.reports] == [False, True]


async def test_server_outage_and_recovery_are_each_reported_once(
    scratch: Database,
) -> None:
    async with committing(scratch, 2) as line:
        await line.put(0)
        with scratch.refusing():
            for number in (1, 2, 3):
                with pytest.raises(StoreUnavailable, match="the database does not take writes"):
                    await line.put(number)
        for number in (4, 5, 6):
            await line.put(number)
    assert line.kept() == [0, 4, 5, 6]
    assert [report is None for report in line.reports] == [False, True]


async def test_failing_report_does_not_stop_writes(scratch: Database) -> None:
    async with committing(scratch) as line:

        def fail(_: object) -> None:
            raise RuntimeError

        line.committer._report = fail  # noqa: SLF001 - stands for a faulty report
        with scratch.refusing(), pytest.raises(StoreUnavailable):
            await line.put(1)
        assert await line.put(2) == 20


async def test_close_commits_waiting_writes(scratch: Database) -> None:
    async with committing(scratch) as line:
        writes = [asyncio.create_task(line.put(number)) for number in range(700)]
        await asyncio.sleep(0)
    assert line.kept() == list(range(700))
    assert await asyncio.gather(*writes) == [number * 10 for number in range(700)]
    await eventually(partial(connections, line), not_)


async def test_write_after_close_is_rejected(scratch: Database) -> None:
    async with committing(scratch) as line:
        await line.put(1)
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(line.put(2), PATIENCE)
    assert line.kept() == [1]


async def test_cancelled_caller_does_not_affect_other_writes(scratch: Database) -> None:
    reached, may_go_on = asyncio.Event(), asyncio.Event()
    work = work_then(reached, may_go_on)
    async with committing(scratch) as line:
        writes = [
            asyncio.create_task(line.committer.write("slow", work, number)) for number in range(4)
        ]
        await reached.wait()
        waiting = [asyncio.create_task(line.put(number)) for number in range(10, 13)]
        await asyncio.sleep(0)
        writes[1].cancel()
        waiting[0].cancel()
        may_go_on.set()
        results = await asyncio.gather(*writes, *waiting, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert isinstance(results[4], asyncio.CancelledError)
        assert [results[index] for index in (0, 2, 3, 5, 6)] == [0, 2, 3, 110, 120]
        assert await line.put(99) == 990
    assert set(line.kept()) >= {0, 2, 3, 11, 12, 99}


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (asyncpg.UniqueViolationError("x"), False),
        (asyncpg.DataError("x"), False),
        (TypeError("x"), False),
        (ValueError("x"), False),
        (asyncpg.ProgramLimitExceededError("x"), False),
        (asyncpg.DiskFullError("x"), True),
        (asyncpg.ReadOnlySQLTransactionError("x"), True),
        (asyncpg.TooManyConnectionsError("x"), True),
        (asyncpg.AdminShutdownError("x"), True),
        (asyncpg.InsufficientPrivilegeError("x"), True),
        (asyncpg.UndefinedTableError("x"), True),
        (asyncpg.ConnectionDoesNotExistError("x"), True),
        (asyncpg.InterfaceError("x"), True),
        (asyncpg.InternalClientError("x"), True),
        (ConnectionResetError("x"), True),
        (TimeoutError("x"), True),
        (asyncpg.exceptions.ClientConfigurationError("the root certificate is missing"), True),
        (ssl.SSLCertVerificationError(1, "certificate has expired"), True),
        (RuntimeError("x"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_server_errors_are_distinguished_from_errors_in_values(
    error: Exception, trouble: bool
) -> None:
    assert is_trouble(error) == trouble
