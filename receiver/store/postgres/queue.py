"""The queue on PostgreSQL: PgQueuer's jobs, one for each pending delivery.

The jobs hand out deliveries: PgQueuer's dequeue finds due jobs with SKIP LOCKED, defers failed
ones, and gives the job of a process without a heartbeat to another. The row decides: a claim is
made when the row gets an owner and a lease, a settlement counts while it still has them, and only
its state, attempts and history are kept. Both are written in one transaction, so that a crash
leaves neither without the other. If they differ, the row is right: a job without a row to run is
ended or put back, and `lost` finds a due row whose job is missing.

Work that one process does for all uses PgQueuer's schedules. A job's payload is its delivery, its
entrypoint the handler; the few statements below do what PgQueuer has no call for.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import structlog

from receiver.store.facade import Housekeeping
from receiver.store.postgres.group_commit import Connection

if TYPE_CHECKING:  # it takes longer to import than all the rest, and may not be needed to accept
    from receiver.store.postgres.parts import JOB_STATUS, Job, Queries, TracebackRecord

log = structlog.get_logger("receiver")

JobResult: TypeAlias = Literal["successful", "exception", "canceled"]

_STALE: Final = timedelta(seconds=30)
"""Time without a heartbeat after which a job is given to another process."""
_OFTEN: Final = "* * * * * */5"
_EVERY_MINUTE: Final = "* * * * *"
_MOST_FORGOTTEN: Final = 10_000
"""Rows of PgQueuer's log that one statement deletes."""
_SETTLED: Final = 1.0
"""Seconds of delay for the first callbacks, as housekeeping's imports take longer than a start."""
_AGAIN: Final = 2.0
"""Seconds after which the schedules resume when the server went away."""

_SELECT_NOTE: Final = "SELECT obj_description(to_regclass($1::text), 'pg_class')"
_HASTEN: Final = """
UPDATE receiver.pgqueuer SET execute_after = NOW() WHERE dedupe_key = ANY($1) AND status = 'queued'
"""
# PgQueuer's own query leaves out jobs that have just fallen due: a worker that woke a moment early
# would continue to sleep.
_NEXT_DUE: Final = """
SELECT greatest(extract(epoch FROM execute_after - NOW()), 0)::double precision
FROM receiver.pgqueuer WHERE status = 'queued' AND entrypoint = $1 ORDER BY execute_after LIMIT 1
"""
# PgQueuer hands out by handler only; this is its own step from queued to picked, for named jobs.
_PICK_THESE: Final = """
WITH held AS MATERIALIZED (
    SELECT id FROM receiver.pgqueuer WHERE dedupe_key = ANY($1) AND status = 'queued'
      AND execute_after <= NOW() ORDER BY id FOR UPDATE SKIP LOCKED
)
UPDATE receiver.pgqueuer
SET status = 'picked', updated = NOW(), heartbeat = NOW(), queue_manager_id = $2
WHERE id IN (SELECT id FROM held) RETURNING *
"""
_LOST: Final = """
SELECT d.id, d.handler FROM receiver.deliveries d WHERE d.state = 'pending' AND d.due_at <= $1
AND NOT EXISTS (SELECT FROM receiver.pgqueuer j
                WHERE j.dedupe_key = d.id AND j.status IN ('queued', 'picked'))
ORDER BY d.due_at LIMIT $2
"""
_JOBS_OF: Final = "SELECT id FROM receiver.pgqueuer WHERE dedupe_key = ANY($1) ORDER BY id"
_FORGET_LOG: Final = """
DELETE FROM receiver.pgqueuer_log WHERE id IN (SELECT id FROM receiver.pgqueuer_log WHERE aggregated
    AND created < NOW() - interval '1 day' ORDER BY id LIMIT $1)
"""
_FORGET_STATISTICS: Final = """
DELETE FROM receiver.pgqueuer_statistics WHERE created < NOW() - interval '30 days'
"""


class PgQueuerJobs:
    """PgQueuer as the queue beside a PostgresStore's rows: one job for each pending delivery.

    Each method uses the given connection, and so its transaction if there is one.
    """

    table: Final = "receiver.pgqueuer"
    note: Final = f"pgqueuer {importlib.metadata.version('pgqueuer')}"
    """The comment on that table: the PgQueuer release that made it."""

    def __init__(self) -> None:
        self._make: Callable[[Connection], Queries] | None = None
        self._taker = uuid.uuid4()

    async def queries(self, connection: Connection) -> Queries:
        """Return PgQueuer's own queries, with our names of its tables."""
        if self._make is None:
            # In a thread, as its import would delay all requests.
            parts = await asyncio.to_thread(_parts)
            self._make = parts.maker()
        return self._make(connection)

    async def install(self, connection: Connection) -> None:
        """Create the queue's own tables, in the caller's transaction, if there are none."""
        if not await self.is_other(connection):
            return  # without importing PgQueuer, as at almost every start
        queries = await self.queries(connection)
        if not await queries.schema_is_installed():
            await queries.install()
            await queries.optimize_autovacuum()
            await self._sign(connection)

    async def is_other(self, connection: Connection) -> bool:
        """Return whether another release made the queue's own tables, or there are none yet."""
        return bool(await connection.fetchval(_SELECT_NOTE, self.table) != self.note)

    async def upgrade(self, connection: Connection) -> None:
        """Upgrade the queue's own tables; outside a transaction, and in one session."""
        await (await self.queries(connection)).apply_upgrade()
        await self._sign(connection)

    async def _sign(self, connection: Connection) -> None:
        """Store the PgQueuer release as the comment on the queue's table."""
        await connection.execute(f"COMMENT ON TABLE {self.table} IS '{self.note}'")

    async def put(self, connection: Connection, pending: Sequence[tuple[str, str]]) -> None:
        """Make deliveries (id, handler) due now; one that has a job keeps it."""
        deliveries = [delivery for delivery, _ in pending]
        queries = await self.queries(connection)
        made = await queries.enqueue(
            [handler for _, handler in pending],
            [delivery.encode() for delivery in deliveries],
            [0] * len(pending),
            dedupe_key=[*deliveries],
            on_conflict="skip",
        )
        there = [name for name, job in zip(deliveries, made, strict=True) if job is None]
        if there:
            await connection.execute(_HASTEN, there)

    async def pick(self, connection: Connection, handler: str, most: int) -> dict[str, Job]:
        """Take jobs that are due, or whose process has not renewed them; return by delivery."""
        queries = await self.queries(connection)
        parts = _parts()
        jobs = await queries.dequeue(
            batch_size=most,
            entrypoints={parts.QueueEntrypoint(handler): parts.UNLIMITED},
            queue_manager_id=parts.QueueManagerId(self._taker),
            global_concurrency_limit=None,
            heartbeat_timeout=_STALE,
        )
        return _by_delivery(jobs)

    async def pick_these(self, connection: Connection, deliveries: Sequence[str]) -> dict[str, Job]:
        """Take the due jobs of some deliveries that no process has; return them by delivery."""
        rows = await connection.fetch(_PICK_THESE, list(deliveries), self._taker)
        job = (await asyncio.to_thread(_parts)).Job
        return _by_delivery([job.model_validate(dict(row)) for row in rows])

    async def next_due(self, connection: Connection, handler: str) -> float | None:
        """Return in how many seconds the next job falls due; None: there is none."""
        seconds: float | None = await connection.fetchval(_NEXT_DUE, handler)
        return seconds

    async def finish(self, connection: Connection, jobs: Sequence[Job], result: JobResult) -> None:
        """End picked jobs."""
        ends: list[tuple[Job, JOB_STATUS, TracebackRecord | None]] = [
            (job, result, None) for job in jobs
        ]
        if ends:
            await (await self.queries(connection)).log_jobs(ends)

    async def drop(self, connection: Connection, deliveries: Sequence[str]) -> None:
        """Cancel the jobs of deliveries, even those that another process has picked."""
        jobs = [row["id"] for row in await connection.fetch(_JOBS_OF, list(deliveries))]
        if jobs:
            await (await self.queries(connection)).mark_job_as_cancelled(jobs)

    async def defer(self, connection: Connection, job: Job, seconds: float) -> None:
        """Put a picked job back, to fall due again in `seconds`."""
        await (await self.queries(connection)).retry_job(job, timedelta(seconds=seconds), None)

    async def lost(self, connection: Connection, before: float, most: int) -> list[tuple[str, str]]:
        """Return deliveries (id, handler) due since before `before` that have no job."""
        rows = await connection.fetch(_LOST, before, most)
        return [(row["id"], row["handler"]) for row in rows]

    async def beat(self, connection: Connection, jobs: Sequence[Job]) -> None:
        """Renew the heartbeats of picked jobs."""
        if jobs:
            await (await self.queries(connection)).update_heartbeat([job.id for job in jobs])

    async def trim(self, queries: Queries) -> None:
        """Aggregate PgQueuer's log into its statistics, and delete old rows of both."""
        await queries.aggregate_logs()
        most = _MOST_FORGOTTEN
        while await queries.driver.execute(_FORGET_LOG, most) == f"DELETE {most}":
            pass
        await queries.driver.execute(_FORGET_STATISTICS)

    async def keep_house(
        self, connect: Callable[[], Awaitable[Connection]], housekeeping: Housekeeping
    ) -> None:
        """Do the housekeeping every few seconds, the queue's own too, in one process for all.

        It uses PgQueuer's schedules: half a minute after a process died, another does its work.
        PgQueuer's log is silenced, as we log the failures.
        """
        logging.getLogger("pgqueuer").setLevel(logging.CRITICAL)
        await asyncio.sleep(_SETTLED)
        while True:
            try:
                await self._keep_house(connect, housekeeping)
            except Exception as error:  # noqa: BLE001 - housekeeping must go on after any error
                log.warning("housekeeping.interrupted", reason=f"{type(error).__name__}: {error}")
            await asyncio.sleep(_AGAIN)

    async def _keep_house(
        self, connect: Callable[[], Awaitable[Connection]], housekeeping: Housekeeping
    ) -> None:
        connection = await connect()
        try:
            queries = await self.queries(connection)
            # Imported only for housekeeping, as it imports PgQueuer's root.
            manager = (await asyncio.to_thread(_parts().scheduler))(queries)
            for name, work in housekeeping.items():
                manager.schedule(f"receiver.{name}", _OFTEN)(_scheduled(name, work))
            trim = _scheduled("queue", partial(self.trim, queries))
            manager.schedule("receiver.queue", _EVERY_MINUTE)(trim)
            await manager.run()
        finally:
            connection.terminate()


def _parts() -> ModuleType:
    """Import the parts of PgQueuer that are used."""
    from receiver.store.postgres import parts  # noqa: PLC0415 - imported when it is used

    return parts


def _by_delivery(jobs: Sequence[Job]) -> dict[str, Job]:
    return {(job.payload or b"").decode(): job for job in jobs}


def _scheduled(name: str, work: Callable[[], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """Return a function for PgQueuer that logs a failure; the next turn comes in seconds."""

    async def run(_: Any) -> None:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - see above
            log.warning("housekeeping.failed", work=name, reason=f"{type(error).__name__}: {error}")

    return run
