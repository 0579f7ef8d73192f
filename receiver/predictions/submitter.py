"""The submitter of one provider: in order, as many at once as it allows, each sent once.

A prediction is `submitting` in the store before the first byte is sent. After a submit without a
clear answer it stays `unconfirmed` until an outcome or a search shows whether it was accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, NoReturn, TypeVar

import httpx
import msgspec
import structlog

from receiver.model.costs import Price
from receiver.model.errors import Problem, ReceiverError, StoreUnavailable, TooLarge, Unreadable
from receiver.model.retry import backoff
from receiver.model.states import TERMINAL
from receiver.model.tasks import TaskSet, repeat
from receiver.model.values import Error, Outcome, Status, Ticket
from receiver.observability.events import SubmitResult
from receiver.observability.runtime import Runtime
from receiver.observability.tracing import Span
from receiver.predictions.inbox import Inbox
from receiver.predictions.provider_client import ANSWER_TIMEOUT, AT_ONCE, ProviderClient
from receiver.predictions.room import Room
from receiver.predictions.tokens import Tokens
from receiver.providers.adapter import (
    Accepted,
    Addressing,
    Ambiguous,
    CallbackTarget,
    Postponed,
    Provider,
    Receipt,
    Refused,
    Stopping,
    can_prove,
)
from receiver.providers.transport import BROKEN
from receiver.settings import Settings
from receiver.store.costs import Figure
from receiver.store.facade import Store
from receiver.store.predictions import (
    Job,
    Progress,
    ProgressCause,
    ProgressResult,
    SendMark,
    SubmitBudget,
)

log = structlog.get_logger("receiver")

T = TypeVar("T")

MARGIN: Final = 30.0
"""Seconds from a request's timeout until another process may take its row."""
LONGEST_NAP: Final = 5.0
_SHORTEST_NAP: Final = 0.01
BACKSTOP: Final = 60.0
"""The longest nap, in seconds, if other processes look for work too."""
_SYNC_TIMEOUT: Final = 960.0
"""Seconds for a blocking call; a video takes fifteen minutes at most."""
_POLL_CAP: Final = 60.0
_PUSHED_POLL: Final = 30.0
_UNPUSHED_POLL: Final = 3.0
_RETRY_BASE: Final = 1.0
_RETRY_CAP: Final = 60.0
_STOP_WAIT: Final = 1.5
"""Seconds that a stop waits for the answers to submits under way."""
_LAST_WRITE: Final = 1.0
"""Seconds to store that a submit was cut off by the stop."""

# Errors of httpx that prove that nothing was sent, even if it has asked for the body.
_UNSENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class TakenOverError(Exception):
    """Another process took the row before anything was sent."""


class TooLateError(Exception):
    """The latest time of a submit passed before anything was sent.

    The submit is queued again, and ended there if its stored latest time has passed too.
    """


class Sending:
    """The request of a submit, whose body is sent only after the send mark is committed.

    A provider cannot act on a request without its body.
    """

    def __init__(self, request: httpx.Request, mark: Callable[[], Awaitable[bool]]) -> None:
        self._body = request.read()  # a body of several parts is joined here
        self._mark = mark
        self.begun = False
        """Whether a part of the body may have been sent."""
        self.request = httpx.Request(
            request.method,
            request.url,
            headers=request.headers,
            content=self._after_the_mark(),
            extensions=request.extensions,
        )

    async def _after_the_mark(self) -> AsyncIterator[bytes]:
        if not await self._mark():
            raise TakenOverError
        self.begun = True
        yield self._body


_RESULTS: Final[Mapping[type, SubmitResult]] = {
    Accepted: "accepted",
    Outcome: "answered",
    Refused: "rejected",
    Postponed: "postponed",
    Ambiguous: "unconfirmed",
}


class Schedule:
    """The times of polls and of repeated submits."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self._pushed = settings.poll_after or _PUSHED_POLL
        self._unpushed = min(self._pushed, _UNPUSHED_POLL)
        self._clock = runtime.clock
        self._random = runtime.random

    def first_poll(self, *, push_expected: bool) -> float:
        return self._clock() + (self._pushed if push_expected else self._unpushed)

    def next_poll(self, job: Job) -> float:
        """Return when to poll next: the short interval, doubled up to 60 s, with 10 % of jitter."""
        seconds = min(_POLL_CAP, self._unpushed * 2.0 ** min(job.polls, 32))
        return self._clock() + seconds * (0.9 + 0.2 * self._random())

    def next_submit(self, job: Job, wanted: float | None) -> float:
        """Return when to submit again: after a backoff, never earlier than the provider asked."""
        seconds = backoff(job.submits, _RETRY_BASE, _RETRY_CAP, 0.5 + self._random() / 2)
        return self._clock() + max(seconds, wanted or 0.0)


class Submitter:
    """The submits of one provider, in order, as many at once as it allows."""

    def __init__(
        self,
        provider: Provider,
        client: ProviderClient,
        store: Store,
        inbox: Inbox,
        tokens: Tokens,
        settings: Settings,
        schedule: Schedule,
        runtime: Runtime,
        *,
        due: Callable[[float], None],
        ready: Callable[[], Awaitable[bool]] | None,
    ) -> None:
        """Create the submitter; `due` is called after a commit, with the time of the next poll.

        `ready`, if the provider has a stream, waits for it and returns whether it is connected.
        """
        self.provider = provider
        self._runtime = runtime
        self._longest_nap = LONGEST_NAP if runtime.single_process else BACKSTOP
        self.submits = 0
        """Number of submits begun."""
        self._at_most: int | None = None
        """Upper bound of predictions in flight, as counting is slow; None if it is not known."""
        self._ready = ready
        self._due = due
        self._limits = settings.providers[provider.name]
        self.client = client
        self._store = store
        self._inbox = inbox
        self._tokens = tokens
        self._settings = settings
        self._schedule = schedule
        self._clock = runtime.clock
        self.room = Room(runtime.monotonic)
        self._awake = asyncio.Event()
        self.under_way = TaskSet(self._awake.set)
        """The tasks of submits, each named by its prediction's id."""
        self._stopping = False
        self._beginning = asyncio.Lock()
        self._begun = TaskSet(is_awaited=True)
        self._next_begin: asyncio.Task[float] | None = None
        """The task that waits for the lock: it begins all submits that arrive until it has it."""
        self._runs = False

    async def run(self) -> NoReturn:
        name = self.provider.name
        # Without a limit of predictions in flight, an end makes no room.
        ends = name if self._limits.max_in_flight is not None else ""
        with self._runtime.wakeups.listen("capacity", ends, self._awake):
            self._runs = True
            await repeat(self.begin, self._awake, longest=self._longest_nap, provider=name)

    def wake(self) -> None:
        """Begin submits soon, as many as there is room for, without waiting for them."""
        if self._runs:
            self._awake.set()
        else:  # as in a worker, whose submitters do not run
            self._begun.start(self._begin_in_background(), context=contextvars.Context())

    async def _begin_in_background(self) -> None:
        try:
            await self.begin()
        except StoreUnavailable:
            return  # housekeeping repeats it
        except Exception:
            log.exception("task.failed", provider=self.provider.name)

    async def stop(self) -> None:
        """Begin no more submits, wait a moment for those under way, and cancel the rest."""
        self._stopping = True
        await self._begun.wait()
        await self.under_way.wait(_STOP_WAIT)
        await self.under_way.cancel()

    async def send_now(self, prediction_id: str) -> None:
        """Begin as many submits as there is room for; if this one is begun, wait for its end.

        The wait also ends with an outcome that comes before the submit's answer, with the end of
        the app, and if the store cannot record the provider's answer.
        """
        with self._runtime.wakeups.listen("prediction", prediction_id) as news:
            await self.begin()
            task = self.under_way.find(prediction_id)
            if task is None:
                return
            news_task = asyncio.create_task(news.wait())
            try:
                await asyncio.wait({task, news_task}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news_task.cancel()

    async def begin(self) -> float:
        """Begin as many submits as there is room for; return the seconds until there may be more.

        They may be of other callers, so the caller's cancellation does not stop them, and they do
        not get the caller's context, such as its trace.
        """
        if self._next_begin is None:
            self._next_begin = self._begun.start(self._begin_once(), context=contextvars.Context())
        return await asyncio.shield(self._next_begin)

    async def send_all(self, seconds: float) -> None:
        """Begin as many submits as there is room for, and wait for them, `seconds` at most.

        For a process that may be frozen as soon as it has answered: a submit whose answer is then
        not read would be unconfirmed.
        """
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(seconds):
                await self.begin()
                await self.under_way.wait(seconds)

    async def _begin_once(self) -> float:
        async with self._beginning:
            self._next_begin = None
            return await self._begin()

    async def _begin(self) -> float:
        wait = max(self.client.paused(), self.room.wait())
        now = self._clock()
        room = self.room.at_once(AT_ONCE) - len(self.under_way)
        if self._stopping:
            return self._longest_nap
        if wait > 0 or room <= 0:
            latest = await self._store.predictions.next_late(self.provider.name)
            return await self._end_late(latest, wait or self._longest_nap)
        at_most, self._at_most = self._at_most, None  # not known if the commit fails
        begun = await self._store.predictions.begin_submits(
            SubmitBudget(
                provider=self.provider.name,
                now=now,
                most=room,
                max_in_flight=self.room.in_flight(self._limits.max_in_flight),
                at_most=at_most,
                per_minute=self._limits.requests_per_minute,
                hold_until=now + ANSWER_TIMEOUT + MARGIN,
                timeout=self._settings.prediction_timeout,
            )
        )
        if self._runtime.single_process:
            self._at_most = begun.at_most
        for job in begun.jobs:
            self.under_way.start(self._submit_safely(job), job.ticket.id)
            self.submits += 1
        if begun.wait > 0:
            nap = begun.wait
        elif begun.next_due is not None and begun.next_due > now:
            nap = max(begun.next_due - self._clock(), _SHORTEST_NAP)
        else:
            nap = self._longest_nap  # none is queued, or none has room: an end wakes us
        return await self._end_late(begun.latest, nap)

    async def _end_late(self, latest: float | None, nap: float) -> float:
        """End queued predictions past their latest time; return the seconds until the next step.

        `latest` is the first of these times.
        """
        if latest is None:
            return nap
        now = self._clock()
        if latest > now:
            return min(nap, max(latest - now, _SHORTEST_NAP))
        name = self.provider.name
        for late in await self._store.predictions.late(name, now, AT_ONCE):
            await self._inbox.too_late(name, *late)
        return 0.0

    async def _submit_safely(self, job: Job) -> None:
        try:
            with self._runtime.tracing.submit(job) as span:
                await self._submit(job, span)
        except TakenOverError:
            log.warning("submit.postponed", prediction=job.ticket.id, reason="begun by another")
        except asyncio.CancelledError:  # we stop: queued again, or unconfirmed if it was sent
            cut_off = Progress(
                id=job.ticket.id, cause="ambiguous", due_at=self._clock(), submits=job.submits
            )
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(_LAST_WRITE):
                    await self._store.predictions.progress(cut_off)
            raise
        except Exception:
            # A fault of ours, perhaps after the provider took the submit: so it is ambiguous.
            log.exception("task.failed", prediction=job.ticket.id)
            self._runtime.telemetry.submit(self.provider.name, "unconfirmed")
            await self._progress(job, "ambiguous", self._schedule.next_poll(job))

    async def _submit(self, job: Job, span: Span) -> None:
        if job.ticket.cancel_requested:
            error = Error(code="canceled", message="canceled before the provider took it")
            await self._ended_unsent(job, error)
            return
        # If the provider has a stream, its connection is waited for.
        listening = self._ready is not None and job.ticket.mode != "sync" and await self._ready()
        began = self._runtime.monotonic()
        receipt, body = await self._send(job)
        result = _RESULTS[type(receipt)]
        self._runtime.telemetry.submit(self.provider.name, result)
        span.note(result=result)
        if isinstance(receipt, Refused | Postponed | Ambiguous):
            span.fail(result)
        log_fields = {
            "provider": self.provider.name,
            "model": job.ticket.model,
            "prediction": job.ticket.id,
        }
        if isinstance(receipt, Accepted | Outcome) and self.room.note_accepted(began):
            log.info("provider.unlocked", provider=self.provider.name)
        match receipt:
            case Accepted():
                await self._accepted(
                    job, receipt, push_expected=listening or self._hook(job) is not None
                )
                log.info("submit.accepted", provider_id=receipt.provider_id, **log_fields)
            case Outcome():
                await self._answered(job, receipt, body)
            case Refused(message, code):
                log.warning("submit.rejected", reason=message, **log_fields)
                await self._ended_unsent(job, Error(code=code, message=message), body)
            case Postponed(message, after):
                log.warning("submit.postponed", reason=message, after=after, **log_fields)
                due_at = await self._hold(job, receipt, began)
                await self._progress(job, "postponed", due_at, reason=message)
            case Ambiguous(message):
                log.warning("submit.unconfirmed", reason=message, **log_fields)
                due_at = self._schedule.next_poll(job)
                await self._progress(job, "ambiguous", due_at, reason=message)

    async def _hold(self, job: Job, receipt: Postponed, began: float) -> float:
        """Hold other submits back if the refusal concerns them too; return when this one is due."""
        if receipt.whole_provider:
            self.client.pause(receipt.after)
        due_at = self._schedule.next_submit(job, receipt.after)
        if receipt.holds == "full":
            in_flight = await self._retry_until_stored(
                job, lambda: self._store.predictions.in_flight(self.provider.name, AT_ONCE)
            )
            self.room.note_full(in_flight - 1, began, receipt.after)
        elif receipt.holds == "locked":
            if not self.room.locked:
                log.error("provider.locked", provider=self.provider.name, reason=receipt.message)
            self.room.note_lock(receipt.message)
            due_at += self.room.wait()  # after the next one that tries, which may be taken
        return due_at

    async def _answered(self, job: Job, outcome: Outcome, body: bytes) -> None:
        """Record the answer to a blocking call; if it does not end the prediction, poll it."""
        taken = await self._retry_until_stored(
            job,
            lambda: self._inbox.answer(self.provider.name, job.ticket.id, "sync", outcome, body),
        )
        if taken.status in TERMINAL:
            return
        if outcome.provider_id is None:
            await self._progress(job, "ambiguous", self._schedule.next_poll(job))
        else:
            await self._accepted(job, Accepted(outcome.provider_id), push_expected=False)

    async def _send(self, job: Job) -> tuple[Receipt, bytes]:
        ticket = await self._addressed(job.ticket)
        if not isinstance(ticket, Ticket):
            return ticket, b""
        return await self._post(msgspec.structs.replace(job, ticket=ticket))

    async def _addressed(self, ticket: Ticket) -> Ticket | Refused | Postponed:
        """Return a ticket with the address of a blocking submit, from the model's description."""
        if ticket.mode == "queue" or not isinstance(self.provider, Addressing):
            return ticket
        try:
            # The request that was counted when the submit began is enough: a permit for each would
            # never be had, as the submits have taken them all.
            answer = await self.client.ask(self.provider.details(ticket.model), is_counted=True)
            return self.provider.addressed(ticket, answer)
        except Problem as error:
            return Refused(str(error))
        except Unreadable as error:
            return Postponed(f"{ticket.model} was not described: {error}", error.after)
        except StoreUnavailable as error:
            return Postponed(str(error))

    async def _post(self, job: Job) -> tuple[Receipt, bytes]:
        seconds = _SYNC_TIMEOUT if job.ticket.mode == "sync" else ANSWER_TIMEOUT
        try:
            request = self.provider.request(job.ticket, self._hook(job))
        except (ReceiverError, ValueError, httpx.InvalidURL) as error:
            return Refused(str(error)), b""
        sending = Sending(request, lambda: self._mark_sent(job, seconds))
        answer = None
        try:
            answer = await self.client.send(sending.request, seconds)
            return self.provider.accepted(job.ticket, answer), answer.body
        except (*_UNSENT, TooLateError) as error:
            return Postponed(f"{type(error).__name__}: {error}"), b""
        except TooLarge as error:
            return _too_large(job, error), b""
        except (*BROKEN, Unreadable, StoreUnavailable) as error:
            reason = f"{type(error).__name__}: {error}"
            if not sending.begun:
                return Postponed(reason), b""
            return Ambiguous(f"HTTP {answer.status}, {error}" if answer else reason), b""

    async def _mark_sent(self, job: Job, seconds: float) -> bool:
        now = self._clock()
        hold_until = now + seconds + MARGIN
        mark = SendMark(id=job.ticket.id, submits=job.submits, now=now, hold_until=hold_until)
        is_ours = await self._store.predictions.mark_sent(mark)
        # Now, as the connection to the provider and both writes may have taken long.
        if is_ours and job.latest_at is not None and job.latest_at <= self._clock():
            raise TooLateError("it could not be sent in time")
        return is_ours

    def _hook(self, job: Job) -> CallbackTarget | None:
        if self._settings.public_url is None or job.ticket.mode == "sync":
            return None
        if not can_prove(self.provider, self._limits.secrets):
            return None
        token = self._tokens.callback(self.provider.name, job.ticket.id)
        url = f"{self._settings.public_url}/webhooks/{self.provider.name}/{token}"
        return CallbackTarget(url, self._tokens.webhook_secrets(job.ticket.id)[0].decode())

    async def _accepted(self, job: Job, receipt: Accepted, *, push_expected: bool) -> None:
        due_at = self._schedule.first_poll(push_expected=push_expected)
        done = await self._progress(job, "accepted", due_at, receipt)
        if done == "taken":
            log.warning("submit.unconfirmed", prediction=job.ticket.id, reason="another's id")
            await self._progress(job, "ambiguous", self._schedule.next_poll(job))
            return
        await self._inbox.unpark(self.provider.name, receipt.provider_id, job.ticket.id)
        if receipt.cost is not None:  # its outcome may have come first
            cost = Price(receipt.cost, "provider")
            figure = Figure(prediction_id=job.ticket.id, cost=cost, at=self._clock())
            await self._retry_until_stored(job, lambda: self._store.costs.learn(figure))
        if done == "to_cancel":
            ticket = msgspec.structs.replace(
                job.ticket, provider_id=receipt.provider_id, links=receipt.links
            )
            await send_cancel(self.provider, self.client, ticket)
            await self._progress(job, "polled", self._clock())

    async def _progress(
        self,
        job: Job,
        cause: ProgressCause,
        due_at: float,
        receipt: Accepted | None = None,
        reason: str | None = None,
    ) -> ProgressResult:
        """Record a step, and wake the poller if it has to look earlier."""
        progress = Progress(
            id=job.ticket.id,
            cause=cause,
            due_at=due_at,
            provider_id=receipt.provider_id if receipt else None,
            links=receipt.links if receipt else {},
            cost=receipt.cost if receipt else None,
            reason=reason,
            submits=job.submits,
        )
        done = await self._retry_until_stored(
            job, lambda: self._store.predictions.progress(progress)
        )
        self._due(due_at)
        return done

    async def _ended_unsent(self, job: Job, error: Error, body: bytes = b"") -> None:
        """End a prediction that the provider did not take; `body` is its answer, if it gave one."""
        await self._retry_until_stored(
            job,
            lambda: self._inbox.verdict(
                self.provider.name,
                job.ticket.id,
                error,
                only_from=frozenset({Status.SUBMITTING}),
                submits=job.submits,
                # A blocking call may be refused by the model, after work that costs money.
                is_free=job.ticket.mode == "queue" or not body,
                channel="sync" if body else None,
                body=body,
            ),
        )

    async def _retry_until_stored(self, job: Job, write: Callable[[], Awaitable[T]]) -> T:
        """Repeat a write until the store takes it, as the provider will not answer again.

        Callers that wait for this submit are woken at each failure: it may take hours.
        """
        while True:
            try:
                return await write()
            except StoreUnavailable:
                self._runtime.wakeups.wake("prediction", job.ticket.id)
                await asyncio.sleep(0.5)


async def send_cancel(provider: Provider, client: ProviderClient, ticket: Ticket) -> None:
    """Send a cancel that was requested before the provider's id was known; a poll shows its end."""
    try:
        if isinstance(provider, Stopping):
            await client.ask(provider.cancel(ticket))
    except Unreadable as error:
        log.warning("cancel.failed", prediction=ticket.id, reason=str(error))


def _too_large(job: Job, error: TooLarge) -> Receipt:
    """Return the receipt of an answer above our size limit; a blocking call's held the result."""
    if job.ticket.mode == "sync":
        return Outcome(kind="failed", error=Error(code="provider_error", message=str(error)))
    return Ambiguous(str(error))
