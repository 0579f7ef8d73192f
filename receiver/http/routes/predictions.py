"""`/v1/predictions`: submit, read, cancel, replay, erase, explain; and the providers' models."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.deliveries.registry import Explained
from receiver.http.auth import Guard
from receiver.http.body import depth_of, named, one_of, parameters, prefer_wait, wishes
from receiver.http.declare import (
    UNREADABLE,
    Answer,
    Content,
    Endpoint,
    EventName,
    ModelName,
    PageSize,
    PredictionId,
    ProviderName,
)
from receiver.http.problems import as_json
from receiver.http.request_log import about
from receiver.model.errors import Problem
from receiver.model.states import TERMINAL
from receiver.model.values import EventType, Mode, Output, Prediction, Status
from receiver.observability.tracing import OFF, Span, Tracing
from receiver.predictions.inbox import Waiters
from receiver.providers import NAMES
from receiver.store.erasure import Erased
from receiver.store.handlers import BreakerState
from receiver.store.values import Delivery, Page, PredictionFilter, ReplayResult

_SYNC_WAIT: Final = 60.0
_DEEPEST: Final = 64
_LARGEST_METADATA: Final = 256 * 1024
"""Bytes of JSON: lists and streams read it of many predictions at once."""
REFUSALS: Final[dict[Erased, tuple[int, str, str]]] = {
    "missing": (404, "not-found", "no such prediction"),
    "living": (409, "not-ended", "the prediction has not ended: cancel it first, or wait"),
    "running": (
        409,
        "delivery-running",
        "a handler is at work on the prediction: erase it when that has ended",
    ),
}
GONE: Final = "no such handler is registered here any more"


class Outbound(Protocol):
    """What the API needs of outbound."""

    async def submit(
        self,
        provider: str,
        model: str,
        input: dict[str, Any],
        *,
        metadata: dict[str, Any] | None = None,
        mode: Mode = "queue",
        idempotency_key: str | None = None,
    ) -> Prediction: ...
    async def cancel(self, prediction_id: str) -> Prediction: ...
    async def details(self, provider: str, model: str) -> Any: ...


class Reads(Protocol):
    """What these routes need of the store."""

    async def prediction(self, prediction_id: str) -> Prediction | None: ...
    async def predictions(self, wanted: PredictionFilter) -> Page[Prediction]: ...
    async def deliveries(self, limit: int, **given: str | None) -> Page[Delivery]: ...


class Submission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to submit. Model and input go to the provider as they are."""

    provider: ProviderName
    model: ModelName
    input: dict[str, Any]
    """As the provider describes it, at most 64 deep."""
    metadata: dict[str, Any] = {}
    """Yours, up to 256 KiB: it is kept, handlers can match on it, the provider never sees it."""
    mode: Mode = "queue"
    """`sync`: by the provider's blocking endpoint."""


class Waiting(msgspec.Struct, frozen=True, rename="pascal"):
    """What a caller may wish of an answer."""

    prefer: Annotated[str, msgspec.Meta(examples=["wait=5"])] | None = None
    """`wait=N`: wait for the outcome, for 1 to 60 seconds. Anything else is ignored (RFC 7240)."""


class Submitting(Waiting, frozen=True, rename={"prefer": "Prefer", "key": "Idempotency-Key"}):
    """What a caller may wish of a submit."""

    key: (
        Annotated[
            str,
            msgspec.Meta(pattern="^[!-~]([ -~]{0,253}[!-~])?$", examples=["order-42"]),
        ]
        | None
    ) = None
    """A repeat with the same key is answered with the same prediction, and sends nothing."""


class PredictionsAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which predictions to list."""

    status: Status | None = None
    provider: ProviderName | None = None
    limit: PageSize = 50
    cursor: PredictionId | None = None
    """The `next_cursor` of the page before."""


class ExplanationAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to explain."""

    type: Literal["succeeded", "failed", "canceled"] | None = None
    """As if the prediction had ended so."""


class ExplainedHandler(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of an event at one handler."""

    handler: str
    runs: bool
    reason: str | None
    """Why it does not run."""
    after: tuple[str, ...]
    """The handlers it waits for."""
    held: Literal["paused", "open"] | None = None
    """Why its deliveries wait now: by hand, or after a run of failures."""
    delivery: Delivery | None
    """What came of it, where the event is owed to it."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Which handlers run for an event, and why the others do not."""

    prediction: str
    type: EventType
    assumed: bool
    """The prediction has not ended so: this is what would be."""
    handlers: list[ExplainedHandler]


class OwedAgain(msgspec.Struct, frozen=True):
    """What a replay owes."""

    owed: int
    """How many deliveries."""
    handlers: tuple[str, ...]


class Predictions:
    """The routes about predictions."""

    def __init__(
        self,
        guard: Guard,
        store: Reads,
        outbound: Outbound,
        waiters: Waiters,
        *,
        replay: Callable[[str], Awaitable[ReplayResult]],
        wake: Callable[[tuple[str, ...]], None],
        explain: Callable[[str, Prediction], list[Explained]],
        erase: Callable[[str], Awaitable[Erased]],
        gates: Callable[[], Awaitable[Mapping[str, BreakerState]]],
        tracing: Tracing = OFF,
    ) -> None:
        self._tracing = tracing
        self._guard = guard
        self._store = store
        self._outbound = outbound
        self._waiters = waiters
        self._replay = replay
        self._wake = wake
        self._explain = explain
        self._gates = gates
        self._erase = erase
        self.stopping = False

    def routes(self) -> list[Route]:
        one = "/v1/predictions/{id}"
        route = self._guard.route
        return [
            route("/v1/predictions", GET=self.list_predictions, POST=self.submit),
            route(one, GET=self.read),
            route(one + "/cancel", POST=self.cancel),
            route(one + "/replay", POST=self.replay),
            route(one + "/erase", POST=self.erase),
            route(one + "/explain", GET=self.explain),
            route("/v1/models/{provider}/{model:path}", GET=self.model),
        ]

    async def submit(self, request: Request) -> Response:
        with self._tracing.request(request, "/v1/predictions") as span:
            response = await self._submit(request, span)
            span.answered(response.status_code)
            return response

    async def _submit(self, request: Request, span: Span) -> Response:
        body = await self._guard.body(request)
        key = wishes(request, Submitting).key
        wait = prefer_wait(request.headers)
        given = _submission(body)
        prediction = await self._outbound.submit(
            given.provider,
            given.model,
            given.input,
            metadata=given.metadata,
            mode=given.mode,
            idempotency_key=key,
        )
        span.note(prediction=prediction.id)
        about(request.scope, prediction=prediction.id, provider=prediction.provider, **span.ids)
        if wait is None and given.mode == "sync":
            wait = _SYNC_WAIT
        if wait is not None and prediction.status not in TERMINAL:
            prediction = await self._wait(prediction, wait)
        return _prediction(prediction, wait)

    async def list_predictions(self, request: Request) -> Response:
        asked = parameters(request, PredictionsAsked)
        one_of("provider", asked.provider, NAMES)
        return as_json(
            await self._store.predictions(PredictionFilter(**msgspec.structs.asdict(asked)))
        )

    async def read(self, request: Request) -> Response:
        prediction = await self._prediction(_id(request))
        wait = prefer_wait(request.headers)
        if wait is not None and prediction.status not in TERMINAL:
            prediction = await self._wait(prediction, wait)
        return as_json(prediction)

    async def cancel(self, request: Request) -> Response:
        prediction = await self._outbound.cancel(_id(request))
        return _prediction(prediction, None)

    async def replay(self, request: Request) -> Response:
        prediction_id = _id(request)
        await self._prediction(prediction_id)
        replayed = await self._replay(prediction_id)
        if replayed.owed is None:
            raise Problem(409, "not-ended", "the prediction has not ended: there is no event yet")
        if replayed.erased:
            raise Problem(409, "erased", "the prediction was erased: there is nothing to replay")
        self._wake(replayed.handlers)
        return as_json(OwedAgain(replayed.owed, replayed.handlers), 202)

    async def erase(self, request: Request) -> Response:
        """Erase a prediction's content; its names, status and times stay."""
        missing = Problem(*REFUSALS["missing"])
        prediction_id = named(request, "id", PredictionId, missing)
        refusal = REFUSALS.get(await self._erase(prediction_id))
        if refusal is not None:
            raise Problem(*refusal)
        prediction = await self._store.prediction(prediction_id)
        if prediction is None:  # its time was over just now
            raise missing
        return as_json(prediction)

    async def explain(self, request: Request) -> Response:
        """Say which handlers run for a prediction's event, or would for one of a given type."""
        given = parameters(request, ExplanationAsked).type
        missing = Problem(404, "not-found", "no such prediction or event")
        # An event is named after its prediction, and either name will do.
        name = named(request, "id", EventName, missing)
        prediction_id = f"pred_{name.partition('_')[2]}"
        prediction = await self._store.prediction(prediction_id)
        if prediction is None:
            raise missing
        has_ended = prediction.status in TERMINAL
        kind = given or (prediction.status if has_ended else "succeeded")
        event_type = msgspec.convert(f"prediction.{kind}", EventType)
        found = await self._store.deliveries(100, prediction=prediction_id)
        deliveries = {delivery.handler: delivery for delivery in found.data}
        gates = await self._gates()
        handlers = [
            ExplainedHandler(
                **asdict(explained),
                held=gates.get(explained.handler, BreakerState(explained.handler)).held,
                delivery=deliveries.pop(explained.handler, None),
            )
            for explained in self._explain(event_type, prediction)
        ]
        gone = [
            ExplainedHandler(handler=name, runs=False, reason=GONE, after=(), delivery=delivery)
            for name, delivery in deliveries.items()
        ]
        return as_json(
            Explanation(
                prediction=prediction_id,
                type=event_type,
                assumed=given is not None or not has_ended,
                handlers=[*handlers, *gone],
            )
        )

    async def model(self, request: Request) -> Response:
        unfit = Problem(422, "invalid-model", "model must be a path like owner/name")
        model = named(request, "model", ModelName, unfit)
        return as_json(await self._outbound.details(request.path_params["provider"], model))

    async def _prediction(self, prediction_id: str) -> Prediction:
        prediction = await self._store.prediction(prediction_id)
        if prediction is None:
            raise Problem(404, "not-found", "no such prediction")
        return prediction

    async def _wait(self, prediction: Prediction, seconds: float) -> Prediction:
        """Wait for the end of a prediction, as long as the caller said, or until we stop."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        with self._waiters.watch(prediction.id) as news:
            while True:
                news.clear()
                found = await self._store.prediction(prediction.id) or prediction
                if found.status in TERMINAL or self.stopping or loop.time() >= until:
                    return found
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        await news.wait()


def _id(request: Request) -> str:
    return named(request, "id", PredictionId, Problem(404, "not-found", "no such prediction"))


def _submission(body: bytes) -> Submission:
    try:
        given = msgspec.json.decode(body, type=Submission)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid-request", str(error)) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Problem(400, "invalid-json", "the body is not JSON") from error
    if depth_of(given.input) > _DEEPEST or depth_of(given.metadata) > _DEEPEST:
        raise Problem(422, "invalid-request", f"input and metadata nest at most {_DEEPEST} deep")
    if len(msgspec.json.encode(given.metadata)) > _LARGEST_METADATA:
        raise Problem(422, "invalid-request", f"metadata has at most {_LARGEST_METADATA} bytes")
    if given.model.endswith("\n"):
        raise Problem(422, "invalid-request", "model: it ends with a line break")
    return given


def _prediction(prediction: Prediction, waited: float | None) -> Response:
    response = as_json(prediction, 200 if prediction.status in TERMINAL else 202)
    response.headers["Location"] = f"/v1/predictions/{prediction.id}"
    if waited is not None:
        response.headers["Preference-Applied"] = f"wait={waited:g}"
    return response


_SUBMITTED: Final = Prediction(
    id="pred_0199f3a6d2c1e45b7f1c9d3e8a260f4b",
    provider="fal",
    model="fal-ai/nano-banana",
    status=Status.PROCESSING,
    mode="queue",
    input={"prompt": "a lighthouse"},
    metadata={"channel": "#art"},
    provider_id="3f6cbd1e-7a92-4a52-9d9b-1c1f7a8e2b90",
    created_at=datetime(2026, 1, 31, 12, tzinfo=UTC),
    submitted_at=datetime(2026, 1, 31, 12, 0, 0, 200000, UTC),
)
EXAMPLE: Final = msgspec.structs.replace(
    _SUBMITTED,
    status=Status.SUCCEEDED,
    output=[Output(url="https://v3.fal.media/files/a.png", content_type="image/png")],
    channel="webhook",
    completed_at=datetime(2026, 1, 31, 12, 0, 3, 500000, UTC),
)
_ONE: Final = {"id": PredictionId}
_LIVES: Final = Answer(
    202,
    "it has not ended",
    Content(Prediction, _SUBMITTED),
    ("Location", "Preference-Applied"),
    ("getPredictionsId", "postPredictionsIdCancel"),
)
_ENDED: Final = Answer(
    200,
    "it has ended",
    Content(Prediction, EXAMPLE),
    _LIVES.headers,
    ("getPredictionsId", "postPredictionsIdReplay", "getPredictionsIdExplain"),
)
_ASKED: Final = ("unknown-provider", "provider-off", "provider-busy", "provider-unavailable")
OPERATIONS: Final = (
    Endpoint(
        "POST",
        "/v1/predictions",
        "Submit a prediction",
        (_LIVES, _ENDED),
        (
            *UNREADABLE,
            "unknown-provider",
            "provider-off",
            "invalid-model",
            "unsupported-input",
            "idempotency-conflict",
            "erased",
        ),
        "It is stored before anything is sent. Its outcome comes to your handlers, and to whoever "
        "asks.",
        headers=Submitting,
        body=(
            Content(
                Submission,
                Submission(
                    provider="fal",
                    model="fal-ai/nano-banana",
                    input={"prompt": "a lighthouse"},
                    metadata={"channel": "#art"},
                ),
            ),
        ),
    ),
    Endpoint(
        "GET",
        "/v1/predictions",
        "List predictions, newest first",
        (
            Answer(
                200,
                "a page of predictions",
                Content(Page[Prediction], Page(data=[EXAMPLE], next_cursor=None)),
            ),
        ),
        ("invalid-request",),
        query=PredictionsAsked,
    ),
    Endpoint(
        "GET",
        "/v1/predictions/{id}",
        "Read a prediction",
        (Answer(200, "as it stands", Content(Prediction, EXAMPLE)),),
        ("not-found",),
        names=_ONE,
        headers=Waiting,
    ),
    Endpoint(
        "POST",
        "/v1/predictions/{id}/cancel",
        "Cancel a prediction at its provider",
        (_LIVES, _ENDED),
        ("not-found", "already-ended", "unconfirmed", *_ASKED),
        "What the provider says then is what counts: it may have succeeded meanwhile.",
        names=_ONE,
    ),
    Endpoint(
        "POST",
        "/v1/predictions/{id}/replay",
        "Owe a prediction's event to its handlers again",
        (Answer(202, "it is owed", Content(OwedAgain, OwedAgain(2, ("save", "slack")))),),
        ("not-found", "not-ended", "erased"),
        names=_ONE,
    ),
    Endpoint(
        "POST",
        "/v1/predictions/{id}/erase",
        "Erase what a prediction was about; its ids, status and times stay",
        (Answer(200, "nothing of its content is left", Content(Prediction)),),
        ("not-found", "not-ended", "delivery-running"),
        names={"id": PredictionId},
    ),
    Endpoint(
        "GET",
        "/v1/predictions/{id}/explain",
        "Say which handlers run for an event, and why the others do not",
        (
            Answer(
                200,
                "every handler, and those that are gone",
                Content(
                    Explanation,
                    Explanation(
                        prediction=EXAMPLE.id,
                        type="prediction.succeeded",
                        assumed=True,
                        handlers=[
                            ExplainedHandler(
                                handler="slack",
                                runs=True,
                                reason=None,
                                after=("save",),
                                delivery=None,
                            )
                        ],
                    ),
                ),
            ),
        ),
        ("not-found", "invalid-request"),
        "For a prediction that lives: as if it had succeeded, or ended as `type` says.",
        names={"id": EventName},
        query=ExplanationAsked,
    ),
    Endpoint(
        "GET",
        "/v1/models/{provider}/{model}",
        "Fetch the provider's own description of a model",
        (Answer(200, "in the provider's own shape", Content(Any, {"id": "nano-banana"})),),
        ("no-model-details", "invalid-model", *_ASKED),
        "Only Oxen.ai has one. Slashes in the model's name may be sent as they are, or as %2F.",
        names={"provider": ProviderName, "model": ModelName},
    ),
)
