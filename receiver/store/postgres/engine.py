"""The store on PostgreSQL: any number of processes on any number of machines.

The queue is written in the same transactions as the rows (`claims`, `queue`), and processes inform
each other of their commits by NOTIFY (`notices`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import asyncpg
import structlog

from receiver.model.errors import StoreUnavailable, StoreUnusable
from receiver.model.tasks import Wakeups, repeat
from receiver.model.values import Shift
from receiver.store import deliveries
from receiver.store.deliveries import (
    ClaimRequest,
    Claims,
    LostAttempt,
    Settlement,
)
from receiver.store.due import sql as due_sql
from receiver.store.engine import AttemptName, each
from receiver.store.facade import Housekeeping, Store, shift_all
from receiver.store.facade import sql as facade_sql
from receiver.store.inbox import IncomingOutcome
from receiver.store.postgres import address, migrating
from receiver.store.postgres.claims import DeliveryQueue
from receiver.store.postgres.clock import CLOCK, ServerClock
from receiver.store.postgres.group_commit import Committer, Connection, in_transaction, is_trouble
from receiver.store.postgres.notices import TOPICS, Notices
from receiver.store.postgres.sessions import (
    CONNECT_TIMEOUT,
    DATABASE_URL,
    MIGRATE_URL,
    Access,
    Sessions,
    close,
)
from receiver.store.postgres.steps import StepRunner, columns, notify, values
from receiver.store.statement import (
    Cells,
    Row,
    Run,
    Statement,
    Steps,
    Transaction,
)

if TYPE_CHECKING:  # PgQueuer takes long to import, and is not needed to accept
    from receiver.store.postgres.queue import PgQueuerJobs

log = structlog.get_logger("receiver")

Item = TypeVar("Item")
Result = TypeVar("Result")

_FIXED: Final = 4
"""Connections besides those of writers and readers: to claim, renew, listen and keep house."""
_WRITERS: Final = 2
_IDLE: Final = 60.0
"""Seconds after which a function closes a connection that it does not use."""
_GLANCE: Final = 1.0
"""Seconds between two polls for commits of other processes, if no NOTIFY comes."""
_ONE_STEP: Final = 30.0
"""Seconds within which all processes have seen the same step of the clock."""
_LARGEST_SHARED: Final = 64 * 1024
"""Most bytes of a callback that shares a transaction with others."""
_LAST_PLACE: Final = Statement(
    "SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS seq FROM receiver.changes_seq_seq"
)
_WRITING: Final = Statement("""
SELECT virtualtransaction FROM pg_locks
WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
  AND database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
  AND relation = to_regclass('receiver.changes')
""")
_USUAL_LIFE: Final = 300.0
_POOLED: Final = (
    "the database is behind a pooler in transaction mode: what other processes commit is not "
    "heard of but looked for, each second; a direct URL or a pooler in session mode is faster"
)
_SHORTEST_WAIT: Final = 0.002
_LONGEST_WAIT: Final = 0.1
"""Seconds between two checks for transactions that write the change log, at first and at most."""


class PostgresStore(Store):
    """The store for many processes; its queue is PgQueuer's, in `jobs`."""

    def __init__(
        self,
        url: str,
        report: Callable[[StoreUnavailable | None], None],
        jobs: PgQueuerJobs,
        committed: Callable[[int], None] = lambda _size: None,
        wakeups: Wakeups | None = None,
        access: Access | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(wakeups or Wakeups())
        self._jobs = jobs
        self._access = access = access or Access()
        self._sessions = Sessions(url, access)
        self._migrating = self._sessions
        if access.migrate_url is not None or access.serverless:
            pooled = access.pooled if access.migrate_url is None else "auto"
            name = DATABASE_URL if access.migrate_url is None else MIGRATE_URL
            self._migrating = Sessions(access.migrate_url or url, Access(pooled=pooled), name)
        writers = 1 if access.serverless else max(min(_WRITERS, access.connections - _FIXED - 2), 1)
        fixed = 0 if access.serverless else _FIXED
        self._readers = max(access.connections - fixed - writers, 1)
        self._idle = _IDLE if access.serverless else None
        self._writer = Committer(
            self.connect, report, writers, committed=committed, begin=self._begin, idle=self._idle
        )
        # A lost claim is made again when its lease has expired. So a claim does not wait for the
        # disk, and PgQueuer's step and ours need not be one transaction.
        self._claimer = self._writer
        if not access.serverless:
            self._claimer = Committer(
                partial(self.connect, synchronous_commit="off"), lambda _: None, 1
            )
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._now = clock
        self._clock = ServerClock(clock)
        self._notices = Notices(self._wakeups, self.attempts)
        self._steps = StepRunner(jobs, self._notices)
        self._queue = DeliveryQueue(
            jobs, self._steps, self._clock, self._writer, self._claimer, self.connect, self._begin
        )
        self._hearing: asyncio.Task[None] | None = None

    async def connect(self, **settings: str) -> Connection:
        """Open a connection with our settings."""
        return await self._sessions.connect(**settings)

    def _begin(self) -> str:
        return self._sessions.begin

    async def migrate(self) -> None:
        await self._migrate()
        with _in_a_sentence(self._migrating):
            await _use_once(self._migrating)
        self._log_parameters()

    async def start(self) -> None:
        with _in_a_sentence(self._sessions):
            if self._access.serverless:
                self._pool = await self._open_pool()
                await self._check_schema(self._pool)
            else:
                await self._set_up()
                await _use_once(self._sessions)
                self._pool = await self._open_pool()
        self._log_parameters()
        if self._sessions.is_pooled and not self._access.serverless:
            log.warning("store.pooled", reason=_POOLED)
        self._writer.start()
        if self._claimer is not self._writer:
            self._claimer.start()
        is_deaf = self._sessions.is_pooled or self._access.serverless
        self._hearing = asyncio.create_task(
            self._poll() if is_deaf else self._notices.listen(self.connect)
        )

    async def stop(self) -> None:
        if self._hearing is None:
            return
        self._hearing.cancel()
        await asyncio.gather(self._hearing, return_exceptions=True)
        await asyncio.to_thread(self._queue.heartbeat.stop)
        if self._claimer is not self._writer:
            await self._claimer.stop()
        await self._writer.stop()
        if self._pool is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    await self._pool.close()

    async def _open_pool(self) -> asyncpg.Pool[asyncpg.Record]:
        """Return the reading connections, none of which is opened before it is needed."""
        return await asyncpg.create_pool(
            **self._sessions.where,
            connect=self._sessions.open,
            min_size=0,  # else the pool itself complains of a server that is away
            max_size=self._readers,
            init=self._sessions.prepare,
            reset=_leave_as_it_is,
            max_inactive_connection_lifetime=self._idle or _USUAL_LIFE,
        )

    def _log_parameters(self) -> None:
        if dropped := self._sessions.address.dropped:
            log.info("store.parameters", unused=", ".join(dropped))

    async def keep_house(self, housekeeping: Housekeeping) -> None:
        """Do the housekeeping, in one process for all; a function leaves it to its drains."""
        if not self._access.serverless:
            await self._jobs.keep_house(self.connect, housekeeping)

    async def should_follow_step(self, now: float, step: Shift) -> bool:
        """Return whether a step is towards the server's clock, which all processes share."""
        there = await self._server_time()
        return abs(there - now - step.deadline) < abs(there - now)

    async def _server_time(self) -> float:
        return float((await self.read(CLOCK))[0]["seconds"])

    async def _compare_clocks(self) -> None:
        asked_at = self._now()
        self._clock.compare(await self._server_time(), asked_at)

    @property
    def ahead(self) -> float:
        return self._clock.skew

    async def shift(self, step: Shift, owner: str, now: float) -> None:
        """Move the stored times with the clock, in one of all the processes that see the step.

        If only our clock was wrong, most stored times are right: a deadline that moved back would
        end other machines' predictions. Those that we made while it was ahead are due too late, so
        all fall due earlier: at worst they are looked at in vain.
        """
        only_ours = self._clock.explains(step.deadline)
        await self.write(_shift_once, (owner, now, step, only_ours))
        with contextlib.suppress(StoreUnavailable):  # else the step would be repeated
            await self._compare_clocks()  # at once: claims are made by the known skew

    async def recover(self, owner: str, now: float) -> list[LostAttempt]:
        """Reclaim only expired claims, as other processes may be at work.

        A function leaves that to its next drain, as it starts often, each time for one callback.
        """
        return [] if self._access.serverless else await self.reclaim(owner, now)

    # --- deliveries ---

    async def claim(self, wanted: ClaimRequest) -> Claims:
        return await self._queue.claim(wanted)

    async def settle(self, settlement: Settlement) -> bool:
        return await self._queue.settle(settlement)

    async def release(
        self, owner: str, now: float, only: tuple[str, ...] = ()
    ) -> list[LostAttempt]:
        return await self._queue.release(owner, now, only)

    def renew(self, owner: str, delivery_ids: list[str], lease_until: float) -> None:
        self._queue.heartbeat.put((owner, delivery_ids, lease_until))

    async def reclaim(self, owner: str, now: float) -> list[LostAttempt]:
        """Reclaim expired claims; once a minute, rescue deliveries without a job."""
        await self._compare_clocks()
        lost = await self.write(deliveries.reclaim, (owner, now + self._clock.skew))
        await self._queue.rescue(now)
        return lost

    async def trim_queue(self) -> None:
        await self._queue.trim()

    # --- transactions ---

    async def write(self, operation: Transaction[Item, Result], item: Item) -> Result:
        # A large item is written alone: a statement may not have a gigabyte.
        large = isinstance(item, IncomingOutcome) and len(item.body) > _LARGEST_SHARED
        key: Hashable = (operation, id(item)) if large else operation
        return await self._writer.write(key, partial(self._operate, operation), item)

    async def _operate(
        self, operation: Transaction[Item, Result], cx: Connection, items: Sequence[Item]
    ) -> Sequence[Result]:
        return await self._steps.drive(cx, operation(items))

    async def read(
        self, statement: Statement, rows: Sequence[Cells] | None = None, **params: Any
    ) -> list[Row]:
        if self._pool is None:
            raise StoreUnavailable("the database is not open")
        arguments = values(statement, params) + columns(statement, rows)
        last: Exception | None = None
        for _ in range(self._readers + 1):  # old connections may turn out to be dead
            try:
                return await self._fetch(self._pool, statement, arguments)
            except Exception as error:
                if not is_trouble(error):
                    raise
                last = error
        raise StoreUnavailable(f"the database cannot be read: {last}") from last

    async def _fetch(
        self, pool: asyncpg.Pool[asyncpg.Record], statement: Statement, arguments: Sequence[Any]
    ) -> list[Row]:
        if not statement.is_list or self._sessions.is_pooled:  # behind a pooler no plan is kept
            return await pool.fetch(statement.postgres, *arguments)  # type: ignore[return-value]
        async with pool.acquire() as connection:
            prepared = await connection.prepare(statement.postgres)
            return await prepared.fetch(*arguments)  # type: ignore[return-value]

    async def change_log_end(self) -> int:
        """Return the last position given out, once the transactions of that time have ended.

        Positions are given out before the commits, which may come in another order. A transaction
        takes a lock on the change log before it gets a position, and holds it until it ends.
        """
        last = await self._last_place()
        writing = await self._writing()
        pause = _SHORTEST_WAIT
        while writing:
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_WAIT)
            writing &= await self._writing()
        return last

    async def _last_place(self) -> int:
        return int((await self.read(_LAST_PLACE))[0]["seq"])

    async def _writing(self) -> set[str]:
        """Return the transactions that write the change log."""
        return {row["virtualtransaction"] for row in await self.read(_WRITING)}

    async def notify(self, ended: list[AttemptName]) -> None:
        await self._writer.write("notify", self._notify_all, ended)

    async def _notify_all(
        self, cx: Connection, items: Sequence[list[AttemptName]]
    ) -> Sequence[None]:
        for text in self._notices.of_attempts(items):
            await notify(cx, text)
        return [None] * len(items)

    def is_taken(self, error: Exception) -> bool:
        return isinstance(error, asyncpg.UniqueViolationError)

    async def _poll(self) -> None:
        """Poll for commits of others while a task waits for them: a pooler passes on no NOTIFY."""
        seen: int | None = None

        async def look() -> None:
            nonlocal seen
            if any(map(self._wakeups.is_awaited, TOPICS)) and await self._last_place() != seen:
                seen = await self.change_log_end()
                self._wakeups.wake("handler", *await self._pending())
                self._wakeups.wake_all("changes")
                self._wakeups.wake_all("prediction")

        await repeat(look, longest=_GLANCE)

    async def _pending(self) -> list[str]:
        """Return the handlers with pending deliveries."""
        rows = await self.read(due_sql.select_due, [], owner=self._notices.sender)
        return [row["name"] for row in rows if row["kind"] == "delivery"]

    # --- the schema ---

    async def _migrate(self) -> None:
        with _in_a_sentence(self._migrating):
            connection = await self._migrating.connect_first()
            try:
                await self._clock.compare_on(connection)
                is_pooled = self._migrating.is_pooled
                await migrating.bring_up_to_date(connection, self._jobs, is_pooled=is_pooled)
            finally:
                await close(connection)

    async def _set_up(self) -> None:
        """Bring the schema up to date; by another URL only if there is something to do."""
        if self._migrating is self._sessions:
            await self._migrate()
            return
        connection = await self._sessions.connect_first()
        try:
            await self._check(connection)
        except StoreUnusable:
            await self._migrate()
        finally:
            await close(connection)

    async def _check_schema(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        """Raise StoreUnusable unless the schema is exactly ours; this opens the first reader."""
        try:
            async with pool.acquire() as connection:
                await self._check(connection)
        except BaseException:
            pool.terminate()
            raise

    async def _check(self, connection: Any) -> None:
        asked_at = self._now()
        self._clock.compare(await migrating.check(connection, self._jobs), asked_at)


@each()
def _shift_once(item: tuple[str, float, Shift, bool]) -> Steps[None]:
    """Move the stored times, unless a process has done so for the same step of the clock.

    Also if this is repeated because the answer to its commit was lost.
    """
    owner, now, step, only_ours = item
    taken = {"owner": owner, "until": now + _ONE_STEP, "seconds": _ONE_STEP}
    if not (yield Run(facade_sql.take_step, taken)):
        return
    if only_ours:
        yield Run(facade_sql.advance_predictions, {"seconds": max(-step.due, 0.0)})
    else:
        yield from shift_all(step)


async def _leave_as_it_is(_: Any) -> None:
    """Do not reset a connection in the pool: no use leaves state, and a reset is a round trip."""


async def _use_once(sessions: Sessions) -> None:
    """Open a connection with our settings: the server may refuse some that the first left out."""
    connection = await sessions.connect()
    try:
        async with in_transaction(connection, sessions.begin):
            pass
    finally:
        await close(connection)


@contextlib.contextmanager
def _in_a_sentence(sessions: Sessions) -> Iterator[None]:
    """Turn any error into StoreUnusable with the solution and the setting to change."""
    try:
        yield
    except StoreUnusable as error:
        raise StoreUnusable(str(error).replace(DATABASE_URL, sessions.name)) from error
    except Exception as error:
        reason = what_to_do(error, sessions.address)
        raise StoreUnusable(reason.replace(DATABASE_URL, sessions.name)) from error


def what_to_do(error: BaseException, at: address.Address) -> str:
    """Return why the server cannot be used, and what would help; never the password."""
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return (
            f"the database cannot be set up: {type(error).__name__}: {error}; run `receiver "
            "migrate` once as a role that may create the schema `receiver`, and let the receiver's "
            "role use it"
        )
    reason = address.explain(error, at.place, at.timeout or CONNECT_TIMEOUT)
    return (
        f"cannot open the database: {reason}; set RECEIVER_DATABASE_URL to a PostgreSQL server "
        "that answers and to a role that may use it"
    )
