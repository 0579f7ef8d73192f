"""Deliveries, handed out by the jobs of the queue: claimed, renewed, settled, given back.

A delivery's row and its job are changed in one transaction. If the two differ, the row is right.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from receiver.model.errors import StoreUnavailable
from receiver.store import deliveries
from receiver.store.deliveries import (
    Claim,
    ClaimRequest,
    Claims,
    LostAttempt,
    Released,
    ReleaseRequest,
    Settlement,
)
from receiver.store.postgres.clock import ServerClock
from receiver.store.postgres.group_commit import Committer, Connection, in_transaction, is_trouble
from receiver.store.postgres.heartbeat import Heartbeat
from receiver.store.postgres.steps import StepRunner, run
from receiver.store.statement import Run

if TYPE_CHECKING:  # PgQueuer takes long to import, and is not needed to accept
    from pgqueuer import Job

    from receiver.store.postgres.queue import JobResult, PgQueuerJobs

log = structlog.get_logger("receiver")

_OVERDUE: Final = 60.0
"""Seconds after which a due delivery that is still pending may have lost its job."""
_MOST_RESCUED: Final = 1000
_SOON: Final = 0.01
"""Seconds until the next try to claim a delivery that has just fallen due or is locked."""


class DeliveryQueue:
    """Claims deliveries by their jobs, on the connection of `claimer`; ends them on `writer`'s.

    If both are the same, as in a function, leases are renewed there too.
    """

    def __init__(
        self,
        jobs: PgQueuerJobs,
        steps: StepRunner,
        clock: ServerClock,
        writer: Committer,
        claimer: Committer,
        connect: Callable[[], Awaitable[Connection]],
        begin: Callable[[], str],
    ) -> None:
        self._jobs = jobs
        self._steps = steps
        self._clock = clock
        self._writer = writer
        self._claimer = claimer
        self._begin = begin
        self._claimed: dict[tuple[str, int], Job] = {}
        """The jobs of this process's claims, by delivery and number of the claim: a delivery may be
        claimed again before the commit of its settlement is known here."""
        self._untaken: dict[str, dict[str, Job]] = {}
        """Picked jobs whose deliveries are not claimed yet, by handler and delivery."""
        self._rescue_at = 0.0
        self._rescued_to = ""
        self.heartbeat = Heartbeat(
            self.renew_on, connect, self._renew_here if claimer is writer else None
        )

    async def claim(self, wanted: ClaimRequest) -> Claims:
        """Claim as many due deliveries as a handler has room for, or raise StoreUnavailable."""
        found = await self._claimer.write("claim", self._claim_all, wanted, is_atomic=False)
        if isinstance(found, Claims):
            if found.claims:
                self.heartbeat.start()
            return found
        if not is_trouble(found):
            raise found
        raise StoreUnavailable(f"nothing can be claimed: {found}") from found

    async def settle(self, settlement: Settlement) -> bool:
        """End an attempt; False if its claim was lost meanwhile, and then nothing changed."""
        held = await self._writer.write("settle", self._settle_all, settlement)
        self._claimed.pop((settlement.id, settlement.number), None)
        return held

    async def release(
        self, owner: str, now: float, only: tuple[str, ...] = ()
    ) -> list[LostAttempt]:
        """Give back claims of `owner`, all or `only` some; return the attempts that count."""
        # All are given back after the claims under way, whose results are no longer used. If a job
        # cannot be given back, PgQueuer hands it out again half a minute later.
        lost: list[LostAttempt] = []
        if not only:
            with contextlib.suppress(StoreUnavailable):
                lost = await self._claimer.write(
                    "give back", self._give_back_all, now, is_atomic=False
                )
        wanted = ReleaseRequest(owner, now, only)
        released = await self._writer.write("release", self._release_all, wanted)
        self._claimed = {
            claim: job for claim, job in self._claimed.items() if claim[0] not in released.ids
        }
        return lost + released.lost

    async def rescue(self, now: float) -> None:
        """Make jobs for deliveries that have none, at most once a minute."""
        if now >= self._rescue_at:
            await self._writer.write("rescue", self._rescue_all, now)
            self._rescue_at = now + _OVERDUE

    async def trim(self) -> None:
        """Delete old rows of the queue's own log."""
        await self._claimer.write("trim_queue", self._trim_all, None, is_atomic=False)

    async def _trim_all(self, cx: Connection, items: Sequence[None]) -> Sequence[None]:
        await self._jobs.trim(await self._jobs.queries(cx))
        return items

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
                results.append(error)  # the deliveries that are already claimed must run
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
        if untaken:
            try:
                lost = await self._put_back(cx, untaken, wanted.now + self._clock.skew)
            except Exception as error:
                if not claims:
                    raise
                if not is_trouble(error):  # the claimed ones must run; the next claim tries again
                    log.exception("task.failed", handler=wanted.handler)
        if claims:  # the next claim, which follows at once, reads it: these must not wait for it
            return Claims(claims, wanted.now, lost)
        seconds = None if wanted.only else await self._jobs.next_due(cx, wanted.handler)
        if seconds is not None and seconds < _SOON:
            seconds = _SOON + time.monotonic() - began
        return Claims([], None if seconds is None else wanted.now + seconds, lost)

    async def _take(
        self, cx: Connection, wanted: ClaimRequest, untaken: dict[str, Job]
    ) -> list[Claim]:
        """Claim as many deliveries of picked jobs as are wanted, and record their jobs."""
        names = list(islice(untaken, wanted.most))
        params = msgspec.structs.asdict(wanted) | {
            "largest": deliveries.LARGEST_RAW,
            "now": wanted.now + self._clock.skew,
            "lease_until": wanted.lease_until + self._clock.skew,
        }
        rows = await run(
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
        """Put back or end jobs whose delivery was not claimed: it has or had an owner, or ended.

        A pending delivery is due at once, as it was in the queue.
        """
        async with in_transaction(cx, self._begin()):
            [lost] = await self._steps.drive(cx, deliveries.reclaim_these([(sorted(untaken), now)]))
            rows = await run(
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
                lost += await self._put_back(cx, untaken, max(items) + self._clock.skew)
        return [lost, *([[]] * (len(items) - 1))]

    async def _settle_all(self, cx: Connection, items: Sequence[Settlement]) -> Sequence[bool]:
        held = await self._steps.drive(cx, deliveries.settle(items))
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

    async def _release_all(
        self, cx: Connection, items: Sequence[ReleaseRequest]
    ) -> Sequence[Released]:
        released = await self._steps.drive(cx, deliveries.release(items))
        for job in self._jobs_of({name for one in released for name in one.ids}):
            await self._jobs.defer(cx, job, 0.0)
        return released

    async def _rescue_all(self, cx: Connection, items: Sequence[float]) -> Sequence[None]:
        """Make jobs for deliveries without one; make those due that wait only for ended ones."""
        look = (max(items), self._rescued_to, _MOST_RESCUED)
        [self._rescued_to] = await self._steps.drive(cx, deliveries.release_waiting([look]))
        found = await self._jobs.lost(cx, max(items) - _OVERDUE, _MOST_RESCUED)
        if found:
            await self._jobs.put(cx, found)
        return [None] * len(items)

    async def renew_on(
        self, cx: Connection, owner: str, delivery_ids: list[str], lease_until: float
    ) -> None:
        """Renew the leases of deliveries and the heartbeats of their jobs, on connection `cx`."""
        await self._clock.compare_on(cx)
        async with in_transaction(cx, self._begin()):
            await self._renew_all(cx, [(owner, delivery_ids, lease_until)])

    async def _renew_here(self, *wish: Any) -> None:
        """Renew on the writing connection, and so in the loop."""
        await self._writer.write("renew", self._renew_all, wish)

    async def _renew_all(
        self, cx: Connection, items: Sequence[tuple[str, list[str], float]]
    ) -> Sequence[None]:
        by_server = [(owner, ids, until + self._clock.skew) for owner, ids, until in items]
        renewed = await self._steps.drive(cx, deliveries.renew(by_server))
        await self._jobs.beat(cx, self._jobs_of({name for names in renewed for name in names}))
        return [None] * len(items)

    def _jobs_of(self, deliveries: Collection[str]) -> list[Job]:
        """Return this process's jobs for `deliveries`; callable from any thread."""
        return [job for claim, job in self._claimed.copy().items() if claim[0] in deliveries]
