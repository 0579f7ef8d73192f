"""The store on PostgreSQL: any number of processes on any number of machines.

The queue (`Jobs`) is written in the same transactions as the rows. It hands out what is due; where
the two differ, the delivery rows are right. Processes notify each other of commits by NOTIFY.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

import asyncpg
import msgspec
import structlog

from receiver.model.errors import StoreUnavailable, StoreUnusable
from receiver.model.tasks import Topic, Wakeups, repeat
from receiver.model.values import Shift
from receiver.store import deliveries
from receiver.store.attempts import AttemptNotice
from receiver.store.deliveries import (
    Claim,
    ClaimRequest,
    Claims,
    Giveback,
    LostAttempt,
    Released,
    Settlement,
)
from receiver.store.due import sql as due_sql
from receiver.store.engine import AttemptName
from receiver.store.facade import Housekeeping, Store
from receiver.store.inbox import IncomingOutcome
from receiver.store.leases import LeaseRequest
from receiver.store.postgres import address, migrating
from receiver.store.postgres.group_commit import Committer, Connection, in_transaction, is_trouble
from receiver.store.postgres.heartbeat import Heartbeat
from receiver.store.postgres.sessions import (
    COMMAND_TIMEOUT,
    CONNECT_TIMEOUT,
    DATABASE_URL,
    MIGRATE_URL,
    Access,
    Sessions,
    close,
)
from receiver.store.statement import (
    Cells,
    News,
    Row,
    Run,
    Statement,
    Steps,
    Transaction,
    Write,
    together,
)

if TYPE_CHECKING:  # PgQueuer takes long to import, and is not here to accept
    from pgqueuer import Job

    from receiver.store.postgres.queue import JobResult, PgQueuerJobs

log = structlog.get_logger("receiver")

Item = TypeVar("Item")
Result = TypeVar("Result")

SCHEMA: Final = "receiver"
"""The PostgreSQL schema that holds everything of ours, the queue's tables too."""
_CHANNEL: Final = "receiver_news"
_MOST_NAMED: Final = 150
"""Predictions named in one notice: its text may have 8,000 bytes."""
_FIXED: Final = 4
"""Connections beside those of writers and readers: to claim, renew, listen and keep house."""
_MOST_ATTEMPTS: Final = 100
"""Attempts named in one notice, likewise."""
_WRITERS: Final = 2
_IDLE: Final = 60.0
"""Seconds after which a function closes a connection that it does not use."""
_GLANCE: Final = 1.0
"""Poll interval in seconds for what others commit, where no NOTIFY comes."""
_OVERDUE: Final = 60.0
"""Seconds after which a delivery that is still pending may have no job any more."""
_MOST_RESCUED: Final = 1000
_SKEWED: Final = 2.0
"""Seconds between our clock and the server's that are worth a warning."""
_ONE_STEP: Final = 30.0
"""Seconds in which all processes have seen one and the same step of the clock."""
_SOON: Final = 0.01
"""Seconds until the next try to claim what has just fallen due, or is locked elsewhere."""
_LARGEST_SHARED: Final = 64 * 1024
"""Bytes of a callback that shares a transaction with others."""
_LAST_PLACE: Final = Statement(
    "SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS seq FROM receiver.changes_seq_seq"
)
_WRITING: Final = Statement("""
SELECT virtualtransaction FROM pg_locks
WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
  AND database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
  AND relation = to_regclass('receiver.changes')
""")
_CLOCK: Final = Statement(
    "SELECT extract(epoch FROM clock_timestamp())::double precision AS seconds"
)
_NEWS: Final[tuple[Topic, ...]] = ("handler", "changes", "prediction")
"""What other processes' commits are news of."""
_USUAL_LIFE: Final = 300.0
_POOLED: Final = (
    "the database is behind a pooler in transaction mode: what other processes commit is not "
    "heard of but looked for, each second; a direct URL or a pooler in session mode is faster"
)
_SHORTEST_WAIT: Final = 0.002
_LONGEST_WAIT: Final = 0.1
"""Seconds between two looks for transactions that write the change log."""


class PostgresStore(Store):
    """The store for many processes, its queue in `jobs`, which is PgQueuer's."""

    def __init__(
        self,
        url: str,
        report: Callable[[StoreUnavailable | None], None],
        jobs: PgQueuerJobs,
        committed: Callable[[int], None] = lambda _size: None,
        wakeups: Wakeups | None = None,
        access: Access | None = None,
    ) -> None:
        super().__init__(report, committed, wakeups or Wakeups())
        self._jobs = jobs
        self._access = access = access or Access()
        self._sessions = Sessions(url, access)
        self._migrating = self._sessions
        if access.migrate_url is not None or access.serverless:
            pooled = access.pooled if access.migrate_url is None else "auto"
            name = DATABASE_URL if access.migrate_url is None else MIGRATE_URL
            self._migrating = Sessions(access.migrate_url or url, Access(pooled=pooled), name)
        self._claimed: dict[tuple[str, int], Job] = {}
        """The jobs of this process's claims, by delivery and claim: it may be claimed again before
        we hear that its settlement is committed."""
        self._untaken: dict[str, dict[str, Job]] = {}
        """Jobs that were picked and whose deliveries are not claimed yet, by handler and id."""
        self._me = secrets.token_hex(8)
        self._rescue_at = 0.0
        self._rescued_to = ""
        writers = 1 if access.serverless else max(min(_WRITERS, access.connections - _FIXED - 2), 1)
        fixed = 0 if access.serverless else _FIXED
        self._readers = max(access.connections - fixed - writers, 1)
        self._idle = _IDLE if access.serverless else None
        self._writer = Committer(
            self.connect, report, writers, committed=committed, begin=self._begin, idle=self._idle
        )
        # A claim that is lost is made again when its lease is over: it waits for no disk, and what
        # PgQueuer hands out and what we note of it need not be one transaction.
        self._claimer = self._writer
        if not access.serverless:
            self._claimer = Committer(
                partial(self.connect, synchronous_commit="off"), lambda _: None, 1
            )
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._pulse = Heartbeat(
            self._renew_now, self.connect, self._renew_here if access.serverless else None
        )
        self._hearing: asyncio.Task[None] | None = None

    async def connect(self, **settings: str) -> Connection:
        """Open a connection as all of ours are."""
        return await self._sessions.connect(**settings)

    def _begin(self) -> str:
        return self._sessions.begin

    async def migrate(self) -> None:
        await self._migrate()
        with _in_a_sentence(self._migrating):
            await _use_once(self._migrating)
        self._tell_of_parameters()

    async def start(self) -> None:
        with _in_a_sentence(self._sessions):
            if self._access.serverless:
                self._pool = await self._open_pool()
                await self._check_schema(self._pool)
            else:
                await self._set_up()
                await _use_once(self._sessions)
                self._pool = await self._open_pool()
        self._tell_of_parameters()
        if self._sessions.is_pooled and not self._access.serverless:
            log.warning("store.pooled", reason=_POOLED)
        self._writer.start()
        if self._claimer is not self._writer:
            self._claimer.start()
        is_deaf = self._sessions.is_pooled or self._access.serverless
        hear = self._look_about if is_deaf else self._listen
        self._hearing = asyncio.create_task(hear())

    async def stop(self) -> None:
        if self._hearing is None:
            return
        self._hearing.cancel()
        await asyncio.gather(self._hearing, return_exceptions=True)
        await asyncio.to_thread(self._pulse.stop)
        if self._claimer is not self._writer:
            await self._claimer.stop()
        await self._writer.stop()
        if self._pool is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    await self._pool.close()

    async def _open_pool(self) -> asyncpg.Pool[asyncpg.Record]:
        """Return the connections that read, of which none is opened before it is needed."""
        return await asyncpg.create_pool(
            **self._sessions.where,
            connect=self._sessions.open,
            min_size=0,  # else the pool itself goes on about a server that is away
            max_size=self._readers,
            init=self._sessions.prepare,
            reset=_leave_as_it_is,
            max_inactive_connection_lifetime=self._idle or _USUAL_LIFE,
        )

    def _tell_of_parameters(self) -> None:
        if dropped := self._sessions.address.dropped:
            log.info("store.parameters", unused=", ".join(dropped))

    async def keep_house(self, housekeeping: Housekeeping) -> None:
        """Do the housekeeping in one of all processes; a function leaves it to its drains."""
        if not self._access.serverless:
            await self._jobs.keep_house(self.connect, housekeeping)

    async def trim_queue(self) -> None:
        await self._claimer.write("trim_queue", self._trim_queue, None, is_atomic=False)

    async def _trim_queue(self, cx: Connection, items: Sequence[None]) -> Sequence[None]:
        await self._jobs.trim(await self._jobs.queries(cx))
        return items

    async def believes(self, now: float, step: Shift) -> bool:
        """Follow a step only towards the server's clock, which all have in common."""
        there = float((await self.read(_CLOCK))[0]["seconds"])
        return abs(there - now - step.deadline) < abs(there - now)

    # --- what the queue has a part in ---

    async def shift(self, step: Shift, owner: str, now: float) -> None:
        """Move what is stored along with the clock, in one of all processes that see the step."""
        role = LeaseRequest(name="clock", owner=owner, now=now, until=now + _ONE_STEP)
        if await self.leases.hold(role):
            await super().shift(step, owner, now)

    async def recover(self, owner: str, now: float) -> list[LostAttempt]:
        """Others may be at work: only what has no owner any more is pending again.

        A function leaves that to its next drain: it starts for one callback, and often.
        """
        return [] if self._access.serverless else await self.reclaim(owner, now)

    async def claim(self, wanted: ClaimRequest) -> Claims:
        found = await self._claimer.write("claim", self._claim_all, wanted, is_atomic=False)
        if isinstance(found, Claims):
            if found.claims:
                self._pulse.start()
            return found
        if not is_trouble(found):
            raise found
        raise StoreUnavailable(f"nothing can be claimed: {found}") from found

    async def settle(self, settlement: Settlement) -> bool:
        held = await self._writer.write("settle", self._settle_all, settlement)
        self._claimed.pop((settlement.id, settlement.number), None)
        return held

    async def release(
        self, owner: str, now: float, only: tuple[str, ...] = ()
    ) -> list[LostAttempt]:
        # All are given back after the claims under way, whose results are not used any more. What
        # cannot be given back is handed out again by PgQueuer half a minute later.
        lost: list[LostAttempt] = []
        if not only:
            with contextlib.suppress(StoreUnavailable):
                lost = await self._claimer.write(
                    "give back", self._give_back_all, now, is_atomic=False
                )
        wanted = Giveback(owner, now, only)
        released = await self._writer.write("release", self._release_all, wanted)
        self._claimed = {
            claim: job for claim, job in self._claimed.items() if claim[0] not in released.ids
        }
        return lost + released.lost

    def renew(self, owner: str, delivery_ids: list[str], lease_until: float) -> None:
        self._pulse.put((owner, delivery_ids, lease_until))

    async def reclaim(self, owner: str, now: float) -> list[LostAttempt]:
        """Reclaim what has no owner; once a minute, rescue deliveries without a job."""
        asked = time.time()
        self._compare_clocks(float((await self.read(_CLOCK))[0]["seconds"]), asked)
        by_server = now + self._skew
        lost = await self.write(deliveries.reclaim, (owner, by_server))
        if now >= self._rescue_at:
            await self._writer.write("rescue", self._rescue_all, now)
            self._rescue_at = now + _OVERDUE
        return lost

    async def _claim_all(
        self, cx: Connection, items: Sequence[ClaimRequest]
    ) -> Sequence[Claims | Exception]:
        results: list[Claims | Exception] = []
        for wanted in items:
            try:
                results.append(await self._claim_for(cx, wanted))
            except Exception as error:
                if not results:
                    raise
                results.append(error)  # what the others have claimed must run
        return results

    async def _claim_for(self, cx: Connection, wanted: ClaimRequest) -> Claims:
        began = time.monotonic()
        if wanted.only:  # if this fails half way, their jobs are handed out again in half a minute
            untaken = await self._jobs.pick_these(cx, wanted.only)
        else:
            untaken = self._untaken.setdefault(wanted.handler, {})
            if not untaken:  # else an earlier claim failed half way
                untaken |= await self._jobs.pick(cx, wanted.handler, wanted.most)
        claims = await self._take(cx, wanted, untaken) if untaken else []
        lost: list[LostAttempt] = []
        try:
            if untaken:
                lost = await self._put_back(cx, untaken, wanted.now + self._skew)
            next_due = None
            if len(claims) < wanted.most and not wanted.only:
                seconds = await self._jobs.next_due(cx, wanted.handler)
                if seconds is not None and seconds < _SOON:
                    seconds = _SOON + time.monotonic() - began
                next_due = None if seconds is None else wanted.now + seconds
        except Exception as error:
            if not claims:
                raise
            if not is_trouble(error):
                log.exception("task.failed", handler=wanted.handler)
            next_due = wanted.now + _SOON  # what was claimed must run; the rest is seen to then
        return Claims(claims, next_due, lost)

    async def _take(
        self, cx: Connection, wanted: ClaimRequest, untaken: dict[str, Job]
    ) -> list[Claim]:
        """Claim deliveries whose jobs were picked, as many as are wanted; their jobs are known."""
        names = list(islice(untaken, wanted.most))
        params = msgspec.structs.asdict(wanted) | {
            "largest": deliveries.LARGEST_RAW,
            "now": wanted.now + self._skew,
            "lease_until": wanted.lease_until + self._skew,
        }
        rows = await _run(
            cx, Run(deliveries.sql.take_deliveries, params, [(name,) for name in names])
        )
        found = [deliveries.claim_of(row, wanted.handler) for row in rows]
        taken = {claim.id: claim for claim in found}
        claims = [taken[name] for name in names if name in taken]
        self._claimed |= {(claim.id, claim.number): untaken.pop(claim.id) for claim in claims}
        return claims

    async def _put_back(
        self, cx: Connection, untaken: dict[str, Job], now: float
    ) -> list[LostAttempt]:
        """Deal with jobs whose delivery was not taken: it has or had an owner, or it is over.

        One that is pending is due, as the queue had it.
        """
        async with in_transaction(cx, self._begin()):
            [lost] = await self._drive(cx, deliveries.reclaim_these([(sorted(untaken), now)]))
            rows = await _run(
                cx, Run(deliveries.sql.select_leases, rows=[(name,) for name in sorted(untaken)])
            )
            pending = {
                row["id"]: row["lease_until"] or now
                for row in rows
                if row["state"] in {"running", "pending"}
            }
            for delivery, lease_until in pending.items():
                await self._jobs.defer(cx, untaken[delivery], max(lease_until - now, 0.0))
            over = [job for name, job in untaken.items() if name not in pending]
            await self._jobs.finish(cx, over, "canceled")
        untaken.clear()
        return lost

    async def _give_back_all(
        self, cx: Connection, items: Sequence[float]
    ) -> Sequence[list[LostAttempt]]:
        """Put back the jobs that were picked by claims that failed half way."""
        lost: list[LostAttempt] = []
        for untaken in self._untaken.values():
            if untaken:
                lost += await self._put_back(cx, untaken, max(items) + self._skew)
        return [lost, *([[]] * (len(items) - 1))]

    async def _settle_all(self, cx: Connection, items: Sequence[Settlement]) -> Sequence[bool]:
        held = await self._drive(cx, deliveries.settle(items))
        ended: dict[JobResult, list[Job]] = {}
        for item, is_held in zip(items, held, strict=True):
            job = self._claimed.get((item.id, item.number))
            if job is None or not is_held:
                continue
            if item.decision.state == "pending":
                await self._jobs.defer(cx, job, item.decision.delay)
            else:
                result: JobResult = "exception" if item.decision.state == "dead" else "successful"
                ended.setdefault(result, []).append(job)
        for result, jobs in ended.items():
            await self._jobs.finish(cx, jobs, result)
        return held

    async def _release_all(self, cx: Connection, items: Sequence[Giveback]) -> Sequence[Released]:
        released = await self._drive(cx, deliveries.release(items))
        for job in self._jobs_of({name for one in released for name in one.ids}):
            await self._jobs.defer(cx, job, 0.0)
        return released

    async def _rescue_all(self, cx: Connection, items: Sequence[float]) -> Sequence[None]:
        """Make jobs for deliveries without one, and make due those that wait for ended ones."""
        look = (max(items), self._rescued_to, _MOST_RESCUED)
        [self._rescued_to] = await self._drive(cx, deliveries.let_go([look]))
        found = await self._jobs.lost(cx, max(items) - _OVERDUE, _MOST_RESCUED)
        if found:
            await self._jobs.put(cx, found)
        return [None] * len(items)

    async def _renew_now(
        self, cx: Connection, owner: str, delivery_ids: list[str], lease_until: float
    ) -> None:
        await self._compare_with(cx)
        async with in_transaction(cx, self._begin()):
            await self._renew_all(cx, [(owner, delivery_ids, lease_until)])

    async def _renew_here(self, *wish: Any) -> None:
        """Renew on the connection that writes, and so in the loop."""
        await self._writer.write("renew", self._renew_all, wish)

    async def _renew_all(
        self, cx: Connection, items: Sequence[tuple[str, list[str], float]]
    ) -> Sequence[None]:
        by_server = [(owner, ids, until + self._skew) for owner, ids, until in items]
        renewed = await self._drive(cx, deliveries.renew(by_server))
        await self._jobs.beat(cx, self._jobs_of({name for names in renewed for name in names}))
        return [None] * len(items)

    def _jobs_of(self, deliveries: Collection[str]) -> list[Job]:
        """Return this process's jobs for `deliveries`; callable from any thread."""
        return [job for claim, job in self._claimed.copy().items() if claim[0] in deliveries]

    # --- running steps ---

    async def write(self, operation: Transaction[Item, Result], item: Item) -> Result:
        # What is large goes alone: a statement may not have a gigabyte.
        large = isinstance(item, IncomingOutcome) and len(item.body) > _LARGEST_SHARED
        key: Hashable = (operation, id(item)) if large else operation
        return await self._writer.write(key, partial(self._operate, operation), item)

    async def _operate(
        self, operation: Transaction[Item, Result], cx: Connection, items: Sequence[Item]
    ) -> Sequence[Result]:
        return await self._drive(cx, operation(items))

    async def _drive(self, cx: Connection, steps: Steps[Sequence[Result]]) -> Sequence[Result]:
        try:
            step = next(steps)
            while True:
                if isinstance(step, Run):
                    step = steps.send(await _run(cx, step))
                else:
                    await self._write_down(cx, step)
                    step = steps.send([])
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    async def _write_down(self, cx: Connection, step: Write) -> None:
        queries = tuple(statement for statement, _ in step.parts)
        values = [column for statement, rows in step.parts for column in _columns(statement, rows)]
        if step.news is None:
            if queries:
                await cx.execute(together(queries, notify=False), *values)
            return
        first, *more = self._told(step.news)
        await cx.execute(together(queries, notify=True), _CHANNEL, first, *values)
        for text in more:
            await cx.execute(together((), notify=True), _CHANNEL, text)
        if step.news.pending:
            await self._jobs.put(cx, step.news.pending)
        if step.news.over:
            await self._jobs.drop(cx, step.news.over)

    def _told(self, news: News) -> list[str]:
        """Return news as the texts of notices, as many as it takes."""
        handlers = sorted({handler for _, handler in news.pending})
        parts = range(0, max(len(news.ended), 1), _MOST_NAMED)
        notices = [[self._me, handlers, news.ended[at : at + _MOST_NAMED]] for at in parts]
        return [msgspec.json.encode(notice).decode() for notice in notices]

    async def read(
        self, statement: Statement, rows: Sequence[Cells] | None = None, **params: Any
    ) -> list[Row]:
        if self._pool is None:
            raise StoreUnavailable("the database is not open")
        arguments = _values(statement, params) + _columns(statement, rows)
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
        """Return the last place that was handed out, once the transactions of then have ended.

        Places are handed out before the commits, which may come in another order. A transaction
        takes a lock on the change log before it gets a place, and holds it until it ends.
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
        await self._writer.write("notify", self._notify_all, AttemptNotice(self._me, ended))

    async def _notify_all(self, cx: Connection, items: Sequence[AttemptNotice]) -> Sequence[None]:
        named = [name for notice in items for name in notice.ended]
        parts = [named[at : at + _MOST_ATTEMPTS] for at in range(0, len(named), _MOST_ATTEMPTS)]
        if not all(notice.ended for notice in items):
            parts.append([])
        for part in parts:
            text = msgspec.json.encode(AttemptNotice(self._me, part)).decode()
            await cx.execute(together((), notify=True), _CHANNEL, text)
        return [None] * len(items)

    def is_taken(self, error: Exception) -> bool:
        return isinstance(error, asyncpg.UniqueViolationError)

    # --- what others commit ---

    async def _listen(self) -> None:
        """Listen for other processes' commits for as long as we run; a gap wakes all workers."""
        while True:
            try:
                await self._hear_until_it_ends()
            except Exception as error:  # noqa: BLE001 - we must listen again after any error
                log.warning("news.interrupted", reason=f"{type(error).__name__}: {error}")
            await asyncio.sleep(1.0)

    async def _hear_until_it_ends(self) -> None:
        connection = await self.connect()
        ended = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: ended.set())
            await connection.add_listener(_CHANNEL, self._hear)
            for topic in _NEWS:
                self._wakeups.wake_all(topic)
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), COMMAND_TIMEOUT)
                await connection.fetchval("SELECT 1")  # else a cut wire would never be noticed
        finally:
            connection.terminate()

    async def _look_about(self) -> None:
        """Poll for what others commit, while anybody waits for it: a pooler passes no NOTIFY on."""
        seen: int | None = None

        async def look() -> None:
            nonlocal seen
            if any(map(self._wakeups.is_awaited, _NEWS)) and await self._last_place() != seen:
                seen = await self.change_log_end()
                self._wakeups.wake("handler", *await self._pending())
                self._wakeups.wake_all("changes")
                self._wakeups.wake_all("prediction")

        await repeat(look, longest=_GLANCE)

    async def _pending(self) -> list[str]:
        """Return the handlers with pending deliveries."""
        rows = await self.read(due_sql.select_due, [], owner=self._me)
        return [row["name"] for row in rows if row["kind"] == "delivery"]

    def _hear(self, _connection: object, _pid: int, _channel: str, text: object) -> None:
        try:
            notice = msgspec.json.decode(
                str(text), type=tuple[str, list[str], list[str]] | AttemptNotice
            )
        except msgspec.DecodeError:
            return  # any role of this database may send a notice, and so nonsense
        if isinstance(notice, AttemptNotice):
            if notice.sender != self._me:
                self.attempts.hear(notice)
            return
        sender, handlers, predictions = notice
        if sender != self._me:
            self._wakeups.wake("handler", *handlers)
            self._wakeups.wake_all("changes")
            self._wakeups.wake("prediction", *predictions)

    # --- the schema ---

    async def _migrate(self) -> None:
        with _in_a_sentence(self._migrating):
            connection = await self._migrating.connect_first()
            try:
                await self._compare_with(connection)
                is_pooled = self._migrating.is_pooled
                await migrating.bring_up_to_date(connection, self._jobs, is_pooled=is_pooled)
            finally:
                await close(connection)

    async def _set_up(self) -> None:
        """Bring the schema up to date; by another URL only where there is something to do."""
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
        """Refuse a schema that is not just ours; its connection is the first that reads."""
        try:
            async with pool.acquire() as connection:
                await self._check(connection)
        except BaseException:
            pool.terminate()
            raise

    async def _check(self, connection: Any) -> None:
        asked = time.time()
        self._compare_clocks(await migrating.check(connection, self._jobs), asked)

    async def _compare_with(self, connection: Connection) -> None:
        asked = time.time()
        self._compare_clocks(await connection.fetchval(_CLOCK.postgres), asked)

    def _compare_clocks(self, there: float, asked: float) -> None:
        """Measure again how far apart the clocks are, as either may have been set."""
        here = time.time()
        skew = there - here
        # An answer that waited while our loop was busy is too old to compare with.
        if not 0.0 <= here - asked < _SKEWED / 2 or abs(skew - self._skew) <= _SKEWED:
            return
        self._skew = skew if abs(skew) > _SKEWED else 0.0
        if self._skew:
            log.warning("clock.skewed", seconds=round(self._skew, 1))
        else:
            log.info("clock.skewed", seconds=0.0)  # no more


async def _leave_as_it_is(_: Any) -> None:
    """Do not reset a connection in the pool: nothing here leaves state, and it is a round trip."""


async def _use_once(sessions: Sessions) -> None:
    """Make a connection as all of ours are: settings may be refused that the first does not set."""
    connection = await sessions.connect()
    try:
        async with in_transaction(connection, sessions.begin):
            pass
    finally:
        await close(connection)


@contextlib.contextmanager
def _in_a_sentence(sessions: Sessions) -> Iterator[None]:
    """Turn any error into StoreUnusable with what to do, and with which setting."""
    try:
        yield
    except StoreUnusable as error:
        raise StoreUnusable(str(error).replace(DATABASE_URL, sessions.name)) from error
    except Exception as error:
        said = what_to_do(error, sessions.address)
        raise StoreUnusable(said.replace(DATABASE_URL, sessions.name)) from error


def what_to_do(error: BaseException, at: address.Address) -> str:
    """Return why the server cannot be used, and what would help; never with its password."""
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return (
            f"the database cannot be set up: {type(error).__name__}: {error}; run `receiver "
            "migrate` once as a role that may create the schema `receiver`, and let the receiver's "
            "role use it"
        )
    said = address.explain(error, at.place, at.timeout or CONNECT_TIMEOUT)
    return (
        f"cannot open the database: {said}; set RECEIVER_DATABASE_URL to a PostgreSQL server "
        "that answers and to a role that may use it"
    )


async def _run(cx: Connection, step: Run) -> list[Row]:
    statement, params, rows = step
    arguments = _values(statement, params) + _columns(statement, rows)
    return await cx.fetch(statement.postgres, *arguments)  # type: ignore[return-value]


def _values(statement: Statement, params: Mapping[str, Any]) -> list[Any]:
    return [_storable(params[name]) for name in statement.names]


def _columns(statement: Statement, rows: Sequence[Cells] | None) -> list[Any]:
    if not rows:
        return [[] for _ in statement.columns]
    return [[_storable(cell) for cell in column] for column in zip(*rows, strict=True)]


def _storable(value: Any) -> Any:
    """Return a text that PostgreSQL can hold: it knows no NUL, which strangers may well send."""
    return value.replace("\0", "\ufffd") if isinstance(value, str) and "\0" in value else value
