"""The poller: asks a provider about each prediction in flight when its poll is due.

A poll ends in one of three ways: the answer, recorded by the inbox, ends the prediction; the
deadline has passed and ends it; or the prediction is due again later.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections import deque
from collections.abc import Mapping
from typing import Final, NoReturn

import msgspec
import structlog

from receiver.model.errors import StoreUnavailable, TooLarge, Unproved, Unreadable
from receiver.model.states import TERMINAL
from receiver.model.tasks import TaskSet, repeat
from receiver.model.values import Error, Outcome, Status, expired
from receiver.observability.runtime import Runtime
from receiver.observability.tracing import Span
from receiver.predictions.inbox import Inbox
from receiver.predictions.provider_client import ANSWER_TIMEOUT, Busy, ProviderClient
from receiver.predictions.submitter import BACKSTOP, LONGEST_NAP, MARGIN, Schedule, send_cancel
from receiver.providers.adapter import Candidate, Follow, Provider, Searched
from receiver.store.facade import Store
from receiver.store.predictions import Job, Progress

log = structlog.get_logger("receiver")

_MOST_POLLS: Final = 32
_MOST_FOLLOWS: Final = 3
_MOST_PAGES: Final = 6
"""The most requests of one search for the prediction of an ambiguous submit."""
_DEADLINE_GRACE: Final = 60.0
"""Seconds past its deadline that a prediction waits until the provider's limits allow a poll."""
_LAST_WRITE: Final = 1.0
"""Seconds that a stop waits for claims to end, and to make claimed predictions due again."""


class Poller:
    """Polls due predictions, within the limits of `clients`: those of providers with a key."""

    def __init__(
        self,
        store: Store,
        inbox: Inbox,
        providers: Mapping[str, Provider],
        clients: Mapping[str, ProviderClient],
        schedule: Schedule,
        runtime: Runtime,
        *,
        timeout: float,
    ) -> None:
        self._runtime = runtime
        self._clock = runtime.clock
        self._longest = LONGEST_NAP if runtime.single_process else BACKSTOP
        self._hints: list[float] = []
        self.polls = 0
        """Number of polls begun."""
        self._store = store
        self._inbox = inbox
        self._providers = providers
        self._clients = clients
        self._schedule = schedule
        self._timeout = timeout
        self.under_way = TaskSet(lambda: runtime.wakeups.wake_all("poll"))
        """The tasks of polls, each named by its provider."""
        self._claims = TaskSet(is_awaited=True)
        self._claimed: dict[str, Job] = {}
        """Predictions that this process has claimed, and whose poll has not ended."""
        self._next_round = float("inf")

    async def stop(self) -> None:
        """Cancel the polls under way, and make claimed predictions due now for other processes."""
        await self._claims.wait(_LAST_WRITE)
        await self.under_way.cancel()
        now = self._clock()
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(_LAST_WRITE):
                await asyncio.gather(*(self._again(job, now) for job in self._claimed.values()))

    def due(self, at: float) -> None:
        """Wake the poller if a prediction is due before its next round of polls."""
        if not self._runtime.single_process:
            heapq.heappush(self._hints, at)
        if at < self._next_round:
            self._runtime.wakeups.wake_all("poll")

    async def run(self) -> NoReturn:
        """Poll predictions whenever they are due, until cancelled.

        If several processes poll, each wakes for the predictions that it handles itself;
        housekeeping finds those of a dead process.
        """
        with self._runtime.wakeups.listen("poll") as awake:
            await repeat(self._step, awake, longest=self._longest)

    async def _step(self) -> float:
        self._next_round = float("inf")
        began = self._clock()
        nap = await self.start_due_polls()
        if not self._runtime.single_process:
            nap = self._next_hint(began)
        nap = min(max(nap, 0.0), self._longest)
        self._next_round = self._clock() + nap
        return nap

    def _next_hint(self, began: float) -> float:
        """Return the seconds until the next round, after a round that began at `began`."""
        while self._hints and self._hints[0] <= began:
            heapq.heappop(self._hints)
        return self._hints[0] - self._clock() if self._hints else BACKSTOP

    async def start_due_polls(self) -> float:
        """Start a poll of every due prediction; return the seconds until the next is due."""
        now = self._clock()
        for provider in self._providers.keys() - self._clients.keys():
            before = now - self._timeout
            for prediction_id in await self._store.predictions.stale(provider, before, _MOST_POLLS):
                await self._expire_unsent(provider, prediction_id)
            late = await self._store.predictions.late(provider, self._clock(), _MOST_POLLS)
            for each in late:
                await self._inbox.too_late(provider, *each)
        naps = [await self._start_polls(provider, now) for provider in self._providers]
        return min(naps, default=LONGEST_NAP)

    async def _start_polls(self, provider: str, now: float) -> float:
        """Start polls at one provider; each has its own bound, so a slow one delays no other."""
        room = _MOST_POLLS - self.under_way.names().count(provider)
        if room <= 0:
            return LONGEST_NAP
        hold_until = now + ANSWER_TIMEOUT + MARGIN
        claim = self._claim(provider, now, hold_until, room)
        await asyncio.shield(self._claims.start(claim))  # `stop` knows all claims
        next_due = await self._store.predictions.next_due(provider)
        return LONGEST_NAP if next_due is None else next_due - self._clock()

    async def _claim(self, provider: str, now: float, hold_until: float, room: int) -> None:
        """Claim due predictions, and start a poll of each."""
        for job in await self._store.predictions.claim_due(provider, now, hold_until, room):
            self._claimed[job.ticket.id] = job
            self.under_way.start(self._poll_safely(job), provider)
            self.polls += 1

    async def _poll_safely(self, job: Job) -> None:
        try:
            await self.poll(job)
        except StoreUnavailable:
            pass  # the row is due again when its hold ends
        except Exception:
            log.exception("task.failed", prediction=job.ticket.id)
        self._claimed.pop(job.ticket.id, None)

    async def poll(self, job: Job) -> None:
        """Poll one due prediction; after it, the prediction has ended or is due again."""
        now = self._clock()
        if job.status in TERMINAL or job.status is Status.QUEUED:
            return
        if job.status is Status.SUBMITTING:
            # Its hold ended well after the submit's timeout: the process that submitted it is gone.
            await self._store.predictions.progress(
                Progress(id=job.ticket.id, cause="ambiguous", due_at=now, submits=job.submits)
            )
            return
        deadline = float("inf") if job.deadline_at is None else job.deadline_at
        reason, after = "", 0.0
        try:
            ended = await self._ask(job)
        except Busy as busy:
            # Past its deadline a prediction waits for one last answer, but not for ever.
            latest = deadline if now < deadline else deadline + _DEADLINE_GRACE
            if now < latest:
                await self._again(job, min(now + busy.seconds, latest))
                return
            ended, reason = False, str(busy)
        except Unreadable as error:
            ended, reason, after = False, str(error), error.after or 0.0
        if ended:
            return
        if now >= deadline:
            await self._expire(job, reason or job.last_reason)
        else:
            due_at = max(self._schedule.next_poll(job), now + after)
            await self._again(job, min(due_at, deadline), reason)

    async def _again(self, job: Job, due_at: float, reason: str = "") -> None:
        progress = Progress(
            id=job.ticket.id,
            cause="polled",
            due_at=due_at,
            reason=reason or None,
            held_until=job.held_until,
        )
        await self._store.predictions.progress(progress)
        self.due(due_at)

    async def _ask(self, job: Job) -> bool:
        """Ask the provider; return whether that ended the prediction, or raise Unreadable."""
        if job.provider not in self._clients:
            return False
        with self._runtime.tracing.poll(job) as span:
            return await self._learn(job, span)

    async def _learn(self, job: Job, span: Span) -> bool:
        try:
            if job.ticket.provider_id is None:
                return await self._search(job)
            try:
                outcome, body = await self._request_outcome(job)
            except TooLarge as large:  # it will be too large next time, too
                error = Error(code="provider_error", message=f"the result cannot be taken: {large}")
                outcome, body = Outcome(kind="failed", error=error), b""
            if outcome.kind == "missing" and job.ticket.cancel_requested:
                error = Error(code="canceled", message="canceled; the provider forgot it")
                outcome = Outcome(kind="canceled", error=error)
            taken = await self._inbox.answer(job.provider, job.ticket.id, "poll", outcome, body)
        except Busy:
            raise
        except (Unreadable, Unproved) as error:
            span.fail(error)
            log.warning(
                "poll.failed", provider=job.provider, prediction=job.ticket.id, reason=str(error)
            )
            self._runtime.telemetry.poll(job.provider, "failed")
            raise error if isinstance(error, Unreadable) else Unreadable(str(error)) from error
        except StoreUnavailable:
            raise
        except Exception as error:
            # A fault of ours must not prevent the end at the deadline.
            span.fail(error)
            log.exception("task.failed", provider=job.provider, prediction=job.ticket.id)
            self._runtime.telemetry.poll(job.provider, "failed")
            return False
        ended = taken.status in TERMINAL
        self._runtime.telemetry.poll(job.provider, "ended" if ended else "pending")
        if outcome.kind == "missing" and not ended:
            raise Unreadable(f"{job.provider} does not know it (HTTP 404)")
        return ended

    async def _request_outcome(self, job: Job) -> tuple[Outcome, bytes]:
        provider = self._providers[job.provider]
        client = self._clients[job.provider]
        answer = await client.ask(provider.poll(job.ticket))
        outcome = provider.polled(job.ticket, answer)
        for _ in range(_MOST_FOLLOWS):
            if not isinstance(outcome, Follow):
                return outcome, answer.body
            answer = await client.ask(outcome.request)
            outcome = outcome.read(job.ticket, answer)
        raise Unreadable("sent on too often")

    async def _search(self, job: Job) -> bool:
        """Search the provider for an ambiguous submit; return whether that ended the prediction."""
        provider = self._providers[job.provider]
        if not isinstance(provider, Searched) or job.ticket.mode != "queue":
            return False
        pages = deque(provider.search(job.ticket))
        for _ in range(_MOST_PAGES):
            if not pages:
                break
            answer = await self._clients[job.provider].ask(pages.popleft())
            found = provider.found(job.ticket, answer)
            for candidate in found.candidates:
                if await self._may_be(job, candidate):
                    ticket = msgspec.structs.replace(job.ticket, provider_id=candidate.provider_id)
                    if ticket.cancel_requested:
                        await send_cancel(provider, self._clients[job.provider], ticket)
                    return await self._ask(msgspec.structs.replace(job, ticket=ticket))
            if found.more is not None:
                pages.appendleft(found.more)
        return False

    async def _may_be(self, job: Job, candidate: Candidate) -> bool:
        """Return whether a candidate can be this prediction, and is not another one of ours."""
        url = candidate.callback_url
        if url is not None:
            token = url.rpartition("/")[2]
            if self._inbox.prediction_id_of(job.provider, token) != job.ticket.id:
                return False
        return await self._store.predictions.find(job.provider, candidate.provider_id) is None

    async def _expire(self, job: Job, reason: str) -> None:
        seconds = self._timeout
        error = expired(f"no outcome within {seconds:g} s", reason)
        if job.status is Status.UNCONFIRMED:
            what = f"the submit got no answer, and nothing was heard for {seconds:g} s"
            error = expired(what, reason, "unconfirmed")
        log.warning("prediction.expired", prediction=job.ticket.id, code=error.code)
        await self._inbox.verdict(
            job.provider, job.ticket.id, error, only_from=frozenset({job.status}), is_free=False
        )

    async def _expire_unsent(self, provider: str, prediction_id: str) -> None:
        """End a prediction that has been queued for too long, as its provider has no key."""
        error = Error(code="expired", message=f"{provider} has no API key here")
        log.warning("prediction.expired", prediction=prediction_id, code=error.code)
        await self._inbox.verdict(
            provider, prediction_id, error, only_from=frozenset({Status.QUEUED})
        )
