"""Submit, cancel, and ask about what is overdue.

The row comes before the money: a prediction is `queued` in the store before anything is sent,
`submitting` before the first byte, and what is unknown after a broken submit stays `unconfirmed`
until somebody who knows says more. Nothing here settles a prediction: every answer goes through
the inbox.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import httpx
import msgspec
import structlog

from receiver.errors import Problem, ReceiverError, StoreUnavailable, Unproved, Unreadable
from receiver.inbox import Inbox
from receiver.model import (
    TERMINAL,
    Error,
    Mode,
    Outcome,
    Prediction,
    Status,
    backoff,
    new_id,
)
from receiver.providers.base import (
    Accepted,
    Ambiguous,
    Answer,
    Follow,
    Hook,
    Postponed,
    Provider,
    Receipt,
    Refused,
    Streamed,
    retry_after,
)
from receiver.settings import ProviderSettings, Settings
from receiver.store.values import Created, Job, NewPrediction, Progress, Slots
from receiver.tokens import Tokens

log = structlog.get_logger("receiver")

_WINDOW: Final = 60.0
_MOST_SENDING: Final = 64
_MOST_LOOKS: Final = 32
_SUBMIT_TIMEOUT: Final = 60.0
"""Seconds for a queue submit, whole; past it the submit is ambiguous."""
_SYNC_TIMEOUT: Final = 600.0
_MARGIN: Final = 30.0
"""Seconds after a timeout before a row that is still `submitting` belongs to nobody."""
_LONGEST_NAP: Final = 5.0
_POLL_CAP: Final = 60.0
_PUSHED_POLL: Final = 30.0
_UNPUSHED_POLL: Final = 3.0
_RETRY_BASE: Final = 1.0
_RETRY_CAP: Final = 60.0
_MOST_FOLLOWS: Final = 3
_LARGEST_ANSWER: Final = 64 * 1024 * 1024

# Errors of httpx after which surely nothing was sent; after all others something may have been.
_UNSENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class Books(Protocol):
    """What outbound needs of the store."""

    async def create(self, new: NewPrediction) -> Created: ...
    async def begin_submits(self, slots: Slots) -> list[Job]: ...
    async def progress(self, progress: Progress) -> None: ...
    async def claim_due(self, now: float, hold_until: float, most: int) -> list[Job]: ...
    async def mark_cancel(self, prediction_id: str) -> None: ...
    async def job(self, prediction_id: str) -> Job | None: ...
    async def prediction(self, prediction_id: str) -> Prediction | None: ...
    async def find(self, provider: str, provider_id: str) -> str | None: ...
    async def next_due(self) -> float | None: ...
    async def next_queued(self, provider: str) -> float | None: ...
    async def stale(self, provider: str, before: float, most: int) -> list[str]: ...
    async def submit_times(self, provider: str, since: float) -> list[float]: ...


class Pace:
    """At most so many requests in any minute; the window slides."""

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._times: deque[float] = deque()

    def seed(self, times: list[float]) -> None:
        """Remember requests of an earlier process, so that a restart is no way around the limit."""
        self._times.extend(times)

    def room(self, now: float) -> int:
        """Say how many requests may be sent now."""
        if self._per_minute is None:
            return _MOST_SENDING
        while self._times and self._times[0] <= now - _WINDOW:
            self._times.popleft()
        return self._per_minute - len(self._times)

    def spend(self, now: float, requests: int = 1) -> None:
        if self._per_minute is not None:
            self._times.extend([now] * requests)

    def refund(self, requests: int) -> None:
        """Take back what was spent for requests that were not sent after all."""
        for _ in range(min(requests, len(self._times))):
            self._times.pop()

    def wait(self, now: float) -> float:
        """Say how many seconds until there is room again."""
        return 0.0 if self.room(now) > 0 else self._times[0] + _WINDOW - now


class Wire:
    """Sends an adapter's requests under the provider's pace, and reads the answers whole."""

    def __init__(
        self, client: httpx.AsyncClient, limits: ProviderSettings, clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._clock = clock
        self.pace = Pace(limits.requests_per_minute)
        self.paused_until = 0.0
        """Until then the provider wants no requests (its 429)."""

    async def send(self, request: httpx.Request, seconds: float) -> Answer:
        """Send without following redirects: they would carry the key elsewhere, or bill twice."""
        timeout = httpx.Timeout(10.0, read=seconds).as_dict()
        request.extensions = {**request.extensions, "timeout": timeout}
        async with asyncio.timeout(seconds):
            response = await self._client.send(request, follow_redirects=False, stream=True)
            body = await _read_capped(response)
        return Answer(response.status_code, response.headers, body, self._clock())

    async def ask(self, request: httpx.Request) -> Answer:
        """Send a request that can be repeated, or raise Unreadable when it is not the time."""
        now = self._clock()
        self.pace.spend(now)
        try:
            answer = await self.send(request, _SUBMIT_TIMEOUT)
        except (httpx.HTTPError, TimeoutError) as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        if answer.status == httpx.codes.TOO_MANY_REQUESTS:
            self.pause(retry_after(answer) or _RETRY_BASE)
            raise Unreadable("HTTP 429")
        return answer

    def pause(self, seconds: float) -> None:
        self.paused_until = max(self.paused_until, self._clock() + seconds)

    def wait(self) -> float:
        """Say how many seconds until a request may be sent."""
        now = self._clock()
        return max(self.paused_until - now, self.pace.wait(now), 0.0)


async def _read_capped(response: httpx.Response) -> bytes:
    body = bytearray()
    try:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > _LARGEST_ANSWER:
                raise Unreadable(f"an answer of more than {_LARGEST_ANSWER} bytes")
    finally:
        await response.aclose()
    return bytes(body)


class Outbound:
    """Everything we ask of providers."""

    def __init__(
        self,
        store: Books,
        inbox: Inbox,
        providers: Mapping[str, Provider],
        settings: Settings,
        tokens: Tokens,
        client: httpx.AsyncClient,
        *,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._inbox = inbox
        self._providers = providers
        self._settings = settings
        self._clock = clock
        self._chance = chance
        self._schedule = Schedule(settings, clock, chance)
        self._lanes: dict[str, _Lane] = {}
        self._wires: dict[str, Wire] = {}
        for name, provider in providers.items():
            limits = settings.providers[name]
            wire = self._wires[name] = Wire(client, limits, clock)
            if limits.key is not None:
                self._lanes[name] = _Lane(
                    provider, limits, wire, store, inbox, tokens, settings, self._schedule, clock
                )
        self._looks: set[asyncio.Task[None]] = set()
        self._awake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def listen_first(self, name: str, ready: Callable[[], Awaitable[bool]]) -> None:
        """Make a provider's submits wait for its stream; `ready` says whether it is connected."""
        self._lanes[name].ready = ready

    async def start(self) -> None:
        for lane in self._lanes.values():
            await lane.recover()
        self._tasks = [asyncio.create_task(lane.run()) for lane in self._lanes.values()]
        self._tasks.append(asyncio.create_task(self._watch()))

    async def stop(self) -> None:
        """Stop; a submit that is under way is left to the next start, as unconfirmed."""
        for lane in self._lanes.values():
            await lane.drain()
        for task in [*self._tasks, *self._looks]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._looks, return_exceptions=True)

    def changed(self, provider: str, _prediction_id: str, verdict: str) -> None:
        """Hear from the inbox: an end frees a place, `ask` wants a look now."""
        if verdict == "ask":
            self._awake.set()
        elif verdict == "accepted" and provider in self._lanes:
            self._lanes[provider].awake.set()

    def look_now(self) -> None:
        """Hear that something may have fallen due."""
        self._awake.set()

    async def submit(
        self,
        provider: str,
        model: str,
        input: dict[str, Any],
        *,
        metadata: dict[str, Any] | None = None,
        mode: Mode = "queue",
        parent_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Prediction:
        """Store a prediction and submit it, or leave it `queued` if there is no room.

        Raises Problem for what could never be submitted, and for a key used for something else.
        """
        lane = self._lane(provider)
        lane.provider.check(model, input)
        now = self._clock()
        new = NewPrediction(
            id=new_id("pred", now),
            provider=provider,
            model=model,
            mode=mode,
            input=input,
            metadata=metadata or {},
            parent_id=parent_id,
            idempotency_key=idempotency_key,
            fingerprint=fingerprint(provider, model, input, metadata or {}, mode),
            created_at=now,
        )
        created = await self._store.create(new)
        if created.fingerprint != new.fingerprint and parent_id is None:
            raise Problem(
                409,
                "idempotency-conflict",
                "this Idempotency-Key was used for another request",
                prediction_id=created.prediction_id,
            )
        if created.is_new:
            await lane.send_now(created.prediction_id)
        return await self._read(created.prediction_id)

    async def cancel(self, prediction_id: str) -> Prediction:
        """Cancel at the provider, then ask what came of it: the answer to that is what counts."""
        job = await self._job(prediction_id)
        if job.status is Status.QUEUED:
            error = Error(code="canceled", message="canceled before it was submitted")
            taken = await self._inbox.verdict(
                job.provider, prediction_id, error, only_from=frozenset({Status.QUEUED})
            )
            if taken.verdict == "accepted":
                return await self._read(prediction_id)
            job = await self._job(prediction_id)
        if job.status is Status.CANCELED:
            return await self._read(prediction_id)
        if job.status in TERMINAL:
            raise Problem(409, "already-ended", f"the prediction has already {job.status}")
        if job.status is Status.SUBMITTING:
            await self._store.mark_cancel(prediction_id)  # the lane cancels once it has the id
        elif job.ticket.provider_id is None:
            raise Problem(
                409,
                "unconfirmed",
                "the submit was not confirmed, so there is no provider's id to cancel by",
            )
        else:
            await self._cancel_at_provider(job)
        return await self._read(prediction_id)

    async def details(self, provider: str, model: str) -> Any:
        """Fetch the provider's own description of a model."""
        lane = self._lane(provider)
        request = lane.provider.details(model)
        if request is None:
            raise Problem(404, "no-model-details", f"{provider} does not describe single models")
        try:
            answer = await self._wires[provider].ask(request)
            body = msgspec.json.decode(answer.body)
        except (Unreadable, msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise Problem(502, "provider-unavailable", f"{provider} did not answer") from error
        if answer.status != httpx.codes.OK:
            status = 404 if answer.status == httpx.codes.NOT_FOUND else 502
            raise Problem(status, "no-model-details", f"{provider} answered {answer.status}")
        return body

    async def _cancel_at_provider(self, job: Job) -> None:
        lane = self._lane(job.provider)
        try:
            answer = await self._wires[job.provider].ask(lane.provider.cancel(job.ticket))
        except Unreadable as error:
            log.warning("cancel.failed", prediction=job.ticket.id, reason=str(error))
            raise Problem(
                502, "provider-unavailable", f"{job.provider} did not answer; try again"
            ) from error
        if answer.status < httpx.codes.BAD_REQUEST:
            await self._store.mark_cancel(job.ticket.id)
        await self._look(await self._job(job.ticket.id))

    # --- asking about what is overdue ---

    async def _watch(self) -> None:
        while True:
            self._awake.clear()
            try:
                nap = await self._look_around()
            except StoreUnavailable:
                nap = 1.0
            try:
                async with asyncio.timeout(min(max(nap, 0.0), _LONGEST_NAP)):
                    await self._awake.wait()
            except TimeoutError:
                continue

    async def _look_around(self) -> float:
        """Start a look at everything that is due; give the seconds until the next."""
        now = self._clock()
        for provider in self._providers.keys() - self._lanes.keys():
            before = now - self._settings.prediction_timeout
            for prediction_id in await self._store.stale(provider, before, _MOST_LOOKS):
                await self._expire_unsent(provider, prediction_id)
        room = _MOST_LOOKS - len(self._looks)
        if room <= 0:
            return _LONGEST_NAP
        for job in await self._store.claim_due(now, now + _SUBMIT_TIMEOUT + _MARGIN, room):
            task = asyncio.create_task(self._look_safely(job))
            self._looks.add(task)
            task.add_done_callback(self._looked)
        next_due = await self._store.next_due()
        return _LONGEST_NAP if next_due is None else next_due - self._clock()

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looks.discard(task)
        self._awake.set()

    async def _look_safely(self, job: Job) -> None:
        try:
            await self._look(job)
        except StoreUnavailable:
            return  # the row is due again when its hold ends
        except Exception:
            log.exception("task.failed", prediction=job.ticket.id)

    async def _look(self, job: Job) -> None:
        """See to one due prediction; whatever happens, it is due again or at its end."""
        now = self._clock()
        if job.status in TERMINAL or job.status is Status.QUEUED:
            return
        if job.status is Status.SUBMITTING:
            # Held well beyond the submit's time: whoever was submitting is gone.
            await self._store.progress(Progress(id=job.ticket.id, cause="ambiguous", due_at=now))
            return
        over = job.deadline_at is not None and job.deadline_at <= now
        wait = 0.0 if job.provider not in self._lanes else self._wires[job.provider].wait()
        if wait > 0 and not over:
            await self._again(job, now + wait)
        elif await self._ask(job):
            return
        elif over:
            await self._expire(job)
        else:
            await self._again(job, self._schedule.next_poll(job))

    async def _again(self, job: Job, due_at: float) -> None:
        if job.deadline_at is not None:
            due_at = min(due_at, max(job.deadline_at, self._clock()))
        await self._store.progress(Progress(id=job.ticket.id, cause="looked", due_at=due_at))

    async def _ask(self, job: Job) -> bool:
        """Ask the provider; True if that ended the prediction."""
        if job.provider not in self._lanes:
            return False
        try:
            if job.ticket.provider_id is None:
                return await self._search(job)
            outcome, body = await self._poll(job)
            if outcome.kind == "missing" and job.ticket.cancel_requested:
                error = Error(code="canceled", message="canceled; the provider forgot it")
                outcome = Outcome(kind="canceled", error=error)
            taken = await self._inbox.learned(job.provider, job.ticket.id, "poll", outcome, body)
        except (Unreadable, Unproved) as error:
            log.warning(
                "poll.failed", provider=job.provider, prediction=job.ticket.id, reason=str(error)
            )
            return False
        return taken.status in TERMINAL

    async def _poll(self, job: Job) -> tuple[Outcome, bytes]:
        provider = self._providers[job.provider]
        wire = self._wires[job.provider]
        answer = await wire.ask(provider.poll(job.ticket))
        outcome = provider.polled(job.ticket, answer)
        for _ in range(_MOST_FOLLOWS):
            if not isinstance(outcome, Follow):
                return outcome, answer.body
            answer = await wire.ask(outcome.request)
            outcome = outcome.read(job.ticket, answer)
        raise Unreadable("sent on too often")

    async def _search(self, job: Job) -> bool:
        """Look for what an ambiguous submit may have left at the provider."""
        provider = self._providers[job.provider]
        if not isinstance(provider, Streamed) or job.ticket.mode != "queue":
            return False
        for request in provider.search(job.ticket):
            answer = await self._wires[job.provider].ask(request)
            for provider_id in provider.found(job.ticket, answer):
                if await self._store.find(job.provider, provider_id) is None:
                    ticket = msgspec.structs.replace(job.ticket, provider_id=provider_id)
                    return await self._ask(msgspec.structs.replace(job, ticket=ticket))
        return False

    async def _expire(self, job: Job) -> None:
        seconds = self._settings.prediction_timeout
        if job.status is Status.UNCONFIRMED:
            error = Error(
                code="unconfirmed",
                message=f"the submit got no answer, and nothing was heard for {seconds:g} s",
            )
        else:
            error = Error(code="expired", message=f"no outcome within {seconds:g} s")
        log.warning("prediction.expired", prediction=job.ticket.id, code=error.code)
        await self._inbox.verdict(
            job.provider, job.ticket.id, error, only_from=frozenset({job.status})
        )

    async def _expire_unsent(self, provider: str, prediction_id: str) -> None:
        """End what waits for a provider that has been off for too long."""
        error = Error(code="expired", message=f"{provider} has no API key here")
        log.warning("prediction.expired", prediction=prediction_id, code=error.code)
        await self._inbox.verdict(
            provider, prediction_id, error, only_from=frozenset({Status.QUEUED})
        )

    def _lane(self, provider: str) -> _Lane:
        if provider not in self._providers:
            raise Problem(
                422, "unknown-provider", f"provider must be one of {_list(self._providers)}"
            )
        if provider not in self._lanes:
            raise Problem(
                422, "provider-off", f"{provider} has no API key here; set it and start again"
            )
        return self._lanes[provider]

    async def _job(self, prediction_id: str) -> Job:
        job = await self._store.job(prediction_id)
        if job is None:
            raise Problem(404, "not-found", "no such prediction")
        return job

    async def _read(self, prediction_id: str) -> Prediction:
        prediction = await self._store.prediction(prediction_id)
        if prediction is None:
            raise Problem(404, "not-found", "no such prediction")
        return prediction


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))


def fingerprint(
    provider: str,
    model: str,
    input: dict[str, Any],
    metadata: dict[str, Any],
    mode: str,
) -> str:
    """Digest what a submit means, whatever the order and spacing of its JSON."""
    text = msgspec.json.encode([provider, model, input, metadata, mode], order="deterministic")
    return hashlib.sha256(text).hexdigest()


class Schedule:
    """When to ask about a prediction that nobody told us about."""

    def __init__(
        self, settings: Settings, clock: Callable[[], float], chance: Callable[[], float]
    ) -> None:
        self._pushed = settings.poll_after or _PUSHED_POLL
        self._unpushed = min(self._pushed, _UNPUSHED_POLL)
        self._clock = clock
        self._chance = chance

    def first_poll(self, *, push_expected: bool) -> float:
        return self._clock() + (self._pushed if push_expected else self._unpushed)

    def next_poll(self, job: Job) -> float:
        """Back off from the short interval to 60 s, a tenth more or less."""
        seconds = min(_POLL_CAP, self._unpushed * 2.0 ** min(job.polls, 32))
        return self._clock() + seconds * (0.9 + 0.2 * self._chance())

    def next_submit(self, job: Job, wanted: float | None) -> float:
        """Back off between submits; never earlier than the provider asked."""
        seconds = backoff(job.submits, _RETRY_BASE, _RETRY_CAP, 0.5 + self._chance() / 2)
        return self._clock() + (seconds if wanted is None else wanted)


class _Lane:
    """The submits of one provider, in order, as many at once as it allows."""

    def __init__(
        self,
        provider: Provider,
        limits: ProviderSettings,
        wire: Wire,
        store: Books,
        inbox: Inbox,
        tokens: Tokens,
        settings: Settings,
        schedule: Schedule,
        clock: Callable[[], float],
    ) -> None:
        self.provider = provider
        self.awake = asyncio.Event()
        self.ready: Callable[[], Awaitable[bool]] | None = None
        self._limits = limits
        self._wire = wire
        self._store = store
        self._inbox = inbox
        self._tokens = tokens
        self._settings = settings
        self._schedule = schedule
        self._clock = clock
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._stopping = False

    async def recover(self) -> None:
        """Count what an earlier process submitted within this minute."""
        if self._limits.requests_per_minute is not None:
            since = self._clock() - _WINDOW
            self._wire.pace.seed(await self._store.submit_times(self.provider.name, since))

    async def run(self) -> None:
        while True:
            self.awake.clear()
            try:
                nap = await self.begin()
            except StoreUnavailable:
                nap = 1.0
            try:
                async with asyncio.timeout(min(max(nap, 0.01), _LONGEST_NAP)):
                    await self.awake.wait()
            except TimeoutError:
                continue

    async def drain(self) -> None:
        """Begin no more, and let the submits under way have a moment to be answered."""
        self._stopping = True
        if self._sending:
            await asyncio.wait(self._sending.values(), timeout=1.5)
        for task in self._sending.values():
            task.cancel()
        await asyncio.gather(*self._sending.values(), return_exceptions=True)

    async def send_now(self, prediction_id: str) -> None:
        """Begin what there is room for; if this prediction is begun, see its submit through."""
        await self.begin()
        task = self._sending.get(prediction_id)
        if task is not None:
            await asyncio.wait({task})

    async def begin(self) -> float:
        """Begin as many submits as there is room for; give the seconds until there may be more."""
        wait = self._wire.wait()
        now = self._clock()
        room = min(_MOST_SENDING - len(self._sending), self._wire.pace.room(now))
        if wait > 0 or room <= 0 or self._stopping:
            return wait or _LONGEST_NAP
        # Spent before the store answers, so that two who begin at once share one allowance.
        self._wire.pace.spend(now, room)
        jobs: list[Job] = []
        try:
            jobs = await self._store.begin_submits(
                Slots(
                    provider=self.provider.name,
                    now=now,
                    most=room,
                    max_in_flight=self._limits.max_in_flight,
                    hold_until=now + _SYNC_TIMEOUT + _MARGIN,
                    timeout=self._settings.prediction_timeout,
                )
            )
        finally:
            self._wire.pace.refund(room - len(jobs))
        for job in jobs:
            task = asyncio.create_task(self._submit_safely(job))
            self._sending[job.ticket.id] = task
            task.add_done_callback(lambda _, key=job.ticket.id: self._sent(key))  # type: ignore[misc]
        next_queued = await self._store.next_queued(self.provider.name)
        if next_queued is None or next_queued <= self._clock():
            return _LONGEST_NAP  # nothing waits, or it waits for a place: an end wakes us
        return next_queued - self._clock()

    def _sent(self, prediction_id: str) -> None:
        self._sending.pop(prediction_id, None)
        self.awake.set()

    async def _submit_safely(self, job: Job) -> None:
        try:
            await self._submit(job)
        except Exception:
            log.exception("task.failed", prediction=job.ticket.id)

    async def _submit(self, job: Job) -> None:
        if job.deadline_at is not None and job.deadline_at <= self._clock():
            await self._ended_unsent(job, Error(code="expired", message="every submit was put off"))
            return
        heard = await self.ready() if self.ready else False
        receipt, body = await self._send(job)
        log_fields = {"provider": self.provider.name, "prediction": job.ticket.id}
        match receipt:
            case Accepted():
                await self._accepted(
                    job, receipt, push_expected=heard or self._hook(job) is not None
                )
                log.info("submit.accepted", provider_id=receipt.provider_id, **log_fields)
            case Outcome():
                await _insist(
                    lambda: self._inbox.learned(
                        self.provider.name, job.ticket.id, "sync", receipt, body
                    )
                )
            case Refused(message):
                log.warning("submit.rejected", reason=message, **log_fields)
                await self._ended_unsent(job, Error(code="rejected", message=message), body)
            case Postponed(message, after):
                log.warning("submit.postponed", reason=message, after=after, **log_fields)
                if receipt.whole_provider:
                    self._wire.pause(after or _RETRY_BASE)
                due_at = self._schedule.next_submit(job, after)
                await self._progress(job, "postponed", due_at)
            case Ambiguous(message):
                log.warning("submit.unconfirmed", reason=message, **log_fields)
                await self._progress(job, "ambiguous", self._schedule.next_poll(job))

    async def _send(self, job: Job) -> tuple[Receipt, bytes]:
        seconds = _SYNC_TIMEOUT if job.ticket.mode == "sync" else _SUBMIT_TIMEOUT
        try:
            request = self.provider.request(job.ticket, self._hook(job))
        except (ReceiverError, ValueError, httpx.InvalidURL) as error:
            return Refused(str(error)), b""
        try:
            answer = await self._wire.send(request, seconds)
        except _UNSENT as error:
            return Postponed(f"{type(error).__name__}: {error}"), b""
        except (httpx.HTTPError, TimeoutError, Unreadable) as error:
            return Ambiguous(f"{type(error).__name__}: {error}"), b""
        try:
            return self.provider.accepted(job.ticket, answer), answer.body
        except Unreadable as error:
            return Ambiguous(f"HTTP {answer.status}, {error}"), answer.body

    def _hook(self, job: Job) -> Hook | None:
        if self._settings.public_url is None or self.provider.proof == "none":
            return None
        if job.ticket.mode == "sync":
            return None
        token = self._tokens.callback(self.provider.name, job.ticket.id)
        url = f"{self._settings.public_url}/webhooks/{self.provider.name}/{token}"
        return Hook(url, self._tokens.webhook_secrets(job.ticket.id)[0].decode())

    async def _accepted(self, job: Job, receipt: Accepted, *, push_expected: bool) -> None:
        due_at = self._schedule.first_poll(push_expected=push_expected)
        await self._progress(job, "accepted", due_at, receipt)
        await self._inbox.unpark(self.provider.name, receipt.provider_id, job.ticket.id)
        now = await self._store.job(job.ticket.id)
        if now is not None and now.ticket.cancel_requested and now.status not in TERMINAL:
            try:
                await self._wire.ask(self.provider.cancel(now.ticket))
            except Unreadable as error:
                log.warning("cancel.failed", prediction=job.ticket.id, reason=str(error))
            await self._progress(job, "looked", self._clock())

    async def _progress(
        self, job: Job, cause: Any, due_at: float, receipt: Accepted | None = None
    ) -> None:
        progress = Progress(
            id=job.ticket.id,
            cause=cause,
            due_at=due_at,
            provider_id=receipt.provider_id if receipt else None,
            links=receipt.links if receipt else {},
        )
        await _insist(lambda: self._store.progress(progress))

    async def _ended_unsent(self, job: Job, error: Error, body: bytes = b"") -> None:
        """End what the provider did not take; `body` is its answer, where there was one."""
        await _insist(
            lambda: self._inbox.verdict(
                self.provider.name,
                job.ticket.id,
                error,
                only_from=frozenset({Status.SUBMITTING}),
                channel="sync" if body else None,
                body=body,
            )
        )


async def _insist(write: Callable[[], Awaitable[Any]]) -> None:
    """Repeat a write until the store takes it: the provider has answered, and will not again."""
    while True:
        try:
            await write()
        except StoreUnavailable:
            await asyncio.sleep(0.5)
        else:
            return
