"""Helpers for the store's tests: values, a judge, and direct access to the rows."""

import itertools
import re
import shutil
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from receiver.model.errors import StoreUnavailable
from receiver.model.retry import DONE, Decision
from receiver.model.states import advance
from receiver.model.values import Error, Outcome, OutcomeKind, Output, Recipients, Status
from receiver.store.deliveries import (
    Claim,
    ClaimRequest,
    Claims,
    LostAttempt,
    Settlement,
    replay,
    retry,
)
from receiver.store.facade import Store
from receiver.store.inbox import (
    AcceptResult,
    CurrentState,
    IncomingOutcome,
    Transition,
    accept,
    accept_outcome,
)
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.predictions import (
    Job,
    NewPrediction,
    Progress,
    ProgressCause,
    SendMark,
    SubmitBudget,
)
from receiver.store.sqlite.engine import SQLiteStore
from receiver.store.statement import Transaction
from tests.patience import PATIENCE
from tests.postgres import Database, wait_for
from tests.sqlite import lay_out

Item = TypeVar("Item")
Result = TypeVar("Result")

NOW: Final = 1_750_000_000.0
TABLES: Final = (
    "predictions",
    "callbacks",
    "events",
    "deliveries",
    "attempts",
    "steps",
    "replays",
)


class Engine(ABC):
    """A store, and direct access to its rows."""

    store: Store

    def __init__(self) -> None:
        self.reports: list[StoreUnavailable | None] = []

    @abstractmethod
    def rows(self, sql: str, *params: Any) -> list[Any]: ...

    @abstractmethod
    def write(self, sql: str) -> None:
        """Change rows directly, not through the store."""

    def dump(self) -> dict[str, list[Any]]:
        """Return the rows of all tables, to compare them before and after."""
        return {table: sorted(self.rows(f"SELECT * FROM {table}"), key=repr) for table in TABLES}

    def column(self, name: str, prediction_id: str) -> Any:
        return self.rows(f"SELECT {name} FROM predictions WHERE id = ?", prediction_id)[0][0]


class SQLite(Engine):
    """The SQLite engine, with its file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        lay_out(path)
        self.path = path
        self.store: SQLiteStore = SQLiteStore(str(path), self.reports.append)

    def rows(self, sql: str, *params: Any) -> list[Any]:
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(sql, params).fetchall()

    def write(self, sql: str) -> None:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(sql)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Hold a read transaction, and so a snapshot of the database."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT * FROM predictions").fetchall()
            yield connection


class Postgres(Engine):
    """The PostgreSQL engine; the test sets the server's clock, by which PgQueuer finds due jobs."""

    def __init__(self, database: Database, pooler: str | None = None) -> None:
        super().__init__()
        self.database = database
        self.store: TimedStore = TimedStore(database, self.reports.append, pooler)

    def rows(self, sql: str, *params: Any) -> list[Any]:
        numbers = itertools.count(1)
        sql = re.sub(r"\?", lambda _: f"${next(numbers)}", sql)
        rows = self.database.rows(sql.replace("AS BLOB", "AS BYTEA"), *params)
        return rows if "AS BLOB" in sql else [tuple(map(_as_sqlite_has_it, row)) for row in rows]

    def write(self, sql: str) -> None:
        self.database.execute(f"SET search_path = receiver; {sql}")


def advisory_locks(database: Database) -> int:
    """Return how many are held in this database; others on the same server do not count."""
    [[count]] = database.rows(
        "SELECT count(*)::int FROM pg_locks WHERE locktype = 'advisory' AND database = "
        "(SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return int(count)


def _as_sqlite_has_it(value: Any) -> Any:
    """Return bytes that are valid text as text, as SQLite stores them."""
    if not isinstance(value, bytes) or b"\0" in value:
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


WITH_CLOCK: Final = "clock, receiver, pg_catalog"
"""The search path in which the test's now() precedes the server's."""
_CLOCK: Final = (
    "CREATE SCHEMA clock",
    "CREATE TABLE clock.hands (at DOUBLE PRECISION)",
    f"INSERT INTO clock.hands VALUES ({NOW})",
    """CREATE FUNCTION clock.now() RETURNS TIMESTAMPTZ STABLE LANGUAGE sql
       AS 'SELECT to_timestamp(at) FROM clock.hands'""",
)


_TIMES: Final[dict[Any, Callable[[Any], float]]] = {
    accept: lambda arrival: arrival.at,
    retry: itemgetter(1),
    replay: itemgetter(2),
}
"""For each of these transactions, the function that returns the time in its item."""


class TimedStore(PostgresStore):
    """A store that sets the server's clock to the time in each call."""

    def __init__(
        self,
        database: Database,
        report: Callable[[StoreUnavailable | None], None],
        pooler: str | None = None,
    ) -> None:
        url, jobs = pooler or database.url, PgQueuerJobs()
        super().__init__(url, report, jobs, access=database.made)
        self._database = database

    async def connect(self, **settings: str) -> Any:
        return await super().connect(search_path=WITH_CLOCK, **settings)

    async def start(self) -> None:
        self._database.execute(*_CLOCK)
        await super().start()

    async def _at(self, now: float) -> None:
        # Slightly earlier: for PgQueuer a job is due after its time, not at it.
        await self._writer.write("clock", self._set, now - 0.0001)

    @staticmethod
    async def _set(connection: Any, items: Sequence[float]) -> Sequence[None]:
        await connection.execute("UPDATE clock.hands SET at = $1", items[-1])
        return [None] * len(items)

    async def write(self, transaction: Transaction[Item, Result], item: Item) -> Result:
        time: Callable[[Any], float] | None = _TIMES.get(transaction)
        if time is not None:
            await self._at(time(item))
        return await super().write(transaction, item)

    async def claim(self, wanted: ClaimRequest) -> Claims:
        await self._at(wanted.now + 0.0001)
        return await super().claim(wanted)

    async def settle(self, settlement: Settlement) -> bool:
        await self._at(settlement.ended_at)
        return await super().settle(settlement)

    async def release(
        self, owner: str, now: float, only: tuple[str, ...] = ()
    ) -> list[LostAttempt]:
        await self._at(now)
        return await super().release(owner, now, only)

    def renew(self, owner: str, delivery_ids: list[str], lease_until: float) -> None:
        async def renew() -> None:
            connection = await self.connect()
            await self._queue.renew_on(connection, owner, delivery_ids, lease_until)
            await connection.close()

        wait_for(renew())  # at once; the real store leaves it to a thread

    async def reclaim(self, owner: str, now: float) -> list[LostAttempt]:
        await self._at(now)
        return await super().reclaim(owner, now)


def dump(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        return {
            table: sorted(connection.execute(f"SELECT * FROM {table}").fetchall(), key=repr)
            for table in TABLES
        }


def copy(path: Path, target: Path) -> None:
    """Copy the file and its log as they are now, as a killed process would leave them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # The log first: a checkpoint in between may move all of it to the file, and truncate it.
    log = path.with_name(f"{path.name}-wal")
    size = None
    while log.exists() and size != log.stat().st_size:  # or truncate it during the copy
        size = log.stat().st_size
        shutil.copyfile(log, target.with_name(f"{target.name}-wal"))
    shutil.copyfile(path, target)


class Watched(sqlite3.Connection):
    """A connection that calls `before` with each statement of the writer."""

    before: Callable[[str], None]

    def execute(self, sql: str, params: Any = (), /) -> sqlite3.Cursor:
        self._tell(sql)
        return super().execute(sql, params)

    def executemany(self, sql: str, params: Any, /) -> sqlite3.Cursor:
        self._tell(sql)
        return super().executemany(sql, params)

    def _tell(self, sql: str) -> None:
        """Report a statement of the writer: in its thread, or in a transaction in the loop's."""
        is_writer = threading.current_thread().name == "receiver-writer"
        if is_writer or self.in_transaction or sql == "BEGIN IMMEDIATE":
            self.before(sql)


class Watch:
    """A hook before the writer's statements, which can count, delay or break them."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.before: Callable[[str], None] = lambda _sql: None
        self._may_begin = threading.Event()
        self._may_begin.set()
        self._held = threading.Event()

    @property
    def commits(self) -> int:
        return self.statements.count("COMMIT")

    def hear(self, sql: str) -> None:
        self.statements.append(sql)
        if sql == "BEGIN IMMEDIATE":
            self._held.set()
            assert self._may_begin.wait(PATIENCE)
        self.before(sql)

    @contextmanager
    def busy(self, store: Store) -> Iterator[None]:
        """Hold the writer in a transaction, so that all calls made meanwhile form one batch."""
        self._held.clear()
        self._may_begin.clear()
        store.renew("nobody", [], NOW)
        assert self._held.wait(PATIENCE)
        try:
            yield
        finally:
            self._may_begin.set()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Watch the connections of every store that is opened from now on."""
    watch = Watch()
    connect = sqlite3.connect

    def watched(path: str, **given: Any) -> Watched:
        connection: Watched = connect(path, factory=Watched, **given)
        connection.before = watch.hear
        return connection

    monkeypatch.setattr(sqlite3, "connect", watched)
    return watch


def pred(number: int) -> str:
    return f"pred_{number:032d}"


def new(number: int, **given: Any) -> NewPrediction:
    return NewPrediction(
        **{
            "id": pred(number),
            "provider": "fal",
            "model": "fal-ai/flux",
            "mode": "queue",
            "input": {"prompt": "a cat"},
            "metadata": {},
            "created_at": NOW,
            **given,
        }
    )


def slots(**given: Any) -> SubmitBudget:
    return SubmitBudget(
        **{
            "provider": "fal",
            "now": NOW,
            "most": 100,
            "max_in_flight": None,
            "per_minute": None,
            "hold_until": NOW + 90,
            "timeout": 3600.0,
            **given,
        }
    )


def sent(job: Job) -> SendMark:
    return SendMark(id=job.ticket.id, submits=job.submits, now=NOW, hold_until=NOW + 90)


def judge(recipients: Recipients) -> Callable[[CurrentState, IncomingOutcome], Transition]:
    """Return a judge that decides as the inbox does, with these recipients."""

    def rule(known: CurrentState, arrival: IncomingOutcome) -> Transition:
        verdict, status, reason = advance(known.status, known.provider_id, arrival.outcome)
        if verdict != "accepted":
            return Transition(verdict=verdict, status=status, reason=reason)
        return Transition(
            verdict=verdict,
            status=status,
            reason=reason,
            event_type=f"prediction.{status}",  # type: ignore[arg-type]
            recipients=recipients,
        )

    return rule


def outcome(kind: OutcomeKind, **given: Any) -> Outcome:
    more: dict[str, Any] = {}
    if kind == "succeeded":
        more["output"] = [Output(url="https://files.example/cat.png")]
    if kind in {"failed", "canceled"}:
        code = "canceled" if kind == "canceled" else "provider_error"
        more["error"] = Error(code=code, message="no luck")  # type: ignore[arg-type]
    return Outcome(**{"kind": kind, **more, **given})


def arrival(number: int, kind: OutcomeKind = "succeeded", **given: Any) -> IncomingOutcome:
    of_outcome = {
        name: given.pop(name) for name in ("provider_id", "also_known_as") if name in given
    }
    recipients = Recipients(tuple(given.pop("handlers", ())), given.pop("after", {}))
    return IncomingOutcome(
        **{
            "prediction_id": pred(number),
            "provider": "fal",
            "channel": "webhook",
            "outcome": outcome(kind, **of_outcome),
            "at": NOW + 10,
            "judge": judge(recipients),
            "headers": '[["host","here"]]',
            "body": b'{"status":"%s"}' % kind.encode(),
            **given,
        }
    )


def progress(number: int, cause: ProgressCause, due_at: float, **given: Any) -> Progress:
    return Progress(**{"id": pred(number), "cause": cause, "due_at": due_at, "submits": 1, **given})


def wanted(handler: str = "greet", **given: Any) -> ClaimRequest:
    return ClaimRequest(
        **{
            "handler": handler,
            "owner": "me",
            "most": 10,
            "now": NOW + 20,
            "lease_until": NOW + 50,
            **given,
        }
    )


def settlement(claim: Claim, decision: Decision = DONE, **given: Any) -> Settlement:
    return Settlement(
        **{
            "id": claim.id,
            "owner": "me",
            "number": claim.number,
            "decision": decision,
            "result": "done" if decision is DONE else "error",
            "started_at": NOW + 20,
            "ended_at": NOW + 21,
            **given,
        }
    )


AGAIN: Final = Decision(state="pending", delay=30.0, reason="no luck")
GIVEN_UP: Final = Decision(state="dead", reason="no luck at all")


async def submitting(store: Store, number: int, **given: Any) -> None:
    await store.predictions.create(new(number, **given))
    begun = await store.predictions.begin_submits(slots(provider=given.get("provider", "fal")))
    for job in begun.jobs:
        assert await store.predictions.mark_sent(sent(job))


async def processing(store: Store, number: int, provider_id: str | None = "req-1") -> None:
    await submitting(store, number)
    await store.predictions.progress(
        progress(number, "accepted", NOW + 30, provider_id=provider_id)
    )


async def unconfirmed(store: Store, number: int) -> None:
    await submitting(store, number)
    await store.predictions.progress(progress(number, "ambiguous", NOW + 30))


async def ended(store: Store, number: int, *handlers: str, **given: Any) -> AcceptResult:
    await store.predictions.create(new(number))
    return await accept_outcome(store, arrival(number, handlers=handlers, **given))


async def claimed(store: Store, number: int = 1, handler: str = "greet") -> Claim:
    await ended(store, number, handler)
    [claim] = (await store.claim(wanted(handler))).claims
    return claim


async def stand(store: Store, number: int, status: Status) -> None:
    """Create a prediction, and bring it to a status by regular transitions."""
    match status:
        case Status.QUEUED:
            await store.predictions.create(new(number))
        case Status.SUBMITTING:
            await submitting(store, number)
        case Status.PROCESSING:
            await processing(store, number, provider_id=f"req-{number}")
        case Status.UNCONFIRMED:
            await unconfirmed(store, number)
        case Status.SUCCEEDED:
            await ended(store, number)
        case Status.FAILED:
            await ended(store, number, kind="failed")
        case Status.CANCELED:
            await ended(store, number, kind="canceled")
