"""Submit, cancel and describe: what callers ask of us, and we of providers.

A prediction is `queued` in the store before anything is sent. Nothing here settles one: every
answer goes through the inbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import httpx
import msgspec
import structlog

from receiver.model.errors import Problem, StoreUnavailable, Unreadable
from receiver.model.ids import new_id
from receiver.model.states import TERMINAL
from receiver.model.values import Error, Mode, Prediction, Status
from receiver.observability.events import Telemetry
from receiver.observability.tracing import OFF, Tracing
from receiver.predictions.inbox import Inbox
from receiver.predictions.poller import Poller
from receiver.predictions.provider_client import Busy, ProviderClient
from receiver.predictions.submitter import BACKSTOP, LONGEST_NAP, Schedule, Submitter
from receiver.predictions.tokens import Tokens
from receiver.providers.adapter import Provider, ProviderResponse, decode
from receiver.settings import Settings
from receiver.store.facade import Store
from receiver.store.leases import LeaseRequest
from receiver.store.predictions import Job, NewPrediction

log = structlog.get_logger("receiver")

_CAUGHT_UP: Final = 60.0
"""Seconds in which no other process that starts needs to ask about everything again."""


class PredictionService:
    """Everything we ask of providers."""

    def __init__(
        self,
        store: Store,
        inbox: Inbox,
        providers: Mapping[str, Provider],
        settings: Settings,
        tokens: Tokens,
        client: httpx.AsyncClient,
        *,
        telemetry: Telemetry,
        alone: bool = True,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] | None = None,
        chance: Callable[[], float] = random.random,
        tracing: Tracing = OFF,
    ) -> None:
        self._alone = alone
        self._tracing = tracing
        self._store = store
        self._inbox = inbox
        self._providers = providers
        self._clock = clock
        schedule = Schedule(settings, clock, chance)
        self._lanes: dict[str, Submitter] = {}
        self._wires: dict[str, ProviderClient] = {}
        for name, provider in providers.items():
            limits = settings.providers[name]
            wire = ProviderClient(
                name, limits.requests_per_minute, client, store.limits, clock, monotonic
            )
            self._wires[name] = wire
            if limits.key is not None:
                self._lanes[name] = Submitter(
                    provider,
                    limits,
                    wire,
                    store,
                    inbox,
                    tokens,
                    settings,
                    schedule,
                    clock,
                    telemetry,
                    LONGEST_NAP if alone else BACKSTOP,
                    tracing,
                )
        self._overdue = Poller(
            store,
            inbox,
            providers,
            self._lanes,
            self._wires,
            schedule,
            timeout=settings.prediction_timeout,
            clock=clock,
            telemetry=telemetry,
            alone=alone,
            tracing=tracing,
        )
        for lane in self._lanes.values():
            lane.on_due = self._overdue.due
        self._tasks: list[asyncio.Task[None]] = []

    def listen_first(self, name: str, ready: Callable[[], Awaitable[bool]]) -> None:
        """Make a provider's submits wait for its stream; `ready` says whether it is connected."""
        self._lanes[name].ready = ready

    async def start(self) -> None:
        """Catch up with what happened meanwhile, then submit and look for as long as we run."""
        # An earlier process may have died over a look, and callbacks have found nobody at home.
        if self._alone or await self._is_first():
            for name in self._lanes:
                await self._store.predictions.hasten(name, self._clock())
        self._tasks = [asyncio.create_task(lane.run()) for lane in self._lanes.values()]
        self._tasks.append(asyncio.create_task(self._overdue.run()))

    async def _is_first(self) -> bool:
        """Return whether no other process has caught up within a minute: ten may start at once."""
        now = self._clock()
        role = LeaseRequest(
            name="catch-up", owner=new_id("start", now), now=now, until=now + _CAUGHT_UP
        )
        return await self._store.leases.hold(role)

    async def stop(self) -> None:
        """Stop; a submit that is under way is left to the next start, as unconfirmed."""
        await asyncio.gather(*(lane.stop() for lane in self._lanes.values()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._overdue.drop()

    async def sweep_submits(self) -> None:
        """See to what waits for room at a provider, whoever was going to."""
        for lane in self._lanes.values():
            await lane.begin()

    async def sweep_looks(self) -> None:
        """See to what is due for a look, whoever was going to."""
        await self._overdue.look_around()

    async def drain(self, until: float, last_start: float) -> None:
        """Submit and look at what is due, until nothing is, or until then by the loop's clock.

        Nothing is begun after `last_start`.
        """
        clock = asyncio.get_running_loop().time
        while True:
            if clock() < last_start:
                await self.sweep_submits()
                await self.sweep_looks()
            tasks = self._overdue.under_way()
            for lane in self._lanes.values():
                tasks += lane.under_way()
            left = until - clock()
            if not tasks or left <= 0:
                return
            await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    @property
    def submits(self) -> int:
        """How many submits were begun here."""
        return sum(lane.submits for lane in self._lanes.values())

    @property
    def looks(self) -> int:
        """How many looks were begun here."""
        return self._overdue.looks

    def changed(self, provider: str, _prediction_id: str, verdict: str) -> None:
        """Hear from the inbox: an end frees a place, `ask` wants a look now."""
        if verdict == "ask":
            self._overdue.awake.set()
        elif verdict == "accepted" and provider in self._lanes:
            self._lanes[provider].freed()

    def look_now(self) -> None:
        """Hear that something may have fallen due."""
        self._overdue.awake.set()

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
            trace=self._tracing.current(),
        )
        created = await self._store.predictions.create(new)
        if created.fingerprint is None and parent_id is None:
            raise Problem(
                409,
                "erased",
                "the prediction of this Idempotency-Key was erased: to ask anew, use a new key",
                prediction_id=created.prediction_id,
            )
        if created.fingerprint != new.fingerprint and parent_id is None:
            raise Problem(
                409,
                "idempotency-conflict",
                "this Idempotency-Key was used for another request",
                prediction_id=created.prediction_id,
            )
        if created.is_new:
            # From here the row is stored and will be sent: a disk that fails now is no refusal.
            with contextlib.suppress(StoreUnavailable):
                await self._begin(lane, created.prediction_id, mode)
        return await self._read(created.prediction_id)

    async def _begin(self, lane: Submitter, prediction_id: str, mode: Mode) -> None:
        """See a queue submit through; a blocking call may take minutes, so only begin it."""
        if mode == "queue":
            await lane.send_now(prediction_id)
        else:
            await lane.begin()

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
            await self._store.predictions.mark_cancel(
                prediction_id
            )  # the lane cancels once it has the id
            job = await self._job(prediction_id)
            if job.status is Status.PROCESSING and job.ticket.provider_id is not None:
                await self._cancel_at_provider(job)  # it had it before it could see the mark
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
            answer = await self._ask(provider, request)
            body = decode(answer.body)
        except Unreadable as error:
            raise Problem(502, "provider-unavailable", f"{provider} did not answer") from error
        if answer.status != httpx.codes.OK:
            if answer.status == httpx.codes.NOT_FOUND:
                raise Problem(404, "no-model-details", f"{provider} knows no such model")
            raise Problem(502, "provider-unavailable", f"{provider} answered {answer.status}")
        return body

    async def _cancel_at_provider(self, job: Job) -> None:
        lane = self._lane(job.provider)
        try:
            answer = await self._ask(job.provider, lane.provider.cancel(job.ticket))
        except Unreadable as error:
            log.warning("cancel.failed", prediction=job.ticket.id, reason=str(error))
            raise Problem(
                502, "provider-unavailable", f"{job.provider} did not answer; try again"
            ) from error
        if answer.status < httpx.codes.BAD_REQUEST:
            await self._store.predictions.mark_cancel(job.ticket.id)
        await self._overdue.look(await self._job(job.ticket.id))

    async def _ask(self, provider: str, request: httpx.Request) -> ProviderResponse:
        """Ask now, for a caller who waits, or refuse while the provider's limits leave no room."""
        try:
            return await self._wires[provider].ask(request)
        except Busy as busy:
            wait = math.ceil(busy.seconds)
            detail = f"{provider} takes no more requests for {wait} s; try again then"
            raise Problem(429, "provider-busy", detail, retry_after=wait) from busy

    def _lane(self, provider: str) -> Submitter:
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
        job = await self._store.predictions.job(prediction_id)
        if job is None:
            raise Problem(404, "not-found", "no such prediction")
        return job

    async def _read(self, prediction_id: str) -> Prediction:
        prediction = await self._store.predictions.get(prediction_id)
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
