"""The prediction service: submit and cancel predictions, describe models.

A prediction is `queued` in the store before anything is sent. The service never ends one:
every answer goes through the inbox.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx
import msgspec
import structlog

from receiver.model.costs import Account
from receiver.model.errors import Problem, StoreUnavailable, Unreadable
from receiver.model.ids import new_id
from receiver.model.recipes import Limit
from receiver.model.requests import SubmitFields, SubmitRequest, check_json
from receiver.model.states import TERMINAL
from receiver.model.text import did_you_mean
from receiver.model.values import Error, Mode, Order, Prediction, Status
from receiver.observability.runtime import Runtime
from receiver.predictions.inbox import Inbox
from receiver.predictions.limits import Limits, refusal
from receiver.predictions.poller import Poller
from receiver.predictions.provider_client import Busy
from receiver.predictions.submitter import Submitter
from receiver.providers import DECLARED
from receiver.providers.adapter import Describing, ProviderResponse, Stopping
from receiver.providers.parsing import decode
from receiver.store.budgets import Excess
from receiver.store.facade import Store
from receiver.store.predictions import CreateResult, Job, NewPrediction

log = structlog.get_logger("receiver")

_WHILE_ASKED: Final = 2.0
"""Seconds for which an order's request may wait for its submit: chats want answers within three."""
_DIGESTED: Final = ("provider", "model", "input", "metadata", "mode", "reply_to")
"""Fields in every digest of a submit; newer fields are in it only if they are given."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prediction to be created, unless that would exceed a limit."""

    submitter: Submitter
    row: NewPrediction
    limits: tuple[Limit, ...]
    """The limits of the row's bounds, in their order."""

    def refusal(self, excess: Excess) -> Problem:
        """Return the Problem of a prediction that exceeds a limit."""
        return refusal(self.limits[excess.bound], excess, self.row.created_at)


class PredictionService:
    """The operations of callers: submit, cancel, read, and describe a provider's models."""

    def __init__(
        self,
        store: Store,
        inbox: Inbox,
        submitters: Mapping[str, Submitter],
        poller: Poller,
        limits: Limits,
        runtime: Runtime,
        *,
        begins: bool,
    ) -> None:
        """Create the service; without `begins` no submit may continue after its request."""
        self.begins = begins
        self._limits = limits
        self._store = store
        self._inbox = inbox
        self._submitters = submitters
        self._poller = poller
        self._tracing = runtime.tracing
        self._clock = runtime.clock

    async def submit(self, request: SubmitRequest) -> Prediction:
        """Store a prediction and submit it, or leave it `queued` if there is no room.

        Raises Problem for a request that can never be submitted, an exceeded limit, and a key that
        was used for another request or an erased prediction.
        """
        prepared = await self.prepare(request)
        created = await self._create(prepared)
        # A handler's submit gets the prediction of its key, whatever became of it.
        if request.parent_id is None and created.fingerprint != prepared.row.fingerprint:
            raise _conflict(created)
        if created.is_new:
            # The row is stored and will be submitted: a store that fails now is no refusal.
            with contextlib.suppress(StoreUnavailable):
                if request.mode == "queue":
                    await prepared.submitter.send_now(created.prediction_id)
                else:  # a blocking call may take minutes
                    await prepared.submitter.begin()
        return await self.read(created.prediction_id)

    async def place(self, request: SubmitRequest) -> Prediction:
        """Store a prediction, and leave its submit to the submitter.

        A key returns the prediction stored under it, until that is deleted, for any request.
        Raises Problem for a request that can never be submitted, and for an exceeded limit.
        """
        prepared = await self.prepare(request)
        created = await self._create(prepared)
        # Also for a repeat: the first call may have died before this step.
        await self.begin_placed(prepared.submitter, request.mode)
        return await self.read(created.prediction_id)

    async def begin_placed(self, submitter: Submitter, mode: Mode = "queue") -> None:
        """Wake the submitter; if no work may continue after the request, submit now.

        Then a blocking call, which may take minutes, is left to a drain.
        """
        if self.begins:
            submitter.wake()
        elif mode == "queue":
            await submitter.send_all(_WHILE_ASKED)

    async def prepare(
        self,
        request: SubmitRequest,
        order: Order | None = None,
        *,
        price: int | None = None,
        latest_at: float | None = None,
    ) -> Prepared:
        """Return a new row and its submitter; raise Problem if it can never be submitted.

        `price` is that of the order's recipe.
        """
        submitter = self.submitter(request.provider)
        check_json("input", request.input, request.metadata)
        submitter.provider.check(request.model, request.input)
        if request.parent_id is not None:  # a handler's submit counts for the first caller
            parent = await self._store.predictions.account(request.parent_id)
            request = msgspec.structs.replace(request, caller=Account.read(parent).key)
        now = self._clock()
        terms = self._limits.terms(request, order, price, now)
        expected, source = terms.price or (None, None)
        row = NewPrediction(
            **{name: getattr(request, name) for name in SubmitFields.__struct_fields__},
            id=new_id("pred", now),
            parent_id=request.parent_id,
            idempotency_key=request.key,
            fingerprint=fingerprint(request) if order is None else None,
            created_at=now,
            trace=self._tracing.current(),
            private=request.private,
            order=order,
            latest_at=latest_at,
            price=expected,
            price_source=source,
            account=terms.account,
            bounds=terms.bounds,
        )
        return Prepared(submitter=submitter, row=row, limits=terms.limits)

    async def _create(self, prepared: Prepared) -> CreateResult:
        created = await self._store.predictions.create(prepared.row)
        if created.excess is not None:
            raise prepared.refusal(created.excess)
        return created

    async def cancel(self, prediction_id: str) -> Prediction:
        """Cancel at the provider, then poll: the answer to the poll decides."""
        job = await self._job(prediction_id)
        if job.status is Status.QUEUED:
            error = Error(code="canceled", message="canceled before it was submitted")
            taken = await self._inbox.verdict(
                job.provider, prediction_id, error, only_from=frozenset({Status.QUEUED})
            )
            if taken.verdict == "accepted":
                return await self.read(prediction_id)
            job = await self._job(prediction_id)
        if job.status is Status.CANCELED:
            return await self.read(prediction_id)
        if job.status in TERMINAL:
            raise Problem(409, "already-ended", f"the prediction has already {job.status}")
        if job.status is Status.SUBMITTING:
            # The submitter cancels once it has the id.
            await self._store.predictions.mark_cancel(prediction_id)
            job = await self._job(prediction_id)
            if job.status is Status.PROCESSING and job.ticket.provider_id is not None:
                await self._cancel_at_provider(job)  # the id was stored before the mark
        elif job.ticket.provider_id is None:
            raise Problem(
                409,
                "unconfirmed",
                "the submit was not confirmed, so there is no provider's id to cancel by",
            )
        else:
            await self._cancel_at_provider(job)
        return await self.read(prediction_id)

    async def details(self, provider: str, model: str) -> Any:
        """Fetch the provider's own description of a model."""
        submitter = self.submitter(provider)
        adapter = submitter.provider
        request = adapter.details(model) if isinstance(adapter, Describing) else None
        if request is None:
            raise Problem(404, "no-model-details", f"{provider} does not describe single models")
        try:
            answer = await _ask(submitter, request)
            body = decode(answer.body)
        except Unreadable as error:
            raise Problem(502, "provider-unavailable", f"{provider} did not answer") from error
        if answer.status != httpx.codes.OK:
            if answer.status == httpx.codes.NOT_FOUND:
                raise Problem(404, "no-model-details", f"{provider} knows no such model")
            raise Problem(502, "provider-unavailable", f"{provider} answered {answer.status}")
        return body

    async def _cancel_at_provider(self, job: Job) -> None:
        submitter = self.submitter(job.provider)
        adapter = submitter.provider
        if not isinstance(adapter, Stopping):
            detail = f"{job.provider} has no way to cancel what it has taken"
            raise Problem(409, "cannot-cancel", detail)
        try:
            answer = await _ask(submitter, adapter.cancel(job.ticket))
        except Unreadable as error:
            log.warning("cancel.failed", prediction=job.ticket.id, reason=str(error))
            raise Problem(
                502, "provider-unavailable", f"{job.provider} did not answer; try again"
            ) from error
        if answer.status < httpx.codes.BAD_REQUEST:
            await self._store.predictions.mark_cancel(job.ticket.id)
        await self._poller.poll(await self._job(job.ticket.id))

    def submitter(self, provider: str) -> Submitter:
        """Return the submitter of a provider, or raise Problem if there is none."""
        if provider not in DECLARED:
            known, near = ", ".join(sorted(DECLARED)), did_you_mean(provider, DECLARED)
            raise Problem(422, "unknown-provider", f"provider must be one of {known}{near}")
        if provider not in self._submitters:
            cure = f"set {DECLARED[provider].key} and start again"
            raise Problem(422, "provider-off", f"{provider} has no API key here: {cure}")
        return self._submitters[provider]

    async def _job(self, prediction_id: str) -> Job:
        job = await self._store.predictions.job(prediction_id)
        if job is None:
            raise Problem(404, "not-found", "no such prediction")
        return job

    async def read(self, prediction_id: str) -> Prediction:
        """Return a prediction, or raise Problem if there is none."""
        prediction = await self._store.predictions.get(prediction_id)
        if prediction is None:
            raise Problem(404, "not-found", "no such prediction")
        return prediction


def _conflict(created: CreateResult) -> Problem:
    """Return the Problem of a key of another request, or of a prediction that was erased."""
    prediction_id = created.prediction_id
    if created.fingerprint is None:
        detail = "the prediction of this Idempotency-Key was erased: to ask anew, use a new key"
        return Problem(409, "erased", detail, prediction_id=prediction_id)
    detail = "this Idempotency-Key was used for another request"
    return Problem(409, "idempotency-conflict", detail, prediction_id=prediction_id)


async def _ask(submitter: Submitter, request: httpx.Request) -> ProviderResponse:
    """Send a request for a waiting caller; raise Problem if the limits leave no room now."""
    try:
        return await submitter.client.ask(request)
    except Busy as busy:
        wait = math.ceil(busy.seconds)
        detail = f"{submitter.provider.name} takes no more requests for {wait} s; try again then"
        raise Problem(429, "provider-busy", detail, retry_after=wait) from busy


def fingerprint(request: SubmitRequest) -> str:
    """Return a digest of a submit that does not depend on the order and spacing of its JSON."""
    fields = {name: getattr(request, name) for name in SubmitFields.__struct_fields__}
    first = [fields.pop(name) for name in _DIGESTED]
    later = {name: value for name, value in fields.items() if value is not None}
    text = msgspec.json.encode([*first, later] if later else first, order="deterministic")
    return hashlib.sha256(text).hexdigest()
