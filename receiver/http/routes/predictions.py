"""The routes `/v1/predictions` (submit, read, cancel, replay, erase, explain) and `/v1/models`."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Annotated, Any, Final, Literal

import msgspec
import structlog
from starlette.requests import Request

from receiver.deliveries.handlers import Facts
from receiver.http.body import prefer_wait
from receiver.http.declare import (
    BODY_PROBLEMS,
    EventName,
    PageSize,
    PredictionId,
    ProviderName,
    Reply,
    get,
    post,
)
from receiver.http.parts import Parts
from receiver.http.request_log import about
from receiver.http.selfstarting import CUT_OFF
from receiver.model.answers import ExplainedHandler, Explanation, Page, Redelivered, Time
from receiver.model.errors import Problem
from receiver.model.ids import prediction_id_of
from receiver.model.requests import ModelName, SubmitFields, SubmitRequest
from receiver.model.states import TERMINAL
from receiver.model.values import EventType, Prediction, Status
from receiver.observability.tracing import Span
from receiver.store.breakers import BreakerState
from receiver.store.erasure import Erased
from receiver.store.predictions import PredictionFilter

log = structlog.get_logger("receiver")

_SYNC_WAIT: Final = 60.0
_ASYNC: Final = re.compile(r"(?:^|,)\s*respond-async\s*(?:[,;]|$)", re.IGNORECASE)
_BEFORE_CUT_OFF: Final = 2.0
_MOST_GLOBS: Final = 20
_LONGEST_GLOB: Final = 300
"""Characters of one filter by metadata."""
REFUSALS: Final[dict[Erased, tuple[int, str, str]]] = {
    "missing": (404, "not-found", "no such prediction"),
    "living": (409, "not-ended", "the prediction has not ended: cancel it first, or wait"),
    "running": (
        409,
        "delivery-running",
        "a handler is at work on the prediction: erase it when that has ended",
    ),
}
_MISSING: Final = "no such prediction"
SENT: Final = ("Location", "Preference-Applied")
_FROM_PROVIDER: Final = (
    "unknown-provider",
    "provider-off",
    "provider-busy",
    "provider-unavailable",
)
GONE: Final = "no such handler is registered here any more"


class Submission(SubmitFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to submit. Model and input are sent to the provider as they are."""

    provider: ProviderName


class Waiting(msgspec.Struct, frozen=True, rename="pascal"):
    """The header that asks to wait for an outcome."""

    prefer: Annotated[str, msgspec.Meta(examples=["wait=5"])] | None = None
    """`wait=N`: wait for the outcome, for 1 to 60 seconds; `respond-async`: do not wait for a
    blocking call. Anything else is ignored (RFC 7240)."""


class Submitting(Waiting, frozen=True, rename={"prefer": "Prefer", "key": "Idempotency-Key"}):
    """The headers of a submit."""

    key: (
        Annotated[
            str,
            msgspec.Meta(
                pattern=r'^([!#-~]([ -~]{0,253}[!-~])?|"([ !#-\[\]-~]|\\["\\]){1,255}")$',
                examples=["order-42", '"order-42"'],
            ),
        ]
        | None
    ) = None
    """A repeat with the same key returns the same prediction, and sends nothing. Plain text, or a
    string of RFC 8941: `k` and `"k"` are the same key. The key of a submit must not begin with
    `in/`: plugins' routes submit by such keys."""


class PredictionsAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which predictions to list."""

    status: Status | None = None
    provider: ProviderName | None = None
    model: Annotated[str, msgspec.Meta(min_length=1, max_length=300)] | None = None
    """A shell glob, as in `fal-ai/*`."""
    since: Time | None = None
    """Only predictions made at this time or later."""
    limit: PageSize = 50
    cursor: PredictionId | None = None
    """The `next_cursor` of the page before."""


class ExplanationAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to explain."""

    type: Literal["succeeded", "failed", "canceled"] | None = None
    """Assume that the prediction has ended with this status."""


class PredictionRoutes:
    """The routes about predictions."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._service = parts.predictions.service
        self._deliveries = parts.deliveries
        self._runtime = parts.runtime
        self._stopping = parts.stopping

    @post(
        "/v1/predictions",
        {202: "it has not ended", 200: "it has ended"},
        problems=[
            *BODY_PROBLEMS,
            "unknown-provider",
            "provider-off",
            "invalid-model",
            "unsupported-input",
            "idempotency-conflict",
            "erased",
            "reply-to-refused",
            "over-limit",
            "over-budget",
            "price-unknown",
        ],
        sends=SENT,
    )
    async def submit(
        self, request: Request, body: Submission, headers: Submitting
    ) -> Reply[Prediction]:
        """Submit a prediction.

        It is stored before anything is sent. Its outcome is given to your handlers, and can be
        read at any time.
        """
        with self._runtime.tracing.request(request, "/v1/predictions") as span:
            check(body)
            await self._deliveries.check_reply_to(body.reply_to)
            wait = prefer_wait(headers.prefer or "")
            prediction = await self._service.submit(
                SubmitRequest(
                    **msgspec.structs.asdict(body),
                    key=_not_of_plugins(key_of(headers.key)),
                    caller=caller_of(request),
                )
            )
            # If nothing continues after the answer, the answer would cut off a blocking call.
            is_async = self._service.begins and _ASYNC.search(headers.prefer or "")
            if wait is None and body.mode == "sync" and not is_async:
                wait = _SYNC_WAIT
            return await self.reply(request, span, prediction, wait, f"predictions/{prediction.id}")

    async def reply(
        self,
        request: Request,
        span: Span,
        prediction: Prediction,
        seconds: float | None,
        location: str,
    ) -> Reply[Prediction]:
        """Return the reply to a submit or an order, when it has ended or after `seconds`."""
        span.note(prediction=prediction.id)
        about(request.scope, prediction=prediction.id, provider=prediction.provider, **span.ids)
        reply = reply_with(await self._wait(prediction, seconds), seconds, location)
        span.answered(reply.status)
        return reply

    @get(
        "/v1/predictions",
        "a page of predictions; it may hold fewer than `limit`: go on by `next_cursor`",
        problems=["invalid-request"],
    )
    async def list_predictions(
        self, query: PredictionsAsked, metadata: dict[str, str]
    ) -> Page[Prediction]:
        """List predictions, newest first.

        Filters narrow the list; `metadata.NAME=GLOB` is one. With a filter by model or metadata,
        one request looks through 2,000 predictions; follow `next_cursor` until it is null.
        """
        if len(metadata) > _MOST_GLOBS or any(
            len(glob) > _LONGEST_GLOB for glob in metadata.values()
        ):
            message = f"at most {_MOST_GLOBS} of metadata, of {_LONGEST_GLOB} characters each"
            raise Problem(422, "invalid-request", message)
        filters = msgspec.structs.asdict(query)
        filters["since"] = query.since and query.since.timestamp()
        return await self._store.predictions.page(PredictionFilter(**filters, metadata=metadata))

    @get("/v1/predictions/{id}", "as it stands", problems=["not-found"], missing=_MISSING)
    async def read(self, id: PredictionId, headers: Waiting) -> Prediction:
        """Read a prediction.

        With `Prefer: wait=30` the answer waits for the outcome, 30 seconds at most.
        """
        prediction = await self._service.read(id)
        return await self._wait(prediction, prefer_wait(headers.prefer or ""))

    @post(
        "/v1/predictions/{id}/cancel",
        {202: "it has not ended", 200: "it has ended"},
        problems=["not-found", "already-ended", "cannot-cancel", "unconfirmed", *_FROM_PROVIDER],
        missing=_MISSING,
        sends=SENT,
    )
    async def cancel(self, id: PredictionId) -> Reply[Prediction]:
        """Cancel a prediction at its provider.

        The provider's answer decides: the prediction may have succeeded meanwhile.
        """
        return reply_with(await self._service.cancel(id), None, f"../{id}")

    @post(
        "/v1/predictions/{id}/replay",
        {202: "it is pending"},
        problems=["not-found", "not-ended", "erased"],
        missing=_MISSING,
    )
    async def replay(self, id: PredictionId) -> Redelivered:
        """Redeliver a prediction's event to its handlers.

        Every handler that matches the event now runs again, including those registered since.
        """
        await self._service.read(id)
        replayed = await self._deliveries.replay(id)
        if replayed.pending is None:
            raise Problem(409, "not-ended", "the prediction has not ended: there is no event yet")
        if replayed.erased:
            raise Problem(409, "erased", "the prediction was erased: there is nothing to replay")
        return Redelivered(replayed.pending, replayed.handlers)

    @post(
        "/v1/predictions/{id}/erase",
        "nothing of its content is left",
        problems=["not-found", "not-ended", "delivery-running"],
        missing=_MISSING,
    )
    async def erase(self, id: PredictionId) -> Prediction:
        """Erase the content of a prediction; its ids, status and times stay.

        Input, metadata, outputs and callbacks are deleted for good. Only a prediction that has
        ended can be erased.
        """
        erased = await self._store.erasure.erase(id, self._runtime.clock())
        if erased in REFUSALS:
            raise Problem(*REFUSALS[erased])
        if erased == "erased":
            log.info("prediction.erased", prediction=id)
        return await self._service.read(id)

    @get(
        "/v1/predictions/{id}/explain",
        "every handler, and those that are gone",
        problems=["not-found", "invalid-request"],
        missing="no such prediction or event",
    )
    async def explain(self, id: EventName, query: ExplanationAsked) -> Explanation:
        """Explain which handlers run for an event, and why the others do not.

        A prediction that has not ended is treated as succeeded, or as ended with the status `type`.
        """
        # An event's id is made from its prediction's, and both are accepted.
        prediction_id = prediction_id_of(id)
        prediction = await self._store.predictions.get(prediction_id)
        if prediction is None:
            raise Problem(404, "not-found", "no such prediction or event")
        has_ended = prediction.status in TERMINAL
        kind = query.type or (prediction.status if has_ended else "succeeded")
        event_type = msgspec.convert(f"prediction.{kind}", EventType)
        event = Facts(
            event_type,
            prediction.provider,
            prediction.model,
            prediction.metadata,
            prediction.reply_to,
        )
        found = await self._store.deliveries.page(100, prediction=prediction_id)
        deliveries = {delivery.handler: delivery for delivery in found.data}
        breakers = await self._store.breakers.all()
        handlers = [
            msgspec.structs.replace(
                explained,
                held=breakers.get(explained.handler, BreakerState(explained.handler)).held,
                delivery=deliveries.pop(explained.handler, None),
            )
            for explained in self._deliveries.registry.explain(event)
        ]
        gone = [
            ExplainedHandler(handler=name, runs=False, reason=GONE, after=(), delivery=delivery)
            for name, delivery in deliveries.items()
        ]
        return Explanation(
            prediction=prediction_id,
            type=event_type,
            assumed=query.type is not None or not has_ended,
            handlers=[*handlers, *gone],
        )

    @get(
        "/v1/models/{provider}/{model:path}",
        "in the provider's own shape",
        problems=["no-model-details", "invalid-model", *_FROM_PROVIDER],
        missing=(422, "invalid-model", "model must be a path like owner/name"),
    )
    async def model(self, provider: ProviderName, model: ModelName) -> Any:
        """Fetch the provider's own description of a model.

        It has the JSON Schema or OpenAPI of the model's input, if the provider has one. Slashes in
        the model's name may be sent as they are, or as %2F.
        """
        return await self._service.details(provider, model)

    async def _wait(self, prediction: Prediction, seconds: float | None) -> Prediction:
        """Return a prediction when it has ended, or after `seconds`, or when we stop."""
        if seconds is None or prediction.status in TERMINAL:
            return prediction
        loop = asyncio.get_running_loop()
        until = min(loop.time() + seconds, CUT_OFF.get() - _BEFORE_CUT_OFF)
        with self._runtime.wakeups.listen("prediction", prediction.id) as news:
            while True:
                news.clear()
                found = await self._store.predictions.get(prediction.id) or prediction
                if found.status in TERMINAL or self._stopping.is_set() or loop.time() >= until:
                    return found
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        await news.wait()


def check(body: Submission) -> None:
    """Raise a Problem for a model with a line break at its end, which its pattern lets pass."""
    if body.model.endswith("\n"):
        raise Problem(422, "invalid-request", "model: it ends with a line break")


def key_of(given: str | None) -> str | None:
    """Read an Idempotency-Key, which may be quoted (RFC 8941, 3.3.3)."""
    if given is None or not given.startswith('"'):
        return given
    return re.sub(r"\\(.)", r"\1", given[1:-1])


def _not_of_plugins(key: str | None) -> str | None:
    """Return a key; raise a Problem if a plugin's route could submit by it."""
    if key is not None and key.startswith("in/"):
        message = "Idempotency-Key: keys that begin with in/ are those of plugins' routes"
        raise Problem(422, "invalid-request", message)
    return key


def caller_of(request: Request) -> str:
    """Return the name of a request's API key; empty if it has no name."""
    return request.state.key or ""


def reply_with(prediction: Prediction, waited: float | None, location: str) -> Reply[Prediction]:
    applied = {} if waited is None else {"Preference-Applied": f"wait={waited:g}"}
    return Reply(
        prediction,
        200 if prediction.status in TERMINAL else 202,
        {"Location": location, **applied},
    )
