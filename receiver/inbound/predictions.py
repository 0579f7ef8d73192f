"""`/v1/predictions`: submit, read, cancel, replay, explain; and the providers' models."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.dispatch.registry import TYPES, Explained
from receiver.errors import Problem
from receiver.inbound.answers import as_json
from receiver.inbound.guard import Guard
from receiver.inbound.reading import depth_of, one_of, page_size, prefer_wait, query
from receiver.inbound.requests import about
from receiver.inbox import Waiters
from receiver.model import TERMINAL, Mode, Prediction, Status
from receiver.store.values import Filter, Found, Replayed

_SYNC_WAIT: Final = 60.0
_LONGEST_KEY: Final = 255
_LONGEST_NAME: Final = 300
_DEEPEST: Final = 64
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
    async def predictions(self, wanted: Filter) -> Found: ...
    async def deliveries(self, limit: int, **given: str | None) -> Found: ...


class Submission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /v1/predictions`."""

    provider: str
    model: str
    input: dict[str, Any]
    metadata: dict[str, Any] = {}
    mode: Literal["queue", "sync"] = "queue"


class Predictions:
    """The routes about predictions."""

    def __init__(
        self,
        guard: Guard,
        store: Reads,
        outbound: Outbound,
        waiters: Waiters,
        *,
        replay: Callable[[str], Any],
        wake: Callable[[tuple[str, ...]], None],
        explain: Callable[[str, Prediction], list[Explained]],
    ) -> None:
        self._guard = guard
        self._store = store
        self._outbound = outbound
        self._waiters = waiters
        self._replay = replay
        self._wake = wake
        self._explain = explain
        self.stopping = False

    def routes(self) -> list[Route]:
        one = "/v1/predictions/{id}"
        route = self._guard.route
        return [
            route("/v1/predictions", GET=self.list_predictions, POST=self.submit),
            route(one, GET=self.read),
            route(one + "/cancel", POST=self.cancel),
            route(one + "/replay", POST=self.replay),
            route(one + "/explain", GET=self.explain),
            route("/v1/models/{provider}/{model:path}", GET=self.model),
        ]

    async def submit(self, request: Request) -> Response:
        body = await self._guard.body(request)
        key = request.headers.get("idempotency-key")
        if key is not None and not (0 < len(key) <= _LONGEST_KEY and key.isprintable()):
            raise Problem(422, "invalid-request", "Idempotency-Key must be 1 to 255 characters")
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
        about(request.scope, prediction=prediction.id, provider=prediction.provider)
        if wait is None and given.mode == "sync":
            wait = _SYNC_WAIT
        if wait is not None and prediction.status not in TERMINAL:
            prediction = await self._wait(prediction, wait)
        return _prediction(prediction, wait)

    async def list_predictions(self, request: Request) -> Response:
        params = query(request, "status", "provider", "limit", "cursor")
        one_of("status", params["status"], tuple(Status))
        found = await self._store.predictions(
            Filter(
                status=params["status"],
                provider=params["provider"],
                limit=page_size(params["limit"]),
                cursor=params["cursor"],
            )
        )
        return as_json(found)

    async def read(self, request: Request) -> Response:
        prediction = await self._store.prediction(request.path_params["id"])
        if prediction is None:
            raise Problem(404, "not-found", "no such prediction")
        wait = prefer_wait(request.headers)
        if wait is not None and prediction.status not in TERMINAL:
            prediction = await self._wait(prediction, wait)
        return as_json(prediction)

    async def cancel(self, request: Request) -> Response:
        prediction = await self._outbound.cancel(request.path_params["id"])
        return _prediction(prediction, None)

    async def replay(self, request: Request) -> Response:
        prediction_id = request.path_params["id"]
        if await self._store.prediction(prediction_id) is None:
            raise Problem(404, "not-found", "no such prediction")
        replayed: Replayed = await self._replay(prediction_id)
        if replayed.owed is None:
            raise Problem(409, "not-ended", "the prediction has not ended: there is no event yet")
        self._wake(replayed.handlers)
        return as_json({"owed": replayed.owed, "handlers": replayed.handlers}, 202)

    async def explain(self, request: Request) -> Response:
        """Say which handlers run for a prediction's event, or would for one of a given type."""
        given = one_of("type", query(request, "type")["type"], TYPES)
        # An event is named after its prediction, and either name will do.
        name = request.path_params["id"]
        prediction_id = f"pred_{name[4:]}" if name.startswith("evt_") else name
        prediction = await self._store.prediction(prediction_id)
        if prediction is None:
            raise Problem(404, "not-found", "no such prediction or event")
        has_ended = prediction.status in TERMINAL
        kind = given or (prediction.status if has_ended else "succeeded")
        found = await self._store.deliveries(100, prediction=prediction_id)
        deliveries = {delivery.handler: delivery for delivery in found.data}
        handlers = [
            {**asdict(explained), "delivery": deliveries.pop(explained.handler, None)}
            for explained in self._explain(f"prediction.{kind}", prediction)
        ]
        gone = [
            {"handler": name, "runs": False, "reason": GONE, "after": (), "delivery": delivery}
            for name, delivery in deliveries.items()
        ]
        return as_json(
            {
                "prediction": prediction_id,
                "type": f"prediction.{kind}",
                "assumed": given is not None or not has_ended,
                "handlers": [*handlers, *gone],
            }
        )

    async def model(self, request: Request) -> Response:
        path = request.path_params
        return as_json(await self._outbound.details(path["provider"], path["model"]))

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


def _submission(body: bytes) -> Submission:
    try:
        given = msgspec.json.decode(body, type=Submission)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid-request", str(error)) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Problem(400, "invalid-json", "the body is not JSON") from error
    if not 0 < len(given.model) <= _LONGEST_NAME or not given.model.isprintable():
        raise Problem(422, "invalid-request", "model must be 1 to 300 printable characters")
    if depth_of(given.input) > _DEEPEST or depth_of(given.metadata) > _DEEPEST:
        raise Problem(422, "invalid-request", f"input and metadata nest at most {_DEEPEST} deep")
    return given


def _prediction(prediction: Prediction, waited: float | None) -> Response:
    response = as_json(prediction, 200 if prediction.status in TERMINAL else 202)
    response.headers["Location"] = f"/v1/predictions/{prediction.id}"
    if waited is not None:
        response.headers["Preference-Applied"] = f"wait={waited:g}"
    return response
