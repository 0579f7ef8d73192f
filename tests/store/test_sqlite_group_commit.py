"""Group commit on SQLite: waiting writes share a transaction, and an invalid one fails alone."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from receiver.model.errors import StoreUnavailable
from receiver.model.values import Outcome, Output, Shift
from receiver.store.facade import Store
from receiver.store.inbox import accept_outcome
from receiver.store.sqlite.group_commit import Writer
from receiver.store.statement import Run, Statement, Steps, Transaction, short
from tests.patience import PATIENCE
from tests.receiving import eventually
from tests.store.parts import NOW, SQLite, Watch, arrival, ended, new, pred, slots, wanted

pytestmark = pytest.mark.anyio


async def test_waiting_writes_share_one_transaction(store: Store, watch: Watch) -> None:
    for number in range(50):
        await store.predictions.create(new(number))
    before = watch.commits
    with watch.busy(store):
        waiting = asyncio.gather(
            *(accept_outcome(store, arrival(number)) for number in range(50)),
            *(store.predictions.create(new(number)) for number in range(50, 100)),
            store.predictions.begin_submits(slots()),
            store.try_write(NOW),
        )
        await asyncio.sleep(0)
    await waiting
    assert watch.commits - before == 2


async def test_batch_has_at_most_1000_writes(store: Store, watch: Watch) -> None:
    with watch.busy(store):
        waiting = asyncio.gather(*(store.try_write(NOW) for _ in range(2500)))
        await asyncio.sleep(0)
    await waiting
    assert watch.commits == 1 + 3


async def test_caller_gets_no_result_before_the_commit(
    engine: SQLite, store: Store, watch: Watch
) -> None:
    seen: list[bool] = []
    created = asyncio.create_task(store.predictions.create(new(1)))

    def look(sql: str) -> None:
        if sql == "COMMIT":
            seen.append(created.done())

    watch.before = look
    await created
    assert seen == [False]
    assert engine.rows("SELECT count(*) FROM predictions") == [(1,)]


async def test_invalid_item_fails_alone_in_a_mixed_batch(
    engine: SQLite, store: Store, watch: Watch
) -> None:
    with watch.busy(store):
        waiting = asyncio.gather(
            store.predictions.create(new(1)),
            store.predictions.create(new(2, mode="never")),
            store.predictions.create(new(3, input={"a": object()})),
            store.predictions.create(new(4)),
            store.try_write(NOW),
            return_exceptions=True,
        )
        await asyncio.sleep(0)
    one, two, three, four, probed = await waiting
    assert isinstance(two, sqlite3.IntegrityError)
    assert isinstance(three, TypeError)
    assert not isinstance(one, BaseException)
    assert not isinstance(four, BaseException)
    assert probed is None
    assert engine.rows("SELECT id FROM predictions ORDER BY id") == [(pred(1),), (pred(4),)]
    assert engine.reports == []


async def test_clock_step_moves_only_times_written_before_it(
    engine: SQLite, store: Store, watch: Watch
) -> None:
    for number in range(2):
        await store.predictions.create(new(number))
    with watch.busy(store):
        waiting = asyncio.gather(
            accept_outcome(store, arrival(0, handlers=["greet"], at=NOW)),
            store.shift(Shift(due=3600.0, deadline=3600.0), "me", NOW),
            accept_outcome(store, arrival(1, handlers=["greet"], at=NOW + 3600)),
        )
        await asyncio.sleep(0)
    await waiting
    assert watch.commits == 4  # two creates, the write of `busy`, and the batch
    assert engine.rows("SELECT due_at FROM deliveries") == [(NOW + 3600,)] * 2


async def test_large_events_are_claimed_in_several_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect

    def bounded(path: str, **given: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(path, **given)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)  # instead of a billion
        return connection

    engine = SQLite(tmp_path / "receiver.db")
    monkeypatch.setattr(sqlite3, "connect", bounded)
    await engine.store.start()
    for number in range(12):
        await ended(engine.store, number, "greet", outcome=large(150_000))
    sizes = []
    for _ in range(3):
        found = await engine.store.claim(wanted(most=16))
        sizes.append((len(found.claims), found.next_due))
    assert sizes == [(4, NOW + 20), (4, NOW + 20), (4, None)]
    await engine.store.stop()


def large(size: int) -> Outcome:
    return Outcome(kind="succeeded", output=[Output(url=f"https://x.example/{'x' * size}")])


async def test_cancelled_caller_does_not_affect_other_writes(engine: SQLite, watch: Watch) -> None:
    with watch.busy(engine.store):
        gone = asyncio.create_task(engine.store.predictions.create(new(1)))
        stays = asyncio.create_task(engine.store.predictions.create(new(2)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
    assert (await stays).is_new
    assert gone.cancelled()
    assert engine.rows("SELECT count(*) FROM predictions") == [(2,)]


def test_closed_event_loop_does_not_stop_the_writer(tmp_path: Path, watch: Watch) -> None:
    engine = SQLite(tmp_path / "receiver.db")
    engine.store.open()

    async def leave() -> None:
        waiting = asyncio.ensure_future(engine.store.predictions.create(new(1)))
        await asyncio.sleep(0)
        waiting.cancel()

    with watch.busy(engine.store):
        asyncio.run(leave())
    assert asyncio.run(engine.store.predictions.create(new(2))).is_new
    engine.store.close()


def test_close_runs_waiting_work_first(tmp_path: Path) -> None:
    connect = partial(
        sqlite3.connect, tmp_path / "w.db", isolation_level=None, check_same_thread=False
    )
    writer = Writer(connect, lambda _: None)
    done: list[int] = []
    busy, may_end = threading.Event(), threading.Event()

    def hold(items: Sequence[int]) -> Steps[Sequence[int]]:
        yield from ()
        busy.set()
        assert may_end.wait(PATIENCE)
        return items

    def note(items: Sequence[int]) -> Steps[Sequence[int]]:
        yield from ()
        done.extend(items)
        return items

    writer.start()
    writer.post(hold, 0)
    assert busy.wait(PATIENCE)
    writer.post(note, 1)
    closing = threading.Thread(target=writer.close)
    closing.start()
    until = time.monotonic() + PATIENCE
    while not writer._closed:  # noqa: SLF001 - nothing else shows that it closes
        assert time.monotonic() < until
    may_end.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert done == [1]


def test_close_commits_waiting_writes(tmp_path: Path, watch: Watch) -> None:
    engine = SQLite(tmp_path / "receiver.db")
    engine.store.open()

    async def last_words() -> None:
        with watch.busy(engine.store):
            waiting = asyncio.gather(*(engine.store.predictions.create(new(n)) for n in range(3)))
            await asyncio.sleep(0)
            closing = asyncio.get_running_loop().run_in_executor(None, engine.store.close)
        await closing
        await waiting

    asyncio.run(last_words())
    assert engine.rows("SELECT count(*) FROM predictions") == [(3,)]


Count: TypeAlias = Transaction[int, int]


def refusing(code: int, name: str) -> Count:
    """Return an operation that fails with an SQLite error if any item is above zero."""

    def operation(items: Sequence[int]) -> Steps[Sequence[int]]:
        yield from ()
        if any(items):
            error = sqlite3.OperationalError(name)
            error.sqlite_errorcode = code
            raise error
        return items

    return operation


@pytest.mark.parametrize(
    ("name", "unavailable"),
    [
        ("SQLITE_FULL", True),
        ("SQLITE_READONLY_DBMOVED", True),
        ("SQLITE_IOERR_FSYNC", True),
        ("SQLITE_BUSY_SNAPSHOT", True),
        ("SQLITE_CANTOPEN", True),
        ("SQLITE_CORRUPT", True),
        ("SQLITE_NOTADB", True),
        ("SQLITE_ERROR", False),
        ("SQLITE_CONSTRAINT", False),
        ("SQLITE_MISMATCH", False),
        ("SQLITE_TOOBIG", False),
    ],
)
async def test_disk_errors_are_distinguished_from_statement_errors(
    tmp_path: Path, name: str, *, unavailable: bool
) -> None:
    reports: list[StoreUnavailable | None] = []
    connect = partial(
        sqlite3.connect, tmp_path / "w.db", isolation_level=None, check_same_thread=False
    )
    writer = Writer(connect, reports.append)
    writer.start()
    operation = refusing(getattr(sqlite3, name), name)
    try:
        expected = StoreUnavailable if unavailable else sqlite3.OperationalError
        for _ in range(2):
            with pytest.raises(expected, match=name):
                await writer.write(operation, 1)
        assert await writer.write(operation, 0) == 0
    finally:
        writer.close()
    assert [report is None for report in reports] == ([False, True] if unavailable else [])


class Unclosable(sqlite3.Connection):
    def close(self) -> None:
        super().close()
        raise sqlite3.OperationalError("unable to close due to unfinalized statements")


async def test_connection_that_fails_to_close_is_replaced(tmp_path: Path) -> None:
    factories = [Unclosable, sqlite3.Connection]
    reports: list[StoreUnavailable | None] = []

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(
            tmp_path / "w.db",
            isolation_level=None,
            check_same_thread=False,
            factory=factories.pop(0),
        )

    writer = Writer(connect, reports.append)
    writer.start()
    operation = refusing(sqlite3.SQLITE_FULL, "SQLITE_FULL")
    with pytest.raises(StoreUnavailable):
        await writer.write(operation, 1)
    assert await writer.write(operation, 0) == 0
    writer.close()
    assert [report is None for report in reports] == [False, True]


class Slow(sqlite3.Connection):
    """Records which thread begins and commits; its COMMIT can wait, or fail as on a full disk."""

    ran: list[tuple[str, bool]]
    may_commit: threading.Event
    is_full: bool

    def execute(self, sql: str, params: Any = (), /) -> sqlite3.Cursor:
        if sql in {"BEGIN IMMEDIATE", "COMMIT"}:
            self.ran.append((sql, threading.current_thread() is threading.main_thread()))
        if sql == "COMMIT":
            assert self.may_commit.wait(PATIENCE)
            if self.is_full:
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
        return super().execute(sql, params)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[Writer, type[Slow]]]:
    class Connection(Slow):
        may_commit = threading.Event()
        is_full = False

    Connection.ran = []
    Connection.may_commit.set()
    writer = Writer(
        lambda: sqlite3.connect(
            tmp_path / "w.db", isolation_level=None, check_same_thread=False, factory=Connection
        ),
        lambda _: None,
    )
    writer.start()
    yield writer, Connection
    Connection.may_commit.set()
    writer.close()


@short()
def double(items: Sequence[int]) -> Steps[Sequence[int]]:
    yield from ()
    return [2 * item for item in items]


async def test_short_writes_run_on_the_event_loop_and_batch_during_a_commit(
    slow: tuple[Writer, type[Slow]],
) -> None:
    writer, connection = slow
    connection.may_commit.clear()
    first = [asyncio.create_task(writer.write(double, number)) for number in range(3)]
    await eventually(lambda: ("COMMIT", False) in connection.ran)  # the event loop is not blocked
    later = [asyncio.create_task(writer.write(double, number)) for number in range(3, 6)]
    later[2].cancel()
    await asyncio.sleep(0)
    assert not any(task.done() for task in (*first, *later[:2]))
    connection.may_commit.set()
    assert await asyncio.gather(*first, *later[:2]) == [0, 2, 4, 6, 8]
    assert connection.ran == 2 * [("BEGIN IMMEDIATE", True), ("COMMIT", False)]


async def test_failed_commit_is_rolled_back_and_the_next_write_succeeds(
    slow: tuple[Writer, type[Slow]], tmp_path: Path
) -> None:
    writer, connection = slow
    insert = Statement("INSERT INTO kept (n) VALUES (:n::int)")

    @short()
    def put(items: Sequence[int]) -> Steps[Sequence[None]]:
        for item in items:
            yield Run(insert, {"n": item})
        return [None] * len(items)

    with closing(sqlite3.connect(tmp_path / "w.db")) as beside:
        beside.execute("CREATE TABLE kept (n)")
        connection.is_full = True
        with pytest.raises(StoreUnavailable, match="full"):
            await writer.write(put, 1)
        connection.is_full = False
        await writer.write(put, 2)
        assert beside.execute("SELECT n FROM kept").fetchall() == [(2,)]


async def test_failing_short_write_fails_alone(slow: tuple[Writer, type[Slow]]) -> None:
    writer, _ = slow

    @short()
    def halve(items: Sequence[int]) -> Steps[Sequence[float]]:
        yield from ()
        return [1 / item for item in items]

    good, bad, other = await asyncio.gather(
        *(writer.write(halve, number) for number in (2, 0, 4)), return_exceptions=True
    )
    assert (good, type(bad), other) == (0.5, ZeroDivisionError, 0.25)


async def test_close_commits_short_writes_that_the_event_loop_has_run(
    slow: tuple[Writer, type[Slow]],
) -> None:
    writer, connection = slow
    connection.may_commit.clear()
    first = asyncio.create_task(writer.write(double, 1))
    await eventually(lambda: ("COMMIT", False) in connection.ran)
    later = asyncio.create_task(writer.write(double, 2))
    await asyncio.sleep(0)
    connection.may_commit.set()
    writer.close()
    assert [await first, await later] == [2, 4]
    with pytest.raises(StoreUnavailable, match="closed"):
        await writer.write(double, 3)
